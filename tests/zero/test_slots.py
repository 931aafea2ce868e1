"""Units that take turns in a slot: where a backward is among them, however tensors go from one to another."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_zero.zero import Zero
from tests.pool import RankFailure
from tests.zero.harness import GPT, Run, distance, momentum, one_process, tokens, with_engine

STEPS = 3


class Part(nn.Module):
    """A residual block; what comes from outside goes through a frozen layer, and one layer is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.key, self.spare = (nn.Linear(12, 12) for _ in range(4))
        self.down.requires_grad_(False)

    def forward(self, x: torch.Tensor, context: torch.Tensor | float = 0.0) -> Any:
        return x + self.down(torch.tanh(self.up(x) + context))


class Model(nn.Module):
    """Five blocks between an embedding and a head."""

    part: type[nn.Module] = Part

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(31, 12), nn.Linear(12, 31)
        self.blocks = nn.ModuleList(self.part() for _ in range(5))
        self.context = nn.Parameter(torch.randn(8, 12))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(self.embedding(tokens)))

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        context = torch.sin(x)
        for block in self.blocks:
            x = block(x, context)
        return x

    loss = GPT.loss


class Leaf(Model):
    """All blocks read one parameter of the root."""

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, self.context)
        return x


class Passing(Part):
    """Hands the context on; whoever finds none makes it, as the first block of a T5 does."""

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> Any:  # type: ignore[override]
        context = self.key(x) if context is None else context
        return super().forward(x, context), context


class PassedThrough(Model):
    part = Passing

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        context = None
        for block in self.blocks:
            x, context = block(x, context)
        return x


class Writing(Part):
    """Changes a dictionary and returns nothing."""

    def forward(self, state: dict[str, Any]) -> None:  # type: ignore[override]
        state["x"] = super().forward(state["x"], state["context"])


class ThroughADictionary(Model):
    part = Writing

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        state = {"x": x, "context": torch.sin(x)}
        for block in self.blocks:
            block(state)
        return state["x"]


class InPlace(Part):
    """Changes its input and returns nothing."""

    def forward(self, x: torch.Tensor) -> None:  # type: ignore[override]
        x += super().forward(x.clone())


class ChangedInPlace(Model):
    part = InPlace

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            block(x)
        return x


class Viewing(Part):
    """Returns a view of what it has made."""

    def forward(self, x: torch.Tensor, context: Any = 0.0) -> torch.Tensor:
        return super().forward(x, context).flatten(0, 1).view(x.shape)


class ChangedByTheCaller(Model):
    """Whoever calls a block changes in place what it returned."""

    part = Viewing

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
            x += 0.1
            x[:, :1] *= 0.9
        return x


class Parallel(Model):
    """All blocks read data that has no gradient, and two blocks each read what one made."""

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        first, data = self.blocks[0](x.detach()), x.detach()
        return x + first + sum(block(data, first) for block in self.blocks[1:])


class Captured(Model):
    """Frozen blocks without a gradient to their inputs read a tensor that was left on them."""

    class part(Part):
        def __init__(self) -> None:
            super().__init__()
            self.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x, self.note)

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            block.note = torch.sin(self.context)
        made = [block(x.detach()) for block in self.blocks]
        for block in self.blocks:
            del block.note
        return x + sum(made)


class Twins(Model):
    """Two inputs go through the same blocks, one after the other, before anything is made of them."""

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        one, other = super().trunk(x), super().trunk(x.flip(1) * 0.5)
        return one * other


class Several(Part):
    """Returns what one half of it made and what the other made of that, in a list."""

    def forward(self, x: torch.Tensor, context: Any = 0.0) -> list[torch.Tensor]:  # type: ignore[override]
        early = torch.tanh(self.key(x))
        return [super().forward(early, context), early]


class EarlyAndLate(Model):
    """One output of every block is read by the next, the other by the head."""

    part = Several

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        kept, early = [], torch.zeros(())
        for block in self.blocks:
            kept.append(x)
            x, early = block(x, early)
        return x + sum(kept)


class Recomputed(Model):
    """Blocks without a checkpoint, with a reentrant one and with the other kind follow one another."""

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        context = torch.sin(x)
        for number, block in enumerate(self.blocks):
            run = partial(checkpoint, block, use_reentrant=number % 3 == 1) if number % 3 else block
            x = run(x, context)
        return x


class RecomputedInside(Model):
    """A block recomputes a part of itself in a backward of its own."""

    class part(Part):
        def forward(self, x: torch.Tensor, context: Any = 0.0) -> torch.Tensor:
            return super().forward(checkpoint(self.inner, x, use_reentrant=True), context)

        def inner(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.down(torch.tanh(self.key(x))))


MODELS = [
    Model,
    Leaf,
    PassedThrough,
    ThroughADictionary,
    ChangedInPlace,
    ChangedByTheCaller,
    Parallel,
    Captured,
    Twins,
    EarlyAndLate,
    Recomputed,
    RecomputedInside,
]
ZEROS = {
    "none": Zero("none"),
    "stage2": Zero("stage2"),
    "1 slot": Zero("stage3", slots=1, poison=True),
    "2 slots": Zero("stage3", slots=2, poison=True),
}


def every_zero(run: Run) -> dict[str, Any]:
    return {name: with_engine(run, zero) for name, zero in ZEROS.items()}


def run_of(model: type[nn.Module], **options: Any) -> Run:
    return Run(model=model, loss=Model.loss, optimizer=momentum, steps=STEPS, **options)


