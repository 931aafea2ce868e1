"""The part of the strategy that deals with data loaders: exact evaluation on uneven data, see ``loaders``."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lit_zero.comm.world import World
from lit_zero.core.errors import LitZeroError, check_choice
from lit_zero.strategy.flavour import ParallelStrategy, pl
from lit_zero.strategy.loaders import NO_BATCH, InStep, counted_steps, divide, draw_resumed_epoch, known_length


class Loading(ParallelStrategy):
    """A strategy under which every sample of an evaluation counts once and all ranks take as many steps.

    Args:
        evaluation: ``"once"``: so. ``"lightning"``: data is divided as Lightning does by itself, with samples that are
            repeated to even the ranks out, and ranks with different numbers of steps wait for one another for ever.
        kwargs: what Lightning passes to every parallel strategy.

    Attributes:
        repeats_batch: in an evaluation step, or a hook after it: this rank has run out of data and repeats a batch to
            keep step with the others. Metrics and what is logged do not count it.

    Raises:
        ConfigError: for a wrong setting.
    """

    repeats_batch = False

    def __init__(self, evaluation: Literal["once", "lightning"] = "once", **kwargs: Any) -> None:
        check_choice("evaluation", evaluation, ("once", "lightning"))
        super().__init__(**kwargs)
        self.evaluation = evaluation
        self._loaders: list[Any] = []  # of the evaluation that runs
        self._taken: list[int] = []  # steps taken with each of them
        self._in_turn = True  # they are read one after the other, not side by side
        self._loader = 0  # the one that the coming step reads
        self._told = False

    # ---- loaders

    def connect(self, model: pl.LightningModule) -> None:
        """Take the module that is about to run."""
        super().connect(model)
        if self.evaluation == "once":
            # It recommends one device, so that no sample counts twice, which none does here.
            warnings.filterwarnings("ignore", message=r".*recommended to use `Trainer\(devices=1, num_nodes=1\)`")

    def process_dataloader(self, dataloader: object) -> object:
        """Divide the data of an evaluation so that no sample is read twice and all ranks take as many steps."""
        loader: Any = super().process_dataloader(dataloader)
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        running, share = trainer.state.stage, self.distributed_sampler_kwargs
        if self.evaluation == "lightning" or share["num_replicas"] == 1:
            return loader
        if running is None or not (running.evaluating or trainer.predicting):
            return loader
        if isinstance(loader, DataLoader):
            limit = getattr(trainer, f"limit_{running.dataloader_prefix}_batches")
            loader = divide(loader, share["rank"], share["num_replicas"], limit)
        found = World().all_gather_object(known_length(loader))
        lengths = {length for length, _ in found}
        relied_on = all(each for _, each in found)
        if relied_on and len(lengths) == 1:
            return loader
        if relied_on and 0 in lengths:
            raise LitZeroError(NO_BATCH)
        return InStep(loader, None if None in lengths else max(length or 0 for length in lengths), self._agree)

    def _agree(self, more: bool) -> tuple[bool, bool]:
        flags = torch.tensor([more, not more], dtype=torch.int64, device=self.root_device)
        some, lacking = self.reduce(flags, reduce_op="max").tolist()
        return bool(some), not lacking

    def on_train_start(self) -> None:
        """Before the first epoch of a fit."""
        super().on_train_start()
        assert self.lightning_module is not None
        draw_resumed_epoch(self.lightning_module.trainer)

    # ---- steps

    def on_validation_start(self) -> None:
        """Before the first step of a validation."""
        super().on_validation_start()
        assert self.lightning_module is not None
        self._begin(self.lightning_module.trainer._evaluation_loop)

    def on_test_start(self) -> None:
        """Before the first step of a test."""
        super().on_test_start()
        assert self.lightning_module is not None
        self._begin(self.lightning_module.trainer._evaluation_loop)

    def on_predict_start(self) -> None:
        """Before the first step of a prediction."""
        super().on_predict_start()
        assert self.lightning_module is not None
        self._begin(self.lightning_module.trainer.predict_loop)

    def _begin(self, loop: Any) -> None:
        combined = loop._combined_loader
        self._loaders, self._in_turn = combined.flattened, combined._mode == "sequential"
        self._taken, self._loader = [0] * len(self._loaders), 0

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a batch to this rank's device."""
        self._loader = dataloader_idx
        return super().batch_to_device(batch, device, dataloader_idx)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's ``validation_step``."""
        with self._counted("validation"):
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's ``test_step``."""
        with self._counted("test"):
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's ``predict_step``."""
        with self._counted("predict"):
            return super().predict_step(*args, **kwargs)

    @contextlib.contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        """Inside, a step runs; what it counts is undone if it repeats a batch."""
        if self._loader >= len(self._loaders):  # a step outside Lightning's loops
            yield
            return
        number = self._taken[self._loader]
        self._taken[self._loader] += 1
        read = [self._loaders[self._loader]] if self._in_turn else self._loaders
        ends = [counted_steps(loader) for loader in read]
        self.repeats_batch = all(end is not None and number >= end for end in ends)
        if not self.repeats_batch:
            yield
            return
        self._tell(name, number)
        assert self.lightning_module is not None
        with uncounted(self.lightning_module, self.lightning_module.trainer._results):
            yield

    def _tell(self, name: str, number: int) -> None:
        if self._told:
            return
        self._told = True
        warnings.warn(
            f"Rank {self.global_rank} has no data left for {name} step {number} while other ranks have, and repeats a "
            f"batch to keep step with them. Metrics, self.log and what predict returns do not count it; what "
            f"{name}_step collects by itself would: leave it out where trainer.strategy.repeats_batch is true. A "
            "number of samples that is a multiple of the number of ranks, or a batch size of more than 1, avoids it.",
            stacklevel=2,
        )

    def on_validation_end(self) -> None:
        """After a validation."""
        super().on_validation_end()
        self.repeats_batch = False

    def on_test_end(self) -> None:
        """After a test."""
        super().on_test_end()
        self.repeats_batch = False

    def on_predict_end(self) -> None:
        """After a prediction: what was predicted for repeated batches is not returned."""
        super().on_predict_end()
        self.repeats_batch = False
        assert self.lightning_module is not None
        predictions = self.lightning_module.trainer.predict_loop._predictions
        for loader, found in zip(self._loaders, predictions, strict=False):  # none are kept unless they are returned
            end = counted_steps(loader)
            if end is not None:
                del found[end:]


