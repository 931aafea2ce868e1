"""Small state in the Trainer: checkpoints that know nothing of it, callbacks, pipelines, Fabric; what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning

from lit_zero import Pipeline, Precision, ZeroStrategy
from lit_zero.core.errors import ConfigError, LitZeroError
from lit_zero.strategy.fabric import FabricZeroStrategy
from lit_zero.zero.access import Access
from tests.callbacks.harness import With
from tests.callbacks.harness import run_all as run_with
from tests.callbacks.test_pruning import LOCAL, PrunesBlocks, Untied
from tests.fabric import harness as fabric
from tests.pipeline.test_training import piped
from tests.precision.harness import Job, build, steps, with_run
from tests.strategy.harness import Fit, LitGPT, Outcome, Short, distance, loaders, make_trainer, same_bits, train
from tests.strategy.harness import train_all as fit_all
from tests.strategy.test_finetuning import Plain, callbacks
from tests.strategy.test_manual import GAN
from tests.strategy.test_precision import half

ADAMW = {"optimizer": "adamw", "lr": 1e-2}
MIXED = {"precision": "bf16-mixed"}
SPLIT = Precision(master="split")
BYTE = Precision(master="split", moments="int8", gradient_dtype="compute")
EARLY = replace(BYTE, step="backward")


def fit(stage: str, precision: Precision | None, devices: int = 2, form: str = "full", **more: Any) -> Fit:
    zero = {"zero": stage, "precision": precision, "checkpoint": form}
    return Short(zero, devices, **{"trainer": MIXED, "arguments": ADAMW, **more})


def close(one: Outcome, other: Outcome, rel: float) -> None:
    assert one.steps == other.steps
    for name in ("train_loss_step", "val_loss"):
        assert one.column(name) == pytest.approx(other.column(name), rel=rel), name


@pytest.mark.parametrize("stage", ["none", "stage1", "stage3"])
def test_training(ranks: Any, stage: str, tmp_path: Path) -> None:
    """With a schedule, two groups and a tied weight; bits are compared under the engine alone."""
    ways = [None, SPLIT, BYTE, EARLY]
    plain, split, byte, early = ranks(2).run(fit_all, [fit(stage, way) for way in ways], tmp_path)[0]
    close(split, plain, 1e-4)
    assert distance(split.weights, plain.weights) < 1e-4
    close(byte, plain, 0.01)
    assert same_bits(early.weights, byte.weights) and early.rows == byte.rows


def test_accumulation_and_clipping(ranks: Any, tmp_path: Path) -> None:
    busy = {**MIXED, "accumulate_grad_batches": 2, "gradient_clip_val": 0.2}
    jobs = [fit(stage, way, trainer=busy) for stage in ("stage1", "stage2") for way in (None, SPLIT, BYTE)]
    found = ranks(2).run(fit_all, jobs, tmp_path)[0]
    for plain, split, byte in (found[:3], found[3:]):
        close(split, plain, 1e-4)
        close(byte, plain, 0.01)


# ---- checkpoints


def save(trainer: pl.Trainer) -> None:
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt")


def masters(trainer: pl.Trainer) -> dict[str, torch.Tensor]:
    found = trainer.strategy.full_state_dict()  # type: ignore[attr-defined]
    return {name: value.clone() for name, value in found.items()}


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["full", "sharded"])
def test_a_resumed_run_goes_on_bit_for_bit(ranks: Any, tmp_path: Path, form: str) -> None:
    """In another stage too, and with the step in another place."""
    whole = fit("stage3", BYTE, form=form, epochs=2, look=masters)
    expected, _ = ranks(2).run(fit_all, [whole, replace(whole, epochs=1, look=save)], tmp_path)[0]
    saved = tmp_path / "1" / "saved.ckpt"
    ways = [whole, replace(fit("stage2", BYTE), epochs=2, look=masters), replace(fit("none", EARLY), epochs=2)]
    ways[2].look = masters
    resumed = ranks(2).run(fit_all, [replace(way, resume=saved) for way in ways], tmp_path / "second")[0]
    for each in resumed:
        assert same_bits(each.notes, expected.notes)
        assert each.column("train_loss_step") == expected.column("train_loss_step")[5:]


def test_checkpoints_are_plain_ones(ranks: Any, tmp_path: Path) -> None:
    """Plain Lightning loads what small state saves, and the other way round; both hold the same names and types."""
    first = replace(fit("stage3", BYTE), look=save)
    plain = Fit(trainer=MIXED, arguments=ADAMW, epochs=1, look=save)
    ranks(2).run(train, first, tmp_path / "small")
    train(plain, tmp_path / "plain")
    mine, theirs = (torch.load(tmp_path / each / "saved.ckpt", weights_only=True) for each in ("small", "plain"))
    assert list(mine["state_dict"]) == list(theirs["state_dict"])
    assert {value.dtype for value in mine["state_dict"].values() if value.is_floating_point()} == {torch.float32}
    for one, other in zip(*(each["optimizer_states"][0]["state"].items() for each in (mine, theirs)), strict=True):
        assert one[0] == other[0] and list(one[1]) == list(other[1])
        for key, value in one[1].items():
            assert value.dtype == other[1][key].dtype and value.shape == other[1][key].shape
            assert torch.allclose(value, other[1][key], atol=0.05)
    whole = train(replace(plain, epochs=2, look=None), tmp_path / "whole")
    lightning = train(replace(plain, epochs=2, look=None, resume=tmp_path / "small" / "saved.ckpt"), tmp_path / "a")
    small = [
        replace(fit(stage, way), epochs=2, resume=tmp_path / "plain" / "saved.ckpt")
        for stage, way in (("stage2", SPLIT), ("stage3", BYTE))
    ]
    exact, rounded = ranks(2).run(fit_all, small, tmp_path / "b")[0]
    for each, rel in ((lightning, 0.01), (exact, 5e-3), (rounded, 0.01)):
        assert each.column("train_loss_step") == pytest.approx(whole.column("train_loss_step")[5:], rel=rel)


# ---- what else a run may have


@pytest.mark.thorough
@pytest.mark.parametrize("way", [SPLIT, BYTE])
def test_averages_and_pruning(ranks: Any, tmp_path: Path, way: Precision) -> None:
    """Both write to the masters of all ranks, whole ones in stage ``none``."""
    for stage in ("none", "stage3"):
        jobs = [With(fit(stage, each), [(EMAWeightAveraging, {"decay": 0.8})], kept=True) for each in (None, way)]
        plain, small = ranks(2).run(run_with, jobs, tmp_path / stage, timeout=120)[0]
        assert distance(small.weights, plain.weights) < (1e-4 if way is SPLIT else 0.02)
    jobs = [
        With(fit("stage2", each, module=Untied, arguments={"lr": 0.1}), [(PrunesBlocks, LOCAL)]) for each in (None, way)
    ]
    plain, small = ranks(2).run(run_with, jobs, tmp_path / "pruned", timeout=120)[0]
    assert distance(small.weights, plain.weights) < (1e-4 if way is SPLIT else 0.02)
    zeros = [sum(int((value == 0).sum()) for value in each.weights.values()) for each in (plain, small)]
    assert zeros[0] == zeros[1] > 100
    assert issubclass(PrunesBlocks, ModelPruning)


def test_with_blocks_that_are_computed_again(ranks: Any, tmp_path: Path) -> None:
    """A block's parameters are stepped only after they have been used for the last time."""
    ways = [fit("stage3", way) for way in (BYTE, EARLY)]
    for way in ways:
        way.zero = {**way.zero, "activation": "full"}  # type: ignore[dict-item]
    after, early = ranks(2).run(fit_all, ways, tmp_path)[0]
    assert same_bits(early.weights, after.weights) and early.rows == after.rows


