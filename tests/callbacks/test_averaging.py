"""Lightning's WeightAveraging and EMAWeightAveraging, unmodified, on shards: complaint 15 of the field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.loops import utilities
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lit_zero.cli import main
from lit_zero.core.errors import UnsupportedError
from tests.callbacks.harness import Buffered, Normalised, With, run, run_all, under
from tests.pool import RankPool
from tests.strategy.harness import STAGES, Fit, LitGPT, Outcome, distance, loaders, make_trainer, same_bits, train
from tests.strategy.test_deferred import Deferred

Ranks = Callable[[int], RankPool]


class EachEpoch(WeightAveraging):
    """As a user writes one: at the end of every epoch, on parameters alone, on a device that is named."""

    def __init__(self, decay: float) -> None:
        super().__init__("cpu", use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


FIT = Fit(module=Buffered, epochs=2)
EMA = (EMAWeightAveraging, {"decay": 0.8, "update_starting_at_step": 2})
KINDS = [With(FIT, [EMA]), With(FIT, [(WeightAveraging, {})]), With(FIT, [(EachEpoch, {"decay": 0.5})])]


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


def size_of_average(trainer: pl.Trainer) -> tuple[int, int]:
    """Return the elements of the average on this rank, and those of the module's parameters."""
    average = trainer.callbacks[0]._average_model
    return sum(p.numel() for p in average.parameters()), sum(p.numel() for p in trainer.lightning_module.parameters())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", range(len(KINDS)), ids=["ema", "mean", "each_epoch"])
def test_equals_one_process(alone, staged, stage, kind):
    mine, theirs, plain = staged[stage][0][kind], alone[kind], alone[-1]
    assert distance(mine.weights, theirs.weights) < 1e-6
    assert mine.weights["running"].tolist() == theirs.weights["running"].tolist()
    assert mine.weights["count"].tolist() == theirs.weights["count"].tolist()
    for name in ("val_loss", "val_accuracy", "train_loss_step"):
        assert mine.column(name) == pytest.approx(theirs.column(name), rel=1e-6)
    # The averages are others than the weights, validation runs on them, and training does not.
    assert distance(theirs.weights, plain.weights) > 1e-3
    assert mine.column("val_loss")[1:] != pytest.approx(plain.column("val_loss")[1:], rel=1e-4)
    assert mine.column("train_loss_step") == pytest.approx(plain.column("train_loss_step"), rel=1e-6)
    assert same_bits(mine.weights, staged["none"][0][kind].weights)


@pytest.mark.parametrize("stage", STAGES)
def test_an_average_costs_a_share_of_the_parameters(staged, stage):
    for kind in range(len(KINDS)):
        sizes = [rank[kind].notes for rank in staged[stage]]
        assert sum(size for size, _ in sizes) == sizes[0][1]
        assert max(size for size, _ in sizes) < 0.52 * sizes[0][1]


@pytest.mark.thorough
def test_averages_of_masters(ranks, tmp_path):
    """In mixed precision the 4-byte masters are averaged, not the 2-byte parameters."""
    job = With(replace(FIT, trainer={"precision": "bf16-mixed"}), [EMA])
    theirs = run(job, tmp_path / "alone")
    bits = None
    for stage in ("stage1", "stage3"):
        mine = ranks(2).run(run, under(job, stage), tmp_path / stage)[0]
        assert mine.weights["model.blocks.0.up.weight"].dtype == torch.float32
        assert distance(mine.weights, theirs.weights) < 1e-2
        assert mine.column("val_loss") == pytest.approx(theirs.column("val_loss"), rel=1e-2)
        bits = bits or mine.weights
        assert same_bits(mine.weights, bits)


@pytest.mark.thorough
@pytest.mark.parametrize(("use_buffers", "stages"), [(True, STAGES), (False, ("stage3",))])
def test_batch_statistics_as_under_ddp(ranks, tmp_path, use_buffers, stages):
    fit = replace(FIT, module=Normalised, devices=2, zero="ddp", epochs=2)
    job = With(fit, [(EMAWeightAveraging, {"decay": 0.8, "use_buffers": use_buffers})])
    found = ranks(2).run(run_all, [job, *(under(job, stage) for stage in stages)], tmp_path)[0]
    assert found[0].weights["model.norm.running_var"].std() > 1e-4
    for mine in found[1:]:
        assert distance(mine.weights, found[0].weights) < 1e-6
        assert mine.column("train_loss_step") == pytest.approx(found[0].column("train_loss_step"), rel=1e-6)


