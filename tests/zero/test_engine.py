"""The engine's life: deferred initialisation, evaluation, errors on the way, detaching, a second engine."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.core.errors import LitZeroError
from lit_zero.precision import Lowering
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine
from tests.zero.harness import BATCH, GPT, Run, adamw, momentum, tokens

STAGES = ("none", "stage1", "stage2", "stage3")
CPU = torch.device("cpu")


def engine_on(
    model: nn.Module, *optimizers: torch.optim.Optimizer, stage: str, lowering: Lowering | None = None, **options: Any
) -> Engine:
    exchange = open_exchange(Comm(), CPU)
    return Engine(model, optimizers, zero=Zero(stage), exchange=exchange, lowering=lowering, **options)


def mine(number: int, engine: Engine) -> torch.Tensor:
    """Return this rank's rows of a whole batch."""
    share = BATCH // engine.exchange.size
    return tokens(number, slice(engine.exchange.rank * share, (engine.exchange.rank + 1) * share))


def train(engine: Engine, model: GPT, numbers: range) -> None:
    for number in numbers:
        engine.backward(model.loss(mine(number, engine)))
        engine.step()


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- deferred initialisation


class Small(GPT):
    """Three blocks; drawn in the order of registration."""


def deferred() -> dict[str, Any]:
    run, found = Run(model=Small, steps=3), {}
    for stage in STAGES:
        torch.manual_seed(0)
        with torch.device("meta"):
            model = Small().double()
        optimizer = adamw(model)
        engine = engine_on(model, optimizer, stage=stage)
        for number in range(run.steps):
            engine.backward(model.loss(mine(number, engine)))
            engine.step()
        engine.detach()
        found[stage] = flat(model)
    return found


