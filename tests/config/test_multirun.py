"""Sweeps: every job runs its own configuration in its own processes, fails alone, and is run again only if it must.

The sweeps are real: a program per sweep, processes per job. They run two at a time, before the first test looks.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.config.support import APPS, EXAMPLES, Finished, in_order, run

STAGES = ("none", "stage3")
SMALL = (
    *("model.dim=32", "model.layers=1", "model.heads=2", "data.block_size=32", "data.vocab_size=256"),
    *("data.val_fraction=0.2", "trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.devices=1"),
    *("callbacks.report.sample_tokens=3", "logger=none"),
)
OPTUNA = ("hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1")
LIGHT = ("-m", "x=2,3", "fails=2", "hydra.sweeper.max_batch_size=1")
RESUME = "hydra.callbacks.sweep_table.resume=true"


@dataclass
class Sweep:
    """A sweep that has ended: the program, and the sweep's folder."""

    done: Finished
    folder: Path

    def seen(self, number: int) -> list[dict[str, Any]]:
        """What each rank of a job saw, by rank."""
        files = sorted((self.folder / str(number)).glob("seen*.json"))
        assert [file.name for file in files] == [f"seen{rank}.json" for rank in range(len(files))]
        return [json.loads(file.read_text()) for file in files]

    def result(self, number: int) -> dict[str, Any]:
        found = json.loads((self.folder / str(number) / "result.json").read_text())
        assert isinstance(found, dict)
        return found

    def ended(self, number: int) -> float:
        """When a job's result was complete, in seconds since the epoch."""
        return (self.folder / str(number) / "result.json").stat().st_mtime

    def table(self, jobs: int) -> str:
        return self.done.output[self.done.output.rindex(f"{jobs} jobs in") :]


def sweep(folder: Path, *arguments: str, script: Path = APPS / "app.py") -> Sweep:
    done = run(script, "-m", f"hydra.sweep.dir={folder}/sweep", *arguments, cwd=folder, timeout=500)
    return Sweep(done, folder / "sweep")


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return path


SWEEPS: dict[str, Callable[[Path], Sweep]] = {
    "stages": lambda at: sweep(at, f"zero={','.join(STAGES)}", "trainer.devices=1,2", "lr=0.25"),
    "half_done": lambda at: sweep(at, *LIGHT[1:], script=APPS / "light.py"),
}
# With a rank that fails, and with launchers and sweepers of others.
OTHERS: dict[str, Callable[[Path], Sweep]] = {
    "failures": lambda at: sweep(at, "failure=rank0_sleeps,none"),
    "joblib": lambda at: sweep(
        at, "failure=rank1_is_killed", "trainer.devices=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"
    ),
    "submitit": lambda at: sweep(at, "trainer.devices=1", "hydra/launcher=submitit_local"),
    "optuna": lambda at: sweep(at, *OPTUNA, "lr=interval(0.01,0.2)", "hydra.sweeper.n_trials=1"),
    "search": lambda at: sweep(
        at, *SMALL, "hparams_search=optuna", "hydra.sweeper.n_trials=1", "model.dim=32", f"data.path={text_file(at)}",
        f"paths.cache_dir={at}/cache", script=EXAMPLES / "train.py",
    ),
}  # fmt: skip


def all_of(sweeps: dict[str, Callable[[Path], Sweep]], folders: pytest.TempPathFactory) -> dict[str, Sweep]:
    with ThreadPoolExecutor(2) as pool:
        started = {name: pool.submit(start, folders.mktemp(name)) for name, start in sweeps.items()}
        return {name: future.result() for name, future in started.items()}


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sweep]:
    return all_of(SWEEPS, tmp_path_factory)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sweep]:
    return all_of(OTHERS, tmp_path_factory)


def test_sweep_of_stages_and_devices_ends_with_a_correct_row_for_every_job(sweeps: dict[str, Sweep]) -> None:
    done = sweeps["stages"].done
    assert done.code == 0, done.output
    table = sweeps["stages"].table(4)
    assert "all with lr=0.25" in table
    jobs = [(stage, devices) for stage in STAGES for devices in (1, 2)]
    for number, (stage, devices) in enumerate(jobs):
        ranks, result = sweeps["stages"].seen(number), sweeps["stages"].result(number)
        assert [(rank["stage"], rank["world_size"], rank["group_size"]) for rank in ranks] == [
            (stage, devices, devices)
        ] * devices
        assert [rank["steps"] for rank in ranks] == [2] * devices
        assert [rank["loss"] for rank in ranks] == [result["val_loss"]] * devices
        size = result["state_bytes_per_rank"]
        shown = f"{size:.0f} B" if size < 1024 else f"{size / 1024:.2f} KiB"
        row = rf"zero={stage} trainer.devices={devices} +{result['val_loss']:.4f} +[\d,]+ +{shown} +\d+ s  completed"
        assert re.search(rf"^ +{number}  {row}$", table, re.MULTILINE), f"{row}\n{table}"
    # every batch is the same, so that all four train the same: the stages bit by bit
    losses = [sweeps["stages"].result(number)["val_loss"] for number in range(4)]
    assert len(set(losses[1::2])) == 1
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    states = [sweeps["stages"].result(number)["state_bytes_per_rank"] for number in range(4)]
    assert states[3] < 0.7 * states[1], "stage3 on two ranks holds about half"


