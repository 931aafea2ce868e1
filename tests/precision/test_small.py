"""Small state: exact where it says so, close where it says so, and alike in every stage and on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lit_zero.precision.small as small_module
from lit_zero.core.errors import ConfigError, LitZeroError, UnsupportedError
from lit_zero.core.keeping import Content
from lit_zero.zero.twin import Twin
from tests.precision.harness import (
    STAGES,
    Found,
    Job,
    all_trained,
    autocast_loss,
    build,
    same,
    steps,
    trained,
    with_run,
)
from tests.zero.harness import GPT, Run

SPLIT = {"master": "split"}
BYTE = {"master": "split", "moments": "int8", "gradient_dtype": "compute"}
TWO_BYTES = {"master": "split", "moments": "bfloat16", "gradient_dtype": "compute"}


def two_rates(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with two groups of different rates."""
    params = [param for param in model.parameters() if param.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.1, "lr": 1e-2},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0, "lr": 3e-3},
        ]
    )


def equal_until_a_tie(one: Found, plain: Found) -> None:
    """Check that two runs are the same bit for bit, up to the first master that is equally near to two bf16 numbers."""
    first = next((number for number, ties in enumerate(plain.ties) if ties), None)
    if first is None:
        assert same(one, plain)
    else:  # these masters make the copies that step ``first`` computes with
        assert first and one.losses[:first] == plain.losses[:first]


# ---- masters in two halves


@pytest.mark.thorough("[1]")
@pytest.mark.parametrize("size", [1, 2])
def test_masters_in_two_halves_change_no_bit(ranks: Any, size: int) -> None:
    jobs = []
    for stage in STAGES if size > 1 else ("stage2",):
        plain = with_run(Job(stage), optimizer=two_rates)
        busy = with_run(plain, micro_batches=2, clip=0.5, steps=3)
        jobs += [plain, replace(plain, small=SPLIT), busy, replace(busy, small=SPLIT)]
    found = ranks(size).run(all_trained, jobs)[0]
    for plain, split in zip(found[::2], found[1::2], strict=True):
        equal_until_a_tie(split, plain)


@pytest.mark.thorough("none")
@pytest.mark.parametrize("stage", ["none", "stage3"])
def test_two_byte_gradients_are_stepped_with_as_they_are(ranks: Any, stage: str) -> None:
    """The portions' fp32 copies are those of the whole; what is clipped is rounded to 2 bytes once more."""
    plain = Job(stage, {"gradient_dtype": "compute"})
    clipped = with_run(plain, clip=0.5)
    jobs = [plain, replace(plain, small={**SPLIT, **plain.small})]
    jobs += [clipped, replace(clipped, small={**SPLIT, **plain.small})]
    exact, split, scaled, scaled_split = ranks(2).run(all_trained, jobs)[0]
    equal_until_a_tie(split, exact)
    assert scaled_split.losses == pytest.approx(scaled.losses, rel=5e-3)


# ---- the step inside the backward


@pytest.mark.thorough("small0", "small1")
@pytest.mark.parametrize("small", [{}, SPLIT, BYTE])
def test_the_step_inside_the_backward_changes_no_bit(ranks: Any, small: dict[str, str]) -> None:
    jobs = [
        replace(with_run(Job(stage), optimizer=two_rates), small={**small, "step": step})
        for stage in STAGES
        for step in ("after", "backward")
    ]
    found = ranks(2).run(all_trained, jobs)[0]
    for after, early in zip(found[::2], found[1::2], strict=True):
        assert same(early, after)
        assert early.sizes["gradient"] == 0 < after.sizes["gradient"]


def test_the_step_inside_the_backward_alone() -> None:
    for small in ({}, BYTE):
        after, early = (trained(Job(small={**small, "step": step})) for step in ("after", "backward"))
        assert same(early, after)
        assert early.sizes["gradient"] == 0


