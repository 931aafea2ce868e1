"""Rotary position embedding: the reference against its definition, and the kernel against the reference, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from lit_zero.kernels.rotary import angles, rotary

from tests.kernels.layer_checks import DTYPES, TOLERANCE, compare, gradients, numbers, poisoned, used


def plain(x, cos, sin, interleaved):
    """The definition: x cos + (x with its pairs turned by a right angle) sin."""
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    else:
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin


def heads(batch, count, times, dim, dtype, device):
    """Return queries as attention makes them: [batch, heads, time, dim] in the order [batch, time, heads, dim]."""
    return numbers(batch, times, count, dim, dtype=dtype, device=device).transpose(1, 2)


def tables(*shape, dtype, device):
    return [numbers(*shape, dtype=dtype, device=device, seed=seed) for seed in (3, 4)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_on_a_cpu(interleaved, dtype):
    x, (cos, sin) = heads(2, 3, 5, 8, dtype, "cpu"), tables(2, 1, 5, 8, dtype=dtype, device="cpu")
    found = gradients(lambda x: rotary(x, cos, sin, interleaved), x=x)
    assert all(value.dtype == dtype for value in found.values())
    expected = gradients(lambda x: plain(x, cos.double(), sin.double(), interleaved), x=x.double())
    compare(found, expected, TOLERANCE.get(dtype, 1e-12))


def test_the_result_has_the_dtype_that_a_product_would_have():
    x = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    y = rotary(x, *angles(3, 4))
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16


def test_only_differences_of_positions_matter():
    cos, sin = angles(10, 8)
    q, k = torch.randn(2, 1, 8)
    scores = [float(rotary(q, cos[i], sin[i]) @ rotary(k, cos[j], sin[j]).T) for i, j in ((2, 0), (9, 7))]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert torch.equal(rotary(q, cos[0], sin[0]), q)


@pytest.mark.parametrize(
    ("x", "cos", "words"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), r"x is \[2, 3\], cos \[2, 3\].*the same even last dimension"),
        (torch.ones(2, 4), torch.ones(2, 2), "the same even last dimension"),
        (torch.ones(2, 4), torch.ones(3, 4), "broadcasts to that of x"),
        (torch.ones(2, 4), torch.ones(2, 4, requires_grad=True), "cos or sin needs a gradient"),
    ],
)
def test_what_does_not_fit(x, cos, words):
    with pytest.raises(ValueError, match=words):
        rotary(x, cos, cos)


def check(device, sizes, dtypes):
    for (batch, count, times, dim), dtype, interleaved in itertools.product(sizes, dtypes, (False, True)):
        x = heads(batch, count, times, dim, dtype, device)
        for shape in ((batch, 1, times, dim), (times, dim), (1, count, times, dim)):
            cos, sin = tables(*shape, dtype=dtype, device=device)
            with poisoned():
                found = gradients(lambda x, c=cos, s=sin, i=interleaved: rotary(x, c, s, i), x=x)
            right = [t.double() for t in (cos, sin)]
            expected = gradients(lambda x, r=right, i=interleaved: plain(x, *r, i), x=x.double())
            compare(found, expected, TOLERANCE[dtype], f"{x.shape}, {shape}, {dtype}, {interleaved}")
    assert used("triton_rotary")


def test_kernels(interpreted):
    check("cpu", [(2, 3, 2, 6)], DTYPES)
    check("cpu", [(1, 9, 1, 2)], [torch.float32])


@pytest.mark.thorough
def test_kernels_at_all_sizes(interpreted):
    check("cpu", [(1, 1, 1, 2), (2, 9, 7, 60), (1, 8, 3, 128)], DTYPES)


@pytest.mark.gpu
def test_kernels_on_a_gpu():
    check("cuda", [(1, 1, 1, 2), (2, 9, 63, 60), (4, 32, 1000, 128)], DTYPES)


@pytest.mark.gpu
def test_past_two_to_the_31_elements():
    check_last_position("cuda", 2**19 + 1, 32)


def check_last_position(device, times, count):
    x = torch.zeros(1, count, times, 128, dtype=torch.bfloat16, device=device)
    x[0, -1, -1] = torch.randn(128, device=device)
    cos, sin = (t[None].bfloat16() for t in angles(times, 128, device=device))
    leaf = x.detach().requires_grad_()
    y = rotary(leaf, cos, sin)
    y.backward(x)
    c, s = (t[0, -1].double() for t in (cos, sin))
    last = x[0, -1, -1].double()
    compare({"last": y[0, -1, -1].detach()}, {"last": plain(last, c, s, False)}, 3e-2)
    compare({"gradient": leaf.grad[0, -1, -1]}, {"gradient": plain(last, c, -s, False)}, 3e-2)


def test_the_last_of_some_positions(interpreted):
    check_last_position("cpu", 2, 3)
