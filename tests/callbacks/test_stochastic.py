"""Lightning's StochasticWeightAveraging, unmodified, on shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging

from tests.callbacks.harness import Buffered, Normalised, With, run, run_all, under
from tests.pool import RankPool
from tests.strategy.harness import STAGES, Fit, Outcome, distance, same_bits

Ranks = Callable[[int], RankPool]


class Epochly(Buffered):
    """Its learning rate changes once per epoch, as SWA's does."""

    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        found["lr_scheduler"]["interval"] = "epoch"
        return found


class Unscheduled(Buffered):
    def configure_optimizers(self) -> Any:
        return super().configure_optimizers()["optimizer"]


FIT = Fit(module=Epochly, epochs=4)
COSINE = (StochasticWeightAveraging, {"swa_lrs": 0.05, "swa_epoch_start": 2, "annealing_epochs": 2})
LINEAR = (
    StochasticWeightAveraging,
    {"swa_lrs": [0.05, 0.02], "swa_epoch_start": 0.4, "annealing_epochs": 3, "annealing_strategy": "linear"},
)
KINDS = [With(FIT, [COSINE]), With(replace(FIT, module=Unscheduled), [LINEAR])]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """The same in one process; the last without averaging."""
    return run_all([*KINDS, With(FIT)], tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def staged(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Outcome]]]:
    """Every stage on 2 ranks: by stage, by rank, one outcome for each kind."""
    found = {}
    for stage in STAGES:
        jobs = [under(job, stage, look=size_of_average) for job in KINDS]
        found[stage] = ranks(2).run(run_all, jobs, tmp_path_factory.mktemp(stage))
    return found


def size_of_average(trainer: pl.Trainer) -> int:
    return sum(p.numel() for p in trainer.callbacks[0]._average_model.parameters())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=["cosine", "linear"])
def test_equals_one_process(alone, staged, stage, kind):
    mine, theirs = staged[stage][0][kind], alone[kind]
    assert distance(mine.weights, theirs.weights) < 1e-6
    rates = [name for name in theirs.rows[0] if name.startswith("lr-")]
    assert len(rates) == 2
    for name in ("val_loss", "train_loss_step", *rates):
        assert mine.column(name) == pytest.approx(theirs.column(name), rel=1e-6)
    assert len(set(theirs.column(rates[0]))) >= 3, "its schedule changes the rate"
    assert same_bits(mine.weights, staged["none"][0][kind].weights)
    size = sum(p.numel() for p in Epochly().parameters())
    assert sum(rank[kind].notes for rank in staged[stage]) == size


def test_it_does_something(alone):
    assert distance(alone[0].weights, alone[-1].weights) > 1e-2


@pytest.mark.thorough
@pytest.mark.parametrize(("accumulate", "stages"), [(1, ("none", "stage3")), (2, ("stage2",))])
def test_batch_statistics_are_made_anew(ranks, tmp_path, accumulate, stages):
    """One more epoch without backward, as under DDP."""
    trainer = {"accumulate_grad_batches": accumulate}
    fit = replace(FIT, module=Normalised, devices=2, zero="ddp", epochs=3, trainer=trainer)
    job = With(fit, [COSINE])
    found = ranks(2).run(run_all, [job, *(under(job, stage) for stage in stages)], tmp_path)[0]
    assert int(found[0].weights["model.norm.num_batches_tracked"]) == 5, "of the last epoch alone"
    for mine in found[1:]:
        assert distance(mine.weights, found[0].weights) < 1e-6
        assert mine.steps == found[0].steps


# ---- checkpoints: in the form of Lightning's own, both ways


KEPT = With(replace(FIT, epochs=5), [COSINE], kept=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """Plain Lightning: what it ends with, and the checkpoint of an epoch in which it averages."""
    folder = tmp_path_factory.mktemp("plain")
    return run(KEPT, folder), folder / "kept" / "epoch=2.ckpt"


def check_rest(resumed: Outcome, whole: Outcome) -> None:
    assert distance(resumed.weights, whole.weights) < 1e-6
    assert resumed.steps == whole.steps == 25
    for name in ("train_loss_step", "val_loss"):
        values = resumed.column(name)
        assert len(values) == (10 if name == "train_loss_step" else 2)
        assert values == pytest.approx(whole.column(name)[-len(values) :], rel=1e-5)


def resumed(job: With, path: Path) -> With:
    return replace(job, fit=replace(job.fit, resume=path), kept=False)


def average_in(path: Path) -> dict[str, torch.Tensor]:
    state = torch.load(path, weights_only=False)["callbacks"]["StochasticWeightAveraging"]
    assert state["n_averaged"] == 2
    return state["average_model_state"]


@pytest.mark.thorough
def test_plain_checkpoints_resume_in_every_stage(ranks, tmp_path, plain):
    for stage in STAGES:
        check_rest(ranks(2).run(run, resumed(under(KEPT, stage), plain[1]), tmp_path / stage)[0], plain[0])


@pytest.mark.thorough("stage1")
@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_a_full_checkpoint_is_a_plain_one(ranks, tmp_path, plain, stage):
    ranks(2).run(run, under(KEPT, stage), tmp_path)
    path = tmp_path / "kept" / "epoch=2.ckpt"
    mine, theirs = average_in(path), average_in(plain[1])
    names = list(dict(Epochly().named_parameters()))
    assert list(mine) == list(theirs)
    assert distance({n: mine[n] for n in names}, {n: theirs[n] for n in names}) < 1e-6
    check_rest(run(resumed(KEPT, path), tmp_path / "plain"), plain[0])


@pytest.mark.thorough
def test_sharded_checkpoints(ranks, tmp_path, plain):
    ranks(2).run(run, under(KEPT, "stage3", "sharded"), tmp_path)
    path = tmp_path / "kept" / "epoch=2.ckpt"
    check_rest(ranks(4).run(run, resumed(under(KEPT, "stage1", "full", 4), path), tmp_path / "second")[0], plain[0])