class Branches(nn.Module):
    """Blocks of which some are not used: by one rank, by any, or because they are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 12)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12)) for _ in range(5))
        self.head = nn.Linear(12, 31, bias=False)
        self.head.weight = self.embedding.weight
        self.never = nn.Linear(12, 12)
        self.blocks[4][0].weight.requires_grad_(False)

    def loss(self, tokens: torch.Tensor, branch: int) -> torch.Tensor:
        x = self.embedding(tokens[:, :-1])
        for number in (0, 1 + branch, 4):  # block 3 is used by nobody
            x = x + self.blocks[number](x)
        return F.cross_entropy(self.head(x).flatten(0, 1), tokens[:, 1:].flatten())


STILL = ("never", "blocks.3", "blocks.4.0.weight")


def branching(stages: tuple[str, ...], small: dict[str, str]) -> list[tuple[Found, Found]]:
    """Train with the step after the backward, and inside it."""
    rank = torch.distributed.get_rank()

    def loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        return model.loss(tokens, branch=rank)

    run = Run(model=Branches, loss=loss, optimizer=two_rates, steps=4, dtype=torch.float32)
    pairs = []
    for stage in stages:
        job = Job(stage, small, mixed=False, run=run, still=STILL)
        after, early = (trained(replace(job, small={**small, "step": step})) for step in ("after", "backward"))
        pairs.append((after, early))
    return pairs


@pytest.mark.parametrize("small", [{}, {"moments": "bfloat16"}])
def test_unused_frozen_and_tied_parameters(ranks: Any, small: dict[str, str]) -> None:
    for pair in ranks(2).run(branching, ("none", "stage1", "stage2"), small):
        for after, early in pair:
            assert same(early, after)
            torch.manual_seed(0)
            start = dict(Branches().named_parameters())
            for name, value in early.weights.items():
                assert torch.equal(value, start[name]) == name.startswith(STILL), name


def without_norms(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([param for param in model.parameters() if param.ndim >= 2], lr=1e-2)


def test_parameters_that_no_optimizer_holds() -> None:
    job = with_run(Job(), optimizer=without_norms, steps=3)
    after, early = (trained(replace(job, small={"step": step})) for step in ("after", "backward"))
    assert same(early, after)
    assert early.sizes["gradient"] == 0
    torch.manual_seed(0)
    assert torch.equal(early.weights["norm.weight"], job.run.model().norm.weight)  # type: ignore[arg-type]


def test_what_needs_all_gradients_is_refused() -> None:
    job = Job(small={"step": "backward"})
    with pytest.raises(LitZeroError, match="no gradients to take a norm of, or to clip.*precision.step='after'"):
        trained(with_run(job, clip=1.0))
    with pytest.raises(LitZeroError, match="cannot accumulate.*accumulate_grad_batches=1"):
        trained(with_run(job, micro_batches=2))
    model, optimizer, engine = build(job)
    batch = torch.zeros(8, 9, dtype=torch.long)
    with pytest.raises(LitZeroError, match="does not run inside optimizer.step\\(closure\\)"):
        engine.backward(autocast_loss(model, batch))

    def closure() -> None:
        engine.backward(autocast_loss(model, batch))
        optimizer.param_groups[0]["lr"] = 1.0

    with pytest.raises(LitZeroError, match="settings of AdamW were changed between the backward and its step"):
        optimizer.step(closure)  # type: ignore[arg-type]


def test_a_backward_that_failed_steps_nothing_later() -> None:
    """If it has stepped nothing, the next one goes on; what it has left on the way is dropped."""
    job = Job(small={"step": "backward"})
    model, optimizer, engine = build(job)

    def failing() -> None:
        loss = autocast_loss(model, torch.zeros(8, 9, dtype=torch.long))
        handle = model.norm.weight.register_hook(lambda _: (_ for _ in ()).throw(ValueError("a mistake")))
        try:
            engine.backward(loss)
        finally:
            handle.remove()

    with pytest.raises(ValueError, match="a mistake"):
        optimizer.step(failing)  # type: ignore[arg-type]
    assert len(steps(with_run(job, steps=2), model, optimizer, engine)) == 2
    counts = {int(state["step"]) for state in optimizer.state.values()}
    assert counts == {2}


# ---- moments


@pytest.mark.thorough("small0")
@pytest.mark.parametrize("small", [TWO_BYTES, BYTE])
def test_all_stages_and_rank_counts_round_alike(ranks: Any, small: dict[str, str]) -> None:
    job = replace(with_run(Job(small=small), optimizer=two_rates), alike=True)
    jobs = [replace(job, stage=stage) for stage in STAGES]
    alone = trained(job)
    for found in ranks(2).run(all_trained, jobs):
        for stage, each in zip(STAGES, found, strict=True):
            assert same(each, alone), stage
    small_module_portion, small_module.CPU_PORTION = small_module.CPU_PORTION, 1024
    try:
        assert same(trained(job), alone)
    finally:
        small_module.CPU_PORTION = small_module_portion


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_training_with_small_moments_follows_the_exact_one(moments: str, mixed: bool) -> None:
    job = with_run(Job(mixed=mixed), steps=12, **({} if mixed else {"loss": GPT.loss}))
    exact, rounded = trained(job), trained(replace(job, small={"moments": moments}))
    assert rounded.losses == pytest.approx(exact.losses, rel=0.02)
    assert rounded.losses[-1] != exact.losses[-1]
    torch.manual_seed(0)
    job.run.model()
    drawn = torch.random.get_rng_state()  # what building the model draws, and no more
    trained(replace(job, small={"moments": moments}))
    assert torch.equal(torch.random.get_rng_state(), drawn)


# Every element-wise class of torch.optim that keeps states, and what these hold.
S, P, W = Content.SIGNED, Content.POSITIVE, Content.WEIGHTS
CONTENTS: list[tuple[Any, dict[str, Any], dict[str, Content]]] = [
    (torch.optim.AdamW, {}, {"exp_avg": S, "exp_avg_sq": P}),
    (torch.optim.Adam, {"amsgrad": True}, {"exp_avg": S, "exp_avg_sq": P, "max_exp_avg_sq": P}),
    (torch.optim.Adam, {"weight_decay": 0.1}, {"exp_avg": S, "exp_avg_sq": P}),
    (torch.optim.NAdam, {}, {"exp_avg": S, "exp_avg_sq": P}),
    (torch.optim.RAdam, {}, {"exp_avg": S, "exp_avg_sq": P}),
    (torch.optim.Adamax, {}, {"exp_avg": S, "exp_inf": P}),
    (torch.optim.Adagrad, {}, {"sum": P}),
    (torch.optim.Adadelta, {}, {"square_avg": P, "acc_delta": P}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}, {"square_avg": P, "momentum_buffer": S, "grad_avg": S}),
    (torch.optim.Rprop, {}, {"prev": S, "step_size": P}),
    (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum_buffer": S}),
    (torch.optim.ASGD, {}, {"ax": W}),
]


@pytest.mark.parametrize(("kind", "settings", "contents"), CONTENTS)
def test_what_states_hold_is_found_out_by_trying(kind: Any, settings: dict[str, Any], contents: Any) -> None:
    param = nn.Parameter(torch.zeros(3))
    found = Twin(kind([param], lr=0.01, **settings), away=False).states(param)
    assert {key: content for key, (_, content) in found.items()} == contents
    assert {dtype for dtype, _ in found.values()} == {torch.float32}


@pytest.mark.parametrize(("kind", "settings", "contents"), CONTENTS)
def test_every_element_wise_optimizer_of_torch(kind: Any, settings: dict[str, Any], contents: Any) -> None:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return kind(model.parameters(), lr=1e-3, **settings)

    exact = trained(with_run(Job(), optimizer=optimizer, steps=3))
    split = trained(replace(with_run(Job(), optimizer=optimizer, steps=3), small=SPLIT))
    equal_until_a_tie(split, exact)
    for moments in ("bfloat16", "int8"):
        job = replace(with_run(Job(), optimizer=optimizer, steps=3), small={"moments": moments})
        if set(contents.values()) == {W}:
            with pytest.raises(ConfigError, match="precision.moments='.*' has no effect: ASGD with these settings"):
                trained(job)
        else:
            assert trained(job).losses == pytest.approx(exact.losses, rel=0.02)


class Counting(torch.optim.Optimizer):
    """A user's own optimizer: it makes a new state in each step, under a name of its own, and counts nothing."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state["v"] = state.get("v", torch.zeros_like(param)) * 0.99 + 0.01 * param.grad.square()
                    param.sub_(param.grad / (state["v"].sqrt() + 1e-3), alpha=group["lr"])
        return loss


