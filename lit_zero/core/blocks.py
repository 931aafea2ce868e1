"""Which modules are the blocks of a model: found by themselves, or as the user names them."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal

from torch import nn
from torch.nn.utils import parametrize

from lit_zero.core.errors import ConfigError, did_you_mean

Choice = Literal["auto"] | Sequence[str] | Callable[[str, nn.Module], bool]

_LISTS = (nn.ModuleList, nn.Sequential)
_LARGE_LIST = 0.1  # a list of blocks counts as large from this share of the largest list's parameters


def check_modules(key: str, value: object) -> None:
    """Check a choice of modules, before there is a model.

    Args:
        key: the setting, for messages.
        value: what the user gave.

    Raises:
        ConfigError: if it is no choice.
    """
    listed = isinstance(value, Sequence) and all(isinstance(entry, str) for entry in value)
    if not listed and not callable(value):
        raise ConfigError(
            f"{key}={value!r} is not valid: expected 'auto', a list of class names and module-name patterns, or a "
            "callable (name, module) -> bool."
        )
    if isinstance(value, str) and value != "auto":
        raise ConfigError(
            f"{key}={value!r} is not valid: expected 'auto', a list such as [{value!r}], or a callable (name, module) "
            "-> bool."
        )


def choose_modules(model: nn.Module, choice: Choice, key: str) -> set[str]:
    """Return the names of the modules that are chosen.

    Args:
        model: the whole module.
        choice: ``auto``, the entries of every large repeated ``ModuleList`` or ``Sequential``; class names and patterns
            of module names; or a callable ``(name, module) -> bool``.
        key: the setting, for messages.

    Raises:
        ConfigError: if a module or class is named that does not exist or has no forward.
    """
    if isinstance(choice, str):
        return _repeated_blocks(model)
    named = [(name, module) for name, module in model.named_modules() if name]
    if callable(choice):
        return _runnable(model, {name for name, module in named if choice(name, module)}, key)
    chosen: set[str] = set()
    classes = {_kind(module).__name__ for _, module in named}
    for pattern in choice:
        found = {
            name for name, module in named if _kind(module).__name__ == pattern or fnmatch.fnmatchcase(name, pattern)
        }
        if not found:
            raise ConfigError(
                f"{key} names {pattern!r}, but no module of that class or name exists. "
                f"{did_you_mean(pattern, sorted(classes))}"
            )
        chosen |= found
    return _runnable(model, chosen, key)


def _runnable(model: nn.Module, chosen: set[str], key: str) -> set[str]:
    """Check that every module chosen has a forward before which something can be done."""
    for name in sorted(chosen):
        kind = type(model.get_submodule(name))
        if kind.forward is nn.Module.forward:
            raise ConfigError(
                f"{key} chooses {name!r}, but a {kind.__name__} has no forward: nothing could be done when it runs. "
                "Choose the modules inside it, or the one that contains it."
            )
    return chosen


def _kind(module: nn.Module) -> type:
    """Return the class that a module was made of: a parametrized one has a class of its own."""
    return parametrize.type_before_parametrizations(module)


def _repeated_blocks(model: nn.Module) -> set[str]:
    """Return the names of the entries of every large outermost list that repeats one class of module with
    parameters.
    """
    sizes: dict[str, int] = {}
    entries: dict[str, list[str]] = {}
    inside: set[str] = set()
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if parent in inside:  # only outermost lists: blocks are not cut into their own repeated parts
            inside.add(name)
            continue
        if not isinstance(module, _LISTS) or isinstance(module, parametrize.ParametrizationList):
            continue
        children = [(child, m) for child, m in module.named_children() if any(p.numel() for p in m.parameters())]
        kinds: dict[type, int] = defaultdict(int)
        for _, child in children:
            kinds[_kind(child)] += 1
        if max(kinds.values(), default=0) >= 2:
            entries[name] = [f"{name}.{child}" if name else child for child, _ in children]
            sizes[name] = sum(p.numel() for p in module.parameters())
            inside.add(name)
    largest = max(sizes.values(), default=0)
    return {entry for name, size in sizes.items() if size >= _LARGE_LIST * largest for entry in entries[name]}
