"""The benchmark of kernels: that all it compares does the same, and that what fails has a row."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import kernel_cases_state
import pytest
import torch
from benchmark_kernels import all_cases, main
from kernel_timing import Case, Contender, measure, plot, table

CPU = torch.device("cpu")


def test_the_command_prints_a_table_and_draws_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--only", "AdamW", "Lion", "--sizes", "tiny", "--rounds", "2", "--repeats", "1"]
    assert main([*words, "--plot", str(tmp_path / "plot.svg")]) == 0
    printed = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert rows[0].startswith("AdamW, 0.0 million elements, ")
    assert rows[2:7] == [
        *("lit_zero, many tensors", "torch fused, flat segments", "torch fused", "torch foreach"),
        "torch, one by one",
    ]
    assert rows[8].endswith("flat segments") and rows[9:] == ["lit_zero, many tensors", "plain torch, many tensors"]
    assert "did not run" not in printed
    drawn = ElementTree.parse(tmp_path / "plot.svg").getroot()
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}line"))) == 2, "the copy beside each case"


def test_an_unknown_case_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "Adamax", "--sizes", "tiny"]) == 1
    assert "no case begins with Adamax" in capsys.readouterr().err


def test_flat_segments_are_fewer_and_as_long_as_the_tensors() -> None:
    from kernel_cases_optimizers import _lengths, _shapes

    shapes, lengths = _shapes("tiny"), _lengths("tiny")
    for tensors, segments in zip(shapes, lengths, strict=True):
        assert len(segments) < len(tensors)
        assert sum(segments) == sum(shape.numel() for shape in tensors)


def test_what_fails_has_a_row() -> None:
    def missing() -> None:
        raise ImportError("No module named 'apex'\nmore")

    case = Case("work", 1000, [Contender("ours", lambda: lambda: None), Contender("Apex", missing)])
    timed = measure(case, CPU, 1, 1)
    assert "| Apex | did not run: ImportError: No module named 'apex' | | | | |" in table(timed)
    assert "Apex" not in plot([timed], "title")


def test_every_case_moves_what_it_says() -> None:
    for case in all_cases(CPU, ["tiny"]):
        assert case.moved > 0 and len(case.contenders) > 1, case.name


def test_every_case_of_state_runs() -> None:
    """Where there is no kernel for the device, the row says so."""
    for case in kernel_cases_state.cases(CPU, ["tiny"]):
        for contender in case.contenders:
            if contender.name == "one launch on small forms":
                with pytest.raises(RuntimeError, match="no kernel for this device"):
                    contender.build()
            else:
                contender.build()()
