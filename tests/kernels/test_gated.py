"""Gated activations: the reference against torch's autograd, and the kernel against the reference, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from lit_zero.kernels.gated import ACTIVATIONS, gated

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

PLAIN = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
}


def pair(*shape, dtype, device):
    """Return the two halves of one tensor, as a layer that makes both at once returns them."""
    both = 2 * numbers(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device)
    return dict(zip(("gate", "up"), both.chunk(2, dim=-1), strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_on_a_cpu(activation, dtype):
    inputs = pair(2, 3, 7, dtype=dtype, device="cpu")
    found = gradients(lambda gate, up: gated(gate, up, activation), **inputs)
    assert all(value.dtype == dtype for value in found.values())
    compare(found, gradients(PLAIN[activation], **doubled(inputs)), TOLERANCE.get(dtype, 1e-12))


def test_two_tensors_are_saved():
    saved = []
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = gated(gate, up)
    assert saved == [gate.data_ptr(), up.data_ptr()]
    y.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            (torch.ones(2), torch.ones(2), "relu"),
            "activation='relu' is not known. Choose one of: silu, gelu, gelu_tanh",
        ),
        (
            (torch.ones(2), torch.ones(3)),
            r"gate is torch.float32 \[2\] and up is torch.float32 \[3\]: expected the same",
        ),
        ((torch.ones(2), torch.ones(2).double()), "expected the same dtype"),
    ],
)
def test_what_does_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        gated(*arguments)


def check(device, sizes, dtypes):
    for shape, dtype, activation in itertools.product(sizes, dtypes, ACTIVATIONS):
        inputs = pair(*shape, dtype=dtype, device=device)
        with poisoned():
            found = gradients(lambda gate, up, a=activation: gated(gate, up, a), **inputs)
        expected = gradients(PLAIN[activation], **doubled(inputs))
        compare(found, expected, TOLERANCE[dtype], f"{shape}, {dtype}, {activation}")
    assert used("triton_gated")


def test_kernels(interpreted):
    check("cpu", [(2, 63)], DTYPES)
    check("cpu", [(1,), (2, 2, 1025)], [torch.float32])


@pytest.mark.thorough
def test_kernels_at_all_sizes(interpreted):
    check("cpu", [(1,), (3, 1000), (2, 2, 1025)], DTYPES)


@pytest.mark.gpu
def test_kernels_on_a_gpu():
    check("cuda", [(1,), (3, 1000), (2, 2, 1025), (4096, 11008)], DTYPES)


@pytest.mark.gpu
def test_past_two_to_the_31_elements():
    check_last_row("cuda", 2**17 + 1, 2**14)  # the last row begins at 2^31


def check_last_row(device, rows, width):
    gate, up = (torch.zeros(rows, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    gate[-1], up[-1] = 1.5, torch.randn(width, device=device)
    last_row(lambda x, up: gated(x, up), lambda x, up: PLAIN["silu"](x, up), gate, up=up)


def test_the_last_of_some_rows(interpreted):
    check_last_row("cpu", 3, 8)
