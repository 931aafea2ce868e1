"""The leader of a job: which rank's error is told, and ranks that do not come."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lit_zero.config import jobs
from lit_zero.core.errors import CheckpointError, LitZeroError, LostRankError
from lit_zero.strategy import ranks as module
from lit_zero.strategy.kinds import kind_of
from lit_zero.strategy.ranks import Leader, RankError

ALIVE = SimpleNamespace(poll=lambda: None, returncode=None)


@pytest.mark.parametrize(
    ("own", "other", "follows"),
    [
        (
            LitZeroError("The loss is nan on rank 0 at step 2."),
            LitZeroError("The loss is nan on rank 1 at step 2."),
            False,
        ),
        (LitZeroError("The loss is inf on rank 0."), LitZeroError("The loss is nan on rank 1."), False),
        (CheckpointError("'x' has no key 'a'"), CheckpointError("'x' has no key 'b'"), False),
        (ValueError("rank 0 of 2 finds a mistake"), ValueError("rank 1 of 2 finds a mistake"), False),
        (RuntimeError("Connection closed by peer [127.0.0.1]:9000"), RuntimeError("shapes 3 and 4 differ"), True),
        (RuntimeError("Connection closed by peer"), ValueError("a mistake"), True),
        (LostRankError("Connection closed: rank 1"), LostRankError("Connection closed: rank 2"), True),
        (LostRankError("Connection closed: rank 1"), LitZeroError("The loss is nan on rank 1"), True),
        (LitZeroError("Rank 0 is left alone."), ValueError("a mistake"), True),
    ],
)
def test_the_error_that_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: Exception, other: Exception, follows: bool
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    leader = Leader()
    leader._folder, leader._ranks = tmp_path, {1: ALIVE}  # type: ignore[dict-item]
    report = {"time": time.time(), "kind": kind_of(other), "text": "its traceback"}
    (tmp_path / "rank1.error").write_text(json.dumps(report))
    cause = leader._cause_of(own)
    assert (cause is not None) == follows
    if cause is not None:
        assert cause.message(2).startswith(f"rank 1 of 2 failed with {kind_of(other)}")


class Environment:
    """What the leader asks of Lightning's cluster environment."""

    creates_processes_externally = False
    main_address, main_port = "127.0.0.1", 29999

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return 0

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        pass


def test_ranks_that_do_not_come(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    stuck = [sys.executable, "-c", "import time; time.sleep(100)"]
    monkeypatch.setattr(jobs, "this_script", lambda *_: stuck)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(module, "ASK_SECONDS", 0.3)
    before, begin = dict(os.environ), time.monotonic()
    with pytest.raises(RankError) as caught:
        Leader.start(Environment(), 3, 1, timeout=1.0)
    assert time.monotonic() - begin < 8
    assert str(caught.value) == (
        "rank 1, 2 of 3 did not begin to train within timeout=1 s and was ended. Every rank must run the same script "
        "up to the same call of the Trainer. If the script only needs longer before that, raise timeout in "
        "ZeroStrategy."
    )
    said = capfd.readouterr().err
    assert said == (
        "lit_zero: still waiting, after 0 s, for rank 1, 2 of 3 to begin to train. Every rank must run the same script "
        "up to the same call of the Trainer.\n"
    )
    assert dict(os.environ) == before
