"""The two halves of a LAMB step over flat pieces of parameters; the norms of whole parameters stand between them.

The update is not stored in between: it is computed from the moments once more, which costs less than the memory for it.

Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from lit_zero.kernels.choice import runs_kernel
from lit_zero.kernels.reductions import sum_of_squares

PORTION = 1 << 15  # elements: what the reference reads and writes of them stays in a core's cache


class LambGroup(NamedTuple):
    """Hyper-parameters of one group; ``adapt``: the learning rate is a part of the parameter's norm."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.0
    adapt: bool = True

    def numbers(self) -> tuple[float, ...]:
        """Return what the kernel's table holds. A complement is computed here: 1 - 0.999 in fp32 is off by 1e-5."""
        betas = (self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2)
        return (self.lr, *betas, _log(self.beta1), _log(self.beta2), self.eps, self.weight_decay, float(self.adapt))


@dataclass(frozen=True)
class LambPiece:
    """A piece of one parameter.

    Attributes:
        group: its hyper-parameters.
        param: ``[n]``, updated by the second half.
        grad: ``[n]``, only read.
        exp_avg: ``[n]``, updated by the first half.
        exp_avg_sq: ``[n]``, updated by the first half.
        step: steps taken so far, 0-d fp32 on the device; counted by the first half.
        own: the elements that count in the sums.
    """

    group: LambGroup
    param: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    own: slice

    def runs(self) -> Iterator[tuple[int, int, bool]]:
        """Yield ``(first, last, counts)`` for the elements that count in the sums, also if there are none, and then for
        those before and behind them, if there are any.
        """
        numel = self.param.numel()
        first, last, _ = self.own.indices(numel)
        last = max(first, last)
        yield first, last, True
        for begin, end in ((0, first), (last, numel)):
            if begin < end:
                yield begin, end, False


def lamb_moments(
    pieces: Sequence[LambPiece], grad_scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None
) -> torch.Tensor:
    """Count the step and update the moments of every piece; return the sums of squares of its parameter and of its
    update, over the elements that count; fp64, shape ``[pieces, 2]``.

    Args:
        pieces: at least one, all on one device.
        grad_scale: gradients are multiplied by it; 0-d fp32 on the device.
        found_inf: not zero: nothing changes, counts included, and the sums are of no use; 0-d fp32 on the device.
    """
    torch._foreach_add_([piece.step for piece in pieces], 1.0 if found_inf is None else (found_inf == 0).float())
    sums = torch.empty(len(pieces), 2, dtype=torch.float64, device=pieces[0].param.device)
    for same in _by_format(pieces):
        each = [pieces[number] for number in same]
        if _runs_kernel(each):
            from lit_zero.kernels.triton_lamb import launch_moments

            found = launch_moments(each, grad_scale, found_inf)
        else:
            found = moments_reference(each, grad_scale, found_inf)
        if len(same) == len(pieces):
            return found
        torch._foreach_copy_([sums[number] for number in same], list(found.unbind()))
    return sums


def moments_reference(
    pieces: Sequence[LambPiece], grad_scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None
) -> torch.Tensor:
    """Do what :func:`lamb_moments` does, piece by piece; the steps are counted already."""
    sums = torch.zeros(len(pieces), 2, dtype=torch.float64, device=pieces[0].param.device)
    if found_inf is not None and bool(found_inf):
        return sums
    for piece, total in zip(pieces, sums.unbind(), strict=True):
        corrections = _corrections(piece)
        for part, counts in _portions(piece):
            exp_avg, exp_avg_sq, grad = (_wide(each[part]) for each in (piece.exp_avg, piece.exp_avg_sq, piece.grad))
            grad = grad if grad_scale is None else grad * grad_scale.to(grad.dtype)
            exp_avg.lerp_(grad, 1.0 - piece.group.beta1)
            exp_avg_sq.mul_(piece.group.beta2).addcmul_(grad, grad, value=1.0 - piece.group.beta2)
            _put_back(piece.exp_avg[part], exp_avg)
            _put_back(piece.exp_avg_sq[part], exp_avg_sq)
            if counts:
                both = piece.param[part], _update(piece, part, corrections)
                total.add_(torch.stack([sum_of_squares(each) for each in both]))
    return sums