@pytest.mark.thorough("2", "-3")
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_whatever_goes_between_units_they_take_turns(ranks, model):
    run = run_of(model)
    expected = one_process(run)
    for outcomes in ranks(2).run(every_zero, run):
        for name, outcome in outcomes.items():
            assert distance(outcome, expected) < 1e-9, name
            assert torch.equal(outcome.flat(), outcomes["none"].flat()), name


# ---- what stays on tensors that live on


def left_on_leaves() -> list[int]:
    found = []
    for zero in ZEROS.values():

        def look(engine: Any) -> int:
            context = engine.model.context
            return len(context._backward_hooks or {}) + len(context._post_accumulate_grad_hooks or {})

        found.append(with_engine(run_of(Leaf), zero, look=look).notes["look"])
    return found


def test_a_parameter_that_units_read_carries_nothing_but_its_landing(ranks):
    for found in ranks(2).run(left_on_leaves):
        assert found == [1] * len(ZEROS)


class Returning(Part):
    """Returns its own weight beside its result."""

    def forward(self, x: torch.Tensor, context: Any = 0.0) -> Any:
        return super().forward(x, context), self.key.weight.t()


class Escaping(Model):
    """A weight leaves its block, and with it the time in which it may be read."""

    part = Returning

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        weights = []
        for block in self.blocks:
            x, weight = block(x)
            weights.append(weight)
        return x @ sum(weights)


def test_a_unit_that_returns_its_parameter_is_refused_where_others_take_its_place(ranks):
    with pytest.raises(
        RankFailure,
        match=r"'blocks.0' returns its parameter 'blocks.0.key.weight' or a view of it.*Return a copy \(\.clone\(\)\)",
    ):
        ranks(2).run(with_engine, run_of(Escaping), Zero("stage3"))
    expected = one_process(run_of(Escaping))
    for outcome in ranks(2).run(with_engine, run_of(Escaping), Zero("stage2")):
        assert distance(outcome, expected) < 1e-9


# ---- gradients of gradients


def penalty(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """The loss, and the squared slope of every row's output at its input."""
    loss = model.loss(batch)
    x = model.embedding(batch[:, :-1]).detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.trunk(x).square().sum(), x, create_graph=True)
    return loss + 1e-2 * slope.square().sum() / len(batch)


def with_penalty(run: Run) -> dict[str, Any]:
    zeros = {
        "none": Zero("none"),
        "stage1": Zero("stage1"),
        "stage2": Zero("stage2"),
        "stage3": Zero("stage3", slots=5),
        "poison": Zero("stage3", slots=9, poison=True),
    }
    return {name: with_engine(run, zero) for name, zero in zeros.items()}


def test_gradients_may_be_differentiated_where_every_unit_keeps_its_slot(ranks):
    run = Run(model=Model, loss=penalty, optimizer=momentum, steps=STEPS)
    expected = one_process(run)
    without = one_process(run_of(Model))
    assert distance(expected, without) > 1e-3, "the penalty shows"
    for outcomes in ranks(2).run(with_penalty, run):
        for name, outcome in outcomes.items():
            assert distance(outcome, expected) < 1e-9, name
            assert torch.equal(outcome.flat(), outcomes["none"].flat()), name


def test_differentiating_gradients_of_units_that_take_turns_is_refused(ranks):
    run = Run(model=Model, loss=penalty, optimizer=momentum, steps=1)
    with pytest.raises(
        RankFailure,
        match=r"create_graph=True goes through 'blocks.4'.*Set zero.slots=5 .*or use zero.stage='stage2'",
    ):
        ranks(2).run(with_engine, run, Zero("stage3"))


# ---- one graph, several backwards


def backwards(kind: str, zero: Zero | None) -> torch.Tensor:
    """Train with more than a plain backward per step, under an engine or (``None``) in one process."""
    from lit_zero.comm import Comm
    from lit_zero.comm.open import open_exchange
    from lit_zero.zero.engine import Engine

    torch.manual_seed(0)
    model = Model().double()
    optimizer = momentum(model)
    engine, rows = None, slice(None)
    if zero is not None:
        exchange = open_exchange(Comm(), torch.device("cpu"))
        engine = Engine(model, [optimizer], zero=zero, exchange=exchange)
        rows = slice(exchange.rank * 4, exchange.rank * 4 + 4)
    for step in range(STEPS):
        loss = model.loss(tokens(step, rows))
        for number in range(2):
            if engine is not None:
                engine.begin_backward()
            loss.backward(retain_graph=kind == "twice" and number == 0, create_graph=kind == "with a graph")
            if engine is not None:
                engine.end_backward()
            if kind != "twice":
                break
        optimizer.step()
        optimizer.zero_grad()
    if engine is not None:
        engine.detach()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def backwards_everywhere(kind: str) -> dict[str, torch.Tensor]:
    zeros = {"stage3": Zero("stage3", slots=5)} if kind == "with a graph" else ZEROS
    return {name: backwards(kind, zero) for name, zero in {**zeros, "stage1": Zero("stage1")}.items()}


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@pytest.mark.parametrize("kind", ["twice", "with a graph"])
def test_a_graph_may_be_gone_through_twice_or_make_a_graph(ranks, kind):
    expected = backwards(kind, None)
    for found in ranks(2).run(backwards_everywhere, kind):
        for name, weights in found.items():
            torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12, msg=name)
