"""The comparison at the end of a sweep, and what is kept when a sweep is taken up again; without a sweep."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from lit_zero.config import chart
from lit_zero.config.job_process import JobError
from lit_zero.config.jobs import _quoted, exit_in_words, typed
from lit_zero.config.results import plain, read_result, read_results
from lit_zero.config.sweep import SweepTable, write_result
from lit_zero.config.table import tabulate
from tests.config.support import composed, in_order, refusal

RESUME = "hydra.callbacks.sweep_table.resume=true"
SVG = "{http://www.w3.org/2000/svg}"


def job(number: int, stage: str, **more: Any) -> dict[str, Any]:
    result = {"job": number, "overrides": [f"zero={stage}", "lr=1"], "status": "completed", "seconds": 12.0}
    return (
        result
        | {"val_loss": 2.5, "val_bpb": 2.25, "tokens_per_second": 12345.6, "state_bytes_per_rank": 3 * 2**20}
        | more
    )


def test_table_shows_what_differs_and_failed_jobs() -> None:
    failed = {
        "job": 1,
        "overrides": ["zero=stage3", "lr=1"],
        "status": "failed",
        "seconds": 3.0,
        "error": "boom\nat line 3",
    }
    cut_off = {"job": 2, "overrides": ["zero=stage2", "lr=1"], "status": "started"}
    common, rows = tabulate([job(0, "none", sent_bytes_per_step=512), failed, cut_off])
    assert common == ["lr=1"]
    assert rows == [
        ["job", "overrides", "val loss", "bits/byte", "tokens/s", "model state/rank", "sent/step", "time", "status"],
        ["0", "zero=none", "2.5000", "2.2500", "12,346", "3.00 MiB", "512 B", "12 s", "completed"],
        ["1", "zero=stage3", "-", "-", "-", "-", "-", "3 s", "FAILED boom"],
        ["2", "zero=stage2", "-", "-", "-", "-", "-", "-", "NOT FINISHED"],
    ]


def test_results_are_in_the_order_of_jobs_and_of_this_sweep_only(tmp_path: Path) -> None:
    for number in range(11):
        folder = tmp_path / "nested" / str(number)
        folder.mkdir(parents=True)
        write_result(folder, job(number, "none"))
    assert [result["job"] for result in read_results(tmp_path)] == list(range(11))
    assert read_results(tmp_path, since=time.time() + 100) == []


def test_files_beside_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, stage in enumerate(["none", "stage3"]):
        (tmp_path / str(number)).mkdir()
        write_result(tmp_path / str(number), job(number, stage, note="a|b"))
    table = SweepTable()
    table._folder = tmp_path
    assert table._show() == []
    assert "zero=stage3" in capsys.readouterr().out
    markdown = (tmp_path / "results.md").read_text().splitlines()
    assert markdown[1].count("---") == markdown[0].count("|") - 1
    assert len(markdown) == 4
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["tokens_per_second"] for row in rows] == ["12345.6", "12345.6"]
    assert rows[1]["overrides"] == "zero=stage3 lr=1"
    assert rows[0]["note"] == "a|b"
    assert ElementTree.parse(tmp_path / "results.svg").getroot().tag == f"{SVG}svg"


def test_picture_has_a_bar_per_job_and_measure() -> None:
    results = [
        job(0, "none", buffer_bytes_per_rank=2**20, tokens_per_second=1000.0),
        job(1, "<stage3>", state_bytes_per_rank=2**20, tokens_per_second=500.0),
        {"job": 2, "overrides": ["zero=stage2", "lr=1"], "status": "failed"},
    ]
    picture = ElementTree.fromstring(chart.draw(results) or "")
    words = [each.text for each in picture.iter(f"{SVG}text")]
    assert words[:3] == ["0  zero=none", "1  zero=<stage3>", "2  zero=stage2"]
    assert words[3:9] == ["memory per rank", "model state", "working buffers", "4.00 MiB", "1.00 MiB", "not completed"]
    assert words[9:] == ["speed", "tokens/s, all ranks together", "1,000", "500", "not completed"]
    bars = [each for each in picture.iter(f"{SVG}rect") if each.get("height") == str(chart._BAR)]
    # model state and working buffers of job 0, model state of job 1, then both speeds: in parts of a panel's width
    assert [float(bar.get("width") or 0) / chart._PANEL for bar in bars] == pytest.approx([0.75, 0.25, 0.25, 1.0, 0.5])
    assert float(bars[1].get("x") or 0) == pytest.approx(float(bars[0].get("x") or 0) + 0.75 * chart._PANEL)
    width = float(picture.get("width") or 0)
    ends = [float(each.get("x") or 0) + float(each.get("width") or 0) for each in picture.iter(f"{SVG}rect")]
    assert max(ends) <= width


def test_no_picture_of_nothing() -> None:
    assert chart.draw([{"job": 0, "overrides": [], "status": "completed", "val_loss": 1.0}]) is None


def test_result_is_plain_json(tmp_path: Path) -> None:
    write_result(tmp_path, {"val_loss": 1.5})
    assert json.loads((tmp_path / "result.json").read_text()) == {"val_loss": 1.5}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_result_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"status": "comp')
    assert read_result(tmp_path) == {}


def test_what_a_job_returns_reaches_the_sweep() -> None:
    value = {"loss": torch.tensor(0.1), "rates": (torch.tensor(2.0, dtype=torch.float64), 3), "name": "a", "none": None}
    assert plain(value) == {"loss": float(torch.tensor(0.1)), "rates": [2.0, 3], "name": "a", "none": None}
    for odd in (torch.ones(2), object(), b"bytes"):
        with pytest.raises(TypeError, match="is neither a number nor text"):
            plain(odd)


@pytest.mark.parametrize(
    "path",
    ["/plain", "/with space", "/lr=0.1,zero=stage3", "/it's", '/"quoted"', "/a,b:[c]{d}", "/back\\slash", "/ends\\"],
)
def test_folder_names_survive_hydras_command_line(path: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"hydra.run.dir={_quoted(path)}"])
    assert override.value() == path


def test_what_to_type_is_plain_where_it_can_be() -> None:
    assert typed("hydra.sweep.dir", "/logs/a-1_b.c") == "hydra.sweep.dir=/logs/a-1_b.c"
    assert typed("hydra.sweep.dir", "/a b") == "'hydra.sweep.dir='\"'\"'/a b'\"'\"''"


def test_end_of_a_process_in_words() -> None:
    assert [exit_in_words(code) for code in (3, -11, -9)] == [
        "exit code 3",
        "SIGSEGV",
        "SIGKILL, as when memory runs out",
    ]


class OneJob:
    """The callback's calls for one job of a sweep, as Hydra makes them."""

    def __init__(self, folder: Path, *overrides: str, resume: bool = False, takes_up: bool = True) -> None:
        self.folder = folder
        self.table = SweepTable(resume=resume)
        self.table._folder = folder.parent
        self.config = composed(*overrides, hydra=True)
        OmegaConf.set_readonly(self.config.hydra, False)
        self.config.hydra.runtime.output_dir = str(folder)
        self.config.hydra.job.num = 7
        self.config.hydra.overrides.task = list(overrides)
        self.takes_up = takes_up

    def start(self) -> dict[str, Any]:
        def task(cfg: DictConfig) -> None: ...

        task.takes_up = self.takes_up  # type: ignore[attr-defined]
        self.table.on_job_start(self.config, task_function=task)
        return read_result(self.folder)

    def end(self, value: Any) -> JobReturn:
        status = JobStatus.FAILED if isinstance(value, Exception) else JobStatus.COMPLETED
        returned = JobReturn(status=status, _return_value=value)
        self.table.on_job_end(self.config, job_return=returned)
        return returned


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """The folder of a job that was completed."""
    folder = tmp_path / "7"
    folder.mkdir()
    first = OneJob(folder, "zero=stage1")
    assert first.start()["status"] == "started"
    first.end(0.5)
    return folder


