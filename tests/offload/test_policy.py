"""Settings are checked where they are made."""

from __future__ import annotations

from typing import Any

import pytest

from lit_zero import Offload, Zero, ZeroStrategy
from lit_zero.core.errors import ConfigError, UnsupportedError


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"where": "gpu"}, "offload.where='gpu' is not known. Did you mean 'cpu'? Choose one of: none, cpu, disk."),
        ({"where": "cpu", "params": "yes"}, "offload.params='yes' is not valid: expected true or false."),
        ({"where": "cpu", "ratio": 0}, "offload.ratio=0 is not valid: expected a number above 0 and at most 1"),
        ({"where": "cpu", "ratio": 1.5}, "offload.ratio=1.5 is not valid"),
        ({"where": "cpu", "ratio": True}, "offload.ratio=True is not valid"),
        ({"where": "cpu", "limit": 0}, "offload.limit=0 is not valid: expected a number of bytes of at least 1."),
        ({"where": "cpu", "limit": "1GB"}, "offload.limit='1GB' is not valid: expected a number of bytes"),
        ({"where": "disk", "folder": "x", "chunk": 1000}, "offload.chunk=1000 is too little: expected at least 65,536"),
        ({"where": "disk", "folder": 3}, "offload.folder=3 is not valid: expected the path of a folder."),
        ({"where": "disk"}, "offload.where='disk' needs offload.folder: say where its files may be made."),
        ({"ratio": 0.5}, "offload.ratio=0.5 has no effect with offload.where='none'. Remove it, or use offload=cpu."),
        ({"params": True}, "offload.params=True has no effect with offload.where='none'"),
        (
            {"where": "cpu", "folder": "x"},
            "offload.folder='x' has no effect with offload.where='cpu'. Remove it, or use",
        ),
        ({"where": "cpu", "chunk": 1 << 20}, "offload.chunk=1048576 has no effect with offload.where='cpu'"),
    ],
)
def test_what_is_wrong_is_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Offload(**arguments)
    assert str(caught.value).startswith(words)


def test_an_address_is_no_folder() -> None:
    with pytest.raises(UnsupportedError, match="offload.folder=s3://bucket/states is an address"):
        Offload("disk", folder="s3://bucket/states")


def test_words_and_objects() -> None:
    assert ZeroStrategy("stage2").offload == Offload("none")
    assert ZeroStrategy("stage2", offload="cpu").offload == Offload("cpu")
    chosen = Offload("disk", params=True, folder="states", ratio=0.5)
    assert ZeroStrategy("stage3", offload=chosen).offload is chosen
    with pytest.raises(ConfigError, match="offload=3 is not valid: expected a Offload, got a int"):
        ZeroStrategy("stage3", offload=3)  # type: ignore[arg-type]


def test_nothing_to_offload() -> None:
    words = (
        "offload.where='cpu' moves shards of optimizer state, and with zero.stage='none' there are none: every rank "
        "keeps it whole. Use zero.stage='stage1' or higher, on one process too, or offload=none."
    )
    with pytest.raises(ConfigError) as caught:
        ZeroStrategy("none", offload="cpu")
    assert str(caught.value) == words


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_parameters_that_are_not_sharded_stay(stage: str) -> None:
    with pytest.raises(ConfigError, match=f"offload.params=True has no effect with zero.stage='{stage}': every rank"):
        ZeroStrategy(Zero(stage), offload=Offload("cpu", params=True))


@pytest.mark.parametrize("stage", ["none", "stage1", "stage2", "stage3"])
def test_a_rank_that_is_alone_has_shards_if_they_live_elsewhere(stage: str) -> None:
    row = Zero(stage).row
    assert row.over(1, apart=True) is row
    assert row.over(1).optimizer is Zero("none").row.optimizer
