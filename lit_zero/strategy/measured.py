"""Metrics in a pipeline: only the rank of the last stage updates them, and every rank computes the same.

``compute`` runs on all ranks, and first asks whether there are other ranks to exchange states with. There, every rank
takes over the states of its pipeline's last stage; then these are exchanged with those of the other pipelines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric
from torchmetrics.metric import jit_distributed_available

from lit_zero.comm.world import World
from lit_zero.core.errors import UnsupportedError
from lit_zero.strategy.logged import to_device

Share = Callable[[Any], Any]  # returns the value that the rank of the last stage was given, on all ranks of a pipeline


class Metrics:
    """The metrics of a module that is in several pieces.

    Args:
        module: holds them.
        share: see ``Share``.
        lasts: the ranks of all pipelines that have the last stage.
        last: this rank has it.

    Attributes:
        in_step: the user's step is running, on this rank alone.
    """

    def __init__(self, module: nn.Module, share: Share, lasts: list[int], last: bool) -> None:
        self._share, self._lasts, self._last, self.in_step = share, lasts, last, False
        self._all = {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}
        self._counts: dict[str, int] = {}
        gathered = _States(lasts)
        for metric in self._all.values():
            metric.dist_sync_fn = gathered
            metric.distributed_available_fn = _Taken(self, metric)

    def begin(self) -> None:
        """Note where the metrics are, before a step."""
        self._counts = {name: metric._update_count for name, metric in self._all.items()}

    def updated(self) -> dict[str, int]:
        """Return how often those metrics were updated that the step has updated."""
        return {name: m._update_count for name, m in self._all.items() if m._update_count != self._counts[name]}

    def follow(self, updated: dict[str, int]) -> None:
        """Take note of what the last stage's rank has updated; what was computed before is not valid any more."""
        for name, count in updated.items():
            self._all[name]._update_count, self._all[name]._computed = count, None

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Inside, a stage before the last one runs; what its part of the step does to metrics is undone."""
        before = [(m, _copied(m), m._update_count, m._computed) for m in self._all.values()] if self._last else []
        try:
            yield
        finally:
            for metric, states, count, computed in before:
                _set(metric, states)
                metric._update_count, metric._computed = count, computed

    def take(self, metric: Metric) -> None:
        """Give ``metric`` the states that it has on the rank of the last stage."""
        if self.in_step:
            raise _refusal(next((name for name, each in self._all.items() if each is metric), type(metric).__name__))
        states = self._share(to_device(metric.metric_state, torch.device("cpu")) if self._last else None)
        if not self._last:
            _set(metric, to_device(states, metric.device))

    def take_persistent(self) -> None:
        """Give all metrics whose states go into checkpoints the states of the last stage's rank."""
        for metric in self._all.values():
            if any(metric._persistent.values()):
                self.take(metric)


def keep_apart(module: nn.Module) -> None:
    """Let the metrics of a module refuse to exchange their states with other ranks, for good."""
    for name, metric in module.named_modules():
        if isinstance(metric, Metric):
            metric.distributed_available_fn = partial(_refuse, name, metric)


def _refuse(name: str, metric: Metric) -> bool:
    if metric._to_sync:
        raise _refusal(name)
    return True


def _refusal(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"The metric {name!r} exchanges its states in the step (compute(), or dist_sync_on_step=True). In a pipeline a "
        "step runs on one rank at a time. Call compute() at the end of the epoch."
    )


class _Taken:
    """Stands in for a metric's question whether there are other ranks. A copy of the metric asks torchmetrics' own."""

    def __init__(self, metrics: Metrics, metric: Metric) -> None:
        self._metrics, self._metric = metrics, metric

    def __call__(self) -> bool:
        # Otherwise it asks, and does nothing with the answer; but one that never exchanges has been updated on the last
        # ranks alone.
        if self._metric._to_sync or (not self._metric.sync_on_compute and not self._metrics.in_step):
            self._metrics.take(self._metric)
        return True

    def __deepcopy__(self, memo: Any) -> Any:
        return jit_distributed_available

    def __reduce__(self) -> Any:
        return _usual, ()


class _States:
    """Stands in for a metric's exchange of one state: returns those of the ranks that have updated it."""

    def __init__(self, lasts: list[int]) -> None:
        self._lasts = lasts

    def __call__(self, state: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
        found = World().all_gather_object(state.cpu()) if len(self._lasts) > 1 else None
        return [state] if found is None else [found[rank].to(state.device) for rank in self._lasts]

    def __deepcopy__(self, memo: Any) -> Any:
        return self


def _usual() -> Callable[[], bool]:
    return jit_distributed_available


def _copied(metric: Metric) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else list(v) for k, v in metric.metric_state.items()}


def _set(metric: Metric, states: dict[str, Any]) -> None:
    for key, value in states.items():
        setattr(metric, key, value)
