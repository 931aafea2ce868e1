"""Reductions against the same sum in fp64, written out."""

from __future__ import annotations

import pytest
import torch
from lit_zero.kernels import sum_of_powers

CPU = torch.device("cpu")
SIZES = (1, 7, 60, 63, 64, 1000, 4097)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype) for size in SIZES]


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 2.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_fp64(dtype, power):
    values = tensors(dtype)
    expected = sum((value.double().abs() ** power).sum() for value in values)
    total = sum_of_powers(values, power, CPU)
    assert (total.dtype, total.dim()) == (torch.float64, 0)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)


def test_large_values_of_small_dtypes_do_not_overflow():
    total = sum_of_powers([torch.full((1000,), 6e4, dtype=torch.float16)], 2.0, CPU)
    torch.testing.assert_close(total, torch.tensor(1000 * float(torch.tensor(6e4).half()) ** 2, dtype=torch.float64))


def test_nothing_sums_to_zero():
    for nothing in ([], [torch.empty(0)], [torch.empty(0, 3), torch.empty(0, dtype=torch.bfloat16)]):
        total = sum_of_powers(nothing, 2.0, CPU)
        assert (total.item(), total.dtype, total.dim()) == (0.0, torch.float64, 0)


def test_empty_tensors_change_no_bit():
    values = tensors(torch.float32)
    assert torch.equal(sum_of_powers([torch.empty(0), *values], 2.0, CPU), sum_of_powers(values, 2.0, CPU))


def test_grouping_changes_only_the_last_bits():
    value = torch.randn(4097, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        sum_of_powers(list(value.split(63)), 2.0, CPU), sum_of_powers([value], 2.0, CPU), rtol=1e-14, atol=0
    )


def test_a_tensor_need_not_be_contiguous():
    value = torch.randn(6, 7)
    torch.testing.assert_close(sum_of_powers([value.t()], 2.0, CPU), value.double().square().sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(bad):
    assert not sum_of_powers([torch.ones(5), torch.tensor([1.0, bad])], 2.0, CPU).isfinite()
    assert not sum_of_powers([torch.ones(1 << 17).index_fill_(0, torch.tensor(9), bad)], 2.0, CPU).isfinite()


@pytest.mark.parametrize("power", [2.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_tensors_are_summed_in_portions(dtype, power):
    value = torch.randn((1 << 19) + 63, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = (value.double().abs() ** power).sum()
    torch.testing.assert_close(sum_of_powers([value], power, CPU), expected, rtol=1e-12, atol=0)
    elsewhere = torch.cat([value[:1], value])[1:]
    assert torch.equal(sum_of_powers([elsewhere], power, CPU), sum_of_powers([value], power, CPU))


def test_what_lies_on_a_cpu_is_summed_there_whatever_the_default_device_is():
    values = torch.ones(70_000, device="cpu")
    with torch.device("meta"):
        total = sum_of_powers([values], 2.0, CPU)
    assert total.item() == 70_000
