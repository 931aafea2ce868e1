"""What the dry run finds out, that it leaves no trace, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import random
from functools import partial

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lit_zero.core.errors import ConfigError, UnsupportedError
from lit_zero.pipeline.plan import plan_split
from lit_zero.pipeline.recording import record
from tests.pipeline import models
from tests.pipeline.harness import check, divide
from tests.pipeline.models import DIM, VOCAB, Deep, Layer, on_tokens
from tests.pipeline.test_splitting import batches


def recorded(model, **options):
    return record(model, lambda: on_tokens(model, batches()[0]), **options)


class Keeping(pl.LightningModule):
    """Does everything in its step that could leave a trace."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(nn.Sequential(Layer(), nn.BatchNorm1d(DIM)) for _ in range(3))
        self.head = nn.Linear(DIM, VOCAB)
        self.accuracy, self.mean = MulticlassAccuracy(VOCAB), MeanMetric()
        self.aside = [MeanMetric()]
        self.register_buffer("steps", torch.zeros(()))
        self.seen, self.average, self.calls = [], torch.zeros(DIM), 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        self.steps += 1
        x = self.embedding(batch).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        self.average.mul_(0.9).add_(x.detach().mean(0))
        logits = self.head(x)
        loss = F.cross_entropy(logits, batch.flatten())
        if not torch.isfinite(loss) or torch.isnan(logits).any() or not torch.isfinite(logits).all():
            raise AssertionError("a dry run must not look broken")
        self.accuracy(logits, batch.flatten())
        self.mean(loss)
        self.aside[0].update(loss)
        self.seen.append(loss.item())
        self.log("loss", loss)
        self.log_dict({"noise": torch.rand(()), "python": random.random(), "numpy": np.random.rand()})
        return {"loss": loss, "logits": logits.detach()}


def trace(module):
    """Return everything that a step of ``Keeping`` changes."""
    state = {name: value.clone() for name, value in module.state_dict().items()}
    metrics = [module.accuracy, module.mean, module.aside[0]]
    counts = [metric._update_count for metric in metrics]
    values = [value.clone() for metric in metrics for value in metric.metric_state.values()]
    return state, counts, values, list(module.seen), module.average.clone(), module.calls, module.steps.clone()


