"""Masters in two halves: every bit comes back, and the copy is what rounding to nearest gives."""

from __future__ import annotations

import pytest
import torch
from lit_zero.kernels.split import join, join_reference, split, split_reference

EDGES = [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0xCAFE]  # lower halves


@pytest.fixture(params=["interpreted", pytest.param("compiled", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels run."""
    if request.param == "compiled":
        return torch.device("cuda", 0)
    request.getfixturevalue("interpreted")
    return torch.device("cpu")


def patterns(lower: int) -> torch.Tensor:
    """Return all 65,536 upper halves with one lower half, as fp32 numbers."""
    return ((torch.arange(1 << 16, dtype=torch.int64) << 16) + lower).to(torch.int32).view(torch.float32)


def halves(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for the two halves, full of something else."""
    copy = torch.full_like(values, float("nan"), dtype=torch.bfloat16)
    return copy, torch.full_like(values, 77, dtype=torch.int16)


@pytest.mark.parametrize("lower", EDGES)
def test_every_upper_half(lower: int) -> None:
    values = patterns(lower)
    copy, remainder = halves(values)
    split_reference(values, copy, remainder)
    back = join_reference(copy, remainder, torch.full_like(values, float("nan")))
    bits, nan = values.view(torch.int32), values.isnan()
    same = back.view(torch.int32) == bits
    # Of 65,536 NaNs with this upper half only those whose lower half would round them up to a zero have other bits.
    full = (bits >> 16 & 0x7FFF) == 0x7FFF
    assert bool(same[~(full & nan)].all())
    assert bool(back[nan].isnan().all())
    assert bool(same.all()) == (lower < 0x8000)
    # The copy is the nearest bf16 number: that of torch, except where two are equally near.
    nearest = values.to(torch.bfloat16)
    if lower != 0x8000:
        assert torch.equal(copy[~nan].view(torch.int16), nearest[~nan].view(torch.int16))
    else:
        away = copy[~nan].double().abs()
        assert bool((away >= nearest[~nan].double().abs()).all())
        gap = (copy.double() - values.double()).abs() - (nearest.double() - values.double()).abs()
        assert bool((gap[copy.isfinite() & nearest.isfinite() & ~nan] == 0).all())
        assert float((copy[~nan] != nearest[~nan]).double().mean()) == pytest.approx(0.5, abs=0.01)
    hidden = nan & ((bits >> 16 & 0x7FFF) == 0x7F80)  # the upper half is that of an infinity
    assert bool(copy[nan & ~hidden].isnan().all())
    if lower < 0x8000:
        assert bool(copy[hidden].isinf().all())


def test_special_values() -> None:
    smallest, largest = 2.0**-149, float(torch.finfo(torch.float32).max)
    numbers = [0.0, -0.0, smallest, -smallest, largest, -largest, float("inf"), -float("inf"), float("nan")]
    values = torch.tensor(numbers)
    copy, remainder = halves(values)
    split(values, copy, remainder)
    assert torch.equal(join(copy, remainder, torch.empty_like(values)).view(torch.int32), values.view(torch.int32))
    assert torch.equal(copy[:-1].view(torch.int16), values[:-1].to(torch.bfloat16).view(torch.int16))
    gpu_nan = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # what CUDA's arithmetic makes
    copy, remainder = halves(gpu_nan)
    split(gpu_nan, copy, remainder)
    assert bool(copy.isnan()) and bool(join(copy, remainder, torch.empty(1)).isnan())


def test_kernels_equal_the_reference(place: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    for numel in (0, 1, 63, 1000, 2048):
        bits = torch.randint(-(2**31), 2**31, (numel + 1,), generator=generator).to(torch.int32)
        if numel > 63:
            bits[: len(EDGES)] = torch.tensor([(0x7FFF << 16) + lower for lower in EDGES]).to(torch.int32)
        values = bits.to(place).view(torch.float32)[1:]  # not aligned
        copy, remainder = halves(values)
        wanted, rest = halves(values)
        split(values, copy, remainder)
        split_reference(values, wanted, rest)
        assert torch.equal(copy.view(torch.int16), wanted.view(torch.int16)), numel
        assert torch.equal(remainder, rest), numel
        back = join(copy, remainder, torch.full_like(values, float("nan")))
        expected = join_reference(copy, remainder, torch.full_like(values, float("nan")))
        assert torch.equal(back.view(torch.int32), expected.view(torch.int32)), numel
