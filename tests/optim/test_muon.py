"""Muon against torch's own on one process, and in every stage against itself on whole parameters."""

from __future__ import annotations

import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
from lit_zero.kernels.newton_schulz import orthogonalize, stacks
from torch import nn

from lit_zero.comm.direct import DirectExchange
from lit_zero.comm.exchange import Swap
from lit_zero.core.errors import ConfigError
from lit_zero.optim import Muon
from lit_zero.optim import muon as muon_module
from lit_zero.zero import Zero
from tests.optim.whole import Odd, cut_dimensions, groups, layout, sent_elements, stages
from tests.zero.harness import GPT, Run, distance, one_process, with_engine


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return Muon(groups(model, use_muon=False, lr=0.005), lr=0.02, ns_dtype="float64")


def muon_in_bf16(model: nn.Module) -> torch.optim.Optimizer:
    return Muon(groups(model, use_muon=False), lr=0.02)


# ---- on one process


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torchs_own(adjust_lr_fn, nesterov):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((12, 5), (5, 12), (8, 8))]
    ours, theirs = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    settings: dict[str, Any] = {
        "lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn
    }  # fmt: skip
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_is_no_hidden_matrix_is_stepped_by_adamw():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((9, 4), (7,), (), (5, 3))]
    ours, theirs = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    optimizers = (
        Muon([{"params": ours[1:]}, {"params": ours[:1], "use_muon": False, "lr": 0.03}], lr=0.01, weight_decay=0.2),
        torch.optim.AdamW(
            [{"params": theirs[1:]}, {"params": theirs[:1], "lr": 0.03}], lr=0.01, weight_decay=0.2, betas=(0.9, 0.95)
        ),
    )
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(ours[3], theirs[3], atol=1e-3)
    assert optimizers[0].state[ours[3]].keys() == {"momentum_buffer"}
    assert optimizers[0].state[ours[0]].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_a_convolution_is_taken_as_a_matrix():
    value, grad = torch.randn(6, 2, 3, 3), torch.randn(6, 2, 3, 3)
    whole, matrix = nn.Parameter(value.clone()), nn.Parameter(value.flatten(1))
    whole.grad, matrix.grad = grad.clone(), grad.flatten(1)
    for param in (whole, matrix):
        Muon([param], lr=0.1, ns_dtype="float32").step()
    assert torch.equal(whole.flatten(1), matrix)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6), (1, 7), (63, 60)])
def test_orthogonalisation_keeps_directions_and_evens_out_sizes(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = matrix.clone()
    got = orthogonalize(matrix)
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ got @ right.T
    assert torch.equal(matrix, before) and got.is_contiguous()
    torch.testing.assert_close(inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-9)
    large = inside.diagonal()[sizes > 0.01 * sizes[0]]
    assert ((large > 0.6) & (large < 1.25)).all()
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6), (1, 7), (63, 60)])
def test_a_stack_is_orthogonalised_as_its_matrices_are(shape, dtype, tolerance):
    matrices = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    matrices[2].zero_()
    matrices[3].mul_(1e3)
    got = orthogonalize(matrices)
    assert got.is_contiguous()
    for one, matrix in zip(got, matrices, strict=True):
        torch.testing.assert_close(one, orthogonalize(matrix), rtol=tolerance, atol=tolerance)


def test_stacks_hold_what_is_alike_and_no_more_bytes_than_allowed():
    alike, sizes = ["a", "b", "a", "a", "b", "a", "c"], [4, 3, 4, 4, 3, 4, 100]
    assert stacks(alike, sizes, 8) == [[0, 2], [1, 4], [3, 5], [6]]
    assert stacks(alike, sizes, 12) == [[0, 2, 3], [1, 4], [5], [6]]
    assert stacks(alike, sizes, 0) == [[0], [1], [2], [3], [4], [5], [6]]
    assert stacks([], [], 8) == []


def test_matrices_of_one_shape_are_orthogonalised_together(monkeypatch):
    """A group of its own settings and a transposed shape stay apart; stacks or not, the step is the same."""
    shapes = [(4, 6), (6, 4), (4, 6), (2, 3, 2), (4, 6), (2, 6), (4, 6)]
    found, seen = [], list[tuple[int, ...]]()
    real = muon_module.orthogonalize
    monkeypatch.setattr(
        muon_module, "orthogonalize", lambda each, *args: (seen.append(each.shape), real(each, *args))[1]
    )
    for limit in (0, 2 * 4 * 6 * 4, 1 << 20):
        monkeypatch.setitem(muon_module.STACKED_BYTES, "cpu", limit)
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = Muon([{"params": params[:6]}, {"params": params[6:], "ns_steps": 3}], lr=0.1, ns_dtype="float32")
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        found.append([param.detach() for param in params])
    assert seen[:7] == [(4, 6), (6, 4), (4, 6), (2, 6), (4, 6), (2, 6), (4, 6)]
    assert seen[7:12] == [(2, 4, 6), (6, 4), (2, 2, 6), (4, 6), (4, 6)]
    assert seen[12:] == [(3, 4, 6), (6, 4), (2, 2, 6), (4, 6)]
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
        ({"momentum": 1.5}, ValueError, "Invalid momentum value: 1.5"),
        (
            {"adjust_lr_fn": "orignal"},
            ConfigError,
            "adjust_lr_fn='orignal' is not known. Did you mean 'original'? Choose one of: original, match_rms_adamw.",
        ),
        (
            {"ns_dtype": "float8"},
            ConfigError,
            "ns_dtype='float8' is not known. Did you mean 'float64'? Choose one of: bfloat16, float32, float64.",
        ),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error) as caught:
        Muon([nn.Parameter(torch.ones(1, 1))], **settings)
    assert str(caught.value) == words


