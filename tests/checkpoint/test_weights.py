"""Further state dicts in a sharded checkpoint, at any place of it."""

from __future__ import annotations

import pytest
import torch

from lit_zero.checkpoint.consolidate import consolidate
from lit_zero.checkpoint.sharded import ShardedCheckpoint
from lit_zero.checkpoint.weights import ShardedWeights, StoredWeights, put_back, take_out
from lit_zero.comm.world import World
from lit_zero.core.errors import CheckpointError
from tests.checkpoint.support import blank, cut, differing, save_here, tensors

AVERAGE = tensors(7)
TIED = {"tied.weight": "embed.weight"}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with an average in it, two levels down."""
    weights = ShardedWeights({"buffer": torch.arange(3.0)}, cut(AVERAGE, 0, 1))
    extras, further = take_out({"epoch": 1, "callbacks": {"Average": {"weights": weights, "number": 4}}})
    assert type(extras["callbacks"]["Average"]["weights"]) is dict
    assert list(further) == [("callbacks", "Average", "weights")]
    save_here(tmp_path / "saved", World(), extras=extras, further=further)
    return tmp_path / "saved"


def test_any_rank_reads_its_part(saved):
    checkpoint = ShardedCheckpoint(saved, World())
    found = put_back(checkpoint.extras(), checkpoint)["callbacks"]["Average"]
    assert found["number"] == 4 and isinstance(found["weights"], StoredWeights)
    for rank in range(3):
        pieces = blank(AVERAGE, rank, 3)
        rest = found["weights"].load_into(pieces, others=["buffer"], aliases=TIED, strict=True)
        assert differing(AVERAGE, pieces) == []
        assert list(rest) == ["buffer"] and rest["buffer"].tolist() == [0.0, 1.0, 2.0]
    whole = blank(tensors(1), 0, 1)
    checkpoint.load_weights(whole, others=["buffer", "extra._extra_state"], aliases=TIED)
    assert differing(tensors(1), whole) == [], "state_dict itself is as it was"


def test_what_does_not_fit_is_named(saved):
    checkpoint = ShardedCheckpoint(saved, World())
    found = put_back(checkpoint.extras(), checkpoint)["callbacks"]["Average"]["weights"]
    with pytest.raises(CheckpointError, match=r"not in the checkpoint \(1\): more"):
        found.load_into(blank(AVERAGE, 0, 1), others=["buffer", "more"], aliases=TIED, strict=True)


def test_consolidated(saved, tmp_path):
    seen = []
    consolidate(saved, tmp_path / "one.ckpt", progress=lambda done, total, name: seen.append((done, total)))
    found = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]["Average"]
    assert found["number"] == 4
    assert set(found["weights"]) == {*AVERAGE, "buffer", "tied.weight"}
    for name, value in AVERAGE.items():
        assert torch.equal(found["weights"][name], value)
    assert seen[-1][0] == seen[-1][1] == len(seen)
