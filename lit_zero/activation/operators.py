"""Operators by name: what ``selective`` keeps the results of.

[Note: dice that are not thrown again] torch's pair of modes hands a kept result out in the repetition in place of
running the operator. If it is one that draws random numbers (attention with dropout, in one kernel on a GPU), what is
drawn after it would be other numbers than in the forward. So the generators are put where they stood behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lit_zero.core.errors import ConfigError, did_you_mean
from lit_zero.core.randomness import random_states, set_random_states

Contexts = tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]

# What a word stands for, over the devices: composed operators never arrive at the level where results can be kept.
WORDS = {
    "matmul": ("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten._scaled_mm", "aten.linear", "aten.matmul"),
    "attention": (
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
        "aten._scaled_dot_product_attention_math",
        "aten._scaled_dot_product_fused_attention_overrideable",
    ),
    "convolution": ("aten.convolution", "aten._convolution"),
}


def overloads(names: Sequence[str]) -> frozenset[Any]:
    """Return all overloads of operators.

    Args:
        names: words of ``WORDS``, or names such as ``aten.gelu`` or ``aten.gelu.default``.

    Raises:
        ConfigError: for a name that torch does not know.
    """
    found: set[Any] = set()
    for name in names:
        for each in WORDS.get(name, (name,)):
            known = _overloads(each)
            if not known and name not in WORDS:
                choices = [*WORDS, *(f"aten.{op}" for op in sorted(dir(torch.ops.aten)) if not op.startswith("_"))]
                hint = did_you_mean(name if "." in name else f"aten.{name}", choices).partition(" Choose one of")[0]
                hint = f"{hint} " if hint.startswith("Did") else ""
                raise ConfigError(
                    f"activation.operators names {name!r}, which is no operator of torch. {hint}Expected "
                    f"{', '.join(WORDS)}, or the name of an operator as a profile shows it, such as 'aten.gelu'."
                )
            found |= known  # a word names operators of several releases
    return frozenset(found)


def _overloads(name: str) -> set[Any]:
    """Return the overloads that ``namespace.operator`` or ``namespace.operator.overload`` names; none if unknown."""
    namespace, _, rest = name.partition(".")
    operator, _, overload = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace), operator, None) if namespace and operator else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return set()
    chosen = [overload] if overload else packet.overloads()
    return {getattr(packet, each) for each in chosen if each in packet.overloads()}


def keeping(operators: frozenset[Any]) -> Contexts:
    """Return what a forward and its repetition run in, so that the results of ``operators`` are kept."""

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in operators else CheckpointPolicy.PREFER_RECOMPUTE

    first, second = create_selective_checkpoint_contexts(policy)
    drawing = frozenset(each for each in operators if torch.Tag.nondeterministic_seeded in each.tags)
    if not drawing:
        return first, second
    states: list[dict[str, Any]] = []
    return _within(first, _Noting(drawing, states)), _within(second, _Following(drawing, states))


@contextlib.contextmanager
def _within(*contexts: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


class _Noting(TorchDispatchMode):
    """Notes where the generators stand behind every operator that draws, see [Note: dice that are not thrown again].

    Args:
        drawing: those whose results are kept.
        states: where to.
    """

    supports_higher_order_operators = True  # they pass through, to torch's mode

    def __init__(self, drawing: frozenset[Any], states: list[dict[str, Any]]) -> None:
        super().__init__()
        self._drawing, self._states = drawing, states

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """As torch's modes, of which this one is a part."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in self._drawing:
            self.behind()
        return output

    def behind(self) -> None:
        """Such an operator has run."""
        self._states.append(random_states())


class _Following(_Noting):
    """Puts them there."""

    def behind(self) -> None:
        """Such an operator's result has been handed out."""
        set_random_states(self._states.pop(0))
