"""Scale, found-inf and sum of squares in one pass: the reference against fp64, and the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from lit_zero.kernels import unscale
from lit_zero.kernels.unscale import unscale_reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 63, 1000, 4096, 0, 4097)


def tensors(device: torch.device, dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[torch.Tensor]:
    """Return tensors of awkward sizes, every second one at an address that is no multiple of 16 bytes."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number, (dtype, size) in enumerate((dtype, size) for dtype in dtypes for size in SIZES):
        whole = torch.randn(size + 1, generator=generator).to(device, dtype)
        found.append(whole[1:] if number % 2 else whole[:-1])
    return found


def zero(device: torch.device) -> torch.Tensor:
    return torch.zeros((), device=device)


def test_reference_equals_fp64():
    values, found = tensors(torch.device("cpu")), torch.zeros(())
    expected = [(value.double() * 0.25) for value in values]
    total = unscale_reference(values, torch.tensor(0.25), found)
    assert (total.dtype, total.dim(), found.item()) == (torch.float64, 0, 0.0)
    torch.testing.assert_close(total, sum(each.square().sum() for each in expected), rtol=1e-9, atol=0)
    for value, each in zip(values, expected, strict=True):
        torch.testing.assert_close(value, each.to(value.dtype), rtol=0, atol=0)


def test_kernel_equals_the_reference(device):
    values, found, scale = tensors(device), zero(device), torch.tensor(0.3, device=device)
    expected = [value.clone() for value in values]
    total = unscale(values, scale, found)
    assert (total.dtype, total.dim(), total.device, found.item()) == (torch.float64, 0, scale.device, 0.0)
    torch.testing.assert_close(total, unscale_reference(expected, scale), rtol=1e-12, atol=0)
    for value, each in zip(values, expected, strict=True):
        torch.testing.assert_close(value, each, rtol=0, atol=0)


def test_elements_beside_a_tensor_stay(device):
    whole = torch.full((70,), 3.0, device=device)
    unscale([whole[3:66]], torch.tensor(2.0, device=device))
    assert whole.tolist() == [3.0] * 3 + [6.0] * 63 + [3.0] * 4


def test_without_a_scale_it_only_looks(device):
    values = tensors(device, (torch.float32, torch.bfloat16))
    expected = [value.clone() for value in values]
    total = unscale(values)
    torch.testing.assert_close(total, unscale_reference(expected), rtol=1e-12, atol=0)
    assert all(torch.equal(value, each) for value, each in zip(values, expected, strict=True))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_found(device, bad):
    for dtype in (torch.float32, torch.bfloat16):
        for spoiled in (0, 1):
            values, found = (
                [torch.ones(5, device=device, dtype=dtype), torch.ones(4097, device=device, dtype=dtype)],
                zero(device),
            )
            values[spoiled][-1] = bad
            total = unscale(values, torch.tensor(0.5, device=device), found)
            assert found.item() == 1.0 and not total.isfinite()
            assert values[spoiled][0].item() == 0.5, "it is scaled all the same"


def test_found_inf_is_never_taken_back(device):
    found = torch.ones((), device=device)
    unscale([torch.ones(3, device=device)], None, found)
    assert found.item() == 1.0
    values = [torch.full((3,), float("inf"), device=device)]
    unscale_reference(values, None, found)
    assert found.item() == 1.0


def test_squares_may_be_larger_than_fp32_holds(device):
    found = zero(device)
    total = unscale([torch.full((5000,), 1e30, device=device)], None, found)
    assert total.item() == pytest.approx(5e63) and found.item() == 0.0


def test_nothing_sums_to_zero(device):
    for nothing in ([], [torch.empty(0, device=device)]):
        assert unscale(nothing, torch.tensor(2.0, device=device)).item() == 0.0


def test_a_tensor_with_gaps_is_refused_by_the_kernel(device):
    with pytest.raises(ValueError) as caught:
        unscale([torch.ones(4, 3, device=device).t()])
    assert str(caught.value) == (
        "A tensor of shape (3, 4) and stride (1, 3) is not contiguous, and flat kernels take contiguous tensors only. "
        "Pass tensor.contiguous(), and copy back what was written."
    )


def test_large_elements_of_fp16_do_not_overflow(device):
    total = unscale([torch.full((1000,), 6e4, dtype=torch.float16, device=device)])
    assert total.item() == pytest.approx(1000 * float(torch.tensor(6e4).half()) ** 2, rel=1e-6)


def test_the_sum_of_nothing_lies_where_it_belongs():
    meta = torch.device("meta")
    assert unscale([torch.empty(0, device=meta)]).device == meta
    assert unscale([], device=meta).device == meta
    assert unscale([]).device == torch.device("cpu") and unscale([]).item() == 0.0
