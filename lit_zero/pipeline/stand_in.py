"""Tensors that have a shape and take no memory."""

from __future__ import annotations

import torch


class StandIns:
    """Makes stand-ins: tensors of any shape whose elements are all one element, NaN where the dtype has it.

    Every stand-in of a dtype and device is a view of the same 16 bytes. Each is an object of its own, so that code
    which goes by identity can tell two of them apart.
    """

    def __init__(self) -> None:
        self._bases: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def make(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a stand-in.

        Args:
            shape: any.
            dtype: any.
            device: of the one element.
        """
        base = self._bases.get((dtype, device))
        if base is None:
            with torch.inference_mode(False), torch.no_grad():
                base = torch.full((), _nothing(dtype), dtype=dtype, device=device)
            self._bases[dtype, device] = base
        return base.data.expand(shape)  # .data: views of one tensor would count their versions together

    def make_written(
        self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Return a tensor with memory of its own, for one to which somebody writes in place."""
        return torch.full(shape, _nothing(dtype), dtype=dtype, device=device)

    def made(self, tensor: torch.Tensor) -> bool:
        """Return whether ``tensor`` is a stand-in or a view of one."""
        base = self._bases.get((tensor.dtype, tensor.device))
        return base is not None and _address(base) == _address(tensor)


def _address(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a wrapper without storage
        return -1


def _nothing(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 0 if dtype is not torch.bool else False
