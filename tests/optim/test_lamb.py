"""LAMB against its algorithm written out, and in every stage against itself on whole parameters."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.core.errors import UnsupportedError
from lit_zero.core.keeping import Keeping
from lit_zero.optim import LAMB
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine
from tests.optim.whole import STAGES, Odd, cut_dimensions, groups, layout, stages
from tests.zero.harness import GPT, Outcome, Run, distance, one_process, tokens, with_engine


def lamb(model: nn.Module) -> torch.optim.Optimizer:
    first, second, third = groups(model)
    return LAMB([first, {**second, "adapt": False}, third], lr=0.02)


RUN = Run(optimizer=lamb, steps=4)


def written_out(values: list[torch.Tensor], grads: list[list[torch.Tensor]], lr: float, decay: float) -> None:
    """Algorithm 2 of the paper, in fp64."""
    moments = [(torch.zeros_like(value), torch.zeros_like(value)) for value in values]
    for count, each in enumerate(grads, 1):
        for value, grad, (m, v) in zip(values, each, moments, strict=True):
            m.copy_(0.9 * m + 0.1 * grad)
            v.copy_(0.999 * v + 0.001 * grad**2)
            update = (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-6) + decay * value
            ratio = value.norm() / update.norm() if value.norm() > 0 and update.norm() > 0 else 1.0
            value -= lr * ratio * update


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_equals_the_algorithm(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (3,), (2, 3, 4), ()]
    expected = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    expected[1].zero_()  # a norm of zero: the learning rate as it is
    expected = [value.to(dtype).double() for value in expected]
    grads = [[torch.randn(s, generator=generator).to(dtype).double() for s in shapes] for _ in range(3)]
    params = [nn.Parameter(value.to(dtype, copy=True)) for value in expected]
    optimizer = LAMB(params, lr=0.01, weight_decay=0.1)
    for each in grads:
        for param, grad in zip(params, each, strict=True):
            param.grad = grad.to(dtype)
        optimizer.step()
        optimizer.zero_grad()
    written_out(expected, grads, lr=0.01, decay=0.1)
    for param, value in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach().double(), value, rtol=tolerance, atol=tolerance)


def test_every_parameter_moves_by_a_part_of_its_norm():
    params = [nn.Parameter(size * torch.randn(6, 7)) for size in (1e-3, 1.0, 1e3)]
    before = [param.detach().clone() for param in params]
    optimizer = LAMB(params, lr=0.01, weight_decay=0.0)
    for param in params:
        param.grad = torch.randn(6, 7)
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        torch.testing.assert_close((param - old).norm(), 0.01 * old.norm(), rtol=1e-3, atol=0)


def test_without_adaptation_it_is_adamw():
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64)) for _ in range(2))
    optimizers = [
        LAMB([ours], lr=0.01, eps=1e-8, weight_decay=0.1, adapt=False),
        torch.optim.AdamW([theirs], lr=0.01, eps=1e-8, weight_decay=0.1),
    ]
    for step in range(3):
        ours.grad = theirs.grad = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for optimizer in optimizers:
            optimizer.step()
    # AdamW decays before it updates, LAMB with the update: the difference is lr squared.
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=1e-12)


def test_a_closure_a_missing_gradient_and_a_round_trip_of_the_state():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = LAMB(params)

    def closure() -> torch.Tensor:
        loss = params[0].square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert params[1] not in optimizer.state and torch.equal(params[1], torch.ones(2))
    assert optimizer.state[params[0]].keys() == {"step", "exp_avg", "exp_avg_sq"}
    other = LAMB([nn.Parameter(p.detach().clone()) for p in params])
    other.load_state_dict(optimizer.state_dict())
    for each in (optimizer, other):
        first = each.param_groups[0]["params"][0]
        first.grad = torch.full((3,), 0.5)
        each.step()
    assert torch.equal(params[0], other.param_groups[0]["params"][0])


def test_only_contiguous_parameters_but_any_gradients():
    value, grad = torch.randn(4, 3), torch.randn(3, 4)
    one, other = nn.Parameter(value.clone()), nn.Parameter(value.clone())
    one.grad, other.grad = grad.t(), grad.t().contiguous()
    for param in (one, other):
        LAMB([param], lr=0.1).step()
    assert torch.equal(one, other) and torch.equal(one.grad, grad.t())
    turned = nn.Parameter(value.t())
    turned.grad = grad
    with pytest.raises(UnsupportedError) as caught:
        LAMB([turned]).step()
    assert str(caught.value) == (
        "LAMB steps contiguous parameters, but one of shape (3, 4) has stride (1, 3). Make it contiguous "
        "(param.data = param.data.contiguous()) before the optimizer is built."
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"betas": (0.9,)}, "optimizer.betas=(0.9,) is not valid: expected 2 numbers, got 1."),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"eps": -1.0}, "Invalid epsilon value: -1.0"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
        ({"betas": (0.9, 2.0)}, "Invalid beta parameter at index 1: 2.0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], words: str):
    with pytest.raises(ValueError) as caught:
        LAMB([nn.Parameter(torch.ones(1))], **settings)
    assert str(caught.value) == words


# ---- divided over ranks


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("model", [GPT, Odd])
def test_every_stage_equals_one_process(ranks, size, model):
    run = Run(model=model, optimizer=lamb, steps=4, clip=0.5)
    expected = one_process(run)
    outcomes = ranks(size).run(stages, run, layout)
    for outcome in itertools.chain(*outcomes):
        assert distance(outcome, expected) < 1e-9
        assert torch.equal(outcome.flat(), outcomes[0][0].flat()), "stages and ranks agree bit for bit"
    looks = [outcome.notes["look"] for outcome in itertools.chain(*outcomes)]
    assert all(cut_dimensions(look) >= ({1, 2} if model is Odd else {2}) for look in looks), "the case must cut some"
    assert all(look["shapes"]["embedding.weight"] == (31, 12) for look in looks), "the real shape"
    assert len({tuple(look["order"]) for look in looks}) == 1, "all ranks hold the same parameters in the same order"


def accumulated(run: Run) -> list[Outcome]:
    return [with_engine(run, Zero(stage)) for stage in STAGES[1:]]


@pytest.mark.thorough
def test_accumulation_in_fp32(ranks):
    run = Run(optimizer=lamb, steps=3, micro_batches=2, dtype=torch.float32)
    expected = one_process(run)
    for outcome in ranks(2).run(accumulated, run)[0]:
        assert distance(outcome, expected) < 1e-5


class Apart(Keeping):
    """Says that shards live elsewhere."""

    apart, knobs = True, "offload=cpu and offload=disk"


def refused() -> str:
    try:
        with_engine(RUN, Zero("stage2"), keeping=Apart())
    except UnsupportedError as error:
        return str(error)
    return ""


def test_offload_is_refused(ranks):
    assert ranks(1).run(refused) == [
        "LAMB looks at whole parameters, but with offload=cpu and offload=disk the step walks through the masters in "
        "portions. Leave that setting out, or use an element-wise optimizer (AdamW, SGD, Lion, ...)."
    ]


def test_states_that_lie_in_another_order_are_updated():
    params = [nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4)) for _ in range(2)]
    optimizers = [LAMB([param], lr=0.1) for param in params]
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        grad = torch.randn(3, 4, generator=generator)
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad
            optimizer.step()
        if number == 0:
            state = optimizers[1].state[params[1]]
            state.update({key: state[key].t().contiguous().t() for key in ("exp_avg", "exp_avg_sq")})
            assert not state["exp_avg"].is_contiguous()
    assert torch.equal(params[1], params[0])


def test_the_kernel_tells_autograd(interpreted):
    param = nn.Parameter(torch.ones(5))
    param.grad, before = torch.ones(5), param._version
    LAMB([param], lr=0.1).step()
    assert param._version > before


def thawed(stage: str) -> dict[str, Any]:
    """A parameter joins between a backward and its step; return what this rank then holds of each of the others."""
    torch.manual_seed(0)
    model = GPT(layers=1)
    late = model.blocks[0].up.weight.requires_grad_(False)
    optimizer = LAMB([p for p in model.parameters() if p.requires_grad], lr=0.02)
    exchange = open_exchange(Comm(), torch.device("cpu"))
    engine = Engine(model, [optimizer], zero=Zero(stage), exchange=exchange)
    rows = slice(4 * exchange.rank, 4 * exchange.rank + 4)
    for number in range(2):
        engine.backward(model.loss(tokens(number, rows)))
        if number == 1:
            late.requires_grad_(True)
            optimizer.add_param_group({"params": [late]})
            engine.follow_groups()
        held = {
            segment.entry.name: (segment.param.grad is not None, float(optimizer.state[segment.param].get("step", -1)))
            for segment in engine.bindings[0].segments
            if segment.entry is not None
        }
        engine.step()
    return held


def test_groups_that_come_later_leave_empty_parts_what_they_have(ranks):
    for stage in ("stage1", "stage3"):
        one, other = ranks(2).run(thawed, stage, timeout=60)
        assert one == other
        assert {value for name, value in one.items() if name != "blocks.0.up.weight"} == {(True, 1.0)}
