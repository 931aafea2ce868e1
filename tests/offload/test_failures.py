"""What goes wrong with files and limits is told before training starts, or in the step, with the knob."""

from __future__ import annotations

import errno
import gc
import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_zero.comm.exchange import Exchange
from lit_zero.core.errors import ConfigError, LitZeroError, UnsupportedError
from lit_zero.offload import Offload
from lit_zero.offload.file import StateFile
from lit_zero.offload.host import HostKeeper, _say_pageable, say_saves_nothing
from lit_zero.offload.open import open_keeping
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine
from tests.offload.harness import CPU, RUN, disk, own_kernel, plain, trained, with_steps
from tests.offload.test_equality import same
from tests.zero.harness import GPT, tokens


def built(
    offload: Offload, stage: str = "stage3", optimizer: Any = plain, overlap: bool = True, **more: Any
) -> tuple[GPT, Engine]:
    torch.manual_seed(0)
    model = GPT()
    keeping = open_keeping(offload, CPU, overlap=overlap)
    return model, Engine(model, [optimizer(model)], zero=Zero(stage), exchange=Exchange(), keeping=keeping, **more)


def stepped(model: GPT, engine: Engine, number: int = 0) -> None:
    engine.backward(model.loss(tokens(number)))
    engine.step()
    engine.join()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = "cannot be used: no file can be made there (Not a directory). Expected a folder in which this process may"
    with pytest.raises(ConfigError, match=r"offload.folder='.*file/states' ") as caught:
        built(disk(tmp_path / "file" / "states"))
    assert words in str(caught.value)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))  # root may write anywhere

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=r"offload.folder='.*' cannot be used: .*\(Permission denied\)"):
        disk(tmp_path).check_folder()


