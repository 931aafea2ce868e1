"""Jobs of several processes: in sweeps, with failing ranks, with and without Hydra."""

from __future__ import annotations

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.config.support import APPS, EXAMPLES, Finished, in_order, run

Sweep = tuple[Finished, Path]


def sweep(folder: Path, *arguments: str) -> Sweep:
    return run(APPS / "app.py", "-m", f"hydra.sweep.dir={folder}/sweep", *arguments, cwd=folder), folder / "sweep"


def seen(folder: Path, number: int) -> list[dict[str, Any]]:
    """What each rank of a job saw, by rank."""
    files = sorted((folder / str(number)).glob("seen*.json"))
    assert [file.name for file in files] == [f"seen{rank}.json" for rank in range(len(files))]
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sweep(tmp_path_factory.mktemp("devices"), "trainer.devices=2,1,2", "lr=0.25")


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sweep(tmp_path_factory.mktemp("failures"), "failure=rank1_raises,rank0_raises,rank0_sleeps,none")


def test_each_job_has_its_own_ranks_and_folder(devices: Sweep) -> None:
    done, folder = devices
    assert done.code == 0, done.output
    for number, size in enumerate([2, 1, 2]):
        ranks = seen(folder, number)
        assert [rank["world_size"] for rank in ranks] == [size] * size
        assert [rank["group_size"] for rank in ranks] == [size] * size
        assert [rank["steps"] for rank in ranks] == [2] * size
    pids = [rank["pid"] for number in range(3) for rank in seen(folder, number)]
    assert len({pids[0], pids[2], pids[3]}) == 1, "rank 0 of every job is the process that the user started"
    assert len(set(pids)) == 3, "the other ranks of every job are new processes"


def test_ranks_of_a_job_have_one_configuration(devices: Sweep) -> None:
    _, folder = devices
    for number, size in enumerate([2, 1, 2]):
        configs = [rank["config"] for rank in seen(folder, number)]
        assert all(config == configs[0] for config in configs)
        assert configs[0]["trainer"]["devices"] == size
        assert configs[0]["lr"] == 0.25
        assert configs[0]["number"] == number


def test_ranks_share_the_threads_that_one_process_has(devices: Sweep) -> None:
    _, folder = devices
    alone = seen(folder, 1)[0]["threads"]
    for number in (0, 2):
        assert [rank["threads"] for rank in seen(folder, number)] == [max(1, alone // 2)] * 2


def test_only_the_first_rank_writes_hydras_files(devices: Sweep) -> None:
    _, folder = devices
    assert (folder / "0" / ".hydra" / "overrides.yaml").read_text() == "- trainer.devices=2\n- lr=0.25\n"
    assert sorted(file.name for file in folder.iterdir()) == [
        "0",
        "1",
        "2",
        "multirun.yaml",
        "results.csv",
        "results.md",
    ]
    assert sorted(file.name for file in (folder / "0").glob("*.log")) == ["app.log", "app_rank1.log"]


def test_sweep_ends_with_a_table(devices: Sweep) -> None:
    done, folder = devices
    table = done.output[done.output.rindex("3 jobs in") :]
    assert "all with lr=0.25" in table
    for number, size in enumerate([2, 1, 2]):
        assert re.search(
            rf"^ +{number}  trainer.devices={size} +\d\.\d{{4}} +3\.00 MiB +\d+ s  completed$", table, re.MULTILINE
        ), table
    assert len((folder / "results.md").read_text().splitlines()) == 5


def test_failed_jobs_do_not_touch_the_others(failures: Sweep) -> None:
    done, folder = failures
    assert done.code == 1
    ranks = seen(folder, 3)
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    assert [rank["steps"] for rank in ranks] == [2, 2]
    results = [json.loads((folder / str(number) / "result.json").read_text()) for number in range(4)]
    assert [result["status"] for result in results] == ["failed", "failed", "failed", "completed"]
    assert all(result["seconds"] < 60 for result in results)


def test_failed_jobs_are_rows_of_the_table(failures: Sweep) -> None:
    done, _ = failures
    table = done.output[done.output.rindex("4 jobs in") :]
    assert "failure=rank1_raises         -                 -" in table
    assert table.count("FAILED rank 1 of 2 failed with ValueError: rank 1 alone finds a mistake\n") == 2
    assert table.count("FAILED ValueError: rank 0 alone finds a mistake\n") == 1
    assert table.count("completed") == 1


def test_error_of_a_job_shows_the_traceback_of_the_rank(failures: Sweep) -> None:
    done, folder = failures
    error = json.loads((folder / "0" / "result.json").read_text())["error"]
    assert in_order(
        error,
        [
            "rank 1 of 2 failed with ValueError",
            "The traceback of rank 1:",
            "in _fail",
            "ValueError: rank 1 alone finds a mistake",
        ],
    )
    assert in_order(
        done.output, ["Error executing job with overrides: ['failure=rank1_raises']", "The traceback of rank 1:"]
    )


FAILURES = ("none", "all_raise", "rank1_raises", "rank1_is_killed", "rank1_leaves", "rank0_is_stuck", "rank0_is_killed")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Finished, Path]]:
    """Every failure of a script without Hydra; two scripts at a time."""
    folders = {failure: tmp_path_factory.mktemp(failure) for failure in FAILURES}

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
        return dict(zip(FAILURES, pool.map(one, FAILURES), strict=True))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_trainers_of_one_script_share_their_processes(plain: dict[str, tuple[Finished, Path]]) -> None:
    done, folder = plain["none"]
    assert done.code == 0, done.output
    assert sorted(file.name for file in folder.iterdir()) == ["done0", "done1", "pid0", "pid1"]


@pytest.mark.parametrize("failure", FAILURES[1:])
def test_failing_rank_ends_all_ranks(plain: dict[str, tuple[Finished, Path]], failure: str) -> None:
    done, folder = plain[failure]
    assert done.code != 0
    assert done.seconds < 60, done.output
    assert not list(folder.glob("done*"))


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


def test_main_job_in_every_stage(tmp_path: Path) -> None:
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
    done = run(EXAMPLES / "train.py", "-m", "zero=none,stage1,stage2,stage3", *small, *short, *places, cwd=tmp_path)
    assert done.code == 0, done.output
    results = [json.loads((tmp_path / "sweep" / str(number) / "result.json").read_text()) for number in range(4)]
    assert [result["status"] for result in results] == ["completed"] * 4
    assert len({result["val_loss"] for result in results}) == 1, "all stages train the same"
    state = [result["state_bytes_per_rank"] for result in results]
    assert state == sorted(state, reverse=True)
    assert state[3] < 0.6 * state[0]
    assert done.output.count("completed\n") == 4
    assert (tmp_path / "sweep" / "3" / "checkpoints" / "last.ckpt").exists()
    assert list((tmp_path / "sweep" / "0" / "tensorboard").glob("events*"))