def test_every_job_has_processes_of_its_own(sweeps: dict[str, Sweep]) -> None:
    pids = [rank["pid"] for number in range(4) for rank in sweeps["stages"].seen(number)]
    assert len(pids) == len(set(pids)) == 6


def test_ranks_of_a_job_have_one_configuration(sweeps: dict[str, Sweep]) -> None:
    for number in range(4):
        configs = [rank["config"] for rank in sweeps["stages"].seen(number)]
        assert all(config == configs[0] for config in configs)
        assert configs[0]["trainer"]["devices"] == len(configs)
        assert (configs[0]["lr"], configs[0]["number"]) == (0.25, number)
        assert configs[0]["sweep"] == str(sweeps["stages"].folder)


def test_ranks_share_the_threads_that_one_process_has(sweeps: dict[str, Sweep]) -> None:
    alone = sweeps["stages"].seen(0)[0]["threads"]
    assert [rank["threads"] for rank in sweeps["stages"].seen(1)] == [max(1, alone // 2)] * 2


def test_files_of_a_sweep(sweeps: dict[str, Sweep]) -> None:
    folder = sweeps["stages"].folder
    overrides = (folder / "1" / ".hydra" / "overrides.yaml").read_text()
    assert overrides == "- zero=none\n- trainer.devices=2\n- lr=0.25\n"
    files = {file.name for file in folder.iterdir()} - set("0123")
    assert files == {"multirun.yaml", "results.csv", "results.md", "results.svg"}
    assert sorted(file.name for file in (folder / "1").glob("*.log")) == ["app.log", "app_rank1.log"]
    assert len((folder / "results.md").read_text().splitlines()) == 6
    picture = ElementTree.parse(folder / "results.svg")
    words = [each.text for each in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert [word for word in words if word and "zero=" in word] == [
        f"{number}  zero={STAGES[number // 2]} trainer.devices={number % 2 + 1}" for number in range(4)
    ]


@pytest.mark.thorough
def test_failed_jobs_do_not_touch_the_others(others: dict[str, Sweep]) -> None:
    failures = others["failures"]
    assert failures.done.code == 1
    assert [rank["steps"] for rank in failures.seen(1)] == [2, 2]
    assert [failures.result(number)["status"] for number in range(2)] == ["failed", "completed"]


def ends_soon(found: Sweep, number: int) -> None:
    """Check that a job ends within 30 seconds once its rank has failed."""
    failure = found.result(number)["overrides"][0].removeprefix("failure=")
    times = re.findall(rf"{failure} on 2 ranks: the time is (\d+\.\d+)", found.done.output)
    assert 0 < found.ended(number) - float(max(times)) < 30


@pytest.mark.thorough
def test_job_whose_rank_fails_ends_within_30_seconds(others: dict[str, Sweep]) -> None:
    ends_soon(others["failures"], 0)


@pytest.mark.thorough
def test_failed_jobs_are_rows_of_the_table(others: dict[str, Sweep]) -> None:
    table = others["failures"].table(2)
    assert in_order(
        table,
        [
            "failure=rank0_sleeps         -",
            "FAILED rank 1 of 2 failed with ValueError: rank 1 alone finds a mistake\n",
            "completed\n1 of 2 jobs were not completed: 0.\nTo run what is missing, repeat the command with ",
            f"hydra.sweep.dir={others['failures'].folder} {RESUME}\n",
        ],
    ), table


@pytest.mark.thorough
def test_failure_is_told_when_it_happens(others: dict[str, Sweep]) -> None:
    assert in_order(
        others["failures"].done.output,
        [
            "Error executing job with overrides: ['failure=rank0_sleeps']",
            "The traceback of rank 1:",
            "in _fail",
            "lit_zero: job 0 (failure=rank0_sleeps) has failed, the sweep goes on. rank 1 of 2 failed with ValueError",
            "2 jobs in",
        ],
    )
    assert in_order(
        others["failures"].result(0)["error"],
        ["rank 1 of 2 failed with ValueError", "The traceback of rank 1:", "ValueError: rank 1 alone finds a mistake"],
    )


@pytest.mark.thorough
@pytest.mark.parametrize("launcher", ["joblib", "submitit"])
def test_jobs_in_worker_processes(others: dict[str, Sweep], launcher: str) -> None:
    at_once = others[launcher]
    jobs = {"joblib": [1, None], "submitit": [1]}[launcher]  # ranks; the job that fails has none to show
    assert at_once.done.code == jobs.count(None), at_once.done.output
    for number, devices in enumerate(jobs):
        assert at_once.result(number)["status"] == ("failed" if devices is None else "completed"), at_once.done.output
        ranks = at_once.seen(number)
        assert [rank["world_size"] for rank in ranks] == [devices] * len(ranks)
        assert len(ranks) == (devices or 0)
        assert all(rank["config"]["number"] == number for rank in ranks)
        assert all(rank["config"] == ranks[0]["config"] for rank in ranks)
    assert at_once.table(len(jobs)).count("completed\n") == len(jobs) - jobs.count(None)
    if None in jobs:
        ends_soon(at_once, jobs.index(None))


@pytest.mark.thorough
def test_ranks_of_an_unseeded_search_see_the_same_values(others: dict[str, Sweep]) -> None:
    assert others["optuna"].done.code == 0, others["optuna"].done.output
    ranks, result = others["optuna"].seen(0), others["optuna"].result(0)
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    assert ranks[0]["lr"] == ranks[1]["lr"] == ranks[0]["config"]["lr"] == ranks[1]["config"]["lr"]
    assert f"lr={ranks[0]['lr']}" in result["overrides"]
    assert ranks[0]["loss"] == ranks[1]["loss"] == result["returned"]
    assert 0.01 < ranks[0]["lr"] < 0.2 and ranks[0]["lr"] != 0.1, "nothing was drawn"
    best = (others["optuna"].folder / "optimization_results.yaml").read_text()
    assert f"best_value: {result['returned']}\n" in best


@pytest.mark.thorough
def test_search_of_the_main_job_minimizes_its_validation_loss(others: dict[str, Sweep]) -> None:
    search = others["search"]
    assert search.done.code == 0, search.done.output
    result = search.result(0)
    assert result["returned"] == result["val_loss"]
    assert {line.split("=")[0] for line in result["overrides"]} >= {"optimizer.lr", "optimizer.weight_decay"}
    best = (search.folder / "optimization_results.yaml").read_text()
    assert f"best_value: {result['val_loss']}\n" in best


def test_sweep_in_batches_goes_on_after_a_failure(sweeps: dict[str, Sweep]) -> None:
    half_done = sweeps["half_done"]
    assert half_done.done.code == 1
    assert [half_done.result(number)["status"] for number in range(2)] == ["failed", "completed"]
    assert half_done.table(2).count("FAILED ValueError: x=2 fails until mended is there\n") == 1


def test_sweep_that_is_taken_up_again_runs_what_is_missing(sweeps: dict[str, Sweep]) -> None:
    folder = sweeps["half_done"].folder
    (folder.parent / "mended").touch()
    again = run(APPS / "light.py", *LIGHT, f"hydra.sweep.dir={folder}", RESUME, cwd=folder.parent)
    assert again.code == 0, again.output
    assert [len((folder / str(number) / "ran").read_text().splitlines()) for number in range(2)] == [2, 1]
    table = again.output[again.output.rindex("2 jobs in") :]
    assert table.count("completed\n") == 2
    assert "not completed" not in table
    assert [sweeps["half_done"].result(number)["returned"] for number in range(2)] == [4.0, 9.0]


@pytest.mark.thorough("15")
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_end_of_a_sweep_is_the_end_of_its_job(tmp_path: Path, by: signal.Signals) -> None:
    command = [sys.executable, str(APPS / "light.py"), "-m", "hangs=1", "x=1", f"hydra.sweep.dir={tmp_path}/sweep"]
    with (tmp_path / "output").open("w") as output:
        program = subprocess.Popen(command, cwd=tmp_path, stdout=output, stderr=output)
    try:
        mark = tmp_path / "sweep" / "0" / "hangs"
        begin = time.monotonic()
        while not mark.exists() or not mark.read_text():
            assert program.poll() is None and time.monotonic() - begin < 300, (tmp_path / "output").read_text()
            time.sleep(0.1)
        program.send_signal(by)
        code = program.wait(60)
    finally:
        program.kill()
    assert code == (-by if by is signal.SIGKILL else 128 + by)
    begin = time.monotonic()
    for pid in map(int, mark.read_text().split()):
        while _is_alive(pid):
            assert time.monotonic() - begin < 30, f"process {pid} of the job is still there"
            time.sleep(0.1)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # a zombie that nobody has waited for: where no init process does
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z")
