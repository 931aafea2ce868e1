"""The search for the largest GPT: that it finds it, and that an attempt trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from largest_gpt import Attempt, Result, in_a_process, largest, main


@pytest.mark.parametrize(("room", "found"), [(0, 0), (1, 1), (5, 5), (13, 13), (103, 100), (1000, 64)])
def test_the_largest_is_found(room: int, found: int) -> None:
    tried = []

    def attempt(layers: int) -> Result:
        tried.append(layers)
        return Result(parameters=layers) if layers <= room else Result(stopped="out of memory")

    most = 64 if room == 1000 else 1000
    layers, result, stopped = largest(attempt, most)
    assert (layers, result.parameters) == (found, found)
    assert stopped == ("nothing, up to 64 layers" if room == 1000 else "out of memory")
    assert len(tried) == len(set(tried))


@pytest.mark.thorough
def test_an_attempt_under_a_limit(tmp_path: Path) -> None:
    attempt = Attempt("disk, params", 2, 64, 1, 32, 2, "cpu", 200 << 20, str(tmp_path))
    found = in_a_process(attempt, 120)
    assert found.parameters > 300_000 and found.tokens > 0 and not found.stopped
    assert list(tmp_path.iterdir()) == []


def test_wrong_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cpu"])
    assert "--limit goes with --device cpu" in capsys.readouterr().err
