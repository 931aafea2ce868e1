"""``WeightAveraging``, ``EMAWeightAveraging`` and ``StochasticWeightAveraging`` on shards, see ``overlay``.

Where Lightning copies the whole module, the average here is a copy of this rank's part of the masters: ``P/N`` elements
per rank, in every stage. torch's and Lightning's own code averages it.

[Note: averages wait for the engine] Lightning makes the average in ``setup`` and fills it from a checkpoint before
there is an engine. Here both happen in ``on_fit_start``, the first hook after the engine exists; the checkpoint waits
until then, unread. The weights in its ``state_dict`` are the averages, so a copy of what was loaded is the average
already, and what remains to be loaded are the weights that training goes on with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lit_zero.checkpoint.weights import ShardedWeights
from lit_zero.core.errors import UnsupportedError
from lit_zero.core.piece import Piece
from lit_zero.strategy.flavour import rank_zero_warn
from lit_zero.strategy.overlay import OnShards
from lit_zero.zero.rewriting import rewriting


class Live:
    """This rank's part of the weights that are being trained, as torch and Lightning see a model to average.

    Args:
        strategy: the ZeroStrategy; its engine exists.
        module: the LightningModule.
    """

    def __init__(self, strategy: Any, module: nn.Module) -> None:
        self.engine, self.checkpoints, self._module = strategy.engine, strategy.checkpoints, module
        self._stages = strategy.stages
        self._pieces: list[Piece] = self.engine.parameter_pieces()

    def parameters(self) -> Iterator[torch.Tensor]:
        """Yield this rank's part of every parameter's master, flat; a copy of what does not lie in memory."""
        self.engine.join()
        return (piece.read() for piece in self._pieces)

    def pieces(self) -> list[Piece]:
        """Return this rank's part of every parameter's master, and then the buffers, to be read and written."""
        self.engine.join()
        buffers = [Piece("", tuple(buffer.shape), 0, buffer) for buffer in self.buffers()]
        return [*self._pieces, *buffers]

    def buffers(self) -> Iterator[torch.Tensor]:
        """Yield the module's buffers, whole."""
        return self._module.buffers()

    def as_module(self) -> nn.Module:
        """Return a module that holds these very tensors, for torch to copy."""
        found = nn.Module()
        found.parts = nn.ParameterList([nn.Parameter(part, requires_grad=False) for part in self.parameters()])
        for number, buffer in enumerate(self.buffers()):
            found.register_buffer(f"buffer{number}", buffer)
        return found

    def pieces_of(self, copy: nn.Module) -> list[Piece]:
        """Return the parameters of a copy of :meth:`as_module` as pieces of the module's."""
        held = zip(self._pieces, copy.parameters(), strict=True)
        return [replace(piece, data=part.detach()) for piece, part in held]

    def state_dict_of(self, copy: nn.Module) -> dict[str, Any]:
        """Return a copy of :meth:`as_module` as a state dict of the module. All ranks must call this."""
        copied = {id(buffer): other for buffer, other in zip(self.buffers(), copy.buffers(), strict=False)}
        named = self._module.named_buffers(remove_duplicate=False)
        others = {name: copied[id(buffer)] for name, buffer in named if id(buffer) in copied}
        self._stages.share(others)
        return self.checkpoints.state_dict_of(self.pieces_of(copy), others)


class Average(AveragedModel):
    """torch's running average, of this rank's part of the weights.

    Args:
        live: what is averaged.
        arguments: of ``AveragedModel``.
    """

    def __init__(self, live: Live, **arguments: Any) -> None:
        super().__init__(live.as_module(), **arguments)
        self.live = live

    def update_parameters(self, model: Any) -> None:
        """Take the weights as they are now into the average."""
        with torch.no_grad():
            super().update_parameters(self.live)  # type: ignore[arg-type]

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return what ``AveragedModel.state_dict`` would return for the whole module. All ranks must call this."""
        found = self.live.state_dict_of(self.module)
        return {"n_averaged": self.n_averaged, **{f"module.{name}": value for name, value in found.items()}}

    def pairs(self) -> Iterator[tuple[torch.Tensor, Piece]]:
        """Yield each averaged tensor with what is being trained."""
        averages = chain(self.module.parameters(), self.module.buffers())
        return zip(averages, self.live.pieces(), strict=True)


class StochasticAverage(nn.Module):
    """The copy that ``StochasticWeightAveraging`` averages into.

    Args:
        live: what is averaged.
    """

    def __init__(self, live: Live) -> None:
        super().__init__()
        self.copy = deepcopy(live.as_module())
        self.live = live

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the average as a state dict of the module. All ranks must call this."""
        return self.live.state_dict_of(self.copy)