def test_deferred_initialisation_trains_as_an_eager_build(ranks):
    # A model that is cast to fp64 while it has no memory is drawn in fp64.
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        model = Small()
    finally:
        torch.set_default_dtype(torch.float32)
    optimizer = adamw(model)
    for number in range(3):
        model.loss(tokens(number)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in ranks(2).run(deferred):
        for stage in STAGES:
            torch.testing.assert_close(found[stage], flat(model), rtol=1e-9, atol=1e-12, msg=stage)


def deferred_memory() -> tuple[int, int]:
    """Return the most bytes that any one moment of the initialisation of stage 3 allocated, and those of the model."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(24)))
    live = []
    original = nn.Linear.reset_parameters

    def noting(self: nn.Linear) -> None:
        if not self.weight.is_meta:
            gc.collect()
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_alive()}
            live.append(sum(storages.values()))
        original(self)

    before = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_alive()}.values())
    nn.Linear.reset_parameters = noting  # type: ignore[method-assign]
    try:
        engine = engine_on(model, torch.optim.SGD(model.parameters(), lr=0.1), stage="stage3")
    finally:
        nn.Linear.reset_parameters = original  # type: ignore[method-assign]
    total = 4 * engine.parameter_count
    engine.exchange.close()
    return max(live) - before, total


def tensors_alive() -> list[torch.Tensor]:
    return [obj for obj in gc.get_objects() if isinstance(obj, torch.Tensor) and not obj.is_meta]


def test_no_rank_ever_holds_the_full_model(ranks):
    for most, total in ranks(4).run(deferred_memory):
        assert most < 0.25 * total * 1.02 + 3 * 4 * 128 * 128, "its shard, and the module at work"


# ---- evaluation


def evaluating(stage: str, inference: bool) -> tuple[float, float]:
    """Forwards without gradients before, between and after training steps; a buffer is made in inference mode."""
    torch.manual_seed(0)
    model = GPT(layers=5).double()
    model.register_buffer("counter", torch.zeros(3))
    reference = copy.deepcopy(model)
    optimizer, plain = momentum(model), momentum(reference)
    engine = engine_on(model, optimizer, stage=stage)
    worst = 0.0
    for number in range(4):
        for _ in range(2):
            with torch.inference_mode() if inference else torch.no_grad():
                worst = max(worst, (model(tokens(9)) - reference(tokens(9))).abs().max().item())
                model.counter = model.counter + 1
        engine.backward(model.loss(tokens(number)))
        engine.step()
        reference.loss(tokens(number)).backward()
        plain.step()
        plain.zero_grad()
    engine.detach()
    return worst, (flat(model) - flat(reference)).abs().max().item()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_between_steps_changes_nothing(ranks, stage, inference):
    for worst, apart in ranks(2).run(evaluating, stage, inference):
        assert worst < 1e-10 and apart < 1e-10


def only_evaluating(stage: str) -> tuple[bool, dict[str, int]]:
    torch.manual_seed(0)
    model = GPT(layers=4)
    expected = model(tokens(0)).detach()
    engine = engine_on(model, stage=stage, training=False)
    with torch.inference_mode():
        same = all(torch.equal(model(tokens(0)), expected) for _ in range(3))
    states = engine.model_state_bytes()
    engine.detach()
    return same, states


@pytest.mark.parametrize("stage", STAGES)
def test_without_training_there_are_no_gradients_and_no_state(ranks, stage):
    for same, states in ranks(2).run(only_evaluating, stage):
        assert same
        assert states["gradient"] == states["optimizer"] == 0


# ---- errors on the way


class Failing(GPT):
    """Raises where it is told to."""

    where = ""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for number, block in enumerate(self.blocks):
            inside = number == 1 and self.where == "inside a unit"
            with block.up.register_forward_pre_hook(fail) if inside else nullcontext():
                x = block(x)
            if number == 1 and self.where == "forward":
                raise ZeroDivisionError
            if number == 1 and self.where == "backward" and x.requires_grad:
                x.register_hook(fail)
        return self.head(self.norm(x))


def fail(*_: Any) -> None:
    raise ZeroDivisionError


def going_on(stage: str, where: str, when: int) -> float:
    torch.manual_seed(0)
    model = Failing(layers=5).double()
    reference = copy.deepcopy(model)
    optimizer, plain = momentum(model), momentum(reference)
    engine = engine_on(model, optimizer, stage=stage)
    for number in range(4):
        if number == when:
            model.where = where
            with pytest.raises(ZeroDivisionError):
                engine.backward(model.loss(tokens(9)))
            model.where = ""
            optimizer.zero_grad()
        engine.backward(model.loss(tokens(number)))
        engine.step()
        reference.loss(tokens(number)).backward()
        plain.step()
        plain.zero_grad()
    engine.detach()
    return (flat(model) - flat(reference)).abs().max().item()


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("where", ["forward", "inside a unit", "backward"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_that_fails_everywhere_can_be_left_out(ranks, stage, where, when):
    for apart in ranks(2).run(going_on, stage, where, when):
        assert apart < 1e-10


def sparse_gradient() -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Embedding(7, 3, sparse=True)
    engine = engine_on(model, torch.optim.SGD(model.parameters(), lr=0.1), stage="stage2")
    engine.backward(model(torch.tensor([1, engine.exchange.rank])).sum())
    engine.step()
    engine.detach()
    return model.weight.detach().clone()


def test_sparse_gradients_are_made_dense(ranks):
    torch.manual_seed(0)
    expected = nn.Embedding(7, 3).weight.detach().clone()
    expected[0] -= 0.1 * 0.5
    expected[1] -= 0.1 * 1.5
    for weight in ranks(2).run(sparse_gradient):
        torch.testing.assert_close(weight, expected)


def foreign_parameter() -> str:
    model = nn.Linear(2, 2)
    try:
        engine_on(model, torch.optim.SGD([nn.Parameter(torch.ones(3, 1))], lr=0.1), stage="stage2")
    except LitZeroError as error:
        return str(error)
    return ""


def test_optimizers_of_other_parameters_are_refused(ranks):
    for message in ranks(1).run(foreign_parameter):
        assert message == (
            "SGD holds a parameter of shape (3, 1) that is not a parameter of the module. Build optimizers from "
            "self.parameters() or self.named_parameters()."
        )


# ---- the end


def given_back(stage: str, low: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = GPT(layers=3)
    lowering = Lowering(dtype=torch.bfloat16 if low else None)
    engine = engine_on(model, momentum(model), stage=stage, lowering=lowering)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        loss = model.loss(mine(0, engine))
    engine.backward(loss)
    engine.step()
    masters = {piece.name: (piece.start, piece.data.clone()) for piece in engine.parameter_pieces()}
    engine.detach()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    twin = copy.deepcopy(model)
    twin.loss(tokens(1)).backward()
    return {
        "hooks": hooks + sum(bool(p._post_accumulate_grad_hooks) for p in model.parameters()),
        "of": Engine.of(model),
        "dtypes": {p.dtype for p in model.parameters()},
        "equal": all(
            torch.equal(p.detach().flatten()[masters[n][0] : masters[n][0] + masters[n][1].numel()], masters[n][1])
            for n, p in model.named_parameters()
        ),
        "grads": all(p.grad is not None and p.grad.isfinite().all() for p in twin.parameters()),
        "untouched": all(p.grad is None for p in model.parameters()),
        "weights": flat(model),
    }


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_detach_gives_back_an_ordinary_module(ranks, stage, low):
    outcomes = ranks(2).run(given_back, stage, low)
    for found in outcomes:
        assert (found["hooks"], found["of"], found["dtypes"]) == (0, None, {torch.float32})
        assert found["equal"] and found["grads"] and found["untouched"]
        assert torch.equal(found["weights"], outcomes[0]["weights"])


def one_after_another() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = GPT(layers=4).double()
    for stage in ("stage3", "none", "stage2", "stage3"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = engine_on(model, optimizer, stage=stage)
        assert Engine.of(model) is engine
        train(engine, model, range(2))
        engine.detach()
    torch.manual_seed(0)
    whole = GPT(layers=4).double()
    engine = engine_on(whole, torch.optim.SGD(whole.parameters(), lr=0.1), stage="stage1")
    for _ in range(4):
        train(engine, whole, range(2))
    engine.detach()
    return flat(model), flat(whole)


def test_engines_may_follow_one_another_on_one_module(ranks):
    for weights, expected in ranks(2).run(one_after_another):
        assert torch.equal(weights, expected)


def what_stays(stage: str) -> tuple[bool, bool]:
    model = GPT(layers=3)
    engine = engine_on(model, momentum(model), stage=stage)
    train(engine, model, range(2))
    engine.detach()
    seen = weakref.ref(engine), weakref.ref(model)
    del engine, model
    gc.collect()
    return seen[0]() is None, seen[1]() is None


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_stays_after_detaching(ranks, stage):
    assert ranks(2).run(what_stays, stage) == [(True, True)] * 2


class Note:
    """Lives as long as the graph that it was noted in."""


class Noting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, made: list[Any]) -> torch.Tensor:
        ctx.note = Note()
        made.append(weakref.ref(ctx.note))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return grad, None


class Noted(GPT):
    def __init__(self) -> None:
        super().__init__()
        self.made: list[Any] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(Noting.apply(x, self.made))
        return self.head(self.norm(x))


def survivors(stage: str) -> tuple[int, int]:
    """Return how much of a graph outlives its step, and how much one that had no backward, without the collector."""
    model = Noted()
    engine = engine_on(model, momentum(model), stage=stage)
    train(engine, model, range(1))
    gc.collect()
    gc.disable()
    try:
        model.made.clear()
        train(engine, model, range(1))
        after_step = sum(ref() is not None for ref in model.made)
        model.made.clear()
        model.loss(tokens(0))
        after_forward = sum(ref() is not None for ref in model.made)
    finally:
        gc.enable()
    engine.detach()
    return after_step, after_forward


@pytest.mark.parametrize("stage", STAGES)
def test_no_graph_outlives_its_step(ranks, stage):
    assert ranks(2).run(survivors, stage) == [(0, 0)] * 2
