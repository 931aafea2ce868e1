"""Weights in ``.safetensors`` files, in the layout of Hugging Face, read by ranges: a rank reads what it holds."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from lit_zero.checkpoint.parts import listed
from lit_zero.core.boxes import boxes
from lit_zero.core.errors import CheckpointError, ConfigError

ENDING = ".safetensors"
INDEX = ".safetensors.index.json"


class Pretrained:
    """The tensors of one or several ``.safetensors`` files, by name. Opening them reads names and shapes only.

    Args:
        path: a ``.safetensors`` file; or a folder with one such file, or with one ``*.safetensors.index.json`` and the
            files that it names, as ``save_pretrained`` writes it.

    Attributes:
        path: as given.
        shapes: global shape of every tensor by name.

    Raises:
        CheckpointError: if there is no such file or folder, or if a file is missing or damaged.
        ConfigError: if the package safetensors is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._files: dict[Path, Any] = {}
        self._opened = contextlib.ExitStack()
        self._places: dict[str, Path] = {}  # the file of each tensor
        self.shapes: dict[str, tuple[int, ...]] = {}
        names = _layout(Path(path))
        for file, expected in names.items():
            handle = self._files[file] = self._open(file)
            held = list(handle.keys())
            missing = sorted(set(expected or ()) - set(held))
            if missing:
                raise CheckpointError(
                    f"'{file}' does not hold {listed(missing)}, as the index beside it says. Copy the folder "
                    "again as a whole."
                )
            for name in held if expected is None else expected:
                self._places[name] = file
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())

    def _open(self, file: Path) -> Any:
        try:
            safetensors = importlib.import_module("safetensors")
        except ImportError as error:
            raise ConfigError(
                f"Reading {ENDING} needs the package safetensors: pip install safetensors ({error})"
            ) from error
        try:
            return self._opened.enter_context(safetensors.safe_open(os.fspath(file), framework="pt", device="cpu"))
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"'{file}' cannot be read as a {ENDING} file: {error}") from error

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Read elements ``[start, start + n)`` of a flattened tensor, and nothing else of it.

        Args:
            name: of the tensor.
            start: first element.
            out: receives them, shape ``[n]``, any device; values are cast to its dtype.
        """
        stored, done = self._files[self._places[name]].get_slice(name), 0
        for box in boxes(self.shapes[name], start, start + out.numel()):
            cut = tuple(slice(first, first + size) for first, size in zip(box.offsets, box.sizes, strict=True))
            part = stored[cut] if cut else self._files[self._places[name]].get_tensor(name)
            with torch.no_grad():
                out[done : done + box.length].copy_(part.reshape(-1))
            done += box.length

    def close(self) -> None:
        """Close the files."""
        self._opened.close()
        self._files.clear()


def _layout(path: Path) -> dict[Path, list[str] | None]:
    """Return the files to read, each with the names to look for in it (``None``: all that it holds)."""
    if path.is_file():
        return {path: None}
    if not path.is_dir():
        raise CheckpointError(
            f"There is no '{path}': a {ENDING} file was expected, or a folder with one. lit_zero downloads nothing; a "
            "model of a hub has to be on this machine."
        )
    indices = sorted(each for each in path.iterdir() if each.name.endswith(INDEX))
    files = sorted(each for each in path.iterdir() if each.name.endswith(ENDING))
    if len(indices) == 1:
        return _indexed(indices[0])
    if not indices and len(files) == 1:
        return {files[0]: None}
    found = [each.name for each in (indices or files or sorted(path.iterdir()))]
    raise CheckpointError(
        f"The folder '{path}' must hold one *{INDEX} or else one *{ENDING}; it holds {listed(found) or 'nothing'}. "
        "Give the path of the file itself where there are several."
    )


def _indexed(index: Path) -> dict[Path, list[str] | None]:
    try:
        entries: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, list[str]] = {}
        for name, file in entries.items():
            files.setdefault(index.parent / file, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{index}' cannot be read as an index of {ENDING} files: {error!r}") from error
    missing = sorted(file.name for file in files if not file.is_file())
    if missing:
        raise CheckpointError(f"'{index}' names files that are not there ({len(missing)}): {listed(missing)}.")
    return dict(files)


def match_pretrained(
    source: Pretrained,
    wanted: Mapping[str, tuple[Any, Sequence[int]]],
    model: str,
    prefix: str = "",
    ignore: Sequence[str] = (),
) -> dict[Any, str]:
    """Find for every tensor of a model the name under which the files hold it.

    Args:
        source: the files.
        wanted: the model's names, each with something that tells its tensor from others (a tied tensor has several
            names and is to be found under any of them) and its global shape.
        model: the model's name, for messages.
        prefix: only entries of the files that begin with this are looked at, and it is cut off.
        ignore: patterns of names, in the model or in the files, that are left out.

    Returns:
        ``{tensor: name in the files}``; what is ignored is not in it.

    Raises:
        CheckpointError: naming what is missing, what is too much, and what has another shape.
        ConfigError: if a pattern of ``ignore`` matches nothing.
    """
    stored = {name.removeprefix(prefix): name for name in source.shapes if name.startswith(prefix)}
    for pattern in ignore:
        if not any(fnmatchcase(name, pattern) for name in (*wanted, *stored)):
            raise ConfigError(
                f"ignore={pattern!r} has no effect: neither {model} nor '{source.path}' has such a name. Names look "
                f"like {listed(list(wanted)[:2])} and {listed(list(stored)[:2])}."
            )

    def ignored(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in ignore)

    names: dict[Any, list[str]] = {}
    for name, (tensor, _) in wanted.items():
        if not ignored(name):
            names.setdefault(tensor, []).append(name)
    found: dict[Any, str] = {}
    missing: list[str] = []
    wrong: list[str] = []
    for tensor, candidates in names.items():
        name = next((each for each in candidates if each in stored), "")
        if not name:
            missing.append(candidates[0])
            continue
        found[tensor] = stored[name]
        here, there = tuple(wanted[name][1]), source.shapes[stored[name]]
        if here != there:
            wrong.append(f"{name} is {there} in the files and {here} in the model")
    unexpected = [name for name in stored if name not in wanted and not ignored(name)]
    problems = [
        f"{words} ({len(which)}): {listed(which, '; ' if which is wrong else ', ')}"
        for words, which in (
            ("not in the files", missing),
            ("only in the files", unexpected),
            ("different shapes", wrong),
        )
        if which
    ]
    if problems:
        raise CheckpointError(
            f"The weights in '{source.path}' are not those of {model}. {'; '.join(problems)}. Build the model with the "
            "settings of the files, load into the part of it that they belong to (into=, prefix=), or name in "
            "ignore=[...] what is to keep its own initialisation or is not wanted."
        )
    return found
