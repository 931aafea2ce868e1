"""Orthogonalisation by matrix products alone."""

from __future__ import annotations

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(
    matrix: torch.Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
) -> torch.Tensor:
    """Return a matrix with the singular vectors of ``matrix`` and singular values near 1.

    Each step sends a singular value ``s`` to ``a s + b s^3 + c s^5``. With the default coefficients small ones grow
    fastest, and after five steps those above a thousandth of the norm lie between about 0.7 and 1.2: enough for Muon,
    and it works in bf16.

    Args:
        matrix: shape ``[m, n]``; not changed. Its dtype is that of all products.
        steps: number of steps.
        coefficients: ``(a, b, c)``.
        eps: the least norm that is divided by.

    Source: Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), Newton-Schulz iteration.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix  # [m, n] with m <= n: the smaller Gram matrix
    x = x / x.norm().clamp(min=eps)  # then no singular value is above 1
    for _ in range(steps):
        gram = x @ x.T  # [m, m]
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).contiguous()
