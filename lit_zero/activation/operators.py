"""Operators by name: what ``selective`` keeps the results of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lit_zero.core.errors import ConfigError, did_you_mean

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
