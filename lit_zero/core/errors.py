"""The errors a user can meet. Each message says what was expected, what came, and which knob to turn."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class LitZeroError(Exception):
    """Base of every error that lit_zero raises on purpose."""


class ConfigError(LitZeroError, ValueError):
    """A setting is unknown, of the wrong type, without effect, or contradicts another one."""


class UnsupportedError(ConfigError):
    """The combination is meaningful but lit_zero cannot do it."""


class CheckpointError(LitZeroError, RuntimeError):
    """A checkpoint is missing, damaged, of another model, or from a newer format."""


class LostRankError(LitZeroError, RuntimeError):
    """Another rank has ended, or sends or takes nothing: mostly what follows from an error of its own."""


def did_you_mean(name: object, choices: Iterable[str]) -> str:
    """Return a sentence naming the choices, led by the nearest one when there is a near one.

    Args:
        name: what the user wrote.
        choices: the valid names, in the order in which they should be listed.
    """
    names = list(choices)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}Choose one of: {', '.join(names)}."


def check_choice(key: str, value: object, choices: Iterable[str]) -> None:
    """Raise ``ConfigError`` unless ``value`` is one of ``choices``.

    Args:
        key: the name of the setting as the user types it, for example ``zero.stage``.
        value: what the user gave.
        choices: the valid names.

    Raises:
        ConfigError: naming the key, what came, and the nearest valid name.
    """
    names = list(choices)
    if value not in names:
        raise ConfigError(f"{key}={value!r} is not known. {did_you_mean(value, names)}")


# A scheme in front of a path, as it stands in an address, in a pathlib.Path of one, and below the working folder.
_ADDRESS = re.compile(r"://|^[a-z][a-z0-9+.-]+:/|/file:/", re.IGNORECASE)


def check_local(key: str, path: object) -> None:
    """Raise ``UnsupportedError`` if ``path`` is an address such as ``s3://bucket/name``.

    Args:
        key: what the user has set, for example ``ModelCheckpoint.dirpath``.
        path: what the user gave.

    Raises:
        UnsupportedError: naming the key, what came, and what to do instead.
    """
    if _ADDRESS.search(str(path)):
        raise UnsupportedError(
            f"{key}={path} is an address, but lit_zero reads and writes checkpoints on local or mounted file systems "
            "only. Give a path of one, and copy checkpoints to and from the store yourself."
        )
