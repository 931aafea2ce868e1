"""Stages under checkpointing, compilation, autocast, evaluation, several stages a process, and from the meta device."""

from __future__ import annotations

import copy
import gc
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_zero.comm.messages import Message
from lit_zero.pipeline.actions import BACKWARD, FORWARD, Compute
from lit_zero.pipeline.balance import balance
from lit_zero.pipeline.plan import plan_split
from lit_zero.pipeline.recording import record
from lit_zero.pipeline.runner import Runner
from lit_zero.pipeline.splitting import Split
from tests.pipeline import models
from tests.pipeline.harness import Stages, check, compare, divide, gradients, run
from tests.pipeline.models import Conditioned, Deep, on_tokens
from tests.pipeline.test_splitting import batches


class Checkpointed(Deep):
    """Every block is recomputed in the backward, with its dropout."""

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.trunk.inner["stack"]:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(x)


class CheckpointedPair(Conditioned):
    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.encoder:
            x = checkpoint(layer, x, use_reentrant=False)
        memory, y = x * 2, self.embedding(tokens.flip(1))
        for layer in self.decoder:
            y = checkpoint(layer, y, memory=memory, use_reentrant=False)
        return self.head(y)


class Segments(Deep):
    """Two blocks are recomputed together."""

    def forward(self, tokens):
        x = self.embedding(tokens)
        stack = self.trunk.inner["stack"]
        for start in (0, 2):
            x = checkpoint(lambda x, start=start: stack[start + 1](stack[start](x)), x, use_reentrant=False)
        return self.head(x)


class Reentrant(Deep):
    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.trunk.inner["stack"]:
            x = checkpoint(layer, x, use_reentrant=True)
        return self.head(x)


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("build", [Checkpointed, CheckpointedPair, Segments])
def test_blocks_that_are_recomputed(build, stages):
    torch.manual_seed(0)
    check(build(), on_tokens, batches(), stages)


def test_reentrant_checkpoints_are_refused():
    with pytest.raises(ValueError, match="reentrant checkpoint.*use_reentrant=False"):
        divide(Reentrant(), on_tokens, batches()[0], 2)


def test_gradient_checkpointing_of_transformers():
    pytest.importorskip("transformers", reason="pip install lit-zero[models]")
    from tests.models.test_transformers import llama

    torch.manual_seed(0)
    model = llama().train()
    model.gradient_checkpointing_enable()
    check(model, models.on_words, batches(), 3)


def test_two_micro_batches_in_flight():
    """A backward recomputes with what its own micro-batch has received."""
    torch.manual_seed(0)
    model = Checkpointed()
    stages = divide(model, on_tokens, batches()[0], 2)
    one, two = stages.splits
    losses, sent = [], []
    for tokens in batches()[:2]:
        torch.manual_seed(1)
        (out,) = one.run(0, lambda tokens=tokens: on_tokens(one.model, tokens)).tensors
        state, leaf = torch.get_rng_state(), out.detach().requires_grad_()
        result = two.run(
            1,
            lambda tokens=tokens: on_tokens(two.model, tokens),
            lambda leaf=leaf: [leaf],
            lambda state=state: torch.set_rng_state(state),
        ).result
        losses.append(result)
        sent.append((out, leaf))
    for loss, (out, leaf) in zip(losses, sent, strict=True):
        loss.backward()
        out.backward(leaf.grad)
    for tokens in batches()[:2]:
        torch.manual_seed(1)
        on_tokens(model, tokens).backward()
    compare(gradients(stages), model, stages.plan)


