"""What else a run may have: every feature that touches masters or states gives what it gives without offload."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning, StochasticWeightAveraging

from lit_zero import Offload
from lit_zero.core.keeping import Keeping
from lit_zero.offload.open import open_keeping
from lit_zero.zero.access import Access
from tests.callbacks.harness import With
from tests.callbacks.harness import run_all as run_with
from tests.callbacks.test_pruning import GLOBAL, LOCAL, PrunesBlocks, Untied
from tests.callbacks.test_stock import FINDS, Steady
from tests.fabric import harness as fabric
from tests.offload.harness import CPU, disk
from tests.pipeline.test_training import piped
from tests.strategy.harness import Fit, LitGPT, Short, distance, same_bits, train, train_all
from tests.strategy.test_checkpoints import Rich
from tests.strategy.test_finetuning import Plain, callbacks
from tests.strategy.test_manual import GAN
from tests.zero.test_access import NAMES, build, rows, step

pytestmark = pytest.mark.thorough


def choices(folder: Path, params: bool = False) -> list[Offload]:
    """Return no offload, and both ways to offload."""
    away = [Offload("cpu", params=params), Offload("disk", folder=folder, params=params, chunk=1 << 16)]
    return [Offload(), *away]


def all_ways(fit: Fit, folder: Path, stage: str = "stage2") -> list[Fit]:
    ways = choices(folder, stage == "stage3")
    return [replace(fit, zero={**zero_of(fit), "zero": stage, "offload": way}, devices=2) for way in ways]


def zero_of(fit: Fit) -> dict[str, Any]:
    return fit.zero if isinstance(fit.zero, dict) else {}


# ---- checkpoints


def save(trainer: pl.Trainer) -> None:
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt")


def whole_weights(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    found = trainer.strategy.full_state_dict()  # type: ignore[attr-defined]
    return {name: value.clone() for name, value in found.items()}


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_a_checkpoint_knows_nothing_of_offload(ranks: Any, tmp_path: Path, form: str) -> None:
    """What one way saves in a stage, another loads in another stage."""
    whole = Short({"checkpoint": form}, module=Rich, arguments={"lr": 0.05}, epochs=2, look=whole_weights)
    first = replace(whole, epochs=1, look=save)
    halves = all_ways(first, tmp_path / "states", "stage3")
    expected, *_ = ranks(2).run(train_all, [all_ways(whole, tmp_path)[0], *halves], tmp_path / "first")[0]
    saved = [tmp_path / "first" / str(number) / "saved.ckpt" for number in range(1, 4)]
    ways = all_ways(whole, tmp_path / "states")
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 2)]  # what saves, what loads
    second = [replace(ways[loads], resume=saved[saves]) for saves, loads in pairs]
    for outcome in ranks(2).run(train_all, second, tmp_path / "second")[0]:
        assert len(outcome.notes) > 20 and same_bits(outcome.notes, expected.notes)
        assert outcome.metrics == expected.metrics


def test_adamw_state_survives(ranks: Any, tmp_path: Path) -> None:
    arguments = {"optimizer": "adamw", "lr": 1e-2}
    whole = Short({"checkpoint": "sharded"}, arguments=arguments, epochs=2, look=whole_weights)
    alone = train(Short(arguments=arguments, epochs=2), tmp_path / "alone")
    firsts = all_ways(replace(whole, epochs=1, look=save), tmp_path / "states")
    ranks(2).run(train_all, firsts, tmp_path / "first")
    second = [
        replace(fit, resume=tmp_path / "first" / str(saves) / "saved.ckpt")
        for fit, saves in zip(all_ways(whole, tmp_path / "states", "stage3"), (1, 2, 0), strict=True)
    ]
    for outcome in ranks(2).run(train_all, second, tmp_path / "second")[0]:
        assert distance(outcome.notes, {name: alone.weights[name] for name in outcome.notes}) < 1e-6


# ---- callbacks


AVERAGES: list[tuple[str, Any, dict[str, Any]]] = [
    ("stage2", StochasticWeightAveraging, {"swa_lrs": 0.05, "swa_epoch_start": 1, "annealing_epochs": 1}),
    ("stage3", EMAWeightAveraging, {"decay": 0.8}),
]


@pytest.mark.parametrize(("stage", "kind", "arguments"), AVERAGES)
def test_weight_averaging(ranks: Any, tmp_path: Path, stage: str, kind: Any, arguments: dict[str, Any]) -> None:
    fits = all_ways(Short(epochs=3), tmp_path / "states", stage)
    jobs = [With(fit, [(kind, arguments)], kept=True) for fit in fits]
    first, *others = ranks(2).run(run_with, jobs, tmp_path, timeout=120)[0]
    for other in others:
        assert same_bits(other.weights, first.weights)
        assert other.metrics == first.metrics


@pytest.mark.parametrize("stage", ["stage3"])
def test_averages_of_what_two_stages_hold(ranks: Any, tmp_path: Path, stage: str) -> None:
    """Embedding and head are one weight, at both ends of a pipeline; validation runs on the average."""
    ways = [
        replace(piped(stage), zero={**piped(stage).zero, "offload": way})
        for way in choices(tmp_path / "states", stage == "stage3")
    ]
    jobs = [With(fit, [(EMAWeightAveraging, {"decay": 0.8})]) for fit in ways]
    first, *others = ranks(2).run(run_with, jobs, tmp_path / "runs", timeout=120)[0]
    for other in others:
        assert distance(other.weights, first.weights) < 1e-6
        assert other.column("val_loss") == pytest.approx(first.column("val_loss"), rel=1e-5)


class Moving(Steady):
    """With states."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), self.lr, foreach=False)