def test_completed_job_is_kept(done: Path) -> None:
    before = (done / "result.json").read_text()
    again = OneJob(done, "zero=stage1", resume=True)
    assert again.start()["status"] == "completed"
    again.end(0.5)
    assert (done / "result.json").read_text() == before


def test_completed_job_runs_again_unless_it_is_to_be_kept(done: Path) -> None:
    assert OneJob(done, "zero=stage1").start()["status"] == "started"


def test_job_runs_again_if_its_configuration_files_have_changed(done: Path) -> None:
    again = OneJob(done, "zero=stage1", resume=True)
    again.config.model.dim = 64  # what no override says
    assert again.start()["status"] == "started"


@pytest.mark.parametrize("value", [ValueError("boom"), object()])
def test_job_runs_again_if_it_failed_or_its_value_is_not_known(tmp_path: Path, value: Any) -> None:
    first = OneJob(tmp_path, "zero=stage1")
    first.start()
    first.end(value)
    assert OneJob(tmp_path, "zero=stage1", resume=True).start()["status"] == "started"


def test_folder_of_another_job_is_left_alone(done: Path) -> None:
    before = (done / "result.json").read_text()
    with pytest.raises(SystemExit, match="takes up the same sweep only.*'zero=stage1', but this one is 'zero=stage2'"):
        OneJob(done, "zero=stage2", resume=True).start()
    assert (done / "result.json").read_text() == before


