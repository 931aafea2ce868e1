"""The words of every error of the user's choice, and the stages as data."""

from __future__ import annotations

import dataclasses

import pytest

from lit_zero.core.errors import ConfigError
from lit_zero.zero import Zero
from lit_zero.zero.policy import ROWS, Placement

ERRORS = {
    "zero.stage='stage4' is not known. Did you mean 'stage3'? Choose one of: none, stage1, stage2, stage3.": {
        "stage": "stage4"
    },
    "zero.stage=3 is not known. Choose one of: none, stage1, stage2, stage3.": {"stage": 3},
    "zero.stage=None is not known. Did you mean 'none'? Choose one of: none, stage1, stage2, stage3.": {"stage": None},
    "zero.accumulate='holds' is not known. Did you mean 'hold'? Choose one of: hold, reduce.": {"accumulate": "holds"},
    "zero.poison='yes' is not valid: expected true or false.": {"stage": "stage3", "poison": "yes"},
    "zero.slots=0 is not valid: expected an integer of at least 1.": {"stage": "stage3", "slots": 0},
    "zero.slots=2.0 is not valid: expected an integer of at least 1.": {"stage": "stage3", "slots": 2.0},
    "zero.slots=True is not valid: expected an integer of at least 1.": {"stage": "stage3", "slots": True},
    "zero.units='Block' is not valid: expected 'auto', a list such as ['Block'], or a callable (name, module) -> "
    "bool.": {"units": "Block"},
    "zero.units=3 is not valid: expected 'auto', a list of class names and module-name patterns, or a callable "
    "(name, module) -> bool.": {"units": 3},
    "zero.units=['Block', 3] is not valid: expected 'auto', a list of class names and module-name patterns, or a "
    "callable (name, module) -> bool.": {"units": ["Block", 3]},
    "zero.accumulate='reduce' has no place with zero.stage='none': every rank steps with whole gradients there. "
    "Remove zero.accumulate, or use zero.stage='stage1' or higher.": {"stage": "none", "accumulate": "reduce"},
    "zero.slots=2 has no effect with zero.stage='stage2': parameters are not sharded there. "
    "Remove zero.slots, or use zero.stage='stage3'.": {"stage": "stage2", "slots": 2},
    "zero.poison=True has no effect with zero.stage='none': parameters are not sharded there. "
    "Remove zero.poison, or use zero.stage='stage3'.": {"stage": "none", "poison": True},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_key_what_came_and_what_to_do(message):
    with pytest.raises(ConfigError) as caught:
        Zero(**ERRORS[message])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "settings",
    [
        {},
        *({"stage": stage} for stage in ROWS),
        {"stage": "none", "accumulate": "hold"},
        {"stage": "stage1", "accumulate": "reduce"},
        {"stage": "stage3", "slots": 5, "poison": True, "accumulate": "hold"},
        {"stage": "stage1", "poison": False},
        {"units": ["Block", "encoder.*"]},
        {"units": ("Block",)},
        {"units": []},
        {"units": lambda name, module: True},
    ],
)
def test_valid_choices_are_taken_as_they_are(settings):
    zero = Zero(**settings)
    assert {key: getattr(zero, key) for key in settings} == settings


def test_a_choice_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Zero().stage = "stage3"  # type: ignore[misc]


def test_each_stage_shards_one_thing_more():
    sharded = [
        [row.optimizer, row.gradient, row.parameter].count(Placement.SHARD)
        for row in (ROWS[stage] for stage in ("none", "stage1", "stage2", "stage3"))
    ]
    assert sharded == [0, 1, 2, 3]
    for row in ROWS.values():  # a gradient is sharded only where the optimizer is, a parameter only where both are
        assert row.optimizer is Placement.SHARD or row.gradient is Placement.REPLICATE
        assert row.gradient is Placement.SHARD or row.parameter is Placement.REPLICATE


@pytest.mark.parametrize("stage", ROWS)
def test_on_one_rank_every_stage_is_none(stage):
    assert Zero(stage).row.over(1) is ROWS["none"]
    assert Zero(stage).row.over(2) is ROWS[stage]
