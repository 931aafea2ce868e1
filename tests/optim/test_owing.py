"""What gradients are multiplied by waits for the step that reads them anyway; whoever looks before sees it done."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_zero import optim
from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.core.errors import LitZeroError
from lit_zero.core.owing import Owing
from lit_zero.optim.flat import Flat
from lit_zero.precision import Lowering, Precision
from lit_zero.precision.small import Small
from lit_zero.strategy.precision import agreeing_scaler
from lit_zero.zero import Zero
from lit_zero.zero.access import Access
from lit_zero.zero.engine import Engine
from tests.fabric.test_training import fp16
from tests.kernels.conftest import interpreting
from tests.optim.beside import PlainLion, groups, model
from tests.pipeline.test_composition import Overflowing as Piped
from tests.pipeline.test_composition import scales as piped_scales
from tests.pipeline.test_training import piped
from tests.strategy.harness import STAGES, Fit, distance, train_all
from tests.strategy.test_precision import ADAMW, Overflowing, half, scales

CLIP = 1e-2  # of gradients whose norm is some 3


class Counts:
    """How often what was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = self.looks = self.products = self.passes = 0
        walk = importlib.import_module("lit_zero.kernels.triton_walk")
        look = importlib.import_module("lit_zero.kernels.triton_unscale")
        for where, what, name in (
            (walk, "launch", "steps"),
            (look, "launch", "looks"),
            (torch, "_foreach_mul_", "products"),
            (torch, "_amp_foreach_non_finite_check_and_unscale_", "passes"),
        ):
            monkeypatch.setattr(where, what, partial(self._count, name, getattr(where, what)))

    def _count(self, name: str, inner: Callable[..., Any], *args: Any) -> Any:
        setattr(self, name, getattr(self, name) + 1)
        return inner(*args)

    def take(self) -> tuple[int, int, int, int]:
        """Return the numbers of steps, looks at gradients, products with them and passes of torch's scaler."""
        found = self.steps, self.looks, self.products, self.passes
        self.steps = self.looks = self.products = self.passes = 0
        return found


@pytest.fixture
def counts(interpreted, monkeypatch) -> Counts:
    return Counts(monkeypatch)


def adamw(net: nn.Module, **more: Any) -> torch.optim.Optimizer:
    return optim.AdamW(groups(net), lr=1e-2, **more)