@pytest.fixture
def small_files() -> Iterator[int]:
    """No file may be larger than that many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield 50_000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_too_little_space_is_found_before_training(tmp_path: Path, small_files: int) -> None:
    """The masters alone have 24,192 bytes and fit: the state is counted too."""
    with pytest.raises(ConfigError, match=r"has too little space: this rank needs [\d,]+ more bytes there, ") as caught:
        built(disk(tmp_path))
    assert str(caught.value).endswith("Free some, choose another folder, or lower offload.ratio.")
    assert list(tmp_path.iterdir()) == []


def test_a_read_error(tmp_path: Path) -> None:
    model, engine = built(disk(tmp_path))
    stepped(model, engine)
    descriptor = engine.keeping._file._descriptor  # type: ignore[attr-defined]
    os.ftruncate(descriptor, 100)
    with pytest.raises(LitZeroError, match=r"reading [\d,]+ bytes of model states failed \(the file ends too early\)"):
        stepped(model, engine, 1)


def test_a_write_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = built(disk(tmp_path))

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.pwritev", full)
    with pytest.raises(
        LitZeroError, match=r"failed \(No space left on device\). The weights of this run are lost"
    ) as e:
        stepped(model, engine)
    assert "go on from the last checkpoint, which is unharmed, with another offload.folder." in str(e.value)


def test_a_failed_step_is_told_by_the_next_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = built(disk(tmp_path))
    engine.backward(model.loss(tokens(0)))
    monkeypatch.setattr("os.pwritev", lambda *_: 1 / 0)
    engine.step()
    with pytest.raises(ZeroDivisionError):
        model.loss(tokens(1))


@pytest.mark.parametrize("overlap", [True, False])
def test_a_step_that_failed_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    """One group of a lane fails and the next does not: the step has failed, and what is half stepped is not saved."""
    model, engine = built(disk(tmp_path), optimizer=own_kernel, overlap=overlap)
    stepped(model, engine)
    engine.backward(model.loss(tokens(1)))
    read, left = StateFile._read, [1]

    def once(self: StateFile, out: torch.Tensor, offset: int) -> None:
        if left:
            left.pop()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        read(self, out, offset)

    monkeypatch.setattr(StateFile, "_read", once)
    engine.step()
    for use in (engine.join, engine.parameter_pieces, engine.join, lambda: model.loss(tokens(2))):
        with pytest.raises(OSError, match="Input/output error"):
            use()
    assert not left


def test_a_manual_step_that_fails_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = built(disk(tmp_path), keep_gradients=True)
    engine.backward(model.loss(tokens(0)))
    monkeypatch.setattr("os.pwritev", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()


def test_a_limit_below_what_is_needed() -> None:
    need = 6048 * (4 + 8 + 4)
    with pytest.raises(ConfigError) as caught:
        built(Offload("cpu", limit=need - 1))
    assert str(caught.value) == (
        "offload.limit=96,767 bytes is too little: this rank needs 96,768 bytes of host memory (masters 24,192, "
        "optimizer state 48,384, gradients 24,192) with offload.ratio=1.0. Raise the limit, lower offload.ratio, or "
        "use offload=disk."
    )
    built(Offload("cpu", limit=need))


def test_a_limit_below_two_portions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\(two portions 131,072, gradients 24,192\).*lower offload.chunk or"):
        built(disk(tmp_path, limit=1 << 17))


def test_a_ratio_that_moves_nothing() -> None:
    with pytest.raises(ConfigError) as caught:
        built(Offload("cpu", ratio=0.001))
    words = str(caught.value)
    assert words.startswith("offload.ratio=0.001 moves nothing: blocks, or thirds of them, leave whole. Expected at")
    least = float(words.split("at least ")[1].split()[0])
    assert 0.05 < least < 0.5
    built(Offload("cpu", ratio=least))
    with pytest.raises(ConfigError, match="moves nothing"):
        built(Offload("cpu", ratio=least - 0.002))


def test_an_optimizer_that_is_not_elementwise(tmp_path: Path) -> None:
    def muon(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(model.parameters())

    for offload in (Offload("cpu"), disk(tmp_path)):
        with pytest.raises(
            UnsupportedError, match="is not element-wise.* With offload=cpu and offload=disk that holds"
        ):
            built(offload, "stage2", muon)


def test_files_have_no_names(tmp_path: Path) -> None:
    """So two jobs in one folder cannot meet, and nothing is left however they end."""
    (one, first), (two, second) = built(disk(tmp_path)), built(disk(tmp_path))
    for number in range(3):
        stepped(one, first, number)
        stepped(two, second, number)
    assert list(tmp_path.iterdir()) == []
    pieces = zip(first.parameter_pieces(), second.parameter_pieces(), strict=True)
    assert all(torch.equal(a.read(), b.read()) for a, b in pieces)
    descriptor = first.keeping._file._descriptor  # type: ignore[attr-defined]
    first.detach()
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_a_disk_that_promises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems cannot allocate ahead."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    same([trained("stage3", None), trained("stage3", disk(tmp_path, params=True), with_steps(RUN))])


def test_too_little_space_where_none_can_be_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.posix_fallocate")
    monkeypatch.setattr("lit_zero.offload.file._free", lambda _: 50_000)
    with pytest.raises(ConfigError, match=r"has too little space: .* more bytes there, 50,000 are free"):
        built(disk(tmp_path))


def test_memory_that_cannot_be_pinned_is_told_once(recwarn: pytest.WarningsRecorder) -> None:
    """There is no GPU here, so nothing can be pinned: what a GPU's keeper then does."""
    _say_pageable.cache_clear()
    keeper = HostKeeper(False, torch.device("cuda", 0))
    if torch.cuda.is_available():
        pytest.skip("memory can be pinned here")
    assert torch.equal(keeper.keep(8, torch.float32).read(), torch.zeros(8))
    arrived = torch.arange(4.0)
    assert torch.equal(keeper.gradient(arrived), arrived)
    said = [str(each.message) for each in recwarn if "could not be pinned" in str(each.message)]
    assert len(said) == 1 and "Raise the limit of locked memory (ulimit -l)." in said[0]


def test_a_cpu_is_told_once_that_nothing_is_saved(recwarn: pytest.WarningsRecorder) -> None:
    say_saves_nothing.cache_clear()
    for _ in range(2):
        open_keeping(Offload("cpu"), CPU).close()
    assert [str(each.message).startswith("offload=cpu saves nothing here") for each in recwarn].count(True) == 1


def test_nothing_stays_open_when_all_let_go(tmp_path: Path) -> None:
    """An engine in the middle of a step that nobody waits for."""
    gc.collect()
    others = set(threading.enumerate())
    model, engine = built(disk(tmp_path))
    engine.backward(model.loss(tokens(0)))
    engine.step()
    descriptor = engine.keeping._file._descriptor  # type: ignore[attr-defined]
    mine = set(threading.enumerate()) - others
    assert {thread.name for thread in mine} == {"lit_zero-step", "lit_zero-offload"}
    del model, engine
    for _ in range(20):  # the step holds them until it is over
        gc.collect()
        [thread.join(0.1) for thread in mine]
        if not any(thread.is_alive() for thread in mine):
            break
    assert not any(thread.is_alive() for thread in mine)
    with pytest.raises(OSError):
        os.fstat(descriptor)
