"""The benchmark of small state: that it runs, and what its table says."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark_state import FORMS, Found, table

from tests.config.support import EXAMPLES, run


def test_the_table_compares_seed_by_seed() -> None:
    found = {
        "float32": Found(18.0, [2.0, 2.2, 2.4], [0.1, 0.1]),
        "split+int8": Found(8.03, [2.01, 2.22, 2.4], [0.12, 0.12]),
    }
    assert table(found).splitlines()[2:] == [
        "| float32 | 18.00 | 2.2000 ± 0.2000 |  | 100.0 | 1.00 |",
        "| split+int8 | 8.03 | 2.2100 ± 0.1952 | +0.0100 ± 0.0100 | 120.0 | 1.20 |",
    ]


@pytest.mark.thorough
def test_the_command_prints_a_row_for_each_form(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a few words, again and again. " * 2000)
    words = ["--path", "text.txt", "--cache-dir", "cache", "--steps", "3", "--seeds", "1", "--val-batches", "2"]
    words += ["--dim", "16", "--layers", "2", "--heads", "2", "--length", "16", "--batch", "2", "--vocab", "256"]
    found = run(EXAMPLES / "benchmark_state.py", *words, cwd=tmp_path)
    assert found.code == 0, found.output
    assert [line.split(" | ")[0] for line in found.output.splitlines() if line.startswith("| ")][1:] == [
        f"| {name}" for name in FORMS
    ]