def engine_on(make: Callable[[nn.Module], Any] = adamw, stage: str = "none", **more: Any) -> Engine:
    net = model()
    made = make(net)
    optimizers = made if isinstance(made, list) else [made]
    exchange = open_exchange(Comm(), torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:  # the probe's many steps need no kernels
        patch.delenv("TRITON_INTERPRET", raising=False)
        return Engine(net, optimizers, zero=Zero(stage), exchange=exchange, **more)


def loss_of(net: nn.Module, number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return net(torch.randn(5, 7, generator=generator)).square().mean()


def masters(engine: Engine) -> torch.Tensor:
    return torch.cat([lane.master.read().detach().clone() for lane in engine.lanes])


def gradients(engine: Engine) -> torch.Tensor:
    return torch.cat([grad.flatten() for binding in engine.bindings for grad in binding.grads()])


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clipping multiply, as it does for other optimizers."""
    monkeypatch.setattr(Flat, "pays", lambda *_: False)


# ---- one step


def train(engine: Engine, steps: int = 2) -> list[float]:
    losses = []
    for number in range(steps):
        loss = loss_of(engine.model, number)
        engine.backward(loss)
        engine.clip_grad_norm(CLIP)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["AdamW", pytest.param("SGD", marks=pytest.mark.thorough), "Lion"])
def test_a_clipped_step_is_one_launch_and_no_product(counts, monkeypatch, name):
    settings = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else {"lr": 1e-2}
    net = model()
    optimizer = (PlainLion if name == "Lion" else getattr(torch.optim, name))(groups(net), **settings)
    expected = []
    for number in range(2):
        loss = loss_of(net, number)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    found = []
    for owes in (True, False):
        if not owes:
            at_once(monkeypatch)
        engine = engine_on(lambda net: getattr(optim, name)(groups(net), **settings))
        counts.take()
        assert train(engine) == pytest.approx(expected, rel=1e-5)
        assert counts.take() == (2, 0, 0 if owes else 2, 0)
        found.append(masters(engine))
        engine.detach()
        mine = torch.cat([p.detach().flatten() for p in engine.model.parameters()])
        torch.testing.assert_close(mine, weights, rtol=1e-5, atol=1e-6)
    assert torch.equal(*found), "the kernel multiplies as the pass of its own does"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_two_bytes_are_rounded_once_less(counts, monkeypatch, dtype):
    found = []
    for owes in (True, False):
        if not owes:
            at_once(monkeypatch)
        precision = Precision(reduce_dtype="compute", gradient_dtype="compute", lower="all")
        engine = engine_on(lambda net: optim.SGD(groups(net), lr=1.0), lowering=Lowering(precision, dtype))
        with torch.autocast("cpu", dtype):
            loss = loss_of(engine.model, 0)
        before = masters(engine)
        engine.backward(loss)
        engine.clip_grad_norm(CLIP)
        engine.step()
        found.append(masters(engine) - before)
    assert counts.take()[2] == 1
    torch.testing.assert_close(found[0], found[1], rtol=2**-7, atol=1e-6)


# ---- who looks before


def accumulate(engine: Engine) -> None:
    engine.backward(loss_of(engine.model, 7))


def zero_in_place(engine: Engine) -> None:
    engine.bindings[0].optimizer.zero_grad(set_to_none=False)


def skip(engine: Engine) -> None:
    engine.bindings[0].optimizer.zero_grad()
    accumulate(engine)


def clear_one_by_one(engine: Engine) -> None:
    for segment in engine.bindings[0].segments:
        segment.param.grad = None
    accumulate(engine)


def replace_one(engine: Engine) -> None:
    param = engine.bindings[0].segments[0].param
    param.grad = torch.full_like(param, 0.5)


def by_hand(engine: Engine) -> None:
    param = engine.bindings[0].segments[0].param
    assert isinstance(param, Owing) and param.grad is not None
    param.grad.add_(0.25)


def read(engine: Engine) -> None:
    assert Access(engine).gradient("0.weight").norm() < CLIP


def write(engine: Engine) -> None:
    Access(engine).set_gradient("0.weight", torch.ones(9, 7))


def split(engine: Engine) -> None:
    engine.bindings[0].split()


def clip_again(engine: Engine) -> None:
    assert engine.clip_grad_norm(CLIP / 2).item() == pytest.approx(CLIP, rel=1e-3)


def clip_values(engine: Engine) -> None:
    engine.clip_grad_value(CLIP / 10)


def infinite_norm(engine: Engine) -> None:
    assert engine.grad_norm(float("inf")) < CLIP


def step_twice(engine: Engine) -> None:
    engine.step()
    assert engine._keep and engine.bindings[0].grads(), "as in torch"


def step_and_go_on(engine: Engine) -> None:
    engine.step()
    accumulate(engine)


# What comes between clipping and the step: whether gradients stay after it, how many products it costs.
BETWEEN: dict[Callable[[Engine], None], tuple[bool, int]] = {
    accumulate: (False, 1),
    clip_again: (False, 1),
    clip_values: (False, 1),
    infinite_norm: (False, 1),
    read: (False, 1),
    write: (False, 1),
    by_hand: (False, 1),
    replace_one: (False, 1),
    split: (False, 1),
    zero_in_place: (False, 1),
    skip: (True, 0),
    clear_one_by_one: (False, 0),
    step_twice: (True, 1),
    step_and_go_on: (True, 1),
}


@pytest.mark.parametrize("between", BETWEEN, ids=lambda between: between.__name__)
def test_it_is_settled_once_before_somebody_looks(counts, monkeypatch, between):
    keep, products = BETWEEN[between]
    found = []
    for owes in (True, False):
        if not owes:
            at_once(monkeypatch)
        engine = engine_on(keep_gradients=keep)
        engine.backward(loss_of(engine.model, 0))
        counts.take()
        engine.clip_grad_norm(CLIP)
        between(engine)
        if owes:
            assert counts.products == products
        engine.step()
        after = gradients(engine) if keep else torch.zeros(0)
        engine.bindings[0].optimizer.zero_grad()
        accumulate(engine)
        assert gradients(engine).norm() > CLIP, "the factor is not owed to the next ones"
        engine.step()
        found.append((masters(engine), after))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_factor_of_one_changes_nothing(counts):
    found = []
    for clips in (True, False):
        engine = engine_on()
        engine.backward(loss_of(engine.model, 0))
        if clips:
            engine.clip_grad_norm(1e6)
        engine.step()
        found.append(masters(engine))
    assert torch.equal(*found)


def test_gradients_that_stay_are_forgotten_with_zero_grad(counts):
    """As in a loop of Fabric's: they are never written to."""
    engine = engine_on(keep_gradients=True)
    for number in range(2):
        loss = loss_of(engine.model, number)
        engine.bindings[0].optimizer.zero_grad()
        engine.backward(loss)
        engine.clip_grad_norm(CLIP)
        engine.step()
    assert counts.take() == (2, 0, 0, 0)


def two(net: nn.Module) -> list[torch.optim.Optimizer]:
    return [optim.AdamW(net[0].parameters(), lr=1e-2), optim.SGD(net[1].parameters(), lr=0.1)]


def test_each_optimizer_has_its_own(counts, monkeypatch):
    found = []
    for owes in (True, False):
        if not owes:
            at_once(monkeypatch)
        engine = engine_on(two)
        first, second = (binding.optimizer for binding in engine.bindings)
        engine.backward(loss_of(engine.model, 0))
        counts.take()
        engine.clip_grad_norm(CLIP, optimizer=first)
        second.step()
        engine.clip_grad_norm(CLIP / 2)  # of the other only: the gradients of this one are gone
        first.step()
        assert counts.take() == (2, 0, 1 if owes else 2, 0)
        engine.backward(loss_of(engine.model, 1))
        engine.clip_grad_norm(CLIP)
        engine.step()
        found.append(masters(engine))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "make",
    [
        partial(adamw, fused="none"),
        lambda net: torch.optim.AdamW(groups(net), lr=1e-2),
        lambda net: optim.LAMB(net.parameters(), lr=1e-2),
        lambda net: optim.Muon(net.parameters(), lr=1e-2),
    ],
    ids=["none", "torch", "LAMB", "Muon"],
)
def test_others_are_multiplied_at_once(counts, make):
    engine = engine_on(make)
    engine.backward(loss_of(engine.model, 0))
    engine.clip_grad_norm(CLIP)
    assert counts.products == 1
    assert gradients(engine).norm().item() == pytest.approx(CLIP, rel=1e-3)
    engine.step()
    assert counts.products == 1


def test_without_kernels_nothing_is_owed():
    engine = engine_on()
    engine.backward(loss_of(engine.model, 0))
    engine.clip_grad_norm(CLIP)
    assert not engine.bindings[0].owed
    assert gradients(engine).norm().item() == pytest.approx(CLIP, rel=1e-3)


def test_a_step_that_torch_has_to_take_settles_first(counts):
    """Somebody has put gradients in another dtype in their place, which no kernel knows."""
    engine = engine_on(lambda net: optim.SGD(net.parameters(), lr=1.0))
    engine.backward(loss_of(engine.model, 0))
    before, whole = masters(engine), gradients(engine).norm()
    engine.clip_grad_norm(CLIP)
    engine.bindings[0].optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(2, dtype=torch.float64)))
    engine.bindings[0].optimizer.param_groups[0]["params"][-1].grad = torch.ones(2, dtype=torch.float64)
    engine.step()
    assert counts.take()[:3] == (0, 0, 1)
    assert (before - masters(engine)).norm().item() == pytest.approx(CLIP, rel=1e-3) and whole > 2 * CLIP


