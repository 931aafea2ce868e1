"""The user's choice of what lives between forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_zero.core.blocks import Choice, check_modules
from lit_zero.core.errors import ConfigError, check_choice

# By variant: the settings that it takes besides ``blocks``, and what each is if nothing is said (``None``: it must be).
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {},
    "every_n": {"n": 2},
    "selective": {"operators": ("matmul", "attention")},
    "offload": {"threshold": 1 << 16, "in_flight": 1 << 28},
    "budget": {"budget": None, "threshold": 1 << 16, "in_flight": 1 << 28},
    "partition": {"ranks": None},
}
_LEAST = {"n": 2, "threshold": 0, "in_flight": 1, "budget": 1, "ranks": 2}


@dataclass(frozen=True)
class Activation:
    """What becomes of the tensors that the blocks of a model save for their backward.

    Args:
        variant: ``none`` (autograd keeps them), ``full`` (every block is recomputed), ``every_n`` (each n-th block),
            ``selective`` (recomputed, except for the results of chosen operators), ``offload`` (copied to host memory),
            ``budget`` (the fastest mix of keeping, recomputing and offloading that fits), ``partition`` (recomputed,
            and the blocks' inputs shared out over ranks that hold the same ones).
        blocks: the modules. ``auto``: those that ``zero.units`` chooses, by default the repeated blocks. Else class
            names and module-name patterns, or a callable ``(name, module) -> bool``.
        n: ``every_n`` only: the blocks 0, n, 2n, ... are recomputed. Default 2.
        operators: ``selective`` only: whose results are kept: ``matmul``, ``attention``, ``convolution``, or operators
            by name (``"aten.gelu"``, ``"mylib.my_op"``). Default ``("matmul", "attention")``.
        threshold: ``offload`` and ``budget``: tensors smaller than this many bytes stay. Default 64 KiB.
        in_flight: ``offload`` and ``budget``: bytes that may be on their way to host memory at a time, and as many back
            before they are needed. Default 256 MiB.
        budget: ``budget`` only: bytes on each rank that the blocks' tensors may take at any time.
        ranks: ``partition`` only: that many neighbouring data-parallel ranks are given the same batches.

    Raises:
        ConfigError: for an unknown name, a wrong type, or a setting that has no effect in this variant.
    """

    variant: str = "none"
    blocks: Choice = "auto"
    n: int | None = None
    operators: Sequence[str] | None = None
    threshold: int | None = None
    in_flight: int | None = None
    budget: int | None = None
    ranks: int | None = None

    def __post_init__(self) -> None:
        check_choice("activation.variant", self.variant, VARIANTS)
        check_modules("activation.blocks", self.blocks)
        if not isinstance(self.blocks, str) and not callable(self.blocks):
            object.__setattr__(self, "blocks", tuple(self.blocks))  # whatever kind of list it was (Hydra has its own)
        if self.variant == "none" and self.blocks != "auto":
            raise ConfigError(
                f"activation.blocks={self.blocks!r} has no effect with activation.variant='none'. Remove it, or use "
                "activation.variant='full'."
            )
        taken = VARIANTS[self.variant]
        for key in (*_LEAST, "operators"):
            value = getattr(self, key)
            if value is not None and key not in taken:
                takers = [repr(variant) for variant, settings in VARIANTS.items() if key in settings]
                raise ConfigError(
                    f"activation.{key}={value!r} has no effect with activation.variant={self.variant!r}. Remove it, or "
                    f"use activation.variant={' or '.join(takers)}."
                )
        for key, least in _LEAST.items():
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"activation.{key}={value!r} is not valid: expected an integer of at least {least}.")
        self._check_operators()
        if self.variant == "budget" and self.budget is None:
            raise ConfigError(
                "activation.variant='budget' needs activation.budget: the bytes on each rank that the tensors saved by "
                "the blocks may take at any time."
            )
        if self.variant == "partition" and self.ranks is None:
            raise ConfigError(
                "activation.variant='partition' shares a block's inputs out over ranks that hold the same ones, and "
                "data-parallel ranks hold different ones. If your sampler gives neighbouring ranks the same batches, "
                "say how many with activation.ranks; else use activation.variant='full'."
            )

    def _check_operators(self) -> None:
        if self.operators is None:
            return
        words = self.operators
        if isinstance(words, str) or not isinstance(words, Sequence) or not all(isinstance(w, str) for w in words):
            raise ConfigError(
                f"activation.operators={words!r} is not valid: expected a list such as ['matmul', 'attention']."
            )
        if not words:
            raise ConfigError("activation.operators=[] keeps nothing, as activation.variant='full' does. Use that.")
        object.__setattr__(self, "operators", tuple(words))

    def setting(self, key: str) -> Any:
        """Return a setting of this variant: what the user has said, or its default."""
        value = getattr(self, key)
        return VARIANTS[self.variant][key] if value is None else value
