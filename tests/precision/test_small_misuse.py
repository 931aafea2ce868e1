"""What small state and the step inside the backward refuse, and what they leave behind when something fails."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from lit_zero import optim
from lit_zero.core.errors import ConfigError, LitZeroError
from lit_zero.zero.access import Access
from lit_zero.zero.twin import Twin
from tests.precision.harness import Job, adamw, autocast_loss, build, steps, with_run
from tests.zero.harness import BATCH, Run, tokens

EARLY = {"step": "backward"}
BATCH_OF = tokens(0, slice(0, BATCH // 2))


def flat(kind: Any, **settings: Any) -> Run:
    """Return a run with an optimizer of ours."""
    return Run(
        loss=autocast_loss, steps=2, dtype=torch.float32, optimizer=lambda model: kind(model.parameters(), **settings)
    )


# ---- the step inside the backward


def test_the_step_inside_the_backward_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing left to step behind the backward, there is nothing to launch."""
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "lit_zero.kernels.triton_small", None)
    job = Job(small=EARLY, run=flat(optim.AdamW, lr=1e-2))
    steps(job, *build(job))
    assert not optim.AdamW([nn.Parameter(torch.zeros(1))]).step_forms([])


def test_a_step_has_one_backward() -> None:
    """A second one would step a second time."""
    model, optimizer, engine = build(Job(small=EARLY))

    def closure() -> None:
        engine.backward(autocast_loss(model, BATCH_OF))
        engine.backward(autocast_loss(model, BATCH_OF))

    with pytest.raises(LitZeroError, match=r"precision.step='backward' .* a second one began in the same"):
        optimizer.step(closure)


def test_a_backward_that_fails_leaves_nothing_to_save_or_to_go_on_with() -> None:
    job = with_run(Job(small=EARLY), steps=1)
    model, optimizer, engine = build(job)
    steps(job, model, optimizer, engine)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("no gradient")

    handle = model.embedding.register_forward_hook(lambda *args: Broken.apply(args[-1]))
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: engine.backward(autocast_loss(model, BATCH_OF)))  # type: ignore[arg-type, return-value]
    handle.remove()
    said = r"ZeroDivisionError came up in a backward that had stepped some .* precision.step='after'"
    for _ in range(2):
        with pytest.raises(LitZeroError, match=said):
            engine.parameter_pieces()
    with pytest.raises(LitZeroError, match=said):
        steps(job, model, optimizer, engine, 1)


def test_a_forward_that_fails_leaves_all_as_it_was() -> None:
    job = with_run(Job(small=EARLY), steps=1)
    model, optimizer, engine = build(job)

    def closure() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    steps(job, model, optimizer, engine)
    assert engine.parameter_pieces()


# ---- forms


def half_way_from_the_start(stage: str) -> bool:
    """Return whether all ranks begin with the same 2-byte weights, as the masters' own rounding gives them."""
    job = Job(stage, {"master": "split"}, run=flat(torch.optim.SGD, lr=0.1))
    kind = job.run.model

    def model() -> nn.Module:
        made = kind()
        for param in made.parameters():
            param.data.fill_(1.0 + 2.0**-8)  # between two bf16 numbers; ties to even give 1.0
        return made

    job.run.model = model
    made, _, _engine = build(job)
    return all(bool((param == 1.0 + 2.0**-7).all()) for param in made.parameters())


def test_weights_half_way_are_rounded_alike_on_all_ranks(ranks: Any) -> None:
    for stage in ("none", "stage1", "stage2"):
        assert ranks(2).run(half_way_from_the_start, stage) == [True, True], stage


def test_states_in_small_forms_are_not_read_as_zeros() -> None:
    job = with_run(Job(small={"moments": "int8"}), steps=1)
    model, optimizer, engine = build(job)
    assert optimizer.state_dict()["param_groups"]
    steps(job, model, optimizer, engine)
    with pytest.raises(LitZeroError, match=r"AdamW.state_dict would hold zeros.*trainer.save_checkpoint"):
        optimizer.state_dict()
    assert Access(engine).state("norm.weight", "exp_avg").any()
    engine.detach()


def test_what_states_an_optimizer_keeps_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    known = Twin._try_out
    monkeypatch.setattr(Twin, "_try_out", lambda self, like: tried.append(like.dtype) or known(self, like))
    job = with_run(Job(small={"master": "split"}), steps=1, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    model, optimizer, engine = build(job)
    for step in range(3):
        steps(job, model, optimizer, engine, step)
        optimizer.param_groups[0]["lr"] *= 0.9
    assert tried == [torch.float32]
    optimizer.param_groups[0]["momentum"] = 0.9
    steps(job, model, optimizer, engine, 3)
    assert tried == [torch.float32] * 2


class Norm(nn.Module):
    """Nothing in it is lowered by default."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)


def test_masters_in_two_halves_need_a_copy() -> None:
    job = with_run(Job(small={"master": "split", "lower": "matmul"}), model=Norm, optimizer=adamw)
    with pytest.raises(ConfigError, match=r"precision.master='split' has no effect: .*Remove precision.master, or use"):
        build(job)