def run_in_inference_mode(job: With, folder: Path) -> Outcome:
    """As Lightning evaluates where the process group is NCCL's."""
    with (
        mock.patch.object(utilities, "_distributed_is_initialized", return_value=False),
        mock.patch.object(_EvaluationLoop, "inference_mode", property(lambda _: True, lambda *_: None), create=True),
    ):
        return run(replace(job, fit=replace(job.fit, module=InInferenceMode)), folder)


class InInferenceMode(Buffered):
    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        assert torch.is_inference_mode_enabled()
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("stage", STAGES)
def test_swapping_in_inference_mode(ranks, tmp_path, staged, stage):
    forced = ranks(2).run(run_in_inference_mode, under(KINDS[0], stage), tmp_path)[0]
    assert same_bits(forced.weights, staged[stage][0][0].weights)
    assert forced.column("val_loss") == staged[stage][0][0].column("val_loss")


def test_a_model_built_on_the_meta_device(ranks, tmp_path):
    """Lightning's own would build the whole model on every rank; here it stays deferred."""
    job = With(replace(FIT, module=Deferred), [EMA])
    theirs = run(job, tmp_path / "alone")
    jobs = [under(job, stage, look=size_of_average) for stage in ("stage2", "stage3")]
    for mine in ranks(2).run(run_all, jobs, tmp_path)[0]:
        assert distance(mine.weights, theirs.weights) < 1e-6
        assert mine.notes[0] < 0.52 * mine.notes[1]


# ---- checkpoints: in the form of Lightning's own, both ways


KEPT = With(replace(FIT, arguments={"optimizer": "adamw", "lr": 1e-2}, epochs=3), [EMA], kept=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """Plain Lightning: what it ends with, and the checkpoint of the first epoch."""
    folder = tmp_path_factory.mktemp("plain")
    return run(KEPT, folder), folder / "kept" / "epoch=0.ckpt"


def check_rest(resumed: Outcome, whole: Outcome) -> None:
    """Check that a run that was taken up after the first epoch ends and logs as the whole run."""
    assert distance(resumed.weights, whole.weights) < 1e-6
    assert resumed.steps == whole.steps == 15
    for name in ("train_loss_step", "val_loss"):
        values = resumed.column(name)
        assert len(values) == (10 if name == "train_loss_step" else 2)
        assert values == pytest.approx(whole.column(name)[-len(values) :], rel=1e-5)


def resumed(job: With, path: Path, **changes: Any) -> With:
    return replace(job, fit=replace(job.fit, resume=path, **changes), kept=False)


@pytest.mark.thorough
def test_plain_checkpoints_resume_in_every_stage(ranks, tmp_path, plain):
    for stage in STAGES:
        job = resumed(under(KEPT, stage), plain[1])
        check_rest(ranks(2).run(run, job, tmp_path / stage)[0], plain[0])


@pytest.mark.thorough("stage1")
@pytest.mark.parametrize("stage", ["stage1", "stage3"])  # how weights are held; resuming is in every stage
def test_a_full_checkpoint_is_a_plain_one(ranks, tmp_path, plain, stage):
    ranks(2).run(run, under(KEPT, stage), tmp_path)
    path = tmp_path / "kept" / "epoch=0.ckpt"
    check_same_averages(path, plain[1])
    check_rest(run(resumed(KEPT, path), tmp_path / "plain"), plain[0])


def check_same_averages(path: Path, other: Path) -> None:
    mine, theirs = (torch.load(each, weights_only=True) for each in (path, other))
    assert int(mine["averaging_state"]["n_averaged"]) == int(theirs["averaging_state"]["n_averaged"]) == 3
    assert mine["callbacks"]["EMAWeightAveraging"] == theirs["callbacks"]["EMAWeightAveraging"]
    for key in ("state_dict", "current_model_state"):
        assert mine[key].keys() == theirs[key].keys()
        mine[key] = {name: mine[key][name] for name in theirs[key]}  # consolidate puts buffers last
        assert distance(mine[key], theirs[key]) < 1e-6
        assert [value.dtype for value in mine[key].values()] == [value.dtype for value in theirs[key].values()]
    assert distance(mine["state_dict"], mine["current_model_state"]) > 1e-3
    assert same_bits(mine["state_dict"], dict(Buffered.load_from_checkpoint(path).state_dict()))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("stage", "size", "other_stage", "other_size"), [("stage3", 2, "stage1", 4), ("none", 4, "stage3", 2)]
)
def test_sharded_checkpoints(ranks, tmp_path, plain, stage, size, other_stage, other_size):
    ranks(size).run(run, under(KEPT, stage, "sharded", size), tmp_path)
    path, one = tmp_path / "kept" / "epoch=0.ckpt", tmp_path / "one.ckpt"
    assert path.is_dir()
    job = resumed(under(KEPT, other_stage, size=other_size), path)
    check_rest(ranks(other_size).run(run, job, tmp_path / "second")[0], plain[0])
    assert main(["consolidate", str(path), str(one)]) == 0
    check_same_averages(one, plain[1])
    check_rest(run(resumed(KEPT, one), tmp_path / "plain"), plain[0])


