"""A choice at work on a module: known layers have a fused forward until it is taken off.

The forward stands in the module as an attribute of the instance. Parameters, buffers, names, hooks and classes stay, so
nothing else sees a difference. A copy of the module has the fused forward too; one that was pickled has its own again.
"""

from __future__ import annotations

import types
import warnings
import weakref
from typing import Any

import torch
from torch import nn

from lit_zero.core.errors import ConfigError, UnsupportedError
from lit_zero.layers.known import LOOKED_FOR, fused_forward
from lit_zero.layers.policy import KINDS, Layers


def _known(module: nn.Module, policy: Layers) -> dict[str, list[tuple[str, Any]]]:
    if policy.variant == "plain":
        return {}
    kinds = KINDS if policy.replace == "auto" else policy.replace
    found: dict[str, list[tuple[str, Any]]] = {kind: [] for kind in kinds}
    for name, each in module.named_modules():
        if each._compiled_call_impl is not None or "_orig_mod" in each._modules:
            raise UnsupportedError(
                f"layers.variant='fused' does not go with torch.compile: {name or type(module).__name__!r} is "
                "compiled, and the compiler fuses these layers itself. Use layers=plain, or do not compile."
            )
        known = None if _taken(each) else fused_forward(each)
        if known is not None and known[0] in found:
            found[known[0]].append((name, known[1]))
    missing = [kind for kind in kinds if not found[kind]]
    if len(missing) == len(kinds) or (missing and policy.replace != "auto"):
        raise ConfigError(
            f"layers.variant='fused' has no effect on {', '.join(missing)}: {type(module).__name__} has none of what "
            f"is known. Looked for: {'; '.join(LOOKED_FOR[kind] for kind in missing)}. Remove "
            f"{'layers=fused' if len(missing) == len(kinds) else 'them from layers.replace'}, or build the model with "
            "the modules of lit_zero.layers."
        )
    return found


class Replaced:
    """A module that is replaced in part.

    Args:
        replacement: what was applied.
        module: the whole module.
    """

    def __init__(self, replacement: Replacement, module: nn.Module) -> None:
        self._replacement, self._module = replacement, module

    def remove(self) -> None:
        """Give the module its own forwards back."""
        self._replacement.restore(self._module)


class Replacement:
    """What a choice does to modules, until it is taken off.

    Args:
        layers: what the user has said.

    Attributes:
        policy: the user's choice.

    Raises:
        ConfigError: if it is none.
    """

    def __init__(self, layers: str | Layers) -> None:
        self.policy = Layers(layers) if isinstance(layers, str) else layers
        if not isinstance(self.policy, Layers):
            raise ConfigError(f"layers={layers!r} is not valid: expected a Layers, got a {type(layers).__name__}.")
        self._replaced: list[weakref.ref[nn.Module]] = []

    def check_fit(self, module: nn.Module) -> dict[str, list[str]]:
        """Return the names of the modules to replace, by kind; the module may be on the meta device.

        Raises:
            ConfigError: if there is nothing to replace, or nothing of a kind that was named.
            UnsupportedError: if a part of the module is compiled.
        """
        return {kind: [name for name, _ in found] for kind, found in _known(module, self.policy).items()}

    def apply(self, module: nn.Module, device: torch.device) -> Replaced:
        """Replace what is known in a module; what was replaced before gets its own forward back first.

        Args:
            module: the whole module.
            device: where it computes.

        Returns:
            What takes it off again, as ``restore`` does.

        Raises:
            ConfigError: if there is nothing to replace.
            UnsupportedError: if a part of the module is compiled.
        """
        self.restore(module)
        known = _known(module, self.policy)
        plain = {nn.LayerNorm.forward}
        names = [name for found in known.values() for name, _ in found]
        if names and device.type == "cpu" and {type(module.get_submodule(n)).forward for n in names} == plain:
            warnings.warn(
                f"layers=fused on a CPU: all that {type(module).__name__} has of what is known is torch.nn.LayerNorm, "
                "which torch fuses there itself. This saves nothing.",
                stacklevel=2,
            )
        for found in known.values():
            for name, forward in found:
                each = module.get_submodule(name)
                vars(each)["forward"] = types.MethodType(_named(forward), each)
                self._replaced.append(weakref.ref(each))
        return Replaced(self, module)

    def restore(self, module: nn.Module | None = None) -> None:
        """Give modules their own forward back.

        Args:
            module: whose; None: of all that were replaced here.
        """
        alive = [each for held in self._replaced if (each := held()) is not None]
        for each in alive if module is None else module.modules():
            if getattr(getattr(vars(each).get("forward"), "__func__", None), "fused", False):
                del vars(each)["forward"]
        self._replaced = [weakref.ref(each) for each in alive if "forward" in vars(each)]


def _taken(module: nn.Module) -> bool:
    """Return whether somebody else has put a forward into the module; an unpickled one may have its own there."""
    placed = getattr(vars(module).get("forward"), "__func__", None)
    return "forward" in vars(module) and placed is not type(module).forward and not getattr(placed, "fused", False)


def _named(forward: Any) -> Any:
    """Return a function of the name that a pickled method is looked up by, so that an unpickled module has its own."""
    made = types.FunctionType(
        forward.__code__, forward.__globals__, "forward", forward.__defaults__, forward.__closure__
    )  # fmt: skip
    made.__kwdefaults__ = forward.__kwdefaults__
    vars(made)["fused"] = True
    return made