@contextlib.contextmanager
def uncounted(module: nn.Module, logged: Mapping[str, Metric] | None) -> Iterator[None]:
    """Inside, metrics and ``self.log`` take in nothing for good.

    Args:
        module: holds the metrics.
        logged: what Lightning accumulates for ``self.log``, by key.
    """
    before = dict(logged or {})
    values = [getattr(each, "value", None) for each in before.values()]
    metrics = [each for each in (*module.modules(), *values) if isinstance(each, Metric)]
    states = [(each, _state(each), each._update_count) for each in {id(m): m for m in metrics}.values()]
    sums = [(each, _state(each)) for each in before.values()]
    yield
    for metric, state, updates in states:
        _set_state(metric, state)
        metric._update_count = updates
    for metric, state in sums:
        _set_state(metric, state)
    for key, metric in (logged or {}).items():
        if key not in before:  # it must stay, since the ranks exchange it, but is empty
            current = metric.metric_state
            _set_state(metric, {name: _like(default, current[name]) for name, default in metric._defaults.items()})


def _state(metric: Metric) -> dict[str, Any]:
    # Tensors may be added to in place, lists are appended to.
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else list(value)
        for name, value in metric.metric_state.items()
    }


def _set_state(metric: Metric, state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        setattr(metric, name, value)
    metric._computed = None


def _like(default: Any, current: Any) -> Any:
    return default.to(current.device, copy=True) if isinstance(default, torch.Tensor) else []
