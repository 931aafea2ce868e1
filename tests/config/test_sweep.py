"""The table at the end of a sweep."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from lit_zero.config.jobs import _quoted
from lit_zero.config.sweep import SweepTable, read_results, tabulate, write_result


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
    common, rows = tabulate([job(0, "none", sent_bytes_per_step=512), failed])
    assert common == ["lr=1"]
    assert rows == [
        ["job", "overrides", "val loss", "bits/byte", "tokens/s", "model state/rank", "sent/step", "time", "status"],
        ["0", "zero=none", "2.5000", "2.2500", "12,346", "3.00 MiB", "512 B", "12 s", "completed"],
        ["1", "zero=stage3", "-", "-", "-", "-", "-", "3 s", "FAILED boom"],
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
    table._show()
    assert "zero=stage3" in capsys.readouterr().out
    markdown = (tmp_path / "results.md").read_text().splitlines()
    assert markdown[1].count("---") == markdown[0].count("|") - 1
    assert len(markdown) == 4
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["tokens_per_second"] for row in rows] == ["12345.6", "12345.6"]
    assert rows[1]["overrides"] == "zero=stage3 lr=1"
    assert rows[0]["note"] == "a|b"


def test_result_is_plain_json(tmp_path: Path) -> None:
    write_result(tmp_path, {"val_loss": 1.5})
    assert json.loads((tmp_path / "result.json").read_text()) == {"val_loss": 1.5}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    "path",
    ["/plain", "/with space", "/lr=0.1,zero=stage3", "/it's", '/"quoted"', "/a,b:[c]{d}", "/back\\slash", "/ends\\"],
)
def test_folder_names_survive_hydras_command_line(path: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"hydra.run.dir={_quoted(path)}"])
    assert override.value() == path
