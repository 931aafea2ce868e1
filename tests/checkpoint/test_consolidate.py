"""``lit-zero consolidate``: a sharded checkpoint into one file that others open."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import safetensors.torch
import torch

from lit_zero import cli
from lit_zero._version import __version__
from lit_zero.checkpoint import consolidate as module
from lit_zero.checkpoint import full, sharded
from lit_zero.checkpoint.consolidate import consolidate
from lit_zero.checkpoint.parts import OptimizerParts
from lit_zero.comm.world import World
from lit_zero.core.errors import CheckpointError, ConfigError
from lit_zero.core.piece import ParamState
from tests.checkpoint.support import SHAPES, adam, blank, groups, names_in, save_here, save_on_rank, tensors
from tests.checkpoint.test_full import BUFFERS, ELSEWHERE, NAMES, Small, equal, trainer

NAMES_IN_FILE = sorted([*SHAPES, "tied.weight", "buffer"])


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the exit status of ``lit-zero`` and what it wrote to stderr; stdout stays free for pipes."""
    status = cli.main(words)
    out, err = capsys.readouterr()
    assert out == ""
    return status, err


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_here(tmp_path / "sharded", World())
    return tmp_path / "sharded"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ckpt_holds_everything(ranks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int) -> None:
    ranks(size).run(save_on_rank, str(tmp_path / "sharded"))
    status, err = run("consolidate", str(tmp_path / "sharded"), str(tmp_path / "x.ckpt"), capsys=capsys)
    assert status == 0
    assert err.splitlines()[0] == "3/22 tensors"
    assert err.splitlines()[-2:] == ["22/22 tensors", f"lit-zero: wrote '{tmp_path / 'x.ckpt'}'"]
    assert names_in(tmp_path) == ["sharded", "x.ckpt"]
    found = torch.load(tmp_path / "x.ckpt", weights_only=True)
    whole = tensors()
    state = {
        index: {"step": torch.tensor(10.0 + index), **{key: values[name] for key, values in adam(whole).items()}}
        for index, name in enumerate(SHAPES)
    }
    expected = {
        "epoch": 1,
        "global_step": 10,
        "hyper_parameters": {"width": 3},
        "state_dict": {
            **whole,
            "tied.weight": whole["embed.weight"],
            "buffer": torch.arange(6).view(2, 3) + 1,
            "extra._extra_state": {"counter": 1},
        },
        "optimizer_states": [{"state": state, "param_groups": groups()}],
    }
    assert equal(found, expected)
    assert found["state_dict"]["tied.weight"].data_ptr() == found["state_dict"]["embed.weight"].data_ptr()
    # Nothing hangs on to more of the file than the tensor itself.
    assert found["state_dict"]["conv.bias"].untyped_storage().nbytes() == 7 * 8


