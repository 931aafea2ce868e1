"""Shards in host memory: pinned where there is a GPU, so that copies run beside the computation."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping

import torch

from lit_zero.core.forms import Origin
from lit_zero.core.keeping import Content, Keeper, Kept


class HostKeeper(Keeper):
    """Host memory.

    Args:
        params: sharded parameters leave the device too.
        device: what they leave.
    """

    place = "host"
    walks = away = True

    def __init__(self, params: bool, device: torch.device) -> None:
        self.params, self._device = params, device
        self.streams = device.type == "cuda"

    def keep(self, numel: int, dtype: torch.dtype, content: Content = Content.WEIGHTS) -> Kept:
        return Kept(host_memory(numel, dtype, self._device).zero_())

    def gradient(self, arrived: torch.Tensor) -> torch.Tensor:
        if not self.streams:
            return arrived
        out = host_memory(arrived.numel(), arrived.dtype, self._device)  # torch keeps pinned memory for reuse
        return out.copy_(arrived, non_blocking=True)

    def walk(
        self, arrays: Mapping[str, Kept], to_come: int, origin: Origin
    ) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
        views = {key: array.read() for key, array in arrays.items()}
        yield 0, next(iter(views.values())).numel(), views


def host_memory(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return host memory (shape ``[numel]``, its content is undefined), pinned if ``device`` is a GPU and the system
    lets us.
    """
    if device.type == "cuda":
        try:
            return torch.empty(numel, dtype=dtype, device="cpu", pin_memory=True)
        except RuntimeError as error:
            _say_pageable(str(error).splitlines()[0])
    return torch.empty(numel, dtype=dtype, device="cpu")


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
