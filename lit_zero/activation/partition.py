"""Arguments of blocks, shared out over ranks that hold the same ones: each keeps a part until the block runs again.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020, section 6.1
(partitioned activation checkpointing).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from lit_zero.activation.recompute import Kept
from lit_zero.activation.surroundings import Call
from lit_zero.comm.exchange import Exchange, Gather
from lit_zero.core.errors import LitZeroError

_SMALL = 1 << 10  # bytes below which a tensor is kept whole


class _Part:
    """This rank's part of a tensor.

    Args:
        group: the ranks.
        tensor: whole, on each of them.
    """

    def __init__(self, group: Exchange, tensor: torch.Tensor) -> None:
        self._group, self._shape, self._wanted = group, tensor.shape, tensor.requires_grad
        size = -(-tensor.numel() // group.size)
        flat = tensor.detach().reshape(-1)[group.rank * size : (group.rank + 1) * size]
        self._own = flat.new_zeros(size)  # the last part is filled up with zeros
        self._own[: flat.numel()] = flat

    def whole(self) -> torch.Tensor:
        """Return the tensor. All ranks of the group together."""
        full = self._own.new_empty(self._own.numel() * self._group.size)
        self._group.all_gather([Gather(full, self._own)]).wait()
        tensor = full[: self._shape.numel()].view(self._shape)
        return tensor.requires_grad_(self._wanted)


class Parted:
    """Arguments of a block of which every rank keeps a part.

    Args:
        group: the ranks that hold the same.
        call: ``(args, kwargs)`` of a block.
        title: the block, for messages.

    Raises:
        LitZeroError: if the ranks hold something else each.
    """

    def __init__(self, group: Exchange, call: Call, title: str) -> None:
        large: list[torch.Tensor] = []

        def part(tensor: torch.Tensor) -> Any:
            if not tensor.is_floating_point() or tensor.nbytes < _SMALL:
                return tensor
            large.append(tensor)
            return _Part(group, tensor)

        parted = tree_map_only(torch.Tensor, part, call)
        self._kept = Kept(parted, title)  # what is kept whole must not be written to
        _refuse_different(group, large, title)

    def back(self) -> Call:
        """Return the arguments. All ranks of the group together."""
        found: Call = tree_map_only(_Part, lambda each: each.whole(), self._kept.back())
        return found


def _refuse_different(group: Exchange, tensors: list[torch.Tensor], title: str) -> None:
    """Compare a number or two of each tensor over the ranks: parts of different tensors would make a wrong one."""
    if not tensors:
        return
    marks = torch.stack([mark for t in tensors for mark in (_sum(t), torch.full_like(_sum(t), t.numel()))])
    highest, lowest = group.maximum(marks), -group.maximum(-marks)
    if not torch.equal(highest.nan_to_num(), lowest.nan_to_num()):
        raise LitZeroError(
            f"The ranks that activation.ranks={group.size} puts together hold different arguments of block {title!r}. "
            "Give them the same batches and seeds (Trainer(use_distributed_sampler=False) and a sampler of your own), "
            "or use activation='full'."
        )


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.float64).sum() if tensor.device.type != "mps" else tensor.detach().sum()
