"""Checks of the kernels of layers: what the public function gives, and every gradient by name, against float64.

The same checks run interpreted on a CPU and compiled on a GPU.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # the interpreter truncates bfloat16
DTYPES = tuple(TOLERANCE)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, new memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what torch.empty returns
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def numbers(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Return normal numbers at an odd address, in rows that lie apart."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape[:-1], shape[-1] + 3, generator=generator).to(device, dtype)
    return values[..., 1:-2]


def gradients(function: Callable[..., Tensor], **inputs: Tensor) -> dict[str, Tensor]:
    """Return the result and the gradient of each input, by name, for a gradient of the result that is not one."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    y = function(**leaves)
    generator = torch.Generator().manual_seed(9)
    upstream = torch.randn(*y.shape, 2, generator=generator)[..., 0].to(y.device, y.dtype)  # every second number
    y.backward(upstream)
    return {"result": y.detach(), **{f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, what: Any = "") -> None:
    """Compare by name; the tolerance is of the largest number of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        right = expected[name].double().cpu()
        assert value is not None and value.shape == right.shape, f"{what} {name}"
        close = tolerance * max(1.0, float(right.abs().max())) if right.numel() else 0.0
        torch.testing.assert_close(
            value.double().cpu(), right, rtol=tolerance, atol=close, msg=lambda m, n=name: f"{what} {n}: {m}"
        )


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in inputs.items()}


def last_row(function: Callable[..., Tensor], right: Callable[..., Tensor], x: Tensor, **others: Tensor) -> None:
    """Compare the last of many rows [rows, width] and all gradients; the others are zero, and so is what comes back to
    them.

    Args:
        function: ours.
        right: the same in plain torch.
        x: rows of zeros, but for the last.
        others: inputs of both; those of the shape of ``x`` are rows too.
    """
    inputs = {"x": x, **others}
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    y = function(**leaves)
    grad = torch.zeros_like(y)
    grad[-1] = torch.randn(grad.shape[1:], device=grad.device)
    y.backward(grad)
    last = {name: value[-1:] if value.shape == x.shape else value for name, value in inputs.items()}
    expected = {name: value.double().requires_grad_() for name, value in last.items()}
    z = right(**expected)
    z.backward(grad[-1:].double())
    compare({"result": y[-1:].detach()}, {"result": z.detach()}, TOLERANCE[x.dtype])
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        found = leaf.grad[-1:] if leaf.shape == x.shape else leaf.grad
        compare({name: found}, {name: expected[name].grad}, TOLERANCE[x.dtype])


def used(name: str) -> bool:
    """Return whether a module of kernels was imported, so that one of them has run."""
    return f"lit_zero.kernels.{name}" in sys.modules