def test_learning_rate_finder(ranks: Any, tmp_path: Path) -> None:
    """It goes back to a checkpoint without any state, in the middle of a run."""
    ways = choices(tmp_path / "states", True)[::2]
    jobs = [
        replace(FINDS, fit=replace(FINDS.fit, module=Moving, zero={"zero": "stage3", "offload": way}, devices=2))
        for way in ways
    ]
    first, *others = ranks(2).run(run_with, jobs, tmp_path, timeout=120)[0]
    for other in others:
        assert same_bits(other.weights, first.weights)
        assert other.rows == first.rows


def test_pruning(ranks: Any, tmp_path: Path) -> None:
    fits = all_ways(Short(module=Untied, epochs=3, trainer={"gradient_clip_val": 0.5}), tmp_path / "states")
    for kind, arguments, chosen in ((ModelPruning, GLOBAL, fits), (PrunesBlocks, LOCAL, fits[:2])):
        jobs = [With(fit, [(kind, arguments)]) for fit in chosen]
        first, *others = ranks(2).run(run_with, jobs, tmp_path / kind.__name__, timeout=120)[0]
        for other in others:
            assert same_bits(other.weights, first.weights)


# ---- other ways to train


def thaw(folder: Path) -> list[Any]:
    fits = all_ways(Short(module=Plain, epochs=4), folder / "states", "stage3")
    return [train(replace(fit, trainer=callbacks()), folder / str(n)) for n, fit in enumerate(fits)]


def test_thawing_block_by_block(ranks: Any, tmp_path: Path) -> None:
    first, *others = ranks(2).run(thaw, tmp_path, timeout=120)[0]
    for other in others:
        assert distance(other.weights, first.weights) < 1e-6


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_manual_optimization(ranks: Any, tmp_path: Path, stage: str) -> None:
    first, *others = ranks(2).run(train_all, all_ways(Short(module=GAN), tmp_path / "states", stage), tmp_path)[0]
    for other in others:
        assert distance(other.weights, first.weights) < 1e-6


def test_fabric(ranks: Any, tmp_path: Path) -> None:
    for loop in (
        fabric.Loop(optimizers=fabric.two, clip={"max_norm": 0.3}, micro_batches=2),
        fabric.Loop(apart=True, clip={"clip_val": 0.01}),
    ):
        loops = [replace(loop, zero={"zero": "stage3", "offload": way}, devices=2) for way in choices(tmp_path, True)]
        first, *others = ranks(2).run(fabric.train_all, loops)[0]
        for other in others:
            assert distance(other.weights, first.weights) < 1e-9
            assert other.norms == pytest.approx(first.norms, rel=1e-9)


class Grows(LitGPT):
    """Evaluates, and predicts, between steps."""

    def on_train_batch_end(self, *_: Any) -> None:
        full = self.trainer.strategy.full  # type: ignore[union-attr]
        self.log("embedding", full.parameter("model.embedding.weight").norm())


def test_validation_and_whole_parameters_between_steps(ranks: Any, tmp_path: Path) -> None:
    fit = Short(module=Grows, trainer={"val_check_interval": 2})
    first, *others = ranks(2).run(train_all, all_ways(fit, tmp_path / "states", "stage3"), tmp_path)[0]
    for other in others:
        assert other.rows == first.rows


# ---- single parameters


def looked(stage: str, keeping: Keeping) -> dict[str, torch.Tensor]:
    """Read everything after one step and a backward, write it, step, and read again."""
    engine = build(stage, keeping=keeping)
    for group in engine.bindings[0].optimizer.param_groups:
        group["foreach"] = False  # the kernel of no offload
    step(engine, 0)
    engine.backward(engine.model.loss(tokens_of(engine, 1)))
    full, found = Access(engine), {}

    def read(title: str) -> None:
        for name in NAMES:
            found[f"{title} {name}"] = full.parameter(name)
            found[f"{title} {name} exp_avg"] = full.state(name, "exp_avg")

    read("before")
    for number, name in enumerate(NAMES):
        gradient = full.gradient(name)
        assert gradient is not None
        found[f"{name} gradient"] = gradient
        full.set_parameter(name, full.parameter(name) + number)
        full.set_gradient(name, gradient * 2)
        full.set_state(name, "exp_avg", full.state(name, "exp_avg") - 1)
    read("written")
    engine.step()
    read("stepped")
    engine.detach()
    return found


def tokens_of(engine: Any, number: int) -> torch.Tensor:
    from tests.zero.harness import tokens

    return tokens(number, rows(engine))


def look(stage: str, folder: Path) -> list[dict[str, torch.Tensor]]:
    ways = [Offload("cpu", params=stage == "stage3"), disk(folder, params=stage == "stage3")]
    return [looked(stage, Keeping()), *(looked(stage, open_keeping(way, CPU)) for way in ways)]


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_single_parameters_are_read_and_written(ranks: Any, stage: str, tmp_path: Path) -> None:
    for first, *others in ranks(2).run(look, stage, tmp_path):
        for other in others:
            for key, value in first.items():
                assert torch.equal(other[key], value), key
