"""Measure how long each block takes, where one process holds the whole model.

The step runs for real. At the entry of every block the graph is cut, and what ran since the last cut runs backward on
its own: so only one block's activations are in memory at a time, and each block has a time of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from lit_zero.core.errors import LitZeroError, UnsupportedError
from lit_zero.pipeline.isolation import isolated, take_logs
from lit_zero.pipeline.leaves import map_leaves, tensors

_RUNS = 3  # the shortest time counts: what else a machine does only adds to it
_ADVICE = "Use pipeline.balance='flops', 'parameters' or 'activations', or give a number for each block."


def measure(
    root: nn.Module, blocks: Sequence[str], call: Callable[[], Any], device: torch.device, training: bool = True
) -> tuple[float, ...]:
    """Return the seconds that each block takes, with what runs between it and the next one.

    The first one's include what runs before it, the last one's what runs after it. The step runs a few times, on copies
    of parameters and buffers; afterwards everything is as it was, as after a dry run.

    Args:
        root: the module that owns all parameters.
        blocks: the entries of the block list, in the order in which they run.
        call: runs the user's step on one micro-batch.
        device: where to run it.
        training: measure the backward too.

    Raises:
        UnsupportedError: if this process does not hold all values, or the step fails, for example for lack of memory.
    """
    named = chain(root.named_parameters(), root.named_buffers())
    without = next((name for name, tensor in named if not _has_values(tensor)), None)
    if without is not None:
        raise UnsupportedError(
            f"pipeline.balance='time' runs the whole module on rank 0, but {without!r} has no values there: it is on "
            f"the meta device, on other ranks, or read from a file later. {_ADVICE}"
        )
    watch = _Watch(device, len(blocks))
    runs = []
    try:
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(training),
            isolated(root, lambda p: nn.Parameter(_copy(p, device), p.requires_grad), lambda b: _copy(b, device)),
            torch.compiler.set_stance("force_eager"),
        ):
            for index, name in enumerate(blocks):
                block = root.get_submodule(name)
                vars(block)["forward"] = watch.entry(index, block.forward)
            take_logs(root, _nothing, _nothing)
            parameters = [p for p in root.parameters() if p.requires_grad]
            for _ in range(1 + _RUNS):  # the first one finds memory and kernels
                runs.append(watch.run(call, parameters))
    except LitZeroError:
        raise
    except Exception as error:
        raise UnsupportedError(
            "pipeline.balance='time' runs the step on rank 0 with the whole module, and that failed: "
            f"{error!r}. {_ADVICE}"
        ) from error
    return tuple(map(min, zip(*runs[1:], strict=True)))


class _Watch:
    """Times the blocks of a step.

    Args:
        device: where they run.
        count: how many there are.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self._device, self._count = device, count
        self._backward = False  # is running

    def run(self, call: Callable[[], Any], parameters: list[nn.Parameter]) -> list[float]:
        """Return the seconds of each block in one run of the step."""
        self._parameters, self._seconds, self._block = parameters, [0.0] * self._count, 0
        self._leaves: list[torch.Tensor] = []  # of the graph since the last cut
        self._cuts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor of an earlier block: its leaf
        self._start = self._now()
        result = call()
        self._cut(result.get("loss") if isinstance(result, Mapping) else result)
        seconds = self._seconds
        del self._parameters, self._leaves, self._cuts, self._seconds
        return seconds

    def entry(self, index: int, real: Callable[..., Any]) -> Callable[..., Any]:
        """Return the ``forward`` of a block: the block before ends here."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            # What runs before the first block is timed with it. In a backward a checkpoint recomputes the block.
            if index == 0 or self._backward:
                return real(*args, **kwargs)
            self._cut((args, kwargs))
            self._block, self._leaves = index, []
            args, kwargs = map_leaves((args, kwargs), lambda path, leaf: self._leaf(leaf))
            self._start = self._now()
            return real(*args, **kwargs)

        return forward

    def _cut(self, outputs: Any) -> None:
        """Run backward what has run since the last cut, and note how long both took."""
        roots = [t for t in tensors(outputs) if t.grad_fn is not None and t not in self._cuts]
        inputs = [*self._leaves, *self._parameters]
        if roots and inputs:
            self._backward = True
            try:
                # Retained: a tensor of an earlier block may lead into a graph that has run backward.
                ones = [torch.ones_like(root) for root in roots]
                torch.autograd.grad(roots, inputs, ones, retain_graph=True, allow_unused=True)
            finally:
                self._backward = False
        self._seconds[self._block] += self._now() - self._start

    def _leaf(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.grad_fn is None:
            return value
        if value not in self._cuts:
            self._cuts[value] = value.detach().requires_grad_()
        leaf: torch.Tensor = self._cuts[value]
        self._leaves.append(leaf)
        return leaf.clone()  # a block may write to it in place

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _has_values(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.detach().to(device, copy=True)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``self.log``."""