def test_a_checkpoint_without_an_average(ranks, tmp_path):
    """Both the weights and the average begin as what it holds."""
    train(replace(FIT, epochs=1, look=save_plainly), tmp_path)
    path = tmp_path / "saved.ckpt"
    job = With(replace(FIT, epochs=2, resume=path), [(EMAWeightAveraging, {"decay": 0.8})])
    theirs = run(job, tmp_path / "alone")
    for stage in ("none", "stage3"):
        assert distance(ranks(2).run(run, under(job, stage), tmp_path / stage)[0].weights, theirs.weights) < 1e-6


def save_plainly(trainer: pl.Trainer) -> None:
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt")


# ---- one callback, several runs


def several_runs(fit: Fit, folder: Path) -> list[Any]:
    """Use one callback under ZeRO, then evaluate, then fit another module, and then in a plain Trainer."""
    callback: Any = EMAWeightAveraging(decay=0.8)
    found: list[Any] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder / str(seed), callbacks=[callback])
        trainer.fit(module, *loaders(fit))
        found.append({k: v.clone() for k, v in trainer.strategy.lightning_module_state_dict().items()})
        evaluated = trainer.validate(module, loaders(fit)[1], verbose=False)[0]["val_loss"]
        trainer.save_checkpoint(folder / f"{seed}.ckpt")
        again = trainer.test(module, loaders(fit)[1], ckpt_path=folder / f"{seed}.ckpt", verbose=False)[0]["test_loss"]
        found.append((evaluated, again))
    torch.manual_seed(0)
    module, alone = fit.module(**fit.arguments), replace(fit, zero="auto", devices=1)
    callback._latest_update_step = 0  # Lightning goes on counting where it was
    plain = make_trainer(alone, folder / "plain", callbacks=[callback])
    plain.fit(module, *loaders(alone))
    return [*found, dict(module.state_dict()), type(callback) is EMAWeightAveraging]


def test_one_callback_in_several_runs(ranks, tmp_path):
    fit = replace(FIT, zero={"zero": "stage3"}, devices=1, module=LitGPT, epochs=2)
    first, scores, second, other_scores, plain, itself = ranks(1).run(several_runs, fit, tmp_path)[0]
    theirs = run(With(replace(fit, zero="auto"), [(EMAWeightAveraging, {"decay": 0.8})]), tmp_path / "alone")
    assert distance(first, theirs.weights) < 1e-6 and distance(plain, theirs.weights) < 1e-6
    assert itself, "in a plain Trainer it is Lightning's own again"
    assert scores[0] == pytest.approx(theirs.column("val_loss")[-1], rel=1e-5) == pytest.approx(scores[1], rel=1e-5)
    torch.manual_seed(1)
    assert distance(second, dict(LitGPT().state_dict())) > 1e-2
    assert other_scores[0] == pytest.approx(other_scores[1], rel=1e-5)


# ---- what is refused


class OwnSwap(EMAWeightAveraging):
    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        raise AssertionError


class OwnSetup(WeightAveraging):
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)


def normalised(average: torch.Tensor, current: torch.Tensor, number: Any) -> torch.Tensor:
    return current / current.norm()


def refused(job: With, folder: Path) -> str:
    with pytest.raises(UnsupportedError) as caught:
        run(job, folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (
            (OwnSwap, {}),
            "The callback OwnSwap overrides _swap_models of Lightning's WeightAveraging. ZeroStrategy replaces those "
            "methods by ones that work on shards, so the override would never run. Move its code to another hook "
            "(on_fit_start comes right after the model is set up), or use strategy='ddp'.",
        ),
        ((OwnSetup, {}), "The callback OwnSetup overrides setup of Lightning's WeightAveraging."),
        (
            (WeightAveraging, {"avg_fn": normalised}),
            "The averaging function of WeightAveraging (avg_fn) is not element-wise: the average of a matrix differs "
            "from that of the matrix cut in two. ZeroStrategy averages parts of parameters. Use an element-wise "
            "function, or strategy='ddp'.",
        ),
    ],
)
def test_refused(ranks, tmp_path, callback, words):
    for found in ranks(2).run(refused, under(With(FIT, [callback]), "stage2"), tmp_path):
        assert found.startswith(words)
