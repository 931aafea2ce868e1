"""``lit-zero schedule``."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from lit_zero.cli import main


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["schedule", *words]) == 0
    return capsys.readouterr().out


def test_1f1b(capsys):
    assert said(capsys, "1f1b", "--stages", "2", "--micro-batches", "4") == (
        "1f1b (one forward, one backward in turn): 2 stages on 2 ranks, 4 micro-batches\n"
        "rank 0  F0 F1 .  .  B0 -  F2 B1 -  F3 B2 -  .  B3 -\n"
        "rank 1  .  F0 B0 -  F1 B1 -  F2 B2 -  F3 B3 -  .  .\n"
        "bubble: 20.0% of the makespan (theory 20.0%); by rank 20.0% 20.0%\n"
        "        11.1% between each rank's own first and last action\n"
        "peak activations in flight, by rank: 2 1\n"
    )


def test_a_split_backward_and_two_stages_per_rank(capsys):
    out = said(capsys, "zbv", "--stages", "4", "--micro-batches", "4")
    assert "bubble: 4.0% of the makespan (theory 4.0%); by rank 4.0% 4.0%\n        0.0% between" in out
    assert out.endswith("by rank: 4 4\n  each of one stage, that is of 1/2 of what a rank holds\n")
    out = said(capsys, "zero_bubble", "--stages", "2", "--micro-batches", "4", "--costs", "F=1,I=1,W=2")
    assert "(no formula for these numbers)" in out
    assert "peak activations in flight, by rank: 2 1\n  with those that only W still needs: 2 2\n" in out


@pytest.mark.parametrize("more", [[], ["--ranks", "2"], ["--stages-per-rank", "2"]])
def test_ranks_either_way(capsys, more):
    out = said(capsys, "interleaved", "--stages", "4", "--micro-batches", "4", *more)
    assert "4 stages on 2 ranks" in out


def test_files(capsys, tmp_path):
    words = ("gpipe", "--stages", "2", "--micro-batches", "3", "--output")
    for ending in ("svg", "png", "json"):
        said(capsys, *words, str(tmp_path / f"out.{ending}"))
    title = "gpipe (all forwards, then all backwards): 2 stages on 2 ranks, 3 micro-batches"
    assert title in [element.text for element in ElementTree.parse(tmp_path / "out.svg").iter()]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((tmp_path / "out.json").read_text())["traceEvents"]
    assert len([event for event in events if event["ph"] == "X"]) == 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("1f1 --stages 4 --micro-batches 8", "pipeline.schedule='1f1' is not known. Did you mean '1f1b'? Choose one"),
        ("1f1b --stages 4 --micro-batches 0", "pipeline.micro_batches=0 must be 1 or more."),
        ("zbv --stages 5 --micro-batches 8", "pipeline.stages=5 does not fit 2 ranks: pipeline.schedule=zbv runs 2"),
        (
            "interleaved --stages 4 --micro-batches 8 --stages-per-rank 3",
            "--stages=4 is not a multiple of --stages-per-rank=3.",
        ),
        ("interleaved --stages 4 --micro-batches 8 --stages-per-rank 0", "--stages=4 is not a multiple of"),
        ("1f1b --stages 4 --micro-batches 8 --costs F=1,X=2", "costs='X' is not known. Choose one of: F, B, I, W, lat"),
        ("1f1b --stages 4 --micro-batches 8 --output a.pgn", "ends with '.pgn'. Did you mean '.png'? Choose one of"),
    ],
)
def test_what_is_wrong_is_said_and_the_status_is_2(capsys, words, message):
    assert main(["schedule", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lit-zero: error: ")
    assert message in err


def test_numbers_that_are_none(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["schedule", "1f1b", "--stages", "four", "--micro-batches", "8"])
    assert caught.value.code == 2
    assert "argument --stages: invalid int value: 'four'" in capsys.readouterr().err


def test_a_folder_that_is_not_there(capsys, tmp_path):
    words = ["schedule", "1f1b", "--stages", "2", "--micro-batches", "2", "--output", str(tmp_path / "no/x.svg")]
    assert main(words) == 1
    assert "No such file or directory" in capsys.readouterr().err