def clipped_too_early() -> list[str]:
    """Clip micro-batches that wait for the last one to be summed over the ranks; return what is said."""
    said = []
    with interpreting(), pytest.MonkeyPatch.context() as patch:
        for owes in (True, False):
            if not owes:
                at_once(patch)
            engine = engine_on(stage="stage1")
            with pytest.raises(LitZeroError) as caught:
                with engine.no_reduce():
                    engine.backward(loss_of(engine.model, 0))
                engine.clip_grad_norm(CLIP)
                engine.backward(loss_of(engine.model, 1))
            said.append(str(caught.value))
            engine.exchange.close()
    return said


def test_clipping_too_early_is_refused_as_ever(ranks):
    pytest.importorskip("triton", reason="triton has no build for this system")
    for owed, at_once in ranks(2).run(clipped_too_early):
        assert owed == at_once


# ---- small state


def small_state(**settings: Any) -> dict[str, Any]:
    policy = Precision(**settings)
    return {"lowering": Lowering(policy, None), "keeping": Small(policy, torch.device("cpu"))}


@pytest.mark.parametrize("keep", [False, True])
def test_a_step_on_small_forms_pays(counts, monkeypatch, keep):
    """But for the first, which is taken in portions."""
    found = []
    for owes in (True, False):
        if not owes:
            at_once(monkeypatch)
        engine = engine_on(**small_state(moments="int8"), keep_gradients=keep)
        counts.take()
        after = []
        for number in range(3):
            engine.bindings[0].optimizer.zero_grad()
            engine.backward(loss_of(engine.model, number))
            engine.clip_grad_norm(CLIP)
            engine.step()
        assert counts.products == (1 if owes else 3)
        if keep:
            after = [gradients(engine).norm().item()]
            assert after == [pytest.approx(CLIP, rel=1e-3)]
            engine.step()
        found.append((masters(engine), after))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_a_step_that_small_forms_do_not_know_settles_first(counts, monkeypatch):
    found = []
    for owes in (True, False):
        if not owes:
            at_once(monkeypatch)
        engine = engine_on(partial(adamw, amsgrad=True), **small_state(moments="int8"))
        train(engine)
        found.append(masters(engine))
    assert counts.products == 4
    assert torch.equal(*found)


# ---- with a loss scaler


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