def test_a_step_that_fails_before_its_backward_keeps_nothing():
    """A checkpoint keeps stand-ins in the graph; what these know of their visit must not lead back to the graph."""
    torch.manual_seed(0)
    divided = divide(Checkpointed(), on_tokens, batches()[0], 4)
    split, forward = divided.splits[1], Compute(FORWARD, 1, 0)
    came = Message("activation", [torch.zeros(4, 6, models.DIM, requires_grad=True)])
    transport, work = mock.Mock(), mock.Mock()
    transport.wait.side_effect = [came]
    work.forward.side_effect = lambda *_: on_tokens(split.model, batches()[0])
    work.random_state.side_effect = OSError  # a class: an error would keep its frames
    with pytest.raises(OSError):
        Runner(split, transport, {1: []}, 4).run([forward, forward._replace(kind=BACKWARD)], work)
    assert work.set_random_state.called, "it has run the stage's blocks"
    alive = weakref.ref(came)
    transport.wait.side_effect = None
    del came
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_blocks(in_place):
    torch.manual_seed(0)
    plain = Deep()
    stack = plain.trunk.inner["stack"]
    model = copy.deepcopy(plain)
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    recorded = record(plain, lambda: on_tokens(plain, batches()[0]))
    plan = plan_split(recorded, balance(recorded, 2))
    assert len(stack) == 4
    splits = []
    for number in range(2):
        each = copy.deepcopy(model)
        stack = each.trunk.inner["stack"]
        for index in range(4):
            if in_place:
                stack[index].compile(backend=backend)
            else:
                stack[index].forward = torch.compile(stack[index].forward, backend=backend)
        splits.append(Split(each, recorded, plan, [number]))
        splits[-1].apply()
    for tokens in batches()[:2]:
        torch.manual_seed(7)
        loss = run(Stages(splits, recorded, plan), on_tokens, tokens)
        torch.manual_seed(7)
        expected = on_tokens(plain, tokens)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
    assert frames, "nothing was compiled"
    found = gradients(Stages(splits, recorded, plan))
    for name, param in plain.named_parameters():
        if param.grad is not None:
            torch.testing.assert_close(found[name], param.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(dtype):
    def step(model, tokens):
        with torch.autocast("cpu", dtype=dtype):
            return on_tokens(model, tokens)

    torch.manual_seed(0)
    check(models.Encoder(), step, batches(), 3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("build", [Deep, models.Encoder, Conditioned])
def test_evaluation(mode, build):
    """Recorded in training, run in evaluation."""
    torch.manual_seed(0)
    model = build()
    stages = divide(model, on_tokens, batches()[0], 3)
    for each in [model, *(split.model for split in stages.splits)]:
        each.eval()
    with mode():
        for tokens in batches():
            assert torch.equal(run(stages, on_tokens, tokens, backward=False), on_tokens(model, tokens))


@pytest.mark.parametrize("build", [Deep, models.Untied, Conditioned])
def test_several_stages_in_a_process(build):
    torch.manual_seed(0)
    divided = check(build(), on_tokens, batches(), 4, ranks=2)
    assert [split.local for split in divided.splits] == [(0, 2), (1, 3)]


@pytest.mark.parametrize("build", [Deep, models.Untied, models.Encoder])
def test_a_model_from_the_meta_device(build):
    """Only the stage's own parameters ever get memory."""
    torch.manual_seed(0)
    plain = build()
    values = dict(plain.named_parameters())
    with torch.device("meta"):
        empty = build()
    recording = record(empty, lambda: on_tokens(empty, batches()[0]))
    plan = plan_split(recording, balance(recording, 2))
    splits = []
    for number in range(2):
        with torch.device("meta"):
            model = build()
        split = Split(model, recording, plan, [number])
        before = dict(model.named_parameters())
        split.apply()
        assert all(param is before[name] for name, param in model.named_parameters())
        assert {name for name, param in model.named_parameters() if param.is_meta} == set(
            plan.stages[number].parameters
        )
        for name in plan.stages[number].parameters:
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            module._parameters[key] = nn.Parameter(values[name].detach().clone())
        splits.append(split)
    stages = Stages(splits, recording, plan)
    torch.manual_seed(7)
    loss = run(stages, on_tokens, batches()[1])
    torch.manual_seed(7)
    expected = on_tokens(plain, batches()[1])
    expected.backward()
    assert torch.equal(loss, expected.detach())
    compare(gradients_of_replaced(stages), plain, plan)


def gradients_of_replaced(stages):
    found = {}
    for split in stages.splits:
        for name, param in split.model.named_parameters():
            if param.grad is not None:
                found[name] = found.get(name, 0) + param.grad
    return found


def test_removing_gives_the_forwards_back():
    model = Deep()
    (split,) = divide(model, on_tokens, batches()[0], 1).splits
    torch.manual_seed(7)
    expected = on_tokens(split.model, batches()[0])
    own = [name for name, module in split.model.named_modules() if "forward" in vars(module)]
    assert own == [f"trunk.inner.stack.{index}" for index in range(4)]
    split.remove()
    assert not any("forward" in vars(module) for module in split.model.modules())
    torch.manual_seed(7)
    assert torch.equal(on_tokens(split.model, batches()[0]), expected)


def test_hooks_and_attributes_of_a_block_stay():
    """A hook sees what the block computes, on the stage that computes it."""
    torch.manual_seed(0)
    model = Deep()
    stages = divide(model, on_tokens, batches()[0], 2)
    seen = []
    for split in stages.splits:
        block = split.model.trunk.inner["stack"][3]
        assert type(block) is models.Layer
        block.register_forward_hook(lambda module, args, output: seen.append(bool(output.isfinite().all())))
    run(stages, on_tokens, batches()[0])
    assert seen == [True]
