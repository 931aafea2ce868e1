"""Many tensors to one flat buffer and back."""

from __future__ import annotations

import pytest
import torch
from lit_zero.kernels import pack, unpack
from lit_zero.kernels.pack import end_to_end, move_reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (9, 7), (0,), (1000,), (), (4097,))


def tensors(device: torch.device, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Return tensors of awkward sizes and, by default, of all dtypes, most of them at odd addresses."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, shape in enumerate(SHAPES * 2):
        whole = torch.randn(torch.Size(shape).numel() + 1, generator=generator).to(device)
        found.append(whole.to(dtype or DTYPES[number % 4])[1:].view(shape))
    found[0][0] = float("nan")
    found[3][5] = float("inf")
    return found


def poisoned(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((numel,), float("nan"), dtype=dtype, device=device)


def test_kernel_equals_the_reference_bit_for_bit(device):
    for dtype in DTYPES:
        values = tensors(device)
        starts = [start + 3 * number for number, start in enumerate(end_to_end(values))]  # gaps, odd addresses
        flat, expected = (torch.full((starts[-1] + 4100,), 7.0, dtype=dtype, device=device) for _ in range(2))
        pack(values, flat, starts)
        move_reference(values, expected, starts, to_flat=True)
        torch.testing.assert_close(flat, expected, rtol=0, atol=0, equal_nan=True)
        back = [poisoned(value.numel(), value.dtype, device).view(value.shape) for value in values]
        unpack(flat, back, starts)
        for number, value in enumerate(values):
            torch.testing.assert_close(back[number], value.to(dtype).to(value.dtype), rtol=0, atol=0, equal_nan=True)


def test_end_to_end_is_the_default(device):
    values = tensors(device, torch.float32)
    flat = poisoned(sum(value.numel() for value in values), torch.float32, device)
    pack(values, flat)
    torch.testing.assert_close(flat, torch.cat([value.flatten() for value in values]), rtol=0, atol=0, equal_nan=True)


def test_aligned_tensors_take_the_same_way(device):
    values = [torch.randn(size, device=device) for size in (4, 4096, 4100)]
    flat = poisoned(3 * 8192, torch.bfloat16, device)
    pack(values, flat, [0, 8192, 16384])
    for start, value in zip((0, 8192, 16384), values, strict=True):
        assert torch.equal(flat[start : start + value.numel()], value.bfloat16())


def test_nothing_is_packed(device):
    flat = torch.ones(3, device=device)
    pack([], flat)
    unpack(flat, [])
    assert flat.tolist() == [1.0] * 3


@pytest.mark.parametrize("start", [-1, 6])
def test_a_place_outside_is_refused(start):
    with pytest.raises(ValueError) as caught:
        pack([torch.ones(5)], torch.ones(10), [start])
    assert str(caught.value) == (
        f"A tensor of 5 elements was to lie from element {start} on in a flat buffer of 10. Make the buffer larger, or "
        "give other starts."
    )


def test_a_flat_buffer_with_gaps_is_refused(device):
    for move in (lambda values, flat: pack(values, flat), lambda values, flat: unpack(flat, values)):
        with pytest.raises(ValueError, match=r"shape \(4,\) and stride \(2,\) is not contiguous, and flat kernels"):
            move([torch.ones(4, device=device)], torch.zeros(8, device=device)[::2])
