"""Arrays that lie on the device in another form than the one they are computed with."""

from __future__ import annotations

import torch

from lit_zero.core.forms import Form
from lit_zero.core.keeping import Kept
from lit_zero.core.ticket import DONE, Ticket
from lit_zero.kernels.moments import BLOCK, Draw, from_int8, to_bfloat16, to_int8
from lit_zero.kernels.split import join, split


class Encoded(Kept):
    """A flat fp32 array in another form.

    Args:
        numel: its elements.
        device: where it lies.
    """

    live = False

    def __init__(self, numel: int, device: torch.device) -> None:
        self._numel, self._device = numel, device

    @property
    def numel(self) -> int:
        return self._numel

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def read(self) -> torch.Tensor:
        return self.decode(torch.empty(self.padded, dtype=torch.float32, device=self._device))

    def write(self, first: int, values: torch.Tensor) -> None:
        flat = values.detach().reshape(-1)
        held = self.padded_part(first, first + flat.numel())
        room = torch.empty(held.padded, dtype=torch.float32, device=self._device)
        begin = held.numel - flat.numel()
        if begin or held.padded != flat.numel():
            held.decode(room)
        room[begin : begin + flat.numel()].copy_(flat)
        held.encode(room, None)

    def fetch(self, out: torch.Tensor) -> Ticket:
        out.copy_(self.read(), non_blocking=True)
        return DONE

    def stand_in(self) -> torch.Tensor:
        return torch.zeros((), dtype=torch.float32, device=self._device).expand(self._numel)

    @property
    def padded(self) -> int:
        """Elements that ``decode`` fills."""
        return self._numel

    def padded_part(self, first: int, last: int) -> Encoded:
        """Return the smallest part that holds ``[first, last)``, ends there and can be encoded by itself."""
        return self.part(first, last)

    def part(self, first: int, last: int) -> Encoded:
        raise NotImplementedError

    def decode(self, out: torch.Tensor) -> torch.Tensor:
        """Write the elements to ``out`` (fp32, shape ``[padded]``), and return those that count, shape ``[n]``."""
        raise NotImplementedError

    def encode(self, values: torch.Tensor, draw: Draw | None) -> None:
        """Take over ``values`` (fp32, shape ``[padded]``).

        Args:
            values: what is not among the ``n`` elements is as ``decode`` gave it.
            draw: random bits for forms that round at random; ``None``: round to nearest.
        """
        raise NotImplementedError


class Split(Encoded):
    """A master of which the 2-byte copy that the device computes with is a part.

    Args:
        copy: bf16, shape ``[n]``.
        remainder: int16, shape ``[n]``.
    """

    def __init__(self, copy: torch.Tensor, remainder: torch.Tensor) -> None:
        super().__init__(copy.numel(), copy.device)
        self._copy, self._remainder = copy, remainder

    def part(self, first: int, last: int) -> Split:
        return Split(self._copy[first:last], self._remainder[first:last])

    def decode(self, out: torch.Tensor) -> torch.Tensor:
        return join(self._copy, self._remainder, out)

    def encode(self, values: torch.Tensor, draw: Draw | None) -> None:
        split(values, self._copy, self._remainder)

    def tensors(self) -> list[torch.Tensor]:
        return [self._copy, self._remainder]

    def form(self) -> Form:
        return Form("split", self._copy, self._remainder)


class Rounded(Encoded):
    """A moment in bf16.

    Args:
        tensor: bf16, shape ``[n]``.
        random: rounded up or down at random, where a step writes it.
    """

    def __init__(self, tensor: torch.Tensor, random: bool) -> None:
        super().__init__(tensor.numel(), tensor.device)
        self._tensor, self._random = tensor, random

    def part(self, first: int, last: int) -> Rounded:
        return Rounded(self._tensor[first:last], self._random)

    def decode(self, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(self._tensor)

    def encode(self, values: torch.Tensor, draw: Draw | None) -> None:
        to_bfloat16(values, self._tensor, draw if self._random else None)

    def tensors(self) -> list[torch.Tensor]:
        return [self._tensor]

    def form(self) -> Form:
        return Form("dithered" if self._random else "rounded", self._tensor)


class Quantized(Encoded):
    """A moment in one byte an element, and a scale for each block of 256.

    Args:
        codes: int8, shape ``[blocks * 256]``.
        scales: fp32, shape ``[blocks]``.
        signed: with sign; else without, and rounded at random where a step writes it.
        first: where it begins in the first block.
        last: where it ends, counted from the start of the first block.
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, signed: bool, first: int, last: int) -> None:
        super().__init__(last - first, codes.device)
        self._codes, self._scales, self._signed, self._first, self._last = codes, scales, signed, first, last

    @classmethod
    def zeros(cls, numel: int, device: torch.device, signed: bool) -> Quantized:
        """Return an array of zeros."""
        blocks = -(-numel // BLOCK)
        codes = torch.full((blocks * BLOCK,), 0 if signed else -128, dtype=torch.int8, device=device)
        return cls(codes, torch.zeros(blocks, device=device), signed, 0, numel)

    @property
    def padded(self) -> int:
        return self._codes.numel()

    def part(self, first: int, last: int) -> Quantized:
        begin, end = self._first + first, self._first + last
        low, high = begin // BLOCK, max(-(-end // BLOCK), begin // BLOCK)
        codes, scales = self._codes[low * BLOCK : high * BLOCK], self._scales[low:high]
        return Quantized(codes, scales, self._signed, begin - low * BLOCK, end - low * BLOCK)

    def padded_part(self, first: int, last: int) -> Quantized:
        found = self.part(first, last)
        return Quantized(found._codes, found._scales, self._signed, 0, found._last)

    def decode(self, out: torch.Tensor) -> torch.Tensor:
        return from_int8(self._codes, self._scales, self._signed, out)[self._first : self._last]

    def encode(self, values: torch.Tensor, draw: Draw | None) -> None:
        to_int8(values, self._codes, self._scales, self._signed, None if self._signed else draw)

    def tensors(self) -> list[torch.Tensor]:
        return [self._codes, self._scales]

    def form(self) -> Form | None:
        whole = self._first == 0 and self._last > self._codes.numel() - BLOCK
        return Form("signed" if self._signed else "unsigned", self._codes, self._scales) if whole else None