def test_a_vector_in_a_group_of_matrices_is_refused():
    with pytest.raises(ValueError) as caught:
        Muon([{"params": [nn.Parameter(torch.ones(3))], "use_muon": True}])
    assert str(caught.value) == (
        "A parameter of shape (3,) is in a group with use_muon=True, but Muon steps matrices. Leave use_muon out, or "
        "put it into a group with use_muon=False, which AdamW steps."
    )


# ---- divided over ranks


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("model", [GPT, Odd])
def test_every_stage_equals_one_process(ranks, size, model):
    run = Run(model=model, optimizer=muon, steps=4, clip=0.5)
    expected = one_process(run)
    outcomes = ranks(size).run(stages, run, layout)
    for outcome in itertools.chain(*outcomes):
        assert distance(outcome, expected) < 1e-9
        assert torch.equal(outcome.flat(), outcomes[0][0].flat()), "stages and ranks agree bit for bit"
    assert cut_dimensions(outcomes[0][3].notes["look"]) >= ({1, 2} if model is Odd else {2}), "the case must cut some"


@pytest.mark.parametrize("model", [GPT])
def test_products_in_bf16_are_the_same_in_every_stage(ranks, model):
    # What travels is rounded to bf16 no sooner than the products would round it.
    run = Run(model=model, optimizer=muon_in_bf16, steps=3, dtype=torch.float32)
    outcomes = ranks(2).run(stages, run)
    for outcome in itertools.chain(*outcomes):
        assert torch.equal(outcome.flat(), outcomes[0][0].flat())
    assert distance(outcomes[0][0], one_process(run)) < 0.02


def counted() -> tuple[dict[str, Any], list[int]]:
    """Train one step; return the layout, and the bytes that each exchange of parts of matrices has sent."""
    sent = []
    swap = DirectExchange.all_to_all

    def watched(exchange: DirectExchange, given: Swap) -> Any:
        before = exchange.counters.sent_bytes
        ticket = swap(exchange, given)
        sent.append(exchange.counters.sent_bytes - before)
        return ticket

    with mock.patch.object(DirectExchange, "all_to_all", watched):
        run = Run(optimizer=muon_in_bf16, steps=1, dtype=torch.float32)
        outcome = with_engine(run, Zero("stage2"), look=layout)
    return outcome.notes["look"], sent


def test_a_step_takes_two_rounds_of_the_matrices_that_are_cut(ranks):
    for rank, (found, sent) in enumerate(ranks(2).run(counted)):
        hidden = [name for name, shape in found["shapes"].items() if len(shape) == 2 and "embedding" not in name]
        expected = sent_elements([found["ranges"][name] for name in hidden], rank)
        assert found["swaps"] == len(sent) == 2
        assert sum(sent) == 2 * expected, "two bytes an element: what is sent has the dtype of the products"
        assert 0 < expected < sum(math.prod(found["shapes"][name]) for name in hidden) / 2


@pytest.mark.parametrize("gaps", [False, True])
def test_adamw_steps_what_lies_in_another_order(gaps):
    value = torch.linspace(-1, 1, 24).view(4, 6)[:, :3] if gaps else torch.linspace(-1, 1, 12).view(4, 3)
    ours, theirs = nn.Parameter(value.clone() if not gaps else value), nn.Parameter(value.clone())
    assert ours.is_contiguous() is not gaps
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = Muon([{"params": [ours], "use_muon": False}], **settings), torch.optim.AdamW([theirs], **settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        ours.grad = torch.randn(3, 4, generator=generator).t()
        theirs.grad = ours.grad.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_group_may_change_sides():
    param = nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([{"params": [param], "use_muon": True}], lr=0.1)
    for use_muon in (True, False, True, False):
        optimizer.param_groups[0]["use_muon"] = use_muon
        param.grad = torch.ones(3, 4)
        optimizer.step()
    assert optimizer.state[param]["step"].item() == 2.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ns_steps": 0}, "optimizer.ns_steps=0 is not valid: expected a whole number of at least 1."),
        ({"betas": (0.9, 0.9, 0.9)}, r"optimizer.betas=\(0.9, 0.9, 0.9\) is not valid: expected 2 numbers, got 3."),
        ({"ns_coefficients": (3.0, 2.0)}, r"optimizer.ns_coefficients=\(3.0, 2.0\) is not valid: expected 3 numbers"),
    ],
)
def test_settings_of_a_group_are_checked(settings, words):
    with pytest.raises(ValueError, match=words):
        Muon([{"params": [nn.Parameter(torch.ones(2, 2))], **settings}])
