"""LAMB's kernels against their reference in fp64, with elements that do not count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lit_zero.kernels.lamb import LambGroup, LambPiece, lamb_apply, lamb_moments, moments_reference

GROUPS = (LambGroup(0.1, 0.9, 0.999, 1e-6, 0.1), LambGroup(0.03, 0.0, 0.9, 1e-3, 0.0, adapt=False))
# Elements of a piece, and those that count: all, some at either end, in the middle, none.
PIECES = (
    (1, 0, 1),
    (63, 0, 63),
    (1000, 0, 400),
    (1000, 400, 1000),
    (2048, 7, 2041),
    (5000, 3, 4100),
    (9, 9, 9),
    (0, 0, 0),
)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def pieces(param: torch.dtype, grad: torch.dtype, state: torch.dtype, device: torch.device) -> list[LambPiece]:
    """Return pieces at odd addresses, with other memory around them."""
    generator = torch.Generator().manual_seed(0)

    def part(size: int, dtype: torch.dtype, positive: bool = False) -> torch.Tensor:
        whole = torch.randn(size + 4, generator=generator)
        return (whole.abs() if positive else whole).to(device, dtype)[1:-3]

    found = []
    for number, (size, first, last) in enumerate(PIECES):
        tensors = part(size, param), part(size, grad), part(size, state), part(size, state, positive=True)
        step = torch.tensor(float(number % 3), device=device)
        found.append(LambPiece(GROUPS[number % 2], *tensors, step, slice(first, last)))
    return found


def in_fp64(each: list[LambPiece]) -> list[LambPiece]:
    """Return copies on the CPU, which only the reference can step."""
    keys = ("param", "grad", "exp_avg", "exp_avg_sq")
    return [
        replace(piece, step=piece.step.cpu().clone(), **{key: getattr(piece, key).cpu().double() for key in keys})
        for piece in each
    ]


def check(param: torch.dtype, grad: torch.dtype, state: torch.dtype, device: torch.device) -> None:
    """Three steps; what is rounded to a small dtype is rounded in the expected values too."""
    given = pieces(param, grad, state, device)
    for _ in range(3):
        expected = in_fp64(given)
        sums, wanted = lamb_moments(given), lamb_moments(expected)
        tolerance = {FP32: 1e-5, BF16: 2e-2, FP16: 3e-3}[state]
        torch.testing.assert_close(sums.cpu(), wanted, rtol=tolerance, atol=1e-9)
        lamb_apply(given, sums)
        lamb_apply(expected, sums.cpu())
        for got, each in zip(given, expected, strict=True):
            assert got.step.item() == each.step.item()
            close = {"param": max(param, state, key=_step), "exp_avg": state, "exp_avg_sq": state}
            for key, dtype in close.items():
                tolerance = {FP32: 1e-5, BF16: 1e-2, FP16: 2e-3}[dtype]
                wanted = getattr(each, key)
                torch.testing.assert_close(getattr(got, key).cpu().double(), wanted, rtol=tolerance, atol=tolerance)


def _step(dtype: torch.dtype) -> float:
    """Return the distance from 1 to the next number."""
    return torch.finfo(dtype).eps


@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (FP32, BF16, FP32), (BF16, BF16, BF16), (FP16, FP16, FP32)])
def test_kernel_equals_the_reference(device, dtypes):
    check(*dtypes, device)


def test_gradients_are_scaled_and_a_step_is_skipped(device):
    given, scaled = pieces(FP32, FP32, FP32, device), pieces(FP32, FP32, FP32, device)
    for piece in scaled:
        piece.grad.mul_(8.0)
    factor, found = torch.tensor(0.125, device=device), torch.zeros((), device=device)
    lamb_apply(given, lamb_moments(given))
    lamb_apply(scaled, lamb_moments(scaled, factor, found), found)
    for one, other in zip(given, scaled, strict=True):
        for key in ("param", "exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(getattr(one, key), getattr(other, key)), key
        assert not other.grad.numel() or torch.equal(other.grad, 8.0 * one.grad), "the gradient is only read"
        other.grad.fill_(torch.inf)
    found.fill_(1.0)
    lamb_apply(scaled, lamb_moments(scaled, factor, found), found)
    for one, other in zip(given, scaled, strict=True):
        for key in ("param", "exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(getattr(one, key), getattr(other, key)), f"{key} of a step that is skipped"


def test_only_what_counts_is_summed(device):
    [piece, *_] = pieces(FP32, FP32, FP32, device)[4:]

    def fresh(own: slice) -> LambPiece:
        states = {"exp_avg": piece.exp_avg.clone(), "exp_avg_sq": piece.exp_avg_sq.clone()}
        return replace(piece, own=own, step=torch.zeros((), device=device), **states)

    sums = [lamb_moments([fresh(own)]) for own in (slice(0, 700), slice(700, 2048), slice(0, 2048))]
    torch.testing.assert_close(sums[0] + sums[1], sums[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(sums[2][0, 0], piece.param.double().square().sum(), rtol=1e-6, atol=0)


def test_memory_around_a_piece_stays(device):
    whole = [torch.full((30,), 3.0, device=device) for _ in range(4)]
    piece = LambPiece(GROUPS[0], *(each[5:20] for each in whole), torch.zeros((), device=device), slice(0, 15))
    lamb_apply([piece], lamb_moments([piece]))
    for each in (whole[0], whole[2], whole[3]):
        assert (each[:5] == 3.0).all() and (each[20:] == 3.0).all() and (each[5:20] != 3.0).all()
    assert (whole[1] == 3.0).all(), "the gradient is only read"


def test_mixed_formats_keep_their_places(device):
    one, other = pieces(FP32, FP32, FP32, device)[2:4], pieces(BF16, BF16, BF16, device)[2:4]
    mixed = [one[0], other[0], one[1], other[1]]
    expected = torch.stack([moments_reference(in_fp64([_counted(piece)]))[0] for piece in mixed])
    torch.testing.assert_close(lamb_moments(mixed).cpu(), expected, rtol=2e-2, atol=0)


def _counted(piece: LambPiece) -> LambPiece:
    return replace(piece, step=piece.step + 1)
