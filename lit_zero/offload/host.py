"""Shards in host memory: pinned where there is a GPU, so that copies run beside the computation."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping

import torch

from lit_zero.core.errors import ConfigError
from lit_zero.core.keeping import Keeper, Kept


class Budget:
    """The host memory that a rank may take for what has left its device.

    Args:
        limit: bytes; ``None`` for any number.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit, self._taken = limit, dict[str, int]()

    def take(self, what: str, size: int) -> None:
        """Note that ``size`` bytes of ``what`` are, or will be, in host memory."""
        self._taken[what] = self._taken.get(what, 0) + size

    def check(self, ratio: float, disk: bool) -> None:
        """Check what has been noted.

        Raises:
            ConfigError: if it is more than the limit.
        """
        total = sum(self._taken.values())
        if self._limit is None or total <= self._limit:
            return
        parts = ", ".join(f"{what} {size:,}" for what, size in self._taken.items() if size)
        advice = "lower offload.chunk or offload.ratio" if disk else "lower offload.ratio, or use offload=disk"
        raise ConfigError(
            f"offload.limit={self._limit:,} bytes is too little: this rank needs {total:,} bytes of host memory "
            f"({parts}) with offload.ratio={ratio}. Raise the limit, {advice}."
        )


class HostKeeper(Keeper):
    """Host memory.

    Args:
        params: sharded parameters leave the device too.
        device: what they leave.
        budget: counts host memory.
    """

    place = "host"
    away = True

    def __init__(self, params: bool, device: torch.device, budget: Budget) -> None:
        self.params, self._device, self._budget = params, device, budget
        self.streams = device.type == "cuda"

    def keep(self, numel: int, dtype: torch.dtype) -> Kept:
        return Kept(host_zeros(numel, dtype, self._device))

    def reserve(self, what: str, size: int) -> None:
        """Note that ``size`` more bytes of ``what`` will be needed."""
        self._budget.take(what, size)

    def gradient(self, arrived: torch.Tensor) -> torch.Tensor:
        if not self.streams:
            return arrived
        out = torch.empty(arrived.shape, dtype=arrived.dtype, pin_memory=True)  # torch keeps pinned memory for reuse
        return out.copy_(arrived, non_blocking=True)

    def walk(self, arrays: Mapping[str, Kept], to_come: int) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
        views = {key: array.read() for key, array in arrays.items()}
        yield 0, next(iter(views.values())).numel(), views


def host_zeros(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros in host memory, pinned if ``device`` is a GPU and the system lets us."""
    if device.type == "cuda":
        try:
            return torch.zeros(numel, dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            _say_pageable(str(error).splitlines()[0])
    return torch.zeros(numel, dtype=dtype)


@functools.cache
def _say_pageable(reason: str) -> None:
    warnings.warn(
        f"offload: host memory could not be pinned ({reason}). Pageable memory is used: the results are the same, but "
        "copies wait for the computation. Raise the limit of locked memory (ulimit -l).",
        stacklevel=2,
    )


@functools.cache
def say_saves_nothing() -> None:
    """Say once that there is no device to relieve."""
    warnings.warn(
        "offload=cpu saves nothing here: the model computes on the CPU, whose memory is the host's. The mechanism runs "
        "all the same. offload=disk saves memory here; on a GPU both do.",
        stacklevel=2,
    )
