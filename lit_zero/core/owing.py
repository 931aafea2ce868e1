"""Gradients that are still to be multiplied by a factor.

To clip by a norm, and to take a loss scale off, all gradients are multiplied by one number. A step that reads them
anyway can do so in passing. Until then the factor is *owed*: it is kept once for all gradients of an optimizer. Whoever
reads one of them before the step, as ``param.grad``, sees it multiplied: then and there all are, once. A tensor that
was taken from ``param.grad`` before shows it only then; to write to it in between is an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from lit_zero.core.errors import LitZeroError


class Owed:
    """The factor that some gradients are still to be multiplied by; none, to begin with."""

    def __init__(self) -> None:
        self._factor: torch.Tensor | None = None
        self._params: Sequence[nn.Parameter] = ()  # only while something is owed: they know of this object
        self._versions: list[int | None] = []  # of their gradients

    def __bool__(self) -> bool:
        return self._factor is not None

    def owe(self, factor: torch.Tensor, params: Sequence[nn.Parameter]) -> None:
        """Let the gradients be multiplied later, after what is owed already.

        Args:
            factor: 0-d.
            params: whose gradients; each time the same.
        """
        self._refuse_written()
        self._factor = (factor if self._factor is None else self._factor * factor).float()
        self._params = params
        self._versions = [None if grad is None else grad._version for grad in map(_GRAD.__get__, params)]

    def settle(self) -> None:
        """Multiply the gradients now, if something is owed.

        Raises:
            LitZeroError: if one of them has been written to since.
        """
        factor, params = self._factor, self._params
        if factor is not None:
            self._refuse_written()
            self.forgive()  # first: to read a gradient is to ask for this
            multiply([param.grad for param in params if param.grad is not None], factor)

    def forgive(self) -> None:
        """Owe nothing any more: the gradients are not needed."""
        self._factor, self._params, self._versions = None, (), []

    def _refuse_written(self) -> None:
        for param, version in zip(self._params, self._versions, strict=True):
            grad = _GRAD.__get__(param)
            if grad is not None and version is not None and grad._version != version:
                raise LitZeroError(
                    "A gradient was written to after it was clipped, through a tensor that had been taken from "
                    "param.grad before: what clipping multiplies it by is still to come, and would be applied to what "
                    "was written. Take param.grad anew after clipping."
                )

    @contextlib.contextmanager
    def lent(self) -> Iterator[torch.Tensor | None]:
        """Inside, gradients are read as they lie; give the factor that belongs to them, ``None`` for none. It is owed
        again afterwards.

        Raises:
            LitZeroError: if a gradient has been written to since.
        """
        self._refuse_written()
        factor, self._factor = self._factor, None
        try:
            yield factor
        finally:
            self._factor = factor


_NOTHING = Owed()
_GRAD: Any = torch.Tensor.grad


class Owing(nn.Parameter):
    """A parameter whose gradient may be owed a factor.

    Attributes:
        owed: the factor.
    """

    owed: Owed = _NOTHING

    @property
    def grad(self) -> torch.Tensor | None:
        self.owed.settle()
        found: torch.Tensor | None = _GRAD.__get__(self)
        return found

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        if value is not None:  # which is not owed what its predecessor is
            self.owed.settle()
        _GRAD.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        _GRAD.__delete__(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.detach(), self.requires_grad).__reduce_ex__(protocol)  # what is owed stays here


def owed_in(groups: Iterable[Mapping[str, Any]]) -> Owed:
    """Return what is owed to the gradients in an optimizer's groups."""
    found = (param.owed for group in groups for param in group["params"] if isinstance(param, Owing))
    return next(found, _NOTHING)


def multiply(grads: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply tensors, on whatever devices, by a 0-d one."""
    for device in {grad.device for grad in grads}:
        torch._foreach_mul_([grad for grad in grads if grad.device == device], factor.to(device))


@runtime_checkable
class Pays(Protocol):
    """An optimizer whose step may multiply gradients by what they are owed. It changes nothing where its ``found_inf``,
    as a loss scaler sets it, is not zero.
    """

    @property
    def may_pay(self) -> bool:
        """Whether :meth:`pays` may ever be true; always the same."""
        ...

    def pays(self, param: torch.Tensor, gradient: torch.dtype) -> bool:
        """Return whether the step of such a parameter does so with gradients of that dtype, and reads nothing back from
        the device (but in a first step, which may have to know whether it is one).
        """
        ...
