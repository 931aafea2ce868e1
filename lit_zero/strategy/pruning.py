"""``ModelPruning`` on shards, see ``overlay``.

torch prunes by giving the module a mask beside each parameter and multiplying the two in every forward. Parameters are
views of flat buffers here, so the masters themselves are multiplied by the mask, right after each step: forward,
backward and update of what is left are the same numbers, since an element-wise optimizer moves each element for itself.
Gradients are masked too, before they are clipped, so that their norm is that of what is left.

Which elements go is decided by torch's own pruning functions, on rank 0 and on the whole parameters (in host memory, as
when a full checkpoint is saved), each time something is pruned. The mask costs one byte per element of a master.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.hooks import RemovableHandle

from lit_zero.checkpoint.full import collect
from lit_zero.checkpoint.together import on_zero
from lit_zero.comm.world import World
from lit_zero.core.errors import UnsupportedError
from lit_zero.core.piece import Piece
from lit_zero.strategy.overlay import OnShards
from lit_zero.zero.engine import Engine
from lit_zero.zero.rewriting import rewriting


class PruningOnShards(OnShards):
    """``ModelPruning``. Attributes and what is called through ``super()`` are Lightning's."""

    stock = "ModelPruning"
    replaced = ("apply_pruning", "apply_lottery_ticket_hypothesis", "on_save_checkpoint")
    _parameters_to_prune: Any
    _parameter_names: Any
    _make_pruning_permanent: bool
    _resample_parameters: bool
    _use_lottery_ticket_hypothesis: Any

    def begin(self, trainer: Any, pl_module: Any) -> None:
        self._whole: dict[str, torch.Tensor] = {}  # the masks of all parameters, on rank 0
        self._masks: dict[Any, torch.Tensor] = {}  # by lane, as long as its master
        if self._fitting and not self._make_pruning_permanent:
            raise UnsupportedError(
                "ModelPruning(make_pruning_permanent=False) wants checkpoints with masks beside the unpruned weights. "
                "ZeroStrategy keeps only the pruned ones. Leave it at True, or use strategy='ddp'."
            )
        if self._fitting and self._resample_parameters:
            raise UnsupportedError(
                "ModelPruning(resample_parameters=True) draws whole modules anew, which ZeroStrategy does not hold. "
                "Leave it at False, or use strategy='ddp'."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._engine: Engine = trainer.strategy.engine
        found = self.sanitize_parameters_to_prune(  # type: ignore[attr-defined]
            pl_module, self._parameters_to_prune, parameter_names=self._parameter_names
        )
        self._parameters_to_prune = self.filter_parameters_to_prune(found)  # type: ignore[attr-defined]
        self._names = self._names_of(pl_module)
        pieces = self._pieces() if self._use_lottery_ticket_hypothesis else []
        self._initial = [piece.read().clone() for piece in pieces]
        self._handles = [self._before_others(binding.optimizer) for binding in self._engine.bindings]
        super().on_fit_start(trainer, pl_module)  # type: ignore[misc]

    def _names_of(self, module: nn.Module) -> list[str]:
        """Return the names of the parameters to prune, in order."""
        names_of = {id(param): name for name, param in module.named_parameters()}
        names = [names_of[id(getattr(owner, name))] for owner, name in self._parameters_to_prune]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UnsupportedError(
                f"ModelPruning would prune {twice[0]!r} twice: two modules share it. Name one of them in "
                "ModelPruning(parameters_to_prune=...)."
            )
        return names

    def _pieces(self) -> list[Piece]:
        """Return what this rank's masters hold of the parameters to prune."""
        wanted = set(self._names)
        return [piece for piece in self._engine.parameter_pieces(to_load=True) if piece.name in wanted]

    def _before_others(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Mask the masters after each step, before the engine sends them to other ranks."""
        handle = optimizer.register_step_post_hook(lambda *_: self._mask_masters())
        optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
        return handle

    # ---- pruning

    def apply_pruning(self, amount: float) -> None:
        """Choose with torch's functions on rank 0, and mask on every rank."""
        world, wanted = World(), set(self._names)
        whole = collect([piece for piece in self._engine.parameter_pieces() if piece.name in wanted], world)
        on_zero(world, "Pruning", lambda: self._choose(whole, amount))
        places = {part.entry.name: (lane, part) for lane in self._engine.lanes for part in lane.master_overlaps()}
        for name in self._names:
            mask = world.broadcast_object(self._whole.get(name))
            if name not in places:  # on another stage of the pipeline
                continue
            lane, part = places[name]
            if lane not in self._masks:
                place = "cpu" if lane.keeper.away else lane.device
                self._masks[lane] = torch.ones(lane.master.numel, dtype=torch.bool, device=place)
            own = mask.view(-1)[part.start : part.start + part.length]
            self._masks[lane][part.local : part.local + part.length] = own.to(self._masks[lane].device)
        with rewriting(self._engine, whole=True):
            self._mask_masters()

    def _choose(self, whole: dict[str, torch.Tensor], amount: float) -> None:
        """Prune whole parameters in stand-ins for their modules, and keep the masks."""
        stand_ins = []
        for (owner, attribute), name in zip(self._parameters_to_prune, self._names, strict=True):
            stand_in = _StandIn(repr(owner))
            stand_in.register_parameter(attribute, nn.Parameter(whole[name]))
            if name in self._whole:
                prune.custom_from_mask(stand_in, attribute, self._whole[name])
            stand_ins.append((stand_in, attribute))
        owners, self._parameters_to_prune = self._parameters_to_prune, stand_ins
        try:
            super().apply_pruning(amount)  # type: ignore[misc]
        finally:
            self._parameters_to_prune = owners
        for (stand_in, attribute), name in zip(stand_ins, self._names, strict=True):
            self._whole[name] = getattr(stand_in, f"{attribute}_mask").bool()

    def _mask_masters(self) -> None:
        self._engine.join()
        with torch.no_grad():
            for lane, mask in self._masks.items():
                masked = lane.master.read().mul_(mask)
                if not lane.master.live:
                    lane.master.write(0, masked)
                if lane.keeper.walks:  # else the engine does it after a step
                    lane.publish()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Mask the gradients, before they are clipped."""
        for binding in self._engine.bindings:
            for segment in binding.segments:
                mask, grad = self._masks.get(segment.lane), segment.param.grad
                if mask is not None and grad is not None:
                    grad.mul_(mask[segment.first : segment.last].view_as(grad))
        super().on_before_optimizer_step(trainer, pl_module, optimizer)  # type: ignore[misc]

    def apply_lottery_ticket_hypothesis(self) -> None:
        """Reset what is left to its initial values."""
        with rewriting(self._engine, whole=True):
            for piece, initial in zip(self._pieces(), self._initial, strict=True):
                piece.write(initial)
            self._mask_masters()

    # ---- checkpoints

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add nothing: the weights in it are the pruned ones."""

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._fitting and self._use_lottery_ticket_hypothesis:
            raise UnsupportedError(
                "ModelPruning(use_lottery_ticket_hypothesis=...) resets weights to their initial values, which a "
                "checkpoint does not hold. Resume with use_lottery_ticket_hypothesis=False."
            )
        super().on_load_checkpoint(trainer, pl_module, checkpoint)  # type: ignore[misc]

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the optimizers."""
        for handle in getattr(self, "_handles", ()):
            handle.remove()
        super().teardown(trainer, pl_module, stage)  # type: ignore[misc]


class _StandIn(nn.Module):
    """Holds a parameter in place of the module that it belongs to.

    Args:
        title: the module in words, for what is logged.
    """

    def __init__(self, title: str) -> None:
        super().__init__()
        self._title = title

    def __repr__(self) -> str:
        return self._title
