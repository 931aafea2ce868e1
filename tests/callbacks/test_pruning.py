"""Lightning's ModelPruning, unmodified, on shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning

from lit_zero.core.errors import UnsupportedError
from tests.callbacks.harness import With, run, run_all, under
from tests.pool import RankPool
from tests.strategy.harness import STAGES, Fit, LitGPT, Outcome, distance, same_bits

Ranks = Callable[[int], RankPool]


class Untied(LitGPT):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{**arguments, "tied": False})


class PrunesBlocks(ModelPruning):
    """As a user chooses what to prune."""

    def filter_parameters_to_prune(self, parameters_to_prune: Any = ()) -> Any:
        return [(owner, name) for owner, name in parameters_to_prune if isinstance(owner, torch.nn.Linear)]


def first_epoch(epoch: int) -> bool:
    return epoch == 0


FIT = Fit(module=Untied, epochs=3, trainer={"gradient_clip_val": 0.5})
GLOBAL = {"pruning_fn": "l1_unstructured", "amount": 0.3, "use_lottery_ticket_hypothesis": False}
LOCAL = {
    "pruning_fn": "ln_structured",
    "use_global_unstructured": False,
    "pruning_dim": 0,
    "pruning_norm": 2,
    "amount": 0.25,
    "use_lottery_ticket_hypothesis": first_epoch,
    "prune_on_train_epoch_end": False,
    "parameter_names": ["weight"],
}
JOBS = [With(FIT, [(ModelPruning, GLOBAL)]), With(FIT, [(PrunesBlocks, LOCAL)])]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    return run_all([*JOBS, With(FIT)], tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def staged(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """Every stage on 2 ranks: one outcome for each job."""
    return {
        stage: ranks(2).run(run_all, [under(job, stage) for job in JOBS], tmp_path_factory.mktemp(stage))[0]
        for stage in STAGES
    }


@pytest.mark.thorough("local")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("job", range(len(JOBS)), ids=["global", "structured_lottery"])
def test_equals_one_process(alone, staged, stage, job):
    mine, theirs = staged[stage][job], alone[job]
    assert set(mine.weights) == set(theirs.weights)
    theirs_in_order = {name: theirs.weights[name] for name in mine.weights}  # torch takes a parameter out and back in
    assert distance(mine.weights, theirs_in_order) < 1e-6
    for name, value in mine.weights.items():
        assert torch.equal(value == 0, theirs.weights[name] == 0), name
    for name in ("train_loss_step", "val_loss"):
        assert mine.column(name) == pytest.approx(theirs.column(name), rel=1e-6)
    assert same_bits(mine.weights, staged["none"][job].weights)


def test_it_prunes_more_each_epoch(alone):
    weights = alone[0].weights
    zeros = sum(int((value == 0).sum()) for value in weights.values()) / sum(v.numel() for v in weights.values())
    assert zeros == pytest.approx(1 - 0.7**3, abs=0.01)
    assert sum(int((value == 0).sum()) for value in alone[2].weights.values()) == 0


def test_a_checkpoint_holds_the_pruned_weights(ranks, tmp_path):
    job = With(replace(FIT, epochs=1), [(ModelPruning, GLOBAL)], kept=True)
    run(job, tmp_path / "alone")
    theirs = torch.load(tmp_path / "alone" / "kept" / "epoch=0.ckpt", weights_only=True)["state_dict"]
    for stage in ("stage1", "stage3"):
        ranks(2).run(run, under(job, stage), tmp_path / stage)
        path = tmp_path / stage / "kept" / "epoch=0.ckpt"
        mine = torch.load(path, weights_only=True)["state_dict"]
        assert distance(mine, {name: theirs[name] for name in mine}) < 1e-6
        assert float((mine["model.head.weight"] == 0).float().mean()) > 0.1


def refused(job: With, folder: Path) -> str:
    with pytest.raises(UnsupportedError) as caught:
        run(job, folder)
    return str(caught.value)


class OwnSave(ModelPruning):
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["pruned"] = True


@pytest.mark.parametrize(
    ("module", "kind", "arguments", "words"),
    [
        (
            Untied,
            ModelPruning,
            {"make_pruning_permanent": False},
            "ModelPruning(make_pruning_permanent=False) wants checkpoints with masks beside the unpruned weights. "
            "ZeroStrategy keeps only the pruned ones. Leave it at True, or use strategy='ddp'.",
        ),
        (
            Untied,
            ModelPruning,
            {"resample_parameters": True},
            "ModelPruning(resample_parameters=True) draws whole modules anew, which ZeroStrategy does not hold. Leave "
            "it at False, or use strategy='ddp'.",
        ),
        (
            LitGPT,
            ModelPruning,
            {},
            "ModelPruning would prune 'model.embedding.weight' twice: two modules share it. Name one of them in "
            "ModelPruning(parameters_to_prune=...).",
        ),
        (Untied, OwnSave, {}, "The callback OwnSave overrides on_save_checkpoint of Lightning's ModelPruning."),
    ],
)
def test_refused(ranks, tmp_path, module, kind, arguments, words):
    job = With(replace(FIT, module=module), [(kind, {"pruning_fn": "l1_unstructured", **arguments})])
    for found in ranks(2).run(refused, under(job, "stage2"), tmp_path):
        assert found.startswith(words)


def test_resuming_with_the_lottery_ticket(ranks, tmp_path):
    job = With(replace(FIT, epochs=1), [(ModelPruning, GLOBAL)], kept=True)
    ranks(2).run(run, under(job, "stage2"), tmp_path)
    again = With(
        replace(FIT, resume=tmp_path / "kept" / "epoch=0.ckpt"), [(ModelPruning, {"pruning_fn": "l1_unstructured"})]
    )
    for found in ranks(2).run(refused, under(again, "stage2"), tmp_path / "again"):
        assert found == (
            "ModelPruning(use_lottery_ticket_hypothesis=...) resets weights to their initial values, which a "
            "checkpoint does not hold. Resume with use_lottery_ticket_hypothesis=False."
        )
