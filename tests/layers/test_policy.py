"""The choice: what it takes, what it refuses, and that it reaches the strategy."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.fabric import Fabric

from lit_zero import Layers, ZeroStrategy
from lit_zero.core.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"variant": "fast"}, "layers.variant='fast' is not known. Choose one of: plain, fused"),
        (
            {"replace": ["norms"]},
            r"layers.replace=\['norms'\] has no effect with layers.variant='plain'. Remove it, or",
        ),
        ({"variant": "fused", "replace": ["norm"]}, "layers.replace='norm' is not known. Did you mean 'norms'"),
        (
            {"variant": "fused", "replace": "norms"},
            "layers.replace='norms' is not valid: expected 'auto' or a list such",
        ),
        ({"variant": "fused", "replace": []}, r"layers.replace=\[\] is not valid: expected 'auto' or a list such"),
        ({"variant": "fused", "replace": 3}, "layers.replace=3 is not valid: expected 'auto' or a list such"),
    ],
)
def test_wrong_settings(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Layers(**arguments)


def test_kinds_are_kept_whatever_list_they_came_in() -> None:
    assert Layers("fused", ["norms", "rotary"]) == Layers("fused", ("norms", "rotary"))


def test_a_strategy_takes_a_word_or_an_object() -> None:
    assert ZeroStrategy().layers.policy == Layers()
    assert ZeroStrategy(layers="fused").layers.policy == Layers("fused")
    with pytest.raises(ConfigError, match="layers=3 is not valid: expected a Layers, got a int"):
        ZeroStrategy(layers=3)  # type: ignore[arg-type]


def test_fabric_takes_it_too() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, strategy=ZeroStrategy("stage3", layers="fused"))
    assert fabric.strategy.layers.policy == Layers("fused")
