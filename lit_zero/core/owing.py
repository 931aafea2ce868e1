"""Gradients that are still to be multiplied by a factor.

To clip by a norm, and to take a loss scale off, all gradients are multiplied by one number. A step that reads them
anyway can do so in passing. Until then the factor is *owed*: it is kept once for all gradients of an optimizer. Whoever
reads one of them before the step, as ``param.grad``, sees it multiplied: then and there all are, once. A tensor that
was taken from ``param.grad`` before shows it only then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn


class Owed:
    """The factor that some gradients are still to be multiplied by; none, to begin with."""

    def __init__(self) -> None:
        self._factor: torch.Tensor | None = None
        self._params: Sequence[nn.Parameter] = ()  # only while something is owed: they know of this object

    def __bool__(self) -> bool:
        return self._factor is not None

    def owe(self, factor: torch.Tensor, params: Sequence[nn.Parameter]) -> None:
        """Let the gradients be multiplied later, after what is owed already.

        Args:
            factor: 0-d.
            params: whose gradients; each time the same.
        """
        self._factor = (factor if self._factor is None else self._factor * factor).float()
        self._params = params

    def settle(self) -> None:
        """Multiply the gradients now, if something is owed."""
        factor, params = self._factor, self._params
        if factor is not None:
            self.forgive()  # first: to read a gradient is to ask for this
            multiply([param.grad for param in params if param.grad is not None], factor)

    def forgive(self) -> None:
        """Owe nothing any more: the gradients are not needed."""
        self._factor, self._params = None, ()

    @contextlib.contextmanager
    def lent(self) -> Iterator[torch.Tensor | None]:
        """Inside, gradients are read as they lie; give the factor that belongs to them, ``None`` for none. It is owed
        again afterwards.
        """
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

    def pays(self, param: torch.Tensor, gradient: torch.dtype) -> bool:
        """Return whether the step of such a parameter does so with gradients of that dtype, and reads nothing back from
        the device.
        """
        ...