def test_a_dry_run_leaves_no_trace():
    torch.manual_seed(0)
    module = Keeping()
    objects = {name: id(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    attributes = {name: set(vars(each)) for name, each in module.named_modules()}
    before = trace(module)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = record(module, lambda: module.training_step(batches()[0], 0))
    torch.testing.assert_close(trace(module), before, rtol=0, atol=0)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()
    assert objects == {name: id(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    assert attributes == {name: set(vars(each)) for name, each in module.named_modules()}
    assert all(param.grad is None for param in module.parameters())
    assert found.logged == (("loss", 2), ("noise", 2)), "a number drawn after a block's dropout is the last stage's"
    assert dict(found.returned) == {"['loss']": 2, "['logits']": 2}
    buffers = {buffer.name: buffer for buffer in found.buffers}
    assert buffers["blocks.1.1.running_mean"].written == (1,)
    assert buffers["blocks.1.1.num_batches_tracked"].written == (1,)
    assert buffers["steps"].written == ()  # every stage counts by itself
    plan = plan_split(found, [1, 2])
    assert "blocks.1.1.running_mean" in plan.stages[1].buffers


def test_a_failed_dry_run_leaves_no_trace():
    model = Deep()
    weight = model.head.weight

    def call():
        on_tokens(model, batches()[0])
        raise KeyError("of the user")

    with pytest.raises(KeyError):
        record(model, call)
    assert model.head.weight is weight and "forward" not in vars(model.trunk.inner["stack"][0])
    assert on_tokens(model, batches()[0]).isfinite()


def test_parameters_belong_where_they_are_used():
    found = recorded(Deep())
    regions = {p.name: p.regions for p in found.parameters}
    assert regions["head.weight"] == (3,) and regions["embedding.weight"] == (0,) and regions["position"] == (0,)
    assert regions["trunk.inner.stack.2.linear.weight"] == (2,)
    assert regions["unused.weight"] == (0,), "that of the parameter registered before it"
    assert {p.name for p in found.parameters if not p.used} == {"unused.weight", "unused.bias"}
    assert {p.name: p.regions for p in recorded(models.Untied()).parameters}["embedding.weight"] == (0, 3)
    assert [block.activation_bytes > 0 and block.flops > 0 for block in found.blocks] == [True] * 4
    assert found.blocks[1].flops == 2 * 24 * DIM * DIM
    assert len({block.signature for block in found.blocks}) == 1


def test_what_the_batch_gives_is_not_sent():
    assert [len(block.slots) for block in recorded(models.Encoder()).blocks] == [1] * 4
    pairs = recorded(models.Pairs())
    assert [slot.paths for slot in pairs.blocks[2].slots] == [("args[0][0]",), ("args[0][1]",)]
    assert [slot.written for slot in recorded(models.InPlace()).blocks[1].slots] == [True]


def test_lists_that_run_one_after_the_other():
    found = recorded(models.Conditioned())
    assert [b.name for b in found.blocks] == [f"encoder.{i}" for i in range(2)] + [f"decoder.{i}" for i in range(3)]
    assert found.allowed() == (1, 2, 3, 4)
    named = recorded(models.Conditioned(), blocks="decoder")
    assert [b.name for b in named.blocks] == ["decoder.0", "decoder.1", "decoder.2"]
    with pytest.raises(UnsupportedError, match="'encoder.0' runs out of order: 'decoder.0' was expected"):
        recorded(models.Conditioned(), blocks=["decoder", "encoder"])


def test_blocks_of_a_sequential():
    found = recorded(models.sequential())
    assert [block.name for block in found.blocks] == ["1", "2", "3", "4"]


def test_a_skip_connection_is_named():
    found = recorded(models.Skipping())
    assert found.allowed() == ()
    with pytest.raises(
        UnsupportedError, match="'add' in Skipping uses what 'embedding' in embedding has made"
    ) as error:
        plan_split(found, [2])
    assert "pipeline.boundaries; possible: none" in str(error.value) and "pipeline.blocks" in str(error.value)


def test_a_list_that_is_not_there():
    with pytest.raises(
        ConfigError, match="pipeline.blocks='trunk.stack' is not the path of a ModuleList or Sequential"
    ):
        recorded(Deep(), blocks="trunk.stack")
    with pytest.raises(ConfigError, match="Did you mean 'trunk.inner.stack'"):
        recorded(Deep(), blocks="trunk.stack")
    with pytest.raises(UnsupportedError, match="no ModuleList or Sequential that repeats .* pipeline.blocks"):
        record(nn.Linear(2, 2), lambda: None)


class Twice(Deep):
    def forward(self, tokens):
        return super().forward(tokens) + super().forward(tokens)


class Backwards(Deep):
    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in reversed(self.trunk.inner["stack"]):
            x = layer(x)
        return self.head(x)


class Partly(Deep):
    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.trunk.inner["stack"][:2]:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Twice, "'trunk.inner.stack.0' is called twice in one step.*Call the model once.*pipeline.blocks"),
        (Backwards, "'trunk.inner.stack.3' runs out of order: 'trunk.inner.stack.0' was expected.*pipeline.blocks"),
        (Partly, "'trunk.inner.stack.2' did not run in the step.*pipeline.blocks"),
    ],
)
def test_orders_that_are_refused(build, message):
    with pytest.raises(UnsupportedError, match=message):
        recorded(build())


class Speech(Deep):
    """A module with parameters makes lengths from the batch, and the loss uses them: no stand-in may answer for it."""

    def __init__(self):
        super().__init__()
        self.front = Front()

    def forward(self, tokens):
        x, real = self.front(tokens)
        if bool(real.all()):  # code that branches on what the batch gives
            x = x * 2
        for layer in self.trunk.inner["stack"]:
            x = layer(x)
        return self.head(x) * real[..., None]


class Front(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)

    def forward(self, tokens):
        return self.embedding(tokens), tokens > 2


class Late(Deep):
    """A random number from the batch alone, drawn after a dropout that other stages do not run."""

    def __init__(self):
        super().__init__()
        self.front = models.Frontend()
        self.blocks = nn.ModuleList(Masked() for _ in range(4))
        del self.trunk

    def forward(self, tokens):
        x = self.front(tokens)
        mask = torch.rand(tokens.shape)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


class Masked(Layer):
    def forward(self, x, mask):
        return super().forward(x) * mask[..., None]


class Lengths(Deep):
    """Shapes that depend on the batch's values, and a parameter handed to the blocks."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(DIM))
        self.blocks = nn.ModuleList(Scaled() for _ in range(4))
        del self.trunk

    def forward(self, tokens):
        x = self.embedding(tokens)[tokens > 2]
        for block in self.blocks:
            x = block(x, self.scale)
        full = torch.zeros(*tokens.shape, VOCAB)
        full[tokens > 2] = self.head(x)
        return full


class Scaled(Layer):
    def forward(self, x, scale):
        return super().forward(x) * scale


@pytest.mark.parametrize("build", [Speech, Late, Lengths])
def test_what_the_batch_decides(build):
    torch.manual_seed(0)
    divided = check(build(), on_tokens, batches()[:2] if build is Lengths else batches(), 3)
    last = divided.plan.stages[-1]
    if build is Speech:
        assert last.ghosts == ("front.embedding",)
    if build is Late:
        assert [slot.paths for slot in last.receives] == [("args[0]",), ("args[1]",)]
        assert [slot.requires_grad for slot in last.receives] == [True, False]
    if build is Lengths:
        assert divided.plan.tied["scale"] == (0, 1, 2)
        assert divided.plan.tied["unused.bias"] == (0, 1, 2), "what no operator used stays everywhere"


def test_steps_that_change_are_refused():
    torch.manual_seed(0)
    tokens = batches()[0]
    model = Deep()
    divided = divide(model, on_tokens, tokens, 2)
    first, last = divided.splits
    received = [torch.zeros(4, 6, DIM, requires_grad=True)]

    def twice():
        return on_tokens(last.model, tokens) + on_tokens(last.model, tokens)

    with pytest.raises(UnsupportedError, match="Module 'embedding' runs after block .* called twice in one step"):
        last.run(1, twice, lambda: received)
    with pytest.raises(UnsupportedError, match="Block 'trunk.inner.stack.0' is called twice in one step"):
        last.run(
            1,
            lambda: [on_tokens(last.model, tokens), last.model.trunk.inner["stack"][0](received[0])],
            lambda: received,
        )
    with pytest.raises(UnsupportedError, match="ended on stage 0 without reaching block 'trunk.inner.stack"):
        first.run(0, lambda: None)
    with pytest.raises(UnsupportedError, match="did not run in this step although it did when .* recorded"):
        last.run(1, lambda: None, lambda: received)
    with pytest.raises(
        ConfigError, match="Stage 1 was given 0 tensors, but it begins with 1: args.0. .4, 6, 8. float32"
    ):
        last.run(1, lambda: on_tokens(last.model, tokens))
    with pytest.raises(ConfigError, match=r"Stage 1 received \[3, 6, 8\] .* its own micro-batch gives \[4, 6, 8\]"):
        last.run(1, lambda: on_tokens(last.model, tokens), lambda: [torch.zeros(3, 6, DIM)])
    with pytest.raises(ConfigError, match="Stage 0 is not held here; local are .1."):
        last.run(0, lambda: None)
    with pytest.raises(UnsupportedError, match="is on another stage and was called outside a step"):
        on_tokens(first.model, tokens)
    stack = first.model.trunk.inner["stack"]
    with pytest.raises(UnsupportedError, match="'trunk.inner.stack.0' did not run in this step"):
        first.run(0, lambda: stack[1](torch.zeros(4, 6, DIM)))
    with pytest.raises(UnsupportedError, match="had a tensor at args.0. .* now has NoneType; its arguments: kwargs"):
        end = divided.plan.stages[0].end
        x = torch.zeros(4, 6, DIM)
        first.run(0, lambda: [*(layer(x) for layer in stack[:end]), stack[end](x=x)])


def test_a_stage_waits_for_what_it_receives_no_sooner_than_at_its_first_block():
    torch.manual_seed(0)
    tokens = batches()[0]
    divided = divide(Deep(), on_tokens, tokens, 2)
    last, seen = divided.splits[1], []

    def receive():
        seen.append("received")
        return [torch.zeros(4, 6, DIM, requires_grad=True)]

    def step():
        seen.append("begun")
        out = on_tokens(last.model, tokens)
        seen.append("ended")
        return out

    last.run(1, step, receive, lambda: seen.append("entered"))
    assert seen == ["begun", "received", "entered", "ended"]
    with pytest.raises(OSError, match="gone"):
        last.run(1, step, partial(_raise, OSError("gone")))

    def careless():
        with contextlib.suppress(OSError):  # such as one that leaves a batch out
            return on_tokens(last.model, tokens)

    with pytest.raises(OSError, match="gone"):
        last.run(1, careless, partial(_raise, OSError("gone")))
    assert not last.running


def _raise(error):
    raise error


def test_an_error_of_the_user_comes_through():
    """And the next step runs as if nothing had been."""
    torch.manual_seed(0)
    divided = divide(Deep(), on_tokens, batches()[0], 2)
    first = divided.splits[0]

    def broken():
        first.model.trunk.inner["stack"][0](first.model.embedding(batches()[0]))
        raise KeyError("of the user")

    with pytest.raises(KeyError):
        first.run(0, broken)
    assert first.run(0, lambda: on_tokens(first.model, batches()[0])).tensors[0].isfinite().all()


def test_a_copy_can_be_recorded_too():
    """Recording does not hang on the model: an equal model gives an equal recording."""
    torch.manual_seed(0)
    model = models.Conditioned()
    assert recorded(model) == recorded(copy.deepcopy(model))


def test_a_module_that_has_yet_to_move_to_its_device():
    """Lightning moves the batch first: parameters and buffers are taken to be there already."""
    model, seen = Deep(), []
    model.register_buffer("scale", torch.ones(()))

    def call():
        seen.extend((model.position.device, model.scale.device))

    with pytest.raises(UnsupportedError, match="did not run"):
        record(model, call, device=torch.device("meta"))
    assert {device.type for device in seen} == {"meta"}
    assert model.position.device.type == model.scale.device.type == "cpu"