def test_in_a_pipeline(ranks: Any, tmp_path: Path) -> None:
    ways = [replace(piped("stage3"), trainer=MIXED, arguments={**ADAMW, "layers": 4}) for _ in range(2)]
    ways[1].zero = {**ways[1].zero, "precision": BYTE}  # type: ignore[dict-item]
    plain, small = ranks(2).run(fit_all, ways, tmp_path)[0]
    close(small, plain, 0.01)


def thaw(folder: Path) -> list[Any]:
    fits = [Short({"zero": "stage3", "precision": way}, 2, module=Plain, epochs=4) for way in (None, BYTE)]
    more = {**callbacks(), **MIXED}
    return [train(replace(each, trainer=more), folder / str(n)) for n, each in enumerate(fits)]


@pytest.mark.thorough
def test_thawing_block_by_block(ranks: Any, tmp_path: Path) -> None:
    plain, small = ranks(2).run(thaw, tmp_path, timeout=120)[0]
    assert distance(small.weights, plain.weights) < 0.02


def test_manual_optimization(ranks: Any, tmp_path: Path) -> None:
    ways = [fit("stage2", way, module=GAN, arguments={}) for way in (None, SPLIT)]
    plain, small = ranks(2).run(fit_all, ways, tmp_path)[0]
    assert distance(small.weights, plain.weights) < 1e-3


def test_a_loss_scaler(ranks: Any, tmp_path: Path) -> None:
    ways = [fit("stage2", way, trainer=half()) for way in (None, Precision(moments="bfloat16"))]
    plain, small = ranks(2).run(fit_all, ways, tmp_path)[0]
    close(small, plain, 0.01)


