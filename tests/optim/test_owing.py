"""What gradients are multiplied by waits for the step that reads them anyway; whoever looks before sees it done."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lit_zero import optim
from lit_zero.core.errors import LitZeroError
from lit_zero.precision import Lowering, Precision
from lit_zero.precision.small import Small
from lit_zero.zero.access import Access
from lit_zero.zero.engine import Engine
from tests.kernels.conftest import interpreting
from tests.optim.beside import PlainLion, groups, model
from tests.optim.owed import (
    CLIP,
    accumulate,
    adamw,
    at_once,
    by_hand,
    clip_values,
    engine_on,
    gradients,
    infinite_norm,
    loss_of,
    masters,
    read,
)

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


def write(engine: Engine) -> None:
    Access(engine).set_gradient("0.weight", torch.ones(9, 7))


def split(engine: Engine) -> None:
    engine.bindings[0].split()


def clip_again(engine: Engine) -> None:
    assert engine.clip_grad_norm(CLIP / 2).item() == pytest.approx(CLIP, rel=1e-3)


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


@pytest.mark.parametrize(
    "make", [partial(adamw, fused="none"), lambda net: torch.optim.AdamW(groups(net), lr=1e-2)], ids=["none", "torch"]
)
def test_torchs_classes_step_what_they_know(make):
    """They take many parameters at once only if these are of torch's own class."""
    for segment in engine_on(make).bindings[0].segments:
        assert type(segment.param) is nn.Parameter


@pytest.mark.parametrize("after", ["step", "read"])
def test_writing_through_an_old_gradient_is_refused(counts, after):
    engine = engine_on()
    engine.backward(loss_of(engine.model, 0))
    param = engine.bindings[0].segments[0].param
    grad = param.grad
    assert grad is not None
    engine.clip_grad_norm(CLIP)
    grad.clamp_(-1e-3, 1e-3)
    with pytest.raises(LitZeroError, match="Take param.grad anew after clipping"):
        engine.step() if after == "step" else param.grad


def test_what_is_saved_is_a_plain_parameter(counts):
    engine = engine_on()
    engine.backward(loss_of(engine.model, 0))
    engine.clip_grad_norm(CLIP)
    file = io.BytesIO()
    torch.save(engine.bindings[0].segments[0].param, file)
    file.seek(0)
    loaded = torch.load(file)
    assert type(loaded) is nn.Parameter and "owed" not in vars(loaded)
    assert torch.equal(loaded, engine.bindings[0].segments[0].param)


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
    for owed, multiplied in ranks(2).run(clipped_too_early):
        assert owed == multiplied


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
