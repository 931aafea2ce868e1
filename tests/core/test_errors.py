"""The words of errors, and what they can be caught as."""

from __future__ import annotations

import pytest

from lit_zero.core.errors import (
    CheckpointError,
    ConfigError,
    LitZeroError,
    UnsupportedError,
    check_choice,
    did_you_mean,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stage4", "Did you mean 'stage2'? Choose one of: none, stage1, stage2."),
        ("Stage2", "Did you mean 'stage2'? Choose one of: none, stage1, stage2."),
        ("zebra", "Choose one of: none, stage1, stage2."),
        (2, "Choose one of: none, stage1, stage2."),
        (None, "Did you mean 'none'? Choose one of: none, stage1, stage2."),
    ],
)
def test_did_you_mean(name, expected):
    assert did_you_mean(name, ("none", "stage1", "stage2")) == expected


def test_choices_may_be_any_iterable():
    assert did_you_mean("b", iter(["a", "b"])) == "Did you mean 'b'? Choose one of: a, b."


def test_check_choice_names_key_value_and_nearest():
    check_choice("zero.stage", "none", ("none", "stage1"))
    with pytest.raises(ConfigError) as caught:
        check_choice("zero.stage", "stage 1", ("none", "stage1"))
    assert str(caught.value) == "zero.stage='stage 1' is not known. Did you mean 'stage1'? Choose one of: none, stage1."


def test_check_choice_takes_values_that_cannot_be_hashed():
    with pytest.raises(ConfigError, match=r"zero.stage=\[1\] is not known"):
        check_choice("zero.stage", [1], ("none",))


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (ConfigError, (LitZeroError, ValueError)),
        (UnsupportedError, (LitZeroError, ValueError, ConfigError)),
        (CheckpointError, (LitZeroError, RuntimeError)),
    ],
)
def test_errors_are_also_pythons_own_kinds(error, bases):
    assert issubclass(error, bases)
