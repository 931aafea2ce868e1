"""Where kernels step, a loss scale is taken off by the step, and an overflow skips it on the device."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_zero.strategy.precision import agreeing_scaler
from lit_zero.zero.engine import Engine
from tests.fabric.test_training import fp16
from tests.kernels.conftest import interpreting
from tests.optim.beside import groups, model
from tests.optim.owed import (
    CLIP,
    Counts,
    at_once,
    by_hand,
    clip_values,
    engine_on,
    infinite_norm,
    loss_of,
    masters,
    read,
)
from tests.pipeline.test_composition import Overflowing as Piped
from tests.pipeline.test_composition import scales as piped_scales
from tests.pipeline.test_training import piped
from tests.strategy.harness import STAGES, Fit, distance, train_all
from tests.strategy.test_precision import ADAMW, Overflowing, half, scales


def scaled(
    net: nn.Module, optimizer: torch.optim.Optimizer, engine: Engine | None = None, infinite: bool = True
) -> list[tuple[float, float]]:
    """Train with a loss scale on a CPU; return the norm before clipping and the scale after each step.

    Args:
        net: the module.
        optimizer: made on it.
        engine: that manages both; ``None``: one process without one.
        infinite: the loss is in two of the steps.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    if engine is not None:
        scaler = agreeing_scaler(scaler, lambda _: engine)
    notes = []
    for number in range(4):
        loss = scaler.scale(loss_of(net, number)) * (float("inf") if infinite and number in (0, 2) else 1.0)
        loss.backward() if engine is None else engine.backward(loss)
        scaler.unscale_(optimizer)
        if engine is None:
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        else:
            norm = engine.clip_grad_norm(CLIP, optimizer=optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        notes.append((norm.item() if number in (1, 3) else 0.0, scaler.get_scale()))
    return notes


def whole(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("stage", ["none", "stage3"])
def test_the_loss_scale_is_taken_off_by_the_step(counts, monkeypatch, stage):
    """A step reads gradients twice, writes none, and the host learns nothing of an overflow."""
    net = model()
    expected = scaled(net, torch.optim.AdamW(groups(net), lr=1e-2))
    counts.take()
    engine = engine_on(stage=stage)
    (binding,) = engine.bindings
    monkeypatch.delattr(torch.amp.GradScaler, "_maybe_opt_step")  # which reads the verdict
    found = scaled(engine.model, binding.optimizer, engine)
    assert counts.take() == (4, 4, 0, 0)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    assert {state["step"].item() for state in binding.optimizer.state.values()} == {2.0}
    engine.detach()
    torch.testing.assert_close(whole(engine.model), whole(net), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("between", [read, by_hand, infinite_norm, clip_values], ids=lambda between: between.__name__)
def test_whoever_looks_sees_the_loss_scale_taken_off(counts, monkeypatch, between):
    """What is known of the norm is no longer, then."""
    found = []
    for owes in (True, False):
        if not owes:
            at_once(monkeypatch)
        engine = engine_on()
        (optimizer,) = (binding.optimizer for binding in engine.bindings)
        scaler = agreeing_scaler(torch.amp.GradScaler("cpu", init_scale=2.0**10), lambda _, engine=engine: engine)
        engine.backward(scaler.scale(loss_of(engine.model, 0) * 1e-4))
        scaler.unscale_(optimizer)
        between(engine)
        norm = engine.clip_grad_norm(CLIP / 1000).item()
        scaler.step(optimizer)
        assert counts.passes == (0 if owes else 1)
        found.append((norm, masters(engine)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert torch.equal(found[0][1], found[1][1])


def on_ranks(stages: tuple[str, ...]) -> dict[str, Any]:
    """The last of them overflows; its loss counts half."""
    found = {}
    with interpreting(), pytest.MonkeyPatch.context() as patch:
        counts = Counts(patch)
        for stage in stages:
            engine = engine_on(stage=stage)
            counts.take()
            last = engine.exchange.rank == engine.exchange.size - 1
            notes = scaled(engine.model, engine.bindings[0].optimizer, engine, infinite=last)
            launches = counts.take()
            engine.detach()
            found[stage] = notes, launches, whole(engine.model)
    return found


def test_ranks_agree_on_an_overflow_on_the_device(ranks):
    pytest.importorskip("triton", reason="triton has no build for this system")
    net = model()
    expected = scaled(net, torch.optim.AdamW(groups(net), lr=1e-2))
    for found in ranks(2).run(on_ranks, ("none", "stage3"), timeout=120):
        for stage, (notes, launches, weights) in found.items():
            for mine, theirs in zip(notes, expected, strict=True):
                assert mine == pytest.approx(theirs, rel=1e-6), stage
            assert launches == (4, 4, 0, 0)
            torch.testing.assert_close(weights, whole(net), rtol=1e-5, atol=1e-6)
            assert torch.equal(weights, found["none"][2])


def in_lightning(fits: list[Fit], root: Path) -> Any:
    with interpreting(), pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch.amp.GradScaler, "_maybe_opt_step")
        return train_all(fits, root)


@pytest.mark.thorough
def test_lightning_skips_steps_on_the_device(ranks, tmp_path):
    """Clipped, with a schedule, in every stage: as without kernels, and without the method that reads the verdict."""
    arguments = {"overflows": (0, 3), **ADAMW}
    fits = [
        Fit({"zero": stage, "fused": "auto"}, 2, half(gradient_clip_val=0.2), module=Overflowing, arguments=arguments)
        for stage in STAGES
    ]
    for each in fits:
        each.look = scales
    plain = ranks(2).run(train_all, fits[:1], tmp_path / "plain", timeout=300)[0][0]
    for mine in ranks(2).run(in_lightning, fits, tmp_path / "kernels", timeout=300)[0]:
        assert mine.notes == plain.notes
        assert mine.column("lr-AdamW/pg1") == plain.column("lr-AdamW/pg1")
        assert distance(mine.weights, plain.weights) < 1e-4


@pytest.mark.thorough
def test_the_stages_of_a_pipeline_skip_steps_on_the_device(ranks, tmp_path):
    """Only one of them has seen the overflow."""
    given = {"where": "model.blocks.3.up.weight", "overflows": (0, 3), **ADAMW, "layers": 4}
    trainer = partial(half, gradient_clip_val=0.2)
    fits = [
        replace(piped(stage), module=Piped, arguments=given, trainer=trainer(), look=piped_scales)
        for stage in ("none", "stage2", "stage3")
    ]
    for each in fits:
        assert isinstance(each.zero, dict)
        each.zero["fused"] = "auto"
    plain = ranks(2).run(train_all, fits[:1], tmp_path / "plain", timeout=300)[0][0]
    assert len({rate for _, rate in plain.notes}) < len(plain.notes)
    for mine in ranks(2).run(in_lightning, fits, tmp_path / "kernels", timeout=300)[0]:
        assert mine.notes == plain.notes
        assert distance(mine.weights, plain.weights) < 1e-4


def in_fabric(stage: str) -> Any:
    with interpreting(), pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch.amp.GradScaler, "_maybe_opt_step")
        return fp16({"zero": stage, "fused": "auto"}, 2)


@pytest.mark.thorough
@pytest.mark.parametrize("stage", STAGES)
def test_a_loop_of_fabrics_skips_steps_on_the_device(ranks, stage):
    alone = fp16("auto", 1)
    first, second = ranks(2).run(in_fabric, stage)
    assert first.notes == second.notes == alone.notes
    assert distance(first.weights, alone.weights) < 2e-3


def test_the_verdict_on_one_optimizer_is_not_that_on_another(counts):
    """A scaler adds up verdicts where the first one lies."""
    engine = engine_on(lambda net: [torch.optim.SGD(part.parameters(), lr=0.1) for part in net])
    first, second = (binding.optimizer for binding in engine.bindings)
    scaler = agreeing_scaler(torch.amp.GradScaler("cpu", init_scale=2.0), lambda _: engine)
    engine.backward(scaler.scale(loss_of(engine.model, 0)))
    for segment in engine.bindings[1].segments:
        assert segment.param.grad is not None
        segment.param.grad.fill_(float("inf"))
    for optimizer in (first, second):
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
    scaler.update()
    assert [bool(scaler.skipped[id(each)]) for each in (first, second)] == [False, True]
