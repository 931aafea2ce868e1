"""Models of Hugging Face transformers, as they are, as stages of a pipeline in the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_zero import Pipeline
from tests.models.harness import Ranks, defaults
from tests.strategy.harness import Fit, Outcome, distance, train, train_all

pytest.importorskip("transformers", reason="pip install lit-zero[models]")

from tests.models.test_transformers import gpt2, llama, on_tokens

MODELS = {"gpt2": gpt2, "llama": llama}


def piped(name: str, stage: str, devices: int = 2, **given: Any) -> Fit:
    pipeline = Pipeline(**{"schedule": "1f1b", "stages": 2, "micro_batches": 4, **given})
    fit = defaults({"arguments": {"build": MODELS[name], "loss": on_tokens}})
    return Fit({"zero": stage, "pipeline": pipeline}, devices, **fit)


def equal(one: Outcome, other: Outcome) -> None:
    """Losses over tokens, and some norms, are computed in fp32 whatever the model's dtype is."""
    assert one.steps == other.steps == 3
    assert distance(one.weights, other.weights) < 1e-7
    for column in ("train_loss", "val_loss"):
        assert one.column(column) == pytest.approx(other.column(column), rel=1e-6)
    assert one.column("train_loss")[-1] != pytest.approx(one.column("train_loss")[0], rel=1e-5), "nothing was learned"


@pytest.mark.parametrize("name", MODELS)
def test_equals_one_process(ranks: Ranks, tmp_path: Path, name: str) -> None:
    alone = train(Fit(**defaults({"arguments": {"build": MODELS[name], "loss": on_tokens}})), tmp_path / "alone")
    fits = [piped(name, "none"), piped(name, "stage3"), piped(name, "stage3", schedule="zero_bubble")]
    for outcome in ranks(2).run(train_all, fits, tmp_path / "two", timeout=120)[0]:
        equal(outcome, alone)
    [outcome] = ranks(4).run(train_all, [piped(name, "stage3", 4)], tmp_path / "four", timeout=120)[0]
    equal(outcome, alone)
    if name == "gpt2":
        assert torch.equal(outcome.weights["model.transformer.wte.weight"], outcome.weights["model.lm_head.weight"]), (
            "tied over the stages"
        )