def lamb_apply(pieces: Sequence[LambPiece], sums: torch.Tensor, found_inf: torch.Tensor | None = None) -> None:
    """Move every piece against its update.

    Args:
        pieces: as the first half has left them.
        sums: what it has returned, for whole parameters. Where one of the two is zero, the learning rate is taken as it
            is.
        found_inf: as the first half has had it.
    """
    norms = sums.sqrt()
    ratios = torch.where((norms > 0).all(1), norms[:, 0] / norms[:, 1], 1.0)
    for same in _by_format(pieces):
        each = [pieces[number] for number in same]
        those = ratios if len(same) == len(pieces) else torch.stack([ratios[number] for number in same])
        if _runs_kernel(each):
            from lit_zero.kernels.triton_lamb import launch_apply

            launch_apply(each, those.float(), found_inf)
            torch.autograd.graph.increment_version([piece.param for piece in each])  # a kernel writes behind its back
        else:
            apply_reference(each, those, found_inf)


def apply_reference(pieces: Sequence[LambPiece], ratios: torch.Tensor, found_inf: torch.Tensor | None = None) -> None:
    """Move every piece against its update, piece by piece; ``ratios``: of the parameter's norm to the update's."""
    if found_inf is not None and bool(found_inf):
        return
    for piece, ratio in zip(pieces, ratios, strict=True):
        rate, corrections = ratio * piece.group.lr if piece.group.adapt else piece.group.lr, _corrections(piece)
        for part, _ in _portions(piece):
            param = _wide(piece.param[part])
            param.sub_(_update(piece, part, corrections).mul_(rate))
            _put_back(piece.param[part], param)


def _portions(piece: LambPiece) -> Iterator[tuple[slice, bool]]:
    """Yield all elements of a piece, and whether they count. Those that do are cut alike however a parameter is
    divided over ranks, so that their sums have the same bits.
    """
    for first, last, counts in piece.runs():
        for begin in range(first, last, PORTION):
            yield slice(begin, min(begin + PORTION, last)), counts


def _update(piece: LambPiece, part: slice, corrections: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the update before it is scaled, of some elements, in memory of its own."""
    first, second = corrections
    update = _wide(piece.exp_avg_sq[part]).div(second).sqrt_().add_(piece.group.eps)
    update = torch.div(_wide(piece.exp_avg[part]), update, out=update).div_(first)
    return update.add_(_wide(piece.param[part]), alpha=piece.group.weight_decay)


def _corrections(piece: LambPiece) -> list[torch.Tensor]:
    """Return ``1 - beta ** step`` for both moments, 0-d, fp64: in fp32 the first steps of 0.999 would be off by 1e-5.
    The step is counted already.
    """
    return [-torch.expm1(piece.step.double() * _log(beta)) for beta in (piece.group.beta1, piece.group.beta2)]


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -1e3  # whose exponential is nothing


def _by_format(pieces: Sequence[LambPiece]) -> list[list[int]]:
    """Return the positions of the pieces by their dtypes; one launch takes one combination."""
    found: dict[tuple[torch.dtype, ...], list[int]] = {}
    for number, piece in enumerate(pieces):
        found.setdefault((piece.param.dtype, piece.grad.dtype, piece.exp_avg.dtype), []).append(number)
    return list(found.values())


def _runs_kernel(pieces: Sequence[LambPiece]) -> bool:
    first = pieces[0]
    return runs_kernel(first.param) and torch.float64 not in (first.param.dtype, first.grad.dtype, first.exp_avg.dtype)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in the dtype that it is computed in: itself in fp32 and fp64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _put_back(stored: torch.Tensor, new: torch.Tensor) -> None:
    if stored.data_ptr() != new.data_ptr():
        stored.copy_(new)
