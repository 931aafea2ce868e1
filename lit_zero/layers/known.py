"""Which modules are known, and what computes the same.

torch's own norms are known by their code. Of other people's models only the shape is known: a class name, attributes,
the names of children. So each module that looks right is tried: its own forward runs on a stand-in, a few random
numbers on the CPU, and only where the fused one gives the same is the module replaced. One that merely has a known
name, or whose next version does something more, is left alone. Each is tried by itself: two of one class may differ in
a flag or an activation.

[Note: back to its own] What was tried is not all that a call may bring. Where the dtypes, shapes or arguments of a call
are not those that the fused forward is for, the module's own forward runs.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_zero.kernels.gated import ACTIVATIONS, gated
from lit_zero.kernels.normalization import layer_norm, rms_norm
from lit_zero.kernels.rotary import rotary, turns

Forward = Callable[..., Any]

_GATED = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_TANH_GELUS = ("NewGELUActivation", "FastGELUActivation", "GELUTanh", "PytorchGELUTanh", "AccurateGELUActivation")
_EPS = ("variance_epsilon", "eps", "epsilon")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# What an error lists, by kind.
LOOKED_FOR = {
    "norms": "norms (torch.nn.LayerNorm, torch.nn.RMSNorm, classes called ...RMSNorm or T5LayerNorm)",
    "feed_forwards": "feed-forward layers (gate_proj, up_proj, down_proj and act_fn with SiLU or GELU; GELU by tanh in "
    "several operators)",
    "rotary": "attention that calls apply_rotary_pos_emb(q, k, cos, sin)",
}


def fused_forward(module: nn.Module) -> tuple[str, Forward] | None:
    """Return the kind of a module and a forward ``(module, ...)`` that computes the same, or None if it is not known.

    Args:
        module: any module; its parameters may have no memory.
    """
    own = type(module).forward
    if own is nn.LayerNorm.forward:
        return "norms", _layer_norm
    if own is nn.RMSNorm.forward:
        return "norms", _rms_norm
    for kind, looks, prove in _FOREIGN:
        if looks(module):
            with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
                found = prove(module)
            return None if found is None else (kind, found)
    return None


def _layer_norm(self: Any, input: Tensor) -> Tensor:
    return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    return rms_norm(x, self.normalized_shape, self.weight, self.eps)


# ---- norms of other people


def _is_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    weight = module._parameters.get("weight")
    return (
        (name.endswith("RMSNorm") or name == "T5LayerNorm")
        and _takes_one(module)
        and not module._modules
        and not module._buffers
        and set(module._parameters) == {"weight"}
        and weight is not None
        and weight.dim() == 1
        and _eps_of(module) is not None
    )


def _eps_of(module: nn.Module) -> str | None:
    return next((name for name in _EPS if isinstance(vars(module).get(name), float)), None)


def _prove_norm(module: nn.Module) -> Forward | None:
    weight, eps = _numbers(8), _eps_of(module)
    assert eps is not None
    # Rows of the size of the square root of eps, too: it must be added where it is added here.
    x = _numbers(3, 8) * torch.tensor([[1.0], [1e-2], [1e-3]], dtype=torch.float32)
    found = [_tried(module, {"weight": weight}, x, training=training) for training in (True, False)]
    for offset in (0.0, 1.0):
        if all(_same(each, rms_norm(x, (8,), weight, getattr(module, eps), offset)) for each in found):
            break
    else:
        return None
    results = {}  # the dtype of the result, by those of x and weight: implementations cast in different places
    for of_x, of_weight in itertools.product(_DTYPES, _DTYPES):
        result = _tried(module, {"weight": weight.to(of_weight)}, x.to(of_x))
        results[of_x, of_weight] = result.dtype if isinstance(result, Tensor) else None

    def compute(self: Any, x: Tensor) -> Any:
        dtype = results.get((x.dtype, self.weight.dtype))
        if dtype is None or x.shape[-1:] != self.weight.shape:
            return type(self).forward(self, x)
        return rms_norm(x, self.weight.shape, self.weight, getattr(self, eps), offset, dtype)

    return _called_as(module, compute)


# ---- feed-forward layers of other people


def _is_gated(module: nn.Module) -> bool:
    return (
        set(module._modules) == _GATED
        and not module._parameters
        and not module._buffers
        and not _has_tensors(module._modules["act_fn"])
        and _takes_one(module)
    )


def _has_tensors(module: nn.Module | None) -> bool:
    """Return whether a module has tensors of its own: what learns may be a known activation only at first."""
    return module is None or next(itertools.chain(module.parameters(), module.buffers()), None) is not None


class _Line(nn.Module):
    """Stands for a linear layer on a stand-in."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + 0.25


def _prove_gated(module: nn.Module) -> Forward | None:
    gate, up, down = _Line(1.5), _Line(-0.5), _Line(2.0)
    x = 3 * _numbers(4, 16)
    children = {"gate_proj": gate, "up_proj": up, "down_proj": down, "act_fn": module._modules["act_fn"]}
    found = [_tried(module, {}, x, children, training) for training in (True, False)]  # which shows a dropout
    for activation in ACTIVATIONS:
        if all(_same(each, down(gated(gate(x), up(x), activation))) for each in found):
            break
    else:
        return None

    def compute(self: Any, x: Tensor) -> Any:
        of_gate, of_up = self.gate_proj(x), self.up_proj(x)
        if of_gate.dtype == of_up.dtype and of_gate.shape == of_up.shape:
            return self.down_proj(gated(of_gate, of_up, activation))
        stand_in = copy.copy(self)  # what is computed already is not computed twice: hooks have run
        known = {"gate_proj": lambda x: of_gate, "up_proj": lambda x: of_up}
        vars(stand_in).update(_modules={**self._modules, **known})
        return type(self).forward(stand_in, x)

    return _called_as(module, compute)