def test_failed_job_is_told_and_the_sweep_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for error, shown in ((ValueError("boom"), True), (JobError("ValueError: boom\n\nThe traceback of rank 0:"), False)):
        one = OneJob(tmp_path, "zero=stage1")
        one.start()
        returned = one.end(error)
        assert returned.return_value is None, "raises if it counts as failed, which ends a batch of the sweep"
        said = capsys.readouterr().err
        assert said.startswith("lit_zero: job 7 (zero=stage1) has failed, the sweep goes on. ValueError: boom\n")
        assert ("ValueError: boom\n" in said[said.index("\n") :]) is shown, "the job's own process has shown it"
        assert read_result(tmp_path)["status"] == "failed"


def test_sweeper_that_learns_from_its_jobs_is_told_of_a_failure(tmp_path: Path) -> None:
    one = OneJob(tmp_path, "zero=stage1")
    one.config.hydra.sweeper._target_ = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
    one.start()
    with pytest.raises(ValueError, match="boom"):
        _ = one.end(ValueError("boom")).return_value


def test_resume_where_nothing_would_keep_a_job_is_refused(done: Path) -> None:
    with pytest.raises(SystemExit, match="needs lit_zero.config.main in place of hydra.main"):
        OneJob(done, "zero=stage1", resume=True, takes_up=False).start()


def test_resume_of_no_sweep_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    said = refusal(monkeypatch, RESUME)
    assert said == "resume=true of lit_zero's SweepTable has an effect in a sweep only: add -m."
    said = refusal(monkeypatch, "-m", "zero=none,stage1", RESUME, "hydra.sweep.dir=nowhere")
    assert said is not None
    assert said.startswith(f"{RESUME} takes up an earlier sweep, but there is no folder {tmp_path}/nowhere. Name the")
    assert list(tmp_path.iterdir()) == []


def test_resume_of_another_sweep_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "there" / "0"
    folder.mkdir(parents=True)
    write_result(folder, job(0, "stage2"))
    said = refusal(monkeypatch, "-m", "zero=stage1", "model.dim=32", RESUME, "hydra.sweep.dir=there")
    assert said is not None and said.startswith(f"{RESUME} takes up the same sweep only: ")
    assert in_order(said, ["'zero=stage2 lr=1'", "is 'zero=stage1 model.dim=32'"])
    assert read_result(folder) == job(0, "stage2"), "nothing was overwritten"


@pytest.mark.parametrize(("variable", "starter"), [("WORLD_SIZE", "torchrun"), ("SLURM_STEP_NUM_TASKS", "srun")])
def test_sweep_in_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, starter: str) -> None:
    monkeypatch.setenv(variable, "2")
    said = refusal(monkeypatch, "-m", "zero=none,stage1")
    assert said == (
        f"A sweep must be started once, but {variable}=2 says that {starter} has started it 2 times. Start it without "
        f"{starter}: each job starts its own processes, as many as trainer.devices says. Or start every job with "
        f"{starter}, without -m."
    )
