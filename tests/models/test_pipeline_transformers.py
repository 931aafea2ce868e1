"""Models of Hugging Face transformers, as they are, as stages of a pipeline in the Trainer."""

from __future__ import annotations

from functools import partial
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


TRAINER = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}


def deep(name: str) -> Any:
    """Return a model with four blocks."""
    model = MODELS[name]()
    return type(model)(type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 4}))


@pytest.mark.parametrize("name", MODELS)
def test_schedules_accumulation_and_clipping(ranks: Ranks, tmp_path: Path, name: str) -> None:
    """Four batches make two steps; with two stages and with four."""
    given = {"arguments": {"build": partial(deep, name), "loss": on_tokens}, "rows": 32}
    alone = train(Fit(**defaults({**given, "trainer": TRAINER})), tmp_path / "alone")
    plain = train(Fit(**defaults({**given, "trainer": {"accumulate_grad_batches": 2}})), tmp_path / "plain")
    assert distance(alone.weights, plain.weights) > 1e-4, "clipping must matter"

    def fit(stage: str, devices: int, schedule: str, stages: int) -> Fit:
        pipeline = Pipeline(schedule, stages=stages, micro_batches=4)
        return Fit({"zero": stage, "pipeline": pipeline}, devices, **defaults({**given, "trainer": TRAINER}))

    two = [fit("stage2", 2, "gpipe", 2), fit("stage1", 2, "interleaved", 4), fit("stage3", 2, "zbv", 4)]
    four = [fit("none", 4, "1f1b", 4), fit("stage2", 4, "zero_bubble", 4)]
    found = ranks(2).run(train_all, two, tmp_path / "two", timeout=120)[0]
    found += ranks(4).run(train_all, four, tmp_path / "four", timeout=120)[0]
    for each in found:
        assert each.steps == alone.steps == 2
        assert distance(each.weights, alone.weights) < 1e-6
        for column in ("train_loss", "val_loss"):
            assert each.column(column) == pytest.approx(alone.column(column), rel=1e-6)