def _is_gelu(module: nn.Module) -> bool:
    plain = not module._modules and not _has_tensors(module)
    return type(module).__name__ in _TANH_GELUS and plain and _takes_one(module)


def _prove_gelu(module: nn.Module) -> Forward | None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float32)
    found = [_tried(module, {}, x, training=training) for training in (True, False)]
    right = F.gelu(x, approximate="tanh")
    return _called_as(module, _gelu) if all(_same(each, right) for each in found) else None


def _gelu(self: Any, x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


# ---- attention of other people


def _is_attention(module: nn.Module) -> bool:
    own = type(module).forward
    return isinstance(own, types.FunctionType) and _ROTARY in own.__code__.co_names and _ROTARY in own.__globals__


_ROTARY = "apply_rotary_pos_emb"


def _rotary_pair(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return what does the work of ``own``, which does it itself where ``rotary`` cannot: where only a part of a head
    turns, or angles learn.
    """

    def pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        c, s = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        if not (turns(q, c, s) and turns(k, c, s)):
            return own(q, k, cos, sin, unsqueeze_dim)
        return rotary(q, c, s), rotary(k, c, s)

    return pair


def _prove_rotary(module: nn.Module) -> Forward | None:
    own: Any = type(module).forward
    function = own.__globals__[_ROTARY]
    pair = _rotary_pair(function)
    if _arguments(function) != _arguments(pair):
        return None
    q, k, cos, sin = (_numbers(*shape) for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8)))
    for at in (1, 2):
        if not _same(_result(function, q, k, cos, sin, at), pair(q, k, cos, sin, at)):
            return None
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    # The same code, in which the name of the function means ours; nobody else's module is written to.
    forward = types.FunctionType(
        own.__code__, {**own.__globals__, _ROTARY: pair}, own.__name__, own.__defaults__, own.__closure__
    )
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward


_FOREIGN: tuple[tuple[str, Callable[[nn.Module], bool], Callable[[nn.Module], Forward | None]], ...] = (
    ("norms", _is_norm, _prove_norm),
    ("feed_forwards", _is_gated, _prove_gated),
    ("feed_forwards", _is_gelu, _prove_gelu),
    ("rotary", _is_attention, _prove_rotary),
)


# ---- how a forward is called


def _arguments(function: Any) -> list[inspect.Parameter] | None:
    """Return names and kinds of arguments, without annotations; None if they cannot be told."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return [inspect.Parameter(each.name, each.kind, default=each.default) for each in found]


def _takes_one(module: nn.Module) -> bool:
    """Return whether the module's own forward takes one tensor, by position or by name, and nothing else."""
    found = _arguments(type(module).forward)
    return found is not None and [each.kind for each in found] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2


def _called_as(module: nn.Module, compute: Forward) -> Forward:
    """Return ``compute`` (module, tensor) as a forward that is called as the module's own one is.

    Args:
        module: its own forward takes one tensor.
        compute: what does the work.
    """
    found = _arguments(type(module).forward)
    assert found is not None
    name = found[1].name

    def forward(self: Any, *given: Any, **named: Any) -> Any:
        values = (*given, *(value for key, value in named.items() if key == name))
        if len(given) + len(named) == 1 and isinstance(values[0] if values else None, Tensor):
            return compute(self, values[0])
        return type(self).forward(self, *given, **named)

    return forward


# ---- trying


def _numbers(*shape: int) -> Tensor:
    # In fp32, whatever the default dtype is.
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32)


def _result(function: Callable[..., Any], *given: Any) -> Any:
    """Return what somebody else's code makes of numbers that it was not made for, or the error that it raises."""
    try:
        return function(*given)
    except Exception as error:
        return error


def _tried(
    module: nn.Module,
    parameters: dict[str, Tensor],
    x: Tensor,
    children: dict[str, Any] | None = None,
    training: bool = True,
) -> Any:
    """Return what a module's own forward makes of ``x`` on a stand-in, or the error that it raises."""
    stand_in = copy.copy(module)
    vars(stand_in).update(_parameters=parameters, training=training)
    if children is not None:
        vars(stand_in).update(_modules=children)
    return _result(type(module).forward, stand_in, x)


def _same(found: Any, expected: Any) -> bool:
    """Return whether both are one tensor, or as many; the same in shape, dtype and place, and nearly so in value."""
    pairs = itertools.zip_longest(_each(found), _each(expected))
    return all(
        isinstance(f, Tensor)
        and isinstance(e, Tensor)
        and (f.shape, f.dtype, f.device) == (e.shape, e.dtype, e.device)
        and torch.allclose(f, e, rtol=1e-4, atol=1e-6)
        for f, e in pairs
    )


def _each(value: Any) -> Iterator[Any]:
    return iter(value) if isinstance(value, tuple) else iter((value,))
