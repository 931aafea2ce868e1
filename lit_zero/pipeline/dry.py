"""Run code without the values of parameters: shapes are computed, what depends on no parameter is computed for real.

[Note: what is real in a dry run]
Masks, positions and lengths that the user's code makes from the batch keep their values, because code branches on them
(``if mask.all()``). Everything that depends on a parameter has a shape, a dtype and a device, and no memory. This is
what a stage sees of what other stages hold, so a dry run takes the branches that the stages will take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
# Operators that look only at the shape of a tensor. What they give is known although the tensor is not.
SHAPE_ONLY = {_aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.new_zeros, _aten.new_ones, _aten.new_full}
_NEED_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    NotImplementedError,
)


class Dry(TorchDispatchMode):
    """While active, operators on parameters and on what depends on them compute shapes only.

    Args:
        device: where parameters, and tensors that stand on the meta device, are said to be.
        unknown: tells further tensors whose values are not there.
    """

    def __init__(self, device: torch.device, unknown: Callable[[torch.Tensor], bool] = lambda tensor: False) -> None:
        super().__init__()
        self.device = device
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._unknown_too = unknown
        self._overwritten: dict[int, torch.UntypedStorage] = {}  # real memory whose values would be others by now
        self._originals: dict[int, tuple[torch.Tensor, FakeTensor]] = {}

    def fake(self, tensor: torch.Tensor) -> FakeTensor:
        """Return a tensor like ``tensor`` without memory; a parameter gives the same one each time."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) in self._originals:
            return self._originals[id(tensor)][1]
        return self._fake_on(tensor, self.device if tensor.device.type == "meta" else tensor.device)

    def _fake_on(self, tensor: torch.Tensor, device: torch.device) -> FakeTensor:
        with torch.no_grad():
            meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            return FakeTensor(self.fakes, meta, device)

    def replace(self, param: torch.nn.Parameter) -> torch.nn.Parameter:
        """Return a parameter without memory; ``param`` itself, where code has kept it, is treated as the same."""
        if id(param) not in self._originals:
            other: Any = torch.nn.Parameter(self._fake_on(param.data, self.device), requires_grad=param.requires_grad)
            self._originals[id(param)] = param, other
        other = self._originals[id(param)][1]
        return other

    def unknown(self, tensor: torch.Tensor) -> bool:
        """Return whether the values of ``tensor`` are not there."""
        if isinstance(tensor, FakeTensor) or id(tensor) in self._originals or tensor.device.type == "meta":
            return True
        return storage_key(tensor) in self._overwritten or self._unknown_too(tensor)

    def before(self, func: Any, inputs: Sequence[torch.Tensor]) -> None:
        """Take note of an operator that is about to run."""

    def after(self, func: Any, call: Any, inputs: Sequence[torch.Tensor], output: Any) -> None:
        """Take note of what an operator has given, called with ``call = (args, kwargs)``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs: list[torch.Tensor] = []
        tree_map_only(torch.Tensor, inputs.append, (args, kwargs))
        written = written_inputs(func, args, kwargs)
        self.before(func, inputs)
        if not any(self.unknown(tensor) for tensor in inputs):
            output = func(*args, **kwargs)
        elif func.overloadpacket in SHAPE_ONLY:
            real = tree_map_only(torch.Tensor, self._of_its_shape, (args, kwargs))
            output = func(*real[0], **real[1])
        else:
            output = self._without_values(func, args, kwargs)
            for tensor in written:
                if not isinstance(tensor, FakeTensor):
                    self._overwritten[storage_key(tensor)] = tensor.untyped_storage()
            if written and _returns_what_it_writes(func):
                output = written[0] if len(written) == 1 else tuple(written)
        self.after(func, (args, kwargs), inputs, output)
        return output

    def _of_its_shape(self, tensor: torch.Tensor) -> torch.Tensor:
        device = self.device if tensor.device.type == "meta" else tensor.device
        return torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)

    def _without_values(self, func: Any, args: Any, kwargs: Any) -> Any:
        fakes = tree_map_only(torch.Tensor, self.fake, (args, kwargs))
        try:
            with self.fakes:
                output = func(*fakes[0], **fakes[1])
        except _NEED_VALUES:  # the shape of the output, or a number, depends on values: take some
            some = tree_map_only(torch.Tensor, self._some_values, (args, kwargs))
            output = func(*some[0], **some[1])
            return tree_map_only(torch.Tensor, self.fake, output)
        if written_inputs(func, args, kwargs):
            return output
        memory: set[int] = set()  # a view stays one
        tree_map_only(torch.Tensor, lambda tensor: memory.add(storage_key(tensor)), fakes)
        return tree_map_only(
            FakeTensor, lambda t: _scalar(func, t) if t.dim() == 0 and storage_key(t) not in memory else t, output
        )

    def _some_values(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.unknown(tensor):
            return tensor
        device = self.device if tensor.device.type == "meta" else tensor.device
        truth = tensor.dtype is torch.bool
        return torch.full(tensor.shape, 0 if truth else 1, dtype=tensor.dtype, device=device)


def storage_key(tensor: torch.Tensor) -> int:
    """Return a number that all views of the same memory share, for as long as that memory lives."""
    return tensor.untyped_storage()._cdata


def written_inputs(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors to which an operator writes."""
    found: list[torch.Tensor] = []
    given = {
        argument.name: kwargs.get(argument.name) if position >= len(args) else args[position]
        for position, argument in enumerate(func._schema.arguments)
    }
    # Batch norms update their statistics in training, which the schemas of the older operators do not say.
    unsaid = ("running_mean", "running_var") if given.get("training") else ()
    for argument in func._schema.arguments:
        if argument.name in unsaid or (argument.alias_info is not None and argument.alias_info.is_write):
            tree_map_only(torch.Tensor, found.append, given[argument.name])
    return found


def _scalar(func: Any, output: FakeTensor) -> torch.Tensor:
    """Give a single number a value, for code that branches on it (``if not torch.isfinite(loss)``).

    Ones are kinder than zeros to code that divides or takes logarithms; "all" are true and not "any" is.
    """
    if not output.is_floating_point() and output.dtype is not torch.bool:
        return output
    value = func.overloadpacket is _aten.all if output.dtype is torch.bool else 1
    return torch.full((), value, dtype=output.dtype, device=output.fake_device)


def _returns_what_it_writes(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(each.alias_info is not None and each.alias_info.is_write for each in returns)