@pytest.mark.parametrize("step", ["after", "backward"])
def test_an_optimizer_of_the_users_own(step: str) -> None:
    job = with_run(Job(), optimizer=lambda model: Counting(model.parameters(), lr=1e-3), steps=5)
    exact = trained(job)
    for moments in ("bfloat16", "int8"):
        found = trained(replace(job, small={"moments": moments, "step": step}))
        assert found.losses == pytest.approx(exact.losses, rel=0.02)
        assert set(found.states["norm.weight"]) == {"v"}


def test_settings_without_effect_are_refused() -> None:
    def plain(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(ConfigError, match="precision.moments='int8' has no effect: SGD with these settings keeps no"):
        trained(with_run(Job(small={"moments": "int8"}), optimizer=plain))

    def whole(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adafactor(model.parameters())

    with pytest.raises(UnsupportedError, match="Adafactor is not element-wise.*With precision.master=split that holds"):
        trained(with_run(Job(small=SPLIT), optimizer=whole))


@pytest.mark.gpu
@pytest.mark.parametrize("small", [SPLIT, TWO_BYTES, BYTE, {**BYTE, "step": "backward"}])
@pytest.mark.parametrize("fused", [False, True])
def test_on_a_gpu(small: dict[str, str], fused: bool) -> None:
    """By the compiled kernels; with ``fused`` the optimizer counts its steps on the device."""

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.cuda().parameters(), lr=1e-2, fused=fused)

    job = replace(with_run(Job(), optimizer=optimizer), device=torch.device("cuda", 0))
    exact, found = trained(job), trained(replace(job, small=small))
    assert found.losses == pytest.approx(exact.losses, rel=1e-4 if small is SPLIT else 0.02)
    assert {value.device.type for value in found.weights.values()} == {"cuda"}


# ---- bytes


def model() -> GPT:
    return GPT(dim=128, layers=8)  # blocks hold 99 % of the parameters


# Bytes per parameter of AdamW at one rank, with scales: one fp32 number for each 256 codes.
SCALES = 2 * 4 / 256
TABLE: list[tuple[dict[str, str], float]] = [
    ({}, 2 + 4 + 4 + 8),
    ({"master": "split"}, 2 + 2 + 4 + 8),
    ({"moments": "bfloat16"}, 2 + 4 + 4 + 4),
    (TWO_BYTES, 2 + 2 + 2 + 4),
    (BYTE, 2 + 2 + 2 + 2 + SCALES),
    ({**BYTE, "step": "backward"}, 2 + 2 + 2 + SCALES),
]


def test_bytes_at_one_rank() -> None:
    for small, wanted in TABLE:
        found = trained(with_run(Job(small=small), model=model, steps=1))
        assert found.per_parameter == pytest.approx(wanted, rel=0.02), small


def test_bytes_on_two_ranks(ranks: Any) -> None:
    """In ``stage3`` all is halved; in ``stage2`` all but the parameter."""
    jobs = [with_run(Job(stage, BYTE), model=model, steps=1) for stage in ("stage2", "stage3")]
    for second, third in ranks(2).run(all_trained, jobs):
        assert second.per_parameter == pytest.approx(2 + (2 + 2 + 2 + SCALES) / 2, rel=0.03)
        assert third.per_parameter == pytest.approx((2 + 2 + 2 + 2 + SCALES) / 2, rel=0.03)


def test_gradients_inside_the_backward_never_stand_all_at_once() -> None:
    early = trained(with_run(Job(small={**BYTE, "step": "backward"}), model=model, steps=2))
    after = trained(with_run(Job(small=BYTE), model=model, steps=2))
    assert early.sizes["slots"] < (2 / 8 + 0.01) * after.sizes["gradient"]  # two of the eight blocks, and the root
