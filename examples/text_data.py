"""Real text that is already on the machine, as batches of tokens.

The default corpus is the source of the running Python's own standard library, so that nothing has to be downloaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from byte_pairs import BytePairs
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_zero.core.errors import ConfigError

FORMAT = 2  # of the cache files; a larger number makes every cache be built anew
LEARN_BYTES = 2_000_000  # of the text, from which byte pairs are learned


class Windows(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Sequences that follow one another in the text: every token is a target exactly once.

    Sequence i has the tokens ``[i * T, (i + 1) * T)`` and as targets the same range moved by one. The first token of
    the text has nothing before it and is no target; at the end fewer than T tokens are left out, so that every
    sequence has T.

    Args:
        text: token numbers [count].
        block_size: T, in tokens.
        lengths: bytes of text that each token stands for [vocab_size], int64.
    """

    def __init__(self, text: np.ndarray, block_size: int, lengths: np.ndarray) -> None:
        self.text = text
        self.block_size = block_size
        self.lengths = lengths

    def __len__(self) -> int:
        return max(0, (len(self.text) - 1) // self.block_size)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens [T], targets [T] and the number of bytes of text that the targets stand for []."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = index * self.block_size
        window = self.text[start : start + self.block_size + 1].astype(np.int64)  # [T + 1]
        text_bytes = self.lengths[window[1:]].sum()
        return torch.from_numpy(window[:-1]), torch.from_numpy(window[1:]), torch.tensor(text_bytes)


class TextDataModule(pl.LightningDataModule):
    """Training and validation sequences from a file, a folder, or the Python standard library.

    With ``vocab_size=256`` a token is one byte; the tokens above are byte pairs learned from the text. Any text in any
    language works. The text is tokenised once into a memory-mapped file, by one process per machine, and found there
    by later runs until a source file changes.

    The files are put one after the other in an order that depends on their names alone (by hash, so that neighbours in
    the list come from everywhere), and the last part of the text is held out for validation: it is a random sample of
    files, of which at most one is shared with the training part.

    Args:
        path: a text file or a folder, of which every file that is UTF-8 text is read; None takes the standard
            library's ``*.py``.
        vocab_size: number of different tokens, from 256 (bytes) to 65,536.
        block_size: sequence length, in tokens.
        batch_size: sequences per rank and step.
        val_fraction: part of the text that is held out, between 0 and 1.
        cache_dir: folder of the memory-mapped files; None takes ``lit_zero/text`` in the user's cache folder.
        num_workers: processes that read batches, per rank; a batch takes less than a millisecond, so 0 is enough.

    Raises:
        ConfigError: for a path that does not exist, or a number outside its range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        vocab_size: int = 256,
        block_size: int = 128,
        batch_size: int = 8,
        val_fraction: float = 0.01,
        cache_dir: str | os.PathLike[str] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for key, size in {"block_size": block_size, "batch_size": batch_size}.items():
            if size < 1:
                raise ConfigError(f"data.{key}={size} is not possible: expected a whole number of at least 1.")
        if not 256 <= vocab_size <= 65_536:
            raise ConfigError(
                f"data.vocab_size={vocab_size} is not possible: expected 256 (one token per byte) to 65,536."
            )
        if not 0.0 < val_fraction < 1.0:
            raise ConfigError(f"data.val_fraction={val_fraction} is not possible: expected a number between 0 and 1.")
        self.path = None if path is None else Path(path).expanduser().resolve()
        self._require_path()  # here already, so that it is said before any process is launched
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.cache_dir = _user_cache() if cache_dir is None else Path(cache_dir).expanduser().resolve()
        self.num_workers = num_workers

    @property
    def cache_file(self) -> Path:
        """The memory-mapped file of this corpus, once it is there; a ``.json`` beside it says what it was made from."""
        return self.cache_dir / str(_read_description(self._description).get("file", self._description.name))

    @property
    def _description(self) -> Path:
        source = str(self.path or sysconfig.get_path("stdlib"))
        name = "standard-library" if self.path is None else self.path.stem
        return self.cache_dir / f"{name}-{hashlib.sha256(source.encode()).hexdigest()[:12]}-{self.vocab_size}.json"

    def prepare_data(self) -> None:
        """Write the memory-mapped file unless it is there and up to date. Lightning calls this in one process per
        machine.

        Raises:
            ConfigError: if the path does not exist, or no text is found there.
        """
        files = list(self._files())
        fingerprint = _fingerprint(files)
        if _read_description(self._description).get("fingerprint") != fingerprint:
            self._write(files, fingerprint)

    def setup(self, stage: str) -> None:
        """Open the memory-mapped file and divide the text.

        Raises:
            ConfigError: if there is no such file, or one of the two parts is shorter than one sequence.
        """
        description = _read_description(self._description)
        if not description:
            raise ConfigError(
                f"The tokenised text of {self._description} is missing or damaged. prepare_data() writes it; on "
                "several machines, data.cache_dir must be a folder that each of them can write to."
            )
        self.tokenizer = BytePairs(description["pairs"])
        text = np.memmap(self.cache_dir / description["file"], dtype=self.tokenizer.dtype, mode="r")  # [count]
        held_out = round(len(text) * self.val_fraction)
        lengths = self.tokenizer.lengths
        self.train_set = Windows(text[: len(text) - held_out], self.block_size, lengths)
        self.val_set = Windows(text[len(text) - held_out :], self.block_size, lengths)
        for part, windows in (("training", self.train_set), ("validation", self.val_set)):
            if len(windows) == 0:
                raise ConfigError(
                    f"The {part} part of {self._source_name()} has {len(windows.text):,} tokens, but one sequence "
                    f"needs data.block_size + 1 = {self.block_size + 1:,}. Give a longer text with data.path, lower "
                    f"data.block_size={self.block_size}, or change data.val_fraction={self.val_fraction}."
                )

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in a new order each epoch; Lightning divides them among the ranks."""
        return DataLoader(
            self.train_set, self.batch_size, shuffle=True, num_workers=self.num_workers, drop_last=self._drop_last()
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val_set, self.batch_size, num_workers=self.num_workers)

    def encode(self, text: str) -> Tensor:
        """Return the token numbers of ``text`` [T]."""
        return torch.from_numpy(self.tokenizer.encode(text.encode()).astype(np.int64))

    def decode(self, tokens: Tensor) -> str:
        """Return the text of token numbers [T]; bytes that are no valid UTF-8 become a replacement character."""
        return self.tokenizer.decode(tokens.tolist()).decode(errors="replace")

    def _drop_last(self) -> bool:
        # Steps of equal size, unless the text is so short that no batch would be left.
        return len(self.train_set) >= self.batch_size

    def _source_name(self) -> str:
        return "the Python standard library" if self.path is None else f"data.path={self.path}"

    def _require_path(self) -> None:
        if self.path is not None and not self.path.exists():
            raise ConfigError(
                f"data.path={self.path} does not exist. Give a text file or a folder of text files, "
                "or leave data.path empty (null) for the source of the Python standard library."
            )

    def _files(self) -> Iterator[Path]:
        """The files to read, in the order in which they stand in the text."""
        self._require_path()
        if self.path is None:
            root = Path(sysconfig.get_path("stdlib"))
            found: Iterable[Path] = root.rglob("*.py")
        elif self.path.is_dir():
            root = self.path
            found = root.rglob("*")
        else:
            root = self.path.parent
            found = [self.path]
        installed = {"site-packages", "dist-packages"}  # other people's code, different on every machine
        names = (file.relative_to(root) for file in found if file.is_file())
        kept = [name for name in names if self.path is not None or not installed & set(name.parts)]
        return (
            root / name for name in sorted(kept, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest())
        )

    def _write(self, files: list[Path], fingerprint: str) -> None:
        texts = [content for content in (file.read_bytes() for file in files) if _is_text(content)]
        count = sum(len(text) for text in texts)
        if count == 0:
            raise ConfigError(
                f"No text was found in {self._source_name()}: {len(files):,} files were read and none is UTF-8 text of "
                "at least one byte. Give a text file or a folder of text files with data.path."
            )
        tokenizer = BytePairs.learn(b"".join(texts)[:LEARN_BYTES], self.vocab_size)
        tokens = b"".join(tokenizer.encode(text).tobytes() for text in texts)
        file = self._description.with_name(f"{self._description.stem}-{fingerprint[:12]}.bin")
        description = {
            "format": FORMAT,
            "file": file.name,
            "fingerprint": fingerprint,
            "files": len(texts),
            "text_bytes": count,
            "tokens": len(tokens) // tokenizer.dtype.itemsize,
            "file_bytes": len(tokens),
            "pairs": tokenizer.pairs,
        }
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        before = _read_description(self._description).get("file", file.name)
        # Another job may be reading: what it reads stays whole, because every text has a file name of its own and the
        # description, which comes last, names it.
        _write_atomically(file, tokens)
        _write_atomically(self._description, json.dumps(description).encode())
        if before != file.name:
            (self.cache_dir / before).unlink(missing_ok=True)


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lit_zero" / "text"


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def _fingerprint(files: list[Path]) -> str:
    """A hash that changes when a file is added, removed or written to; the contents are not read."""
    digest = hashlib.sha256(f"format {FORMAT}".encode())
    for file in files:
        status = file.stat()
        digest.update(f"\0{file}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _read_description(path: Path) -> dict[str, Any]:
    """What the cached file was made from; empty if it is missing or damaged, so that it is written again."""
    try:
        description = json.loads(path.read_text())
        complete = description["file_bytes"] == (path.parent / description["file"]).stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return description if complete else {}


def _write_atomically(file: Path, content: bytes) -> None:
    """Write under a temporary name and rename: another process sees the old file or the whole new one."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