class WeightAveragingOnShards(OnShards):
    """``WeightAveraging`` and its subclasses. Attributes and what is called through ``super()`` are Lightning's."""

    stock = "WeightAveraging"
    replaced = ("on_load_checkpoint", "_swap_models", "_copy_average_to_current")
    _average_model: Any
    _waiting: Any
    _device: Any
    _use_buffers: bool
    _kwargs: dict[str, Any]
    _latest_update_step: int
    _latest_update_epoch: int

    def begin(self, trainer: Any, pl_module: Any) -> None:
        self._average_model, self._waiting = None, None
        # A new Trainer counts steps from the start; Lightning would wait until there are more than in the one before.
        self._latest_update_step = min(self._latest_update_step, trainer.global_step)
        self._latest_update_epoch = min(self._latest_update_epoch, trainer.current_epoch - 1)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        _require_elementwise(self, self._kwargs)
        live, device = Live(trainer.strategy, pl_module), self._device or pl_module.device
        self._average_model = Average(live, device=device, use_buffers=self._use_buffers, **self._kwargs)
        self._restore(pl_module)
        super().on_fit_start(trainer, pl_module)  # type: ignore[misc]

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if not self._fitting:
            rank_zero_warn(
                f"{type(self).__name__}: the checkpoint is loaded outside fit, so the averaged weights in its "
                "state_dict are used and the state of the average is not restored."
            )
        elif {"current_model_state", "averaging_state"} <= checkpoint.keys():
            self._waiting = checkpoint["current_model_state"], checkpoint["averaging_state"]
            if self._average_model is not None:  # a checkpoint is loaded in the middle of a run, as a tuner does
                with torch.no_grad():
                    for average, current in self._average_model.pairs():
                        average.copy_(current.read())
                self._restore(pl_module)
        else:
            rank_zero_warn(
                f"The checkpoint was not created with {type(self).__name__}. Both the current and the averaged weights "
                "begin as its state_dict."
            )

    def _restore(self, pl_module: Any) -> None:
        """Go on from the checkpoint that waits [Note: averages wait for the engine]."""
        if self._waiting is not None:
            (current, state), self._waiting = self._waiting, None
            self._average_model.n_averaged.copy_(state["n_averaged"])
            self._average_model.live.checkpoints.take(current, pl_module.strict_loading)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)  # type: ignore[misc]
        average = self._average_model
        if average is not None and isinstance(checkpoint.get("current_model_state"), ShardedWeights):
            pieces = average.live.pieces_of(average.module)
            checkpoint["state_dict"] = ShardedWeights(checkpoint["state_dict"], pieces)

    def _swap_models(self, pl_module: Any) -> None:
        with rewriting(self._average_model.live.engine):
            for average, current in self._average_model.pairs():
                kept = average.clone()
                average.copy_(current.read())
                current.write(kept)

    def _copy_average_to_current(self, pl_module: Any) -> None:
        with rewriting(self._average_model.live.engine):
            for average, current in self._average_model.pairs():
                current.write(average)


class StochasticOnShards(OnShards):
    """``StochasticWeightAveraging``. Attributes and what is called through ``super()`` are Lightning's."""

    stock = "StochasticWeightAveraging"
    replaced = ("update_parameters", "transfer_weights", "_load_average_model_state")
    _average_model: Any
    _waiting: Any
    _avg_fn: Callable[..., Any]
    state_key: str

    def begin(self, trainer: Any, pl_module: Any) -> None:
        self._average_model, self._waiting = None, None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        _require_elementwise(self, {"avg_fn": self._avg_fn})
        self._average_model = StochasticAverage(Live(trainer.strategy, pl_module))
        self._restore()
        super().on_fit_start(trainer, pl_module)  # type: ignore[misc]

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["callbacks"].get(self.state_key)
        if state and self._fitting:
            # Taken out before Lightning copies the state: it is as large as the model, and may be on the disk.
            self._waiting = state["average_model_state"]
            checkpoint["callbacks"][self.state_key] = {**state, "average_model_state": None}
            if self._average_model is not None:
                self._restore()
        super().on_load_checkpoint(trainer, pl_module, checkpoint)  # type: ignore[misc]

    def _load_average_model_state(self, model_state: Any) -> None:
        """The average is loaded by ``_restore``."""

    def _restore(self) -> None:
        """Read the average that waits [Note: averages wait for the engine]."""
        if self._waiting is not None:
            live, waiting, self._waiting = self._average_model.live, self._waiting, None
            live.checkpoints.read(waiting, live.pieces_of(self._average_model.copy), True)

    def update_parameters(self, average_model: Any, model: Any, n_averaged: Any, avg_fn: Any) -> None:
        super().update_parameters(average_model, average_model.live, n_averaged, avg_fn)  # type: ignore[misc]

    def transfer_weights(self, src_pl_module: Any, dst_pl_module: Any) -> None:
        with rewriting(src_pl_module.live.engine):
            for average, current in zip(src_pl_module.parameters(), src_pl_module.live.pieces(), strict=False):
                current.write(average)


def _require_elementwise(callback: Any, formula: Mapping[str, Any]) -> None:
    """Check that averaging pieces of parameters gives pieces of the averaged parameters.

    Raises:
        UnsupportedError: if it does not.
    """
    functions = {key: formula[key] for key in ("avg_fn", "multi_avg_fn") if formula.get(key) is not None}

    def averaged(cuts: list[int]) -> torch.Tensor:
        values = torch.linspace(-1.0, 1.0, 36, dtype=torch.float64).split(12)
        model = nn.ParameterList([nn.Parameter(part, requires_grad=False) for part in values[0].split(cuts)])
        if len(cuts) == 1:
            model[0].data = model[0].data.view(3, 4)
        average = AveragedModel(model, **functions)
        with torch.no_grad():
            for value in values[1:]:
                for part, new in zip(model, value.square().split(cuts), strict=True):
                    part.copy_(new.view_as(part))
                average.update_parameters(model)
        return torch.cat([part.detach().flatten() for part in average.module.parameters()])

    if not torch.allclose(averaged([12]), averaged([5, 7]), rtol=1e-12):
        raise UnsupportedError(
            f"The averaging function of {type(callback).__name__} ({', '.join(functions)}) is not element-wise: the "
            "average of a matrix differs from that of the matrix cut in two. ZeroStrategy averages parts of "
            "parameters. Use an element-wise function, or strategy='ddp'."
        )