def test_fabric(ranks: Any) -> None:
    loop = fabric.Loop(fabric={"precision": "bf16-mixed"}, micro_batches=2, clip={"max_norm": 0.3}, devices=2)
    loops = [replace(loop, zero={"zero": "stage3", "precision": way}) for way in (None, SPLIT, BYTE)]
    plain, split, byte = ranks(2).run(fabric.train_all, loops)[0]
    assert distance(split.weights, plain.weights) < 1e-4
    assert byte.losses == pytest.approx(plain.losses, rel=0.01)


def test_single_parameters_are_read_and_written() -> None:
    job = with_run(Job(small={"master": "split", "moments": "int8"}), steps=1)
    model, optimizer, engine = build(job)
    steps(job, model, optimizer, engine)
    full = Access(engine)
    for name in ("embedding.weight", "blocks.1.up.bias", "norm.weight"):
        value = full.parameter(name)
        assert torch.equal(value.to(torch.bfloat16), dict(model.named_parameters())[name])
        full.set_parameter(name, value + 1e-4)
        assert torch.equal(full.parameter(name), value + 1e-4)
        moment = full.state(name, "exp_avg")
        full.set_state(name, "exp_avg", moment)
        assert torch.equal(full.state(name, "exp_avg"), moment)
        full.set_state(name, "exp_avg", moment - 1)
        assert (full.state(name, "exp_avg") - (moment - 1)).abs().max() < 0.01
    engine.detach()
    assert dict(model.named_parameters())["norm.weight"].dtype == torch.float32


# ---- what is refused


def refusals(fits: list[Fit], folder: Path) -> list[str]:
    """Return what fits are refused with."""
    said = []
    for number, given in enumerate(fits):
        trainer, module = make_trainer(given, folder / str(number)), given.module(**given.arguments)
        with pytest.raises(LitZeroError) as caught:
            trainer.fit(module, *loaders(given))
        said.append(str(caught.value))
    return said


class Changes(LitGPT):
    """Its learning rate is set where gradients are looked at."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        optimizer.param_groups[0]["lr"] *= 0.5


def test_what_a_trainer_may_not_ask_for(ranks: Any, tmp_path: Path) -> None:
    early = Precision(step="backward")
    cases = [
        (
            fit("stage2", early, 1, trainer={**MIXED, "gradient_clip_val": 0.5}),
            "precision.step='backward' does not go with gradient_clip_val=0.5: the norm of all gradients is known only",
        ),
        (
            fit("stage2", early, 1, trainer={**MIXED, "accumulate_grad_batches": 3}),
            "does not go with accumulate_grad_batches=3: gradients of several micro-batches would stand all at once",
        ),
        (
            fit("stage2", early, 1, module=GAN, arguments={}),
            "needs automatic optimization, where Lightning runs the backward inside optimizer.step(closure); GAN",
        ),
        (
            fit("stage2", SPLIT, 1, trainer={"precision": "32-true"}),
            "precision.master='split' has no place in the mode '32-true': expected bf16-mixed. An fp32 original is put",
        ),
        (
            fit("stage2", Precision(moments="int8"), 1, trainer={"precision": "64-true"}),
            "precision.moments='int8' has no place in the mode '64-true': expected 32-true or bf16-mixed or 16-mixed.",
        ),
        (
            fit("stage2", early, 1, trainer={"precision": "bf16-true"}),
            "precision.step='backward' has no place in the mode 'bf16-true': expected 32-true or bf16-mixed.",
        ),
        (
            fit("stage2", early, 1, module=Changes),
            "The settings of AdamW were changed between the backward and its step",
        ),
    ]
    [said] = ranks(1).run(refusals, [given for given, _ in cases], tmp_path)
    for message, (_, words) in zip(said, cases, strict=True):
        assert words in message


def test_what_a_strategy_may_not_be_given() -> None:
    with pytest.raises(ConfigError, match="precision.step='backward' does not go with pipeline.schedule='1f1b'"):
        ZeroStrategy("stage2", precision=Precision(step="backward"), pipeline=Pipeline("1f1b", stages=2))
    with pytest.raises(
        ConfigError, match="precision.master=split, precision.moments=int8 does not go with offload.where='cpu'"
    ):
        ZeroStrategy("stage2", precision=BYTE, offload="cpu")
    with pytest.raises(ConfigError, match="does not go with offload.where='cpu'"):
        FabricZeroStrategy("stage2", precision=SPLIT, offload="cpu")


def by_hand() -> str:
    loop = fabric.Loop({"zero": "stage2", "precision": Precision(step="backward")}, fabric={"precision": "bf16-mixed"})
    with pytest.raises(ConfigError) as caught:
        fabric.train(loop)
    return str(caught.value)


def test_fabric_steps_after_the_backward(ranks: Any) -> None:
    [said] = ranks(1).run(by_hand)
    assert "needs automatic optimization" in said and "a loop of Fabric's calls them one after the other" in said
