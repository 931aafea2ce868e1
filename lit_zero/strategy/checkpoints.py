"""Lightning's checkpoint calls, answered from shards.

Lightning asks for the module's and the optimizers' state dicts, adds the rest, and hands everything back to be written;
on loading the other way round. In the full format the state dicts are gathered to rank 0. In the sharded format they
stay where they are, and every rank writes its own pieces when the rest comes back.

[Note: weights wait for setup] Lightning restores weights before ``setup``, when there is no engine yet and a module may
lie on the meta device. They are kept (as an open file, nothing is read) until the engine exists, and each rank then
reads only its part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lit_zero.checkpoint import full, sharded
from lit_zero.checkpoint.parts import OptimizerParts
from lit_zero.checkpoint.policy import Checkpoint
from lit_zero.comm.world import World
from lit_zero.core.errors import CheckpointError, LitZeroError
from lit_zero.zero.engine import Engine
from lit_zero.zero.policy import Placement

_OPTIMIZERS, _WEIGHTS = "optimizer_states", "state_dict"


class Checkpoints:
    """Reads and writes checkpoints of one module.

    Args:
        policy: the user's choice of format for writing; both are read.
        module: the LightningModule.
    """

    def __init__(self, policy: Checkpoint, module: nn.Module) -> None:
        self._policy, self._module = policy, module
        self._engine: Engine | None = None
        self._opened: sharded.ShardedCheckpoint | None = None
        self._path: Any = None
        self._waiting: tuple[Mapping[str, Any], bool] | None = None
        self._guarded = True

    def attach(self, engine: Engine) -> None:
        """Work on ``engine`` from now on, and give it the weights that have been waiting for it."""
        if self._engine is None:
            self._guard()
        self._engine = engine
        if self._waiting is not None:
            (checkpoint, strict), self._waiting = self._waiting, None
            self.load_weights(checkpoint, strict)

    @property
    def engine(self) -> Engine:
        """The engine; it exists from ``setup`` on."""
        if self._engine is None:
            raise LitZeroError("The strategy has not been set up: call trainer.fit, validate, test or predict first.")
        return self._engine

    # ---- writing

    def weights(self, whole: bool = False) -> dict[str, Any]:
        """Return the module's state dict: whole on rank 0 in the full format, without the sharded parameters in the
        sharded one.

        Args:
            whole: on rank 0 in either format.
        """
        engine = self.engine
        with self._unguarded():
            template = self._module.state_dict()
        managed = {piece.name for piece in engine.parameter_pieces()}
        if self._policy.format == "sharded" and not whole:
            return {name: value for name, value in template.items() if engine.aliases.get(name, name) not in managed}
        world = World()
        values = full.collect(engine.parameter_pieces(), world)
        if world.rank != 0:
            return {}
        return {name: values.get(engine.aliases.get(name, name), value) for name, value in template.items()}

    def optimizer(self, number: int) -> dict[str, Any]:
        """Return optimizer ``number``'s state dict as torch saves it: on rank 0 in the full format, empty in the
        sharded one.
        """
        if self._policy.format == "sharded":
            return {}
        return full.collect_optimizer(self._parts(number), World())

    def save(self, checkpoint: dict[str, Any], path: Any) -> None:
        """Write what Lightning has put together."""
        if self._policy.format == "full":
            full.save(checkpoint, path, World())
            return
        engine = self.engine
        extras = {key: value for key, value in checkpoint.items() if key not in (_WEIGHTS, _OPTIMIZERS)}
        numbers = range(len(engine.bindings)) if _OPTIMIZERS in checkpoint else []
        sharded.save(
            path,
            weights=engine.parameter_pieces(),
            others=checkpoint.get(_WEIGHTS, {}),
            aliases=engine.aliases,
            optimizers=[self._parts(number) for number in numbers],
            extras=extras,
            world=World(),
        )

    # ---- reading

    def load(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        """Open a checkpoint of either format and return what Lightning wants of it."""
        self._path, self._opened = path, None
        if not sharded.is_sharded(path):
            return full.load(path, weights_only)
        self._opened = sharded.ShardedCheckpoint(path, World(), weights_only)
        found = {**self._opened.extras(), _WEIGHTS: {}}
        if self._opened.header.optimizers:
            found[_OPTIMIZERS] = [{}] * len(self._opened.header.optimizers)
        return found

    def load_weights(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        """Read the parameters and buffers, now or when the engine exists."""
        if self._engine is None:
            self._waiting = (checkpoint, strict)
            return
        engine = self._engine
        with self._unguarded():
            template = self._module.state_dict()
        pieces = engine.parameter_pieces(whole_if_replicated=True)
        managed = {piece.name for piece in pieces}
        others = [name for name in template if engine.aliases.get(name, name) not in managed]
        if self._opened is not None:
            rest = self._opened.load_weights(pieces, others=others, aliases=engine.aliases, strict=strict)
        else:
            rest = full.load_into(
                pieces,
                checkpoint[_WEIGHTS],
                others=others,
                aliases=engine.aliases,
                strict=strict,
                where=self._path or _WEIGHTS,
            )
        with self._unguarded():
            self._module.load_state_dict(rest, strict=False)
        engine.refresh()

    def load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        """Read every optimizer's state and hyper-parameters.

        Raises:
            CheckpointError: if the checkpoint holds another number of optimizers, or other parameter groups.
        """
        saved, mine = len(checkpoint[_OPTIMIZERS]), len(self.engine.bindings)
        if saved != mine:
            raise CheckpointError(
                f"The checkpoint '{self._path}' holds {saved} optimizers, configure_optimizers returned {mine}."
            )
        for number in range(mine):
            binding = self.engine.bindings[number]
            self._refuse_another_optimizer(number, checkpoint[_OPTIMIZERS][number])
            described = self._described(number, checkpoint[_OPTIMIZERS][number])
            binding.prepare_states(described)
            parts = OptimizerParts(
                self.engine.optimizer_pieces(number, described, whole_if_replicated=True), binding.groups()
            )
            if self._opened is not None:
                groups = self._opened.load_optimizer(number, parts)
            else:
                groups = full.load_optimizer_into(
                    parts, checkpoint[_OPTIMIZERS][number], where=self._path or _OPTIMIZERS
                )
            binding.load_groups(groups)

    def _refuse_another_optimizer(self, number: int, saved: Mapping[str, Any]) -> None:
        """Check that the checkpoint has every number that the optimizer is steered by. Flags may be missing: torch has
        added some over time.
        """
        groups = saved.get("param_groups", []) if self._opened is None else self._opened.param_groups(number)
        optimizer = self.engine.bindings[number].optimizer
        wanted = {key for key, value in optimizer.defaults.items() if value is not None and not isinstance(value, bool)}
        missing = sorted(wanted.difference(*groups)) if groups else []
        if missing:
            raise CheckpointError(
                f"The checkpoint '{self._path}' is of another optimizer than {type(optimizer).__name__}: it lacks "
                f"{', '.join(missing)}. Use the optimizer that wrote the checkpoint, or load only its weights."
            )

    def _described(self, number: int, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``{parameter: ({tensor key: dtype}, {scalar key: value})}`` of what a checkpoint holds."""
        if self._opened is not None:
            scalars, opened = self._opened.scalars(number), self._opened
            return {
                name: ({key: opened.state_dtype(number, name, key) for key in keys}, scalars[name])
                for name, keys in opened.optimizer_keys(number).items()
                if keys or scalars[name]
            }
        binding = self.engine.bindings[number]
        if "state" not in saved:
            raise CheckpointError(
                f"The checkpoint '{self._path}' holds no state of optimizer {number}; load only its weights."
            )
        names = dict(enumerate(name for group in binding.group_names for name in group))
        shapes = {piece.name: piece.shape for piece in self.engine.parameter_pieces()}
        described = {}
        for index, state in saved["state"].items():
            name = names.get(index)
            if name in shapes and state:
                tensors = {
                    key: value.dtype
                    for key, value in state.items()
                    if isinstance(value, torch.Tensor) and key != "step" and tuple(value.shape) == tuple(shapes[name])
                }
                described[name] = (tensors, {key: value for key, value in state.items() if key not in tensors})
        return described

    def _parts(self, number: int) -> OptimizerParts:
        described = self.engine.describe_states(number, World().all_gather_object)
        return OptimizerParts(self.engine.optimizer_pieces(number, described), self.engine.bindings[number].groups())

    # ---- the module's own state_dict

    def _guard(self) -> None:
        """Stand before the module's own ``state_dict`` and ``load_state_dict``: they see the parameters' memory, not
        the masters.
        """

        def check(module: nn.Module, *_: Any) -> None:
            engine = self._engine
            if not self._guarded or engine is None or Engine.of(self._module) is not engine:
                return
            if engine.row.parameter is Placement.SHARD or any(lane.lowered for lane in engine.lanes):
                raise LitZeroError(
                    f"{type(module).__name__}.state_dict() and load_state_dict() would see released or 2-byte "
                    "parameters under this strategy. Save with trainer.save_checkpoint(path), get the weights with "
                    "trainer.strategy.lightning_module_state_dict() on all ranks, and load weights before setup (in "
                    "__init__ or configure_model) or through ckpt_path."
                )
            engine.wait_for_parameters()  # on their way since the last step: the other ranks need not be here

        for module in self._module.modules():
            if any(True for _ in module.parameters()):
                module.register_state_dict_pre_hook(check)
                module.register_load_state_dict_pre_hook(check)

    @contextlib.contextmanager
    def _unguarded(self) -> Iterator[None]:
        self._guarded = False
        try:
            yield
        finally:
            self._guarded = True