def test_safetensors_holds_every_tensor(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, err = run("consolidate", str(saved), str(tmp_path / "x.safetensors"), capsys=capsys)
    assert status == 0
    assert "9/9 tensors" in err
    found = safetensors.torch.load_file(tmp_path / "x.safetensors")
    whole = tensors()
    assert sorted(found) == NAMES_IN_FILE
    assert equal({name: found[name] for name in whole}, whole)
    assert torch.equal(found["tied.weight"], whole["embed.weight"])
    assert names_in(tmp_path) == ["sharded", "x.safetensors"]


def shard(source: str, target: str) -> None:
    """Save Lightning's plain checkpoint as a sharded one, from pieces on every rank."""
    world = World()
    checkpoint = full.load(source)
    weights = {name: checkpoint["state_dict"][name] for name in NAMES}
    pieces = blank(weights, world.rank, world.size)
    buffers = full.load_into(pieces, checkpoint["state_dict"], others=BUFFERS, aliases={"head.weight": NAMES[0]})
    saved = checkpoint["optimizer_states"][0]
    own = OptimizerParts([ParamState(i, name) for i, name in enumerate(NAMES)], saved["param_groups"])
    for state in own.states:
        one = {state.name: weights[state.name]}
        state.tensors = {key: blank(one, world.rank, world.size)[0] for key in ("exp_avg", "exp_avg_sq")}
    full.load_optimizer_into(own, saved)
    sharded.save(
        target,
        weights=pieces,
        others=buffers,
        aliases={"head.weight": "embed.weight"},
        optimizers=[own],
        extras={k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")},
        world=world,
    )


def test_lightning_loads_and_resumes(ranks: Any, tmp_path: Path) -> None:
    pl.seed_everything(1, verbose=False)
    first = trainer(tmp_path, 1)
    first.fit(Small(width=3))
    first.save_checkpoint(tmp_path / "plain.ckpt")
    ranks(2).run(shard, str(tmp_path / "plain.ckpt"), str(tmp_path / "sharded"))
    consolidate(tmp_path / "sharded", tmp_path / "x.ckpt")
    assert equal(torch.load(tmp_path / "plain.ckpt"), torch.load(tmp_path / "x.ckpt"))
    loaded = Small.load_from_checkpoint(tmp_path / "x.ckpt")
    assert loaded.hparams["width"] == 3
    assert equal(dict(loaded.state_dict()), dict(first.model.state_dict()))
    again = trainer(tmp_path, 2)
    again.fit(loaded, ckpt_path=str(tmp_path / "x.ckpt"))
    assert again.global_step == 2 * first.global_step == 6


def test_the_file_opens_where_this_package_is_not_installed(saved: Path, tmp_path: Path) -> None:
    consolidate(saved, tmp_path / "x.ckpt")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "x.ckpt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(sorted([*NAMES_IN_FILE, "extra._extra_state"]))


def test_one_tensor_at_a_time_in_memory(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.save gets lies in mapped files, not in the process's own memory."""
    mapped = []

    def save(content: dict[str, Any], file: Any) -> None:
        table = Path("/proc/self/maps").read_text()
        ranges = [
            tuple(int(n, 16) for n in line.split()[0].split("-")) for line in table.splitlines() if "x.ckpt" in line
        ]
        states = content["optimizer_states"][0]["state"].values()
        for tensor in [*content["state_dict"].values(), *(t for s in states for t in s.values())]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.numel():
                mapped.append(any(start <= tensor.data_ptr() < end for start, end in ranges))

    if not Path("/proc/self/maps").exists():
        pytest.fail("this test reads /proc/self/maps, which Linux has")
    monkeypatch.setattr(module.torch, "save", save)
    consolidate(saved, tmp_path / "x.ckpt")
    assert len(mapped) == 17
    assert all(mapped)


def test_weights_alone(tmp_path: Path) -> None:
    save_here(tmp_path / "sharded", World(), optimizers=[])
    consolidate(tmp_path / "sharded", tmp_path / "x.ckpt")
    assert "optimizer_states" not in torch.load(tmp_path / "x.ckpt")


# ---- refusals ----


def test_an_existing_file_stays(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "x.ckpt"
    target.write_text("precious")
    words = ["consolidate", str(saved), str(target)]
    status, err = run(*words, capsys=capsys)
    assert status == 1
    assert err == (f"lit-zero: error: '{target}' exists already. Choose another name, or replace it with --force.\n")
    assert target.read_text() == "precious"
    assert run(*words, "--force", capsys=capsys)[0] == 0
    assert torch.load(target)["epoch"] == 1


def test_a_folder_as_target(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").mkdir()
    with pytest.raises(CheckpointError, match=r"Cannot write '.*x\.ckpt': it is a folder\."):
        consolidate(saved, tmp_path / "x.ckpt", force=True)


def test_an_unknown_ending(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, err = run("consolidate", str(saved), str(tmp_path / "x.bin"), capsys=capsys)
    assert status == 1
    assert err == (
        f"lit-zero: error: Cannot write '{tmp_path / 'x.bin'}': a name that ends in .ckpt, .pt, .pth or .safetensors"
        " was expected.\n"
    )


def test_safetensors_missing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ConfigError, match=r"needs the package safetensors: pip install safetensors"):
        consolidate(saved, tmp_path / "x.safetensors")
    assert names_in(tmp_path) == ["sharded"]


def test_a_truncated_checkpoint(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(saved / "__0_0.distcp", "r+b") as file:
        file.truncate(100)
    status, err = run("consolidate", str(saved), str(tmp_path / "x.ckpt"), capsys=capsys)
    assert status == 1
    assert err.startswith(f"lit-zero: error: The checkpoint '{saved}' is damaged: __0_0.distcp has 100 bytes of ")
    assert names_in(tmp_path) == ["sharded"]


def test_a_broken_tensor_leaves_no_output(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved / "__0_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    status, err = run("consolidate", str(saved), str(tmp_path / "x.ckpt"), capsys=capsys)
    assert status == 1
    assert f"lit-zero: error: The checkpoint '{saved}' is damaged: a tensor cannot be read (" in err
    assert names_in(tmp_path) == ["sharded"]


def test_a_newer_version_another_format_and_a_file(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = json.loads((saved / "lit_zero.json").read_text())
    (saved / "lit_zero.json").write_text(json.dumps({**header, "format_version": 99}))
    assert "has format version 99" in run("consolidate", str(saved), str(tmp_path / "x.ckpt"), capsys=capsys)[1]
    (saved / "lit_zero.json").unlink()
    assert "is not a lit_zero checkpoint" in run("consolidate", str(saved), str(tmp_path / "x.ckpt"), capsys=capsys)[1]
    torch.save({}, tmp_path / "plain.ckpt")
    err = run("consolidate", str(tmp_path / "plain.ckpt"), str(tmp_path / "x.ckpt"), capsys=capsys)[1]
    assert "plain.ckpt' is a file; a sharded checkpoint is a folder." in err
    assert not (tmp_path / "x.ckpt").exists()


def test_objects_need_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_here(tmp_path / "sharded", World(), extras={"hyper_parameters": {"error": CheckpointError("mine")}})
    words = ["consolidate", str(tmp_path / "sharded"), str(tmp_path / "x.ckpt")]
    status, err = run(*words, capsys=capsys)
    assert status == 1
    assert "--trust" in err
    assert run(*words, "--trust", capsys=capsys)[0] == 0
    assert str(torch.load(tmp_path / "x.ckpt", weights_only=False)["hyper_parameters"]["error"]) == "mine"


# ---- the command itself ----


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words, expected in [(["--version"], f"lit-zero {__version__}\n"), (["--help"], "consolidate"), ([], "COMMAND")]:
        with pytest.raises(SystemExit) as status:
            cli.main(words)
        out, err = capsys.readouterr()
        assert status.value.code == (0 if words else 2)
        assert expected in out + err


def test_interrupted(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(content: Any, file: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.torch, "save", interrupt)
    assert cli.main(["consolidate", str(saved), str(tmp_path / "x.ckpt")]) == 130
    assert names_in(tmp_path) == ["sharded"]
