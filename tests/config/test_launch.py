"""Jobs of several processes without Hydra, with ranks that fail, and the main job without and with sharding."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.config.support import APPS, EXAMPLES, Finished, in_order, run

QUICK = ("all_raise", "rank1_raises", "rank0_is_killed")
THOROUGH = ("rank1_is_killed", "rank1_leaves", "rank0_is_stuck")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, tuple[Finished, Path]]:
    """Every failure, of those that are asked for, of a script without Hydra; two scripts at a time."""
    failures = QUICK + (THOROUGH if pytestconfig.getoption("--thorough") else ())
    folders = {failure: tmp_path_factory.mktemp(failure) for failure in failures}

    def one(failure: str) -> tuple[Finished, Path]:
        folder = folders[failure]
        done = run(APPS / "plain.py", failure, str(folder), cwd=folder)
        begin = time.monotonic()  # a process that rank 0 leaves behind must end soon too
        for file in folder.glob("pid*"):
            while _is_alive(int(file.read_text())) and time.monotonic() - begin < 30:
                time.sleep(0.2)
            assert not _is_alive(int(file.read_text())), f"{file.name} is still there after 30 s"
        return done, folder

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(failures, pool.map(one, failures), strict=True))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.thorough(*THOROUGH)
@pytest.mark.parametrize("failure", QUICK + THOROUGH)
def test_failing_rank_ends_all_ranks(plain: dict[str, tuple[Finished, Path]], failure: str) -> None:
    done, folder = plain[failure]
    assert done.code != 0
    assert done.seconds < 60, done.output
    assert not list(folder.glob("done*"))


@pytest.mark.thorough(*THOROUGH)
@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("all_raise", ["in _fail", "ValueError: every rank finds the same mistake"]),
        (
            "rank1_raises",
            ["RankError: rank 1 of 2 failed with ValueError: rank 1 alone", "The traceback of rank 1:", "in _fail"],
        ),
        ("rank1_is_killed", ["RankError: rank 1 of 2 ended with SIGKILL, as when memory runs out"]),
        ("rank1_leaves", ["RankError: rank 1 of 2 ended (exit code 3) before it began to train."]),
        (
            "rank0_is_stuck",
            ["lit_zero: rank 0 is stuck and ends. rank 1 of 2 failed with ValueError: rank 1 alone", "in _fail"],
        ),
    ],
)
def test_output_says_which_rank_failed_and_how(
    plain: dict[str, tuple[Finished, Path]], failure: str, words: list[str]
) -> None:
    done, _ = plain[failure]
    assert in_order(done.output, words), done.output


def test_same_error_on_every_rank_keeps_its_type(plain: dict[str, tuple[Finished, Path]]) -> None:
    assert "RankError" not in plain["all_raise"][0].output


def test_main_job_without_and_with_sharding(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    small = [
        "model.dim=32",
        "model.layers=2",
        "model.heads=2",
        "data.block_size=32",
        "data.vocab_size=256",
        "data.val_fraction=0.2",
    ]
    short = ["trainer.max_steps=4", "trainer.val_check_interval=4", "callbacks.report.sample_tokens=3"]
    places = [f"data.path={text}", f"paths.cache_dir={tmp_path}/cache", f"hydra.sweep.dir={tmp_path}/sweep"]
    done = run(EXAMPLES / "train.py", "-m", "zero=none,stage3", *small, *short, *places, cwd=tmp_path)
    assert done.code == 0, done.output
    results = [json.loads((tmp_path / "sweep" / str(number) / "result.json").read_text()) for number in range(2)]
    assert [result["status"] for result in results] == ["completed"] * 2
    assert len({result["val_loss"] for result in results}) == 1, "both train the same"
    state = [result["state_bytes_per_rank"] for result in results]
    assert state[1] < 0.6 * state[0]
    assert done.output.count("completed\n") == 2
    assert (tmp_path / "sweep" / "1" / "checkpoints" / "last.ckpt").exists()
    assert list((tmp_path / "sweep" / "0" / "tensorboard").glob("events*"))


@pytest.mark.thorough
def test_main_job_in_a_pipeline(tmp_path: Path) -> None:
    """Two stages, on two data-parallel ranks each: the numbers of two ranks without a pipeline, and a sample."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    small = ["model.dim=32", "model.heads=2", "data.block_size=32", "data.vocab_size=256"]
    # 112 sequences: equal shares for 2 ranks; else the means of their means differ
    small += ["data.val_fraction=0.205"]
    short = ["trainer.max_steps=4", "trainer.val_check_interval=4", "callbacks.report.sample_tokens=3", "logger=csv"]
    same = ["data.batch_size=8", "model.layers=2"]
    places = [f"data.path={text}", f"paths.cache_dir={tmp_path}/cache"]
    results = {}
    for name, words in {"piped": ["experiment=pipeline_2x2"], "whole": ["trainer.devices=2"]}.items():
        folder = f"hydra.run.dir={tmp_path}/{name}"
        done = run(EXAMPLES / "train.py", *small, *short, *places, *same, *words, folder, cwd=tmp_path)
        assert done.code == 0, done.output
        assert "A sample of 3 tokens:" in done.output
        results[name] = json.loads((tmp_path / name / "result.json").read_text())
    piped, whole = results["piped"], results["whole"]
    assert piped["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-5)
    assert piped["val_bpb"] == pytest.approx(whole["val_bpb"], rel=1e-5)
    assert piped["parameters"] == whole["parameters"]
    assert (tmp_path / "piped" / "checkpoints" / "last.ckpt").exists()
