"""Orthogonalisation by matrix products alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Bytes of the matrices that are orthogonalised together; what is computed in between takes about three times that. On a
# CPU they stay in a core's cache. On a GPU larger matrices fill it by themselves.
STACKED_BYTES = {"cpu": 1 << 18, "cuda": 1 << 26}


def orthogonalize(
    matrix: torch.Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
) -> torch.Tensor:
    """Return a matrix with the singular vectors of ``matrix`` and singular values near 1, or a stack of them.

    Each step sends a singular value ``s`` to ``a s + b s^3 + c s^5``. With the default coefficients small ones grow
    fastest, and after five steps those above a thousandth of the norm lie between about 0.7 and 1.2: enough for Muon,
    and it works in bf16.

    Args:
        matrix: shape ``[m, n]``, or ``[k, m, n]`` for ``k`` of them; not changed. Its dtype is that of all products.
        steps: number of steps.
        coefficients: ``(a, b, c)``.
        eps: the least norm that is divided by.

    Source: Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), Newton-Schulz iteration.
    """
    a, b, c = coefficients
    add = torch.addmm if matrix.dim() == 2 else torch.baddbmm
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix  # [..., m, n] with m <= n: the smaller Gram matrix
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / norm.clamp(min=eps)  # then no singular value is above 1
    for _ in range(steps):
        gram = x @ x.mT  # [..., m, m]
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).contiguous()


def stacks(alike: Sequence[Hashable], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Return which matrices are orthogonalised together: their positions, every one once.

    Args:
        alike: of each matrix, what those of a stack have in common: the shape, and whatever else.
        sizes: of each matrix, in bytes.
        limit: bytes of a stack; a matrix that has more is alone.
    """
    found: list[list[int]] = []
    last: dict[Hashable, list[int]] = {}  # that is not full
    for number, (kind, size) in enumerate(zip(alike, sizes, strict=True)):
        if kind not in last or (len(last[kind]) + 1) * size > limit:
            last[kind] = []
            found.append(last[kind])
        last[kind].append(number)
    return found
