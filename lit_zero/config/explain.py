"""One line for what is wrong with an override: which key, what was expected, and the nearest valid name."""

from __future__ import annotations

import difflib
import inspect
from typing import Any, get_args

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import BooleanNode, DictConfig, FloatNode, IntegerNode, ListConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException, UnsupportedValueType, ValidationError

from lit_zero.core.errors import did_you_mean

_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_NODES: dict[type, Any] = {BooleanNode: bool, IntegerNode: int, FloatNode: float, StringNode: str}
_PLUGINS = {
    "hydra/sweeper/optuna": "hydra-optuna-sweeper",
    "hydra/launcher/joblib": "hydra-joblib-launcher",
    "hydra/launcher/submitit_local": "hydra-submitit-launcher",
    "hydra/launcher/submitit_slurm": "hydra-submitit-launcher",
}


def explain(loader: Any, config_name: str, lines: list[str], error: Exception) -> str:
    """Return one line that says why a configuration does not compose.

    Args:
        loader: Hydra's config loader.
        config_name: the root config.
        lines: the overrides as typed.
        error: what Hydra raised. Its own words are used where no single override is found to be wrong.
    """
    if isinstance(error, OverrideParseException):
        reason = next(line for line in error.message.splitlines() if not line.startswith(("Error parsing", "See ")))
        return (
            f"{error.override!r} cannot be read as key=value: {reason}. A value with special characters needs quotes."
        )
    missing = str(getattr(error, "missing_cfg_file", ""))
    if missing in _PLUGINS:
        option = "=".join(missing.rsplit("/", 1))
        return (
            f"{option} needs the package {_PLUGINS[missing]}, which is not installed. Install it with "
            "'pip install lit_zero[sweep]'."
        )
    parsed = [
        o for o in OverridesParser.create(config_loader=loader).parse_overrides(lines) if not o.is_hydra_override()
    ]
    groups = [name for name in loader.list_groups("") if name not in ("hydra", "lit_zero")]
    chosen = [o for o in parsed if o.key_or_group in groups or "/" in o.key_or_group]
    for override in chosen:
        problem = _option_problem(loader, override)
        if problem:
            return problem
    group_lines = [str(o.input_line) for o in chosen if not o.is_sweep_override()]
    try:
        config = loader.load_configuration(config_name, group_lines, RunMode.RUN)
    except (HydraException, OmegaConfBaseException):
        return _words(error)
    for override in parsed:
        if override in chosen or override.is_sweep_override():
            continue
        problem = _key_problem(loader, config, groups, override) or _type_problem(config, override)
        if problem:
            return problem
    return _words(error)


def _option_problem(loader: Any, override: Override) -> str | None:
    """Return what is wrong with ``group=option``."""
    options = loader.get_group_options(override.key_or_group)
    if not options:
        return f"{override.input_line}: there is no config group {override.key_or_group!r}."
    if override.is_sweep_override():
        values: list[Any] = list(override.sweep_iterator()) if override.is_discrete_sweep() else []
    else:
        value = override.value()
        values = list(value) if isinstance(value, list) else [value]
    for value in values:
        if value is not None and str(value) not in options:
            # zero=3 is the most likely slip: Hydra's options cannot be numbers, so ours are called stage3
            name = next((option for option in options if option.endswith(str(value))), value)
            return f"{override.key_or_group}={value} is not known. {did_you_mean(name, options)}"
    return None


def _key_problem(loader: Any, config: DictConfig, groups: list[str], override: Override) -> str | None:
    """Return what is wrong with the key of ``key=value``."""
    if override.is_add() or override.is_force_add():
        return None
    line, parts = override.input_line, override.key_or_group.split(".")
    node: Any = config
    for depth, part in enumerate(parts):
        if not isinstance(node, DictConfig):
            return None
        if part in node:
            node = node._get_node(part)
            node = node._maybe_dereference_node() if hasattr(node, "_maybe_dereference_node") else node
            continue
        if depth == 0:
            names = list(dict.fromkeys([*groups, *(str(key) for key in config if key != "hydra")]))
            return f"{line}: there is no group or key {part!r}. {did_you_mean(part, names)}"
        parent = ".".join(parts[:depth])
        return f"{line}: {parent!r} has no key {part!r} here. " + (
            _has_it_elsewhere(loader, groups, parts[: depth + 1]) or _nearest_key(node, parent, part, override)
        )
    return None


def _has_it_elsewhere(loader: Any, groups: list[str], parts: list[str]) -> str | None:
    """Return the options of the group that do have this key."""
    group = parts[0]
    if group not in groups:
        return None
    having = []
    for option in loader.get_group_options(group):
        try:
            other = loader.load_configuration(f"{group}/{option}", [], RunMode.RUN)  # alone: a fraction of the time
        except (HydraException, OmegaConfBaseException):
            continue
        parent = OmegaConf.select(other, ".".join(parts[:-1]))
        if isinstance(parent, DictConfig) and parts[-1] in parent:
            having.append(f"{group}={option}")
    return f"It exists with {' and '.join(having)}." if having else None


def _nearest_key(node: DictConfig, parent: str, key: str, override: Override) -> str:
    """Return the nearest key of ``node``, or how to add an argument that its class takes but the group does not set."""
    keys = [str(name) for name in node if not str(name).startswith("_")]
    arguments = [name for name in _arguments(node.get("_target_")) if name not in keys]
    if key in arguments:
        return f"{node._target_} takes it: add it with +{override.input_line}."
    near = difflib.get_close_matches(key, keys + arguments, n=1)
    if near and near[0] in arguments:
        return f"Did you mean {near[0]!r}? {node._target_} takes it: add it with +{parent}.{near[0]}=..."
    return did_you_mean(key, keys) if keys else "It has no keys."


def _arguments(target: object) -> list[str]:
    """Return the argument names of the class or function named ``target``; none if it cannot be imported."""
    if not isinstance(target, str):
        return []
    try:
        return list(inspect.signature(get_object(target)).parameters)
    except Exception:  # whatever a foreign module raises on import: then the message names only what the group sets
        return []


def _type_problem(config: DictConfig, override: Override) -> str | None:
    """Return what is wrong with the value of ``key=value``."""
    key, value = override.key_or_group, override.value()
    node = OmegaConf.select(config, ".".join(key.split(".")[:-1])) if "." in key else config
    leaf = node._get_node(key.split(".")[-1]) if isinstance(node, DictConfig) else None
    try:
        OmegaConf.update(config, key, value, merge=True, force_add=True)
    except (ValidationError, UnsupportedValueType):
        return f"{key}={_shown(value)} is not valid: expected {_expected(leaf)}."
    except OmegaConfBaseException as error:
        return f"{override.input_line}: {str(error).splitlines()[0]}"
    return None


def _expected(node: Any) -> str:
    """Return in words which values a config node takes."""
    if isinstance(node, ListConfig):
        return f"a list, each item {_WORDS.get(node._metadata.element_type, 'of the right type')}"
    if isinstance(node, DictConfig):
        return "a mapping"
    kinds = get_args(node._metadata.ref_type) or (node._metadata.ref_type,) if node is not None else ()
    words = [_WORDS[kind] for kind in kinds if kind in _WORDS] or [_WORDS.get(_NODES.get(type(node)), "another type")]
    if node is not None and node._is_optional():
        words.append("null")
    return " or ".join(words)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


def _words(error: BaseException) -> str:
    """Return Hydra's own words in one line, its cause's first line included."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if isinstance(error.__cause__, OmegaConfBaseException):
        text += f" ({str(error.__cause__).splitlines()[0]})"
    return text
