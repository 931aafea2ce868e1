"""Layer norm and RMS norm: the reference against torch's, and the kernel against the reference, in float64."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from lit_zero.kernels.gated import gated
from lit_zero.kernels.normalization import layer_norm, normalized, normalized_backward, rms_norm
from lit_zero.kernels.rotary import rotary
from torch import Tensor

from tests.kernels.layer_checks import (
    DTYPES,
    TOLERANCE,
    compare,
    doubled,
    gradients,
    last_row,
    numbers,
    poisoned,
    used,
)

SIZES = [(1, 1), (5, 63), (3, 1000)]  # rows, width


def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, offset: float, centred: bool) -> Tensor:
    """The definition, in torch's own words."""
    shape = x.shape[-1:]
    if centred:
        return F.layer_norm(x, shape, weight, bias, 1e-5)
    return F.rms_norm(x, shape, None if weight is None else weight + offset, 1e-5)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("names", [(), ("weight",), ("weight", "bias")])
def test_the_reference_is_torchs_definition(names, centred):
    offset = 0.0 if centred else 1.0
    names = names if centred else names[:1]
    columns = {name: numbers(7, dtype=torch.float64, device="cpu", seed=i) for i, name in enumerate(names)}
    x, upstream = (numbers(4, 7, dtype=torch.float64, device="cpu", seed=seed) for seed in (5, 6))
    leaves = [t.detach().requires_grad_() for t in (x, *columns.values())]
    weight, bias = (dict(zip(names, leaves[1:], strict=True)).get(name) for name in ("weight", "bias"))
    expected = plain(leaves[0], weight, bias, offset, centred)
    expected.backward(upstream)

    weight, bias = columns.get("weight"), columns.get("bias")
    y, mean, rstd = normalized(x, weight, bias, 1e-5, offset, centred, torch.float64)
    found = normalized_backward(upstream, x, weight, mean, rstd, offset)
    torch.testing.assert_close(y, expected.detach())
    for name, value, leaf in zip(("x", "weight", "bias"), found, leaves, strict=False):
        torch.testing.assert_close(value, leaf.grad, msg=lambda m, n=name: f"gradient of {n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_rms_norm_on_a_cpu(dtype):
    """Without eps, too, and with a weight of two dimensions."""
    inputs = {"x": numbers(2, 3, 4, 5, dtype=dtype, device="cpu"), "weight": torch.randn(4, 5).to(dtype)}
    found = gradients(lambda x, weight: rms_norm(x, (4, 5), weight), **inputs)
    expected = gradients(lambda x, weight: F.rms_norm(x, (4, 5), weight, torch.finfo(dtype).eps), **doubled(inputs))
    assert all(value.dtype == dtype for value in found.values())
    if dtype in (torch.float64, torch.float32):
        compare(found, expected, TOLERANCE.get(dtype, 1e-12))
    stock = gradients(lambda x, weight: F.rms_norm(x, (4, 5), weight), **inputs)
    compare(found, stock, TOLERANCE.get(dtype, 1e-12))


def test_layer_norm_on_a_cpu_is_torchs():
    x, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    assert torch.equal(layer_norm(x, (8,), weight, bias), F.layer_norm(x, (8,), weight, bias))


def test_only_what_is_wanted_gets_a_gradient():
    x, weight = torch.randn(3, 8), torch.randn(8, requires_grad=True)
    rms_norm(x, (8,), weight).sum().backward()
    assert x.grad is None and weight.grad is not None
    assert not rms_norm(x, (8,), weight.detach()).requires_grad


def test_a_gradient_of_a_gradient_is_refused():
    x = torch.randn(3, 8, requires_grad=True)
    for y in (rms_norm(x, (8,)), gated(x, x), rotary(x, x.detach(), x.detach())):
        with pytest.raises(RuntimeError, match="fused layers and losses have no second derivative.*Use layers=plain"):
            torch.autograd.grad(y.sum(), x, create_graph=True)  # torch would hand out one without a graph
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: rms_norm(x, (8,)).sum())(x.detach())


def test_shapes_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"normalized_shape=\[8\] does not fit weight, whose last dimensions are \(4,\)"
    ):
        layer_norm(torch.ones(2, 8), (8,), torch.ones(4))
    with pytest.raises(ValueError, match=r"normalized_shape=\[8\] does not fit x, whose last dimensions are \(4,\)"):
        rms_norm(torch.ones(2, 4), (8,))


def check(device, sizes, dtypes):
    for (rows, width), dtype, centred in itertools.product(sizes, dtypes, (True, False)):
        what = f"{rows} x {width}, {dtype}, {'layer' if centred else 'rms'} norm"
        inputs = {
            "x": numbers(rows, width, dtype=dtype, device=device),
            "weight": numbers(width, dtype=dtype, device=device, seed=1),
            "bias": numbers(width, dtype=dtype, device=device, seed=2),
        }
        if centred:

            def ours(x, weight, bias, width=width):
                return layer_norm(x, (width,), weight, bias)

        else:
            del inputs["bias"]

            def ours(x, weight, width=width):
                return rms_norm(x, (width,), weight, 1e-5, 1.0)

        def right(x, weight, bias=None, centred=centred):
            return plain(x, weight, bias, 1.0, centred)

        with poisoned():
            found = gradients(ours, **inputs)
        compare(found, gradients(right, **doubled(inputs)), TOLERANCE[dtype], what)
    assert used("triton_normalization")


def check_without_weight(device):
    x = numbers(2, 60, dtype=torch.float32, device=device)
    with poisoned():
        found = gradients(lambda x: layer_norm(x, (60,)), x=x)
        compare(found, gradients(lambda x: F.layer_norm(x, (60,)), x=x.double()), 2e-5)
        found = gradients(lambda x: rms_norm(x, (60,), eps=1e-5), x=x)
        compare(found, gradients(lambda x: F.rms_norm(x, (60,), eps=1e-5), x=x.double()), 2e-5)


def test_kernels(interpreted):
    check("cpu", SIZES[1:2], DTYPES)
    check("cpu", SIZES[::2], [torch.float32])
    check_without_weight("cpu")


def test_a_backward_of_many_rows_per_program(interpreted, monkeypatch):
    monkeypatch.setattr(importlib.import_module("lit_zero.kernels.triton_normalization"), "_PROGRAMS", 2)
    check("cpu", [(5, 9)], [torch.float32])


@pytest.mark.thorough
def test_kernels_at_all_sizes(interpreted):
    check("cpu", SIZES, DTYPES)


@pytest.mark.gpu
def test_kernels_on_a_gpu():
    check("cuda", [*SIZES, (1000, 4096), (3, 8191)], DTYPES)
    check_without_weight("cuda")


@pytest.mark.gpu
def test_past_two_to_the_31_elements():
    check_last_row("cuda", 2**17 + 1, 2**14)  # the last row begins at 2^31


def check_last_row(device, rows, width):
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=device)
    x[-1], weight = torch.randn(width, device=device), torch.randn(width, device=device)
    for ours, stock in ((layer_norm, F.layer_norm), (rms_norm, F.rms_norm)):
        last_row(
            lambda x, w, f=ours: f(x, (width,), w, eps=1e-5),
            lambda x, w, f=stock: f(x, (width,), w, eps=1e-5),
            x,
            w=weight,
        )


def test_the_last_of_some_rows(interpreted):
    check_last_row("cpu", 3, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("ours, stock", [(layer_norm, F.layer_norm), (rms_norm, F.rms_norm)])
def test_autocast_on_a_gpu_gives_torchs_dtype(ours, stock):
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        assert ours(x, (64,)).dtype == stock(x, (64,)).dtype
