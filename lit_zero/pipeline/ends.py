"""All outputs of a stage joined in one node of the graph, so that a split backward has one place to begin.

[Note: a root for the split backward]
torch's split backward follows the paths from what a stage has received to its outputs, and computes gradients of
weights from where they meet those paths. A weight that never meets one would be left out: those of a stage whose input
needs no gradient (everything before it is frozen), and those that only feed an output which does not depend on the
input. So the outputs are joined in a root, which also takes a leaf of our own: its path holds nothing but the root, and
there every weight that meets no other path is found. It also hides from torch whether an output is a view, which it
refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def join(outputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a root from which a backward gives ``outputs`` the gradients ``grads``, and a leaf that leads to it alone.

    Args:
        outputs: at least one, all of which require a gradient.
        grads: one for each output, of its shape; ``None`` stands for one.

    Returns:
        The root, without a dimension, to be given the gradient one, and the leaf.
    """
    leaf = torch.zeros((), device=outputs[0].device, requires_grad=True)
    given = [torch.ones_like(t) if grad is None else grad for t, grad in zip(outputs, grads, strict=True)]
    root: torch.Tensor = _Join.apply(leaf, given, *outputs)
    return root, leaf


def from_root_alone(root: Any, branches: Sequence[dict[str, Any]]) -> None:
    """Let branches that meet the root begin there and nowhere else: from it, everything below is computed anyway.

    Args:
        root: the root's node.
        branches: of torch's split backward; changed in place.
    """
    for branch in branches:
        if root in branch["intermediates"] and len(branch["intermediates"]) > 1:
            place = branch["intermediates"].index(root)
            branch["intermediates"] = [branch["intermediates"][place]]
            branch["grads"] = [branch["grads"][place]]


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, grads: list[torch.Tensor], *outputs: torch.Tensor) -> torch.Tensor:
        ctx.grads = grads
        return leaf.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        return (torch.zeros_like(grad[0]), None, *ctx.grads)
