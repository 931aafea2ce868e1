"""The optimizers on shards: every class in every stage, with offload, with kernels, in Lightning."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lit_zero import ZeroStrategy, optim
from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.core.errors import ConfigError, UnsupportedError
from lit_zero.offload import Offload
from lit_zero.offload.open import open_keeping
from lit_zero.precision import Lowering, Precision
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine
from lit_zero.zero.lane import Lane
from lit_zero.zero.probe import require_elementwise
from tests.fabric.harness import Loop
from tests.fabric.harness import train_all as all_in_fabric
from tests.kernels.conftest import interpreting
from tests.optim.beside import PlainLion, groups
from tests.precision.harness import autocast_loss
from tests.strategy.harness import STAGES, Fit, LitGPT, distance, same_bits, train, train_all
from tests.strategy.test_precision import ADAMW, half, scales
from tests.strategy.test_precision_modes import Exact
from tests.zero.harness import GPT, Outcome, Run, one_process, tokens, with_engine
from tests.zero.harness import distance as apart

SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-2, "amsgrad": True},
    "Adam": {"lr": 1e-2, "weight_decay": 0.1},
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.2},
    "Adagrad": {"lr": 0.05, "initial_accumulator_value": 0.1},
    "Lion": {"lr": 1e-3, "weight_decay": 0.1},
}
CLIP = 0.5


def make(model: nn.Module, name: str, source: Any = optim) -> torch.optim.Optimizer:
    kind = PlainLion if name == "Lion" and source is torch.optim else getattr(source, name)
    return kind(groups(model), **SETTINGS[name])


def small() -> GPT:
    """Return a model without parameters whose true gradient is zero: Lion would step by the sign of its rounding."""
    model = GPT(layers=1)
    for block in model.blocks:
        block.qkv.bias.requires_grad_(False)
    return model


def run_of(name: str, source: Any, **more: Any) -> Run:
    return Run(small, optimizer=partial(make, name=name, source=source), clip=CLIP, **more)


def in_stages(
    kernels: bool, names: Sequence[str], stages: Sequence[str], dtype: torch.dtype, steps: int
) -> dict[tuple[str, str], Outcome]:
    """Train with each class in each stage, and by torch's kernels with offload; on a rank of the pool."""
    found = {}
    with interpreting() if kernels else contextlib.nullcontext():
        for name in names:
            run = run_of(name, optim, steps=steps, dtype=dtype)
            for stage in stages:
                found[name, stage] = with_engine(run, Zero(stage))
            if not kernels:
                keeping = open_keeping(Offload("cpu"), torch.device("cpu"))
                found[name, "offload"] = with_engine(run, Zero("stage2"), keeping=keeping)
    return found


@pytest.mark.parametrize(
    ("kernels", "names", "stages"),
    [
        pytest.param(False, list(SETTINGS), STAGES, id="torch"),
        pytest.param(True, ["AdamW", "Lion"], ("none", "stage2"), id="kernels"),
        pytest.param(True, list(SETTINGS), STAGES, id="kernels-all", marks=pytest.mark.thorough),
    ],
)
def test_equals_torchs_class_in_one_process(ranks, kernels, names, stages):
    """In fp64, which no kernel takes, and in fp32 by the kernels."""
    if kernels:
        pytest.importorskip("triton", reason="triton has no build for this system")
    dtype, steps, tolerance = (torch.float32, 2, 1e-6) if kernels else (torch.float64, 3, 1e-9)
    for found in ranks(2).run(in_stages, kernels, names, stages, dtype, steps, timeout=120):
        for name in names:
            expected = one_process(run_of(name, torch.optim, steps=steps))
            each = {stage: outcome for (other, stage), outcome in found.items() if other == name}
            assert {stage: apart(outcome, expected) < tolerance for stage, outcome in each.items()} == dict.fromkeys(
                each, True
            ), name
            assert all(torch.equal(outcome.flat(), each["none"].flat()) for outcome in each.values()), name


def test_the_kernel_writes_the_copy_that_is_gathered_next(interpreted, monkeypatch):
    published: list[Lane] = []
    launches: list[int] = []
    inner, walk = Lane.publish, importlib.import_module("lit_zero.kernels.triton_walk")
    launch = walk.launch
    monkeypatch.setattr(walk, "launch", lambda *args: (launches.append(1), launch(*args)))
    monkeypatch.setattr(Lane, "publish", lambda lane: (published.append(lane), inner(lane))[1])
    found = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.delenv("TRITON_INTERPRET")
        torch.manual_seed(0)
        model = GPT(layers=1)
        optimizer = optim.AdamW(groups(model), lr=1e-2, eps=1e-3)
        exchange = open_exchange(Comm(), torch.device("cpu"))
        lowering = Lowering(Precision(), torch.bfloat16)  # some lanes have a copy, others none
        engine = Engine(model, [optimizer], zero=Zero("none"), exchange=exchange, lowering=lowering)
        published.clear()
        launches.clear()
        for number in range(3):
            engine.backward(autocast_loss(model, tokens(number)))
            engine.step()
        assert len(launches) == (3 if kernels else 0), "one launch a step, for all lanes and groups"
        assert len(published) == (0 if kernels else 3 * len(engine.lanes))
        assert {lane.lowered for lane in engine.lanes} == {True, False}
        for lane in engine.lanes:
            assert torch.equal(lane.full, lane.master.read().to(lane.full.dtype))
        masters = torch.cat([lane.master.read() for lane in engine.lanes])
        engine.refresh()
        assert len(published) >= len(engine.lanes), "what others have written is copied as ever"
        found.append(masters)
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-4)  # gradients are of 2-byte parameters


def test_hooks_of_others_may_change_what_the_kernel_has_written(interpreted):
    """One that runs before the engine's, as the user's does that was there first, and as pruning puts its own."""
    torch.manual_seed(0)
    model = GPT(layers=1)
    optimizer = make(model, "AdamW")

    def clamp(*_: Any) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.data.clamp_(-0.01, 0.01)

    optimizer.register_step_post_hook(clamp)
    exchange = open_exchange(Comm(), torch.device("cpu"))
    lowering = Lowering(Precision(), torch.bfloat16)
    engine = Engine(model, [optimizer], zero=Zero("none"), exchange=exchange, lowering=lowering)
    engine.backward(autocast_loss(model, tokens(0)))
    engine.step()
    for lane in engine.lanes:
        assert lane.full is not None and lane.full.abs().max() < 0.0101
        assert torch.equal(lane.full, lane.master.read().to(lane.full.dtype))


@pytest.mark.parametrize("source", [torch.optim, optim])
def test_the_engine_lets_go_of_states_of_whole_parameters(source):
    model = GPT(layers=1)
    optimizer = source.Adagrad(model.parameters(), lr=0.1, **({"fused": "none"} if source is optim else {}))
    assert optimizer.state, "torch makes them at once"
    engine = Engine(model, [optimizer], zero=Zero("none"), exchange=open_exchange(Comm(), torch.device("cpu")))
    assert set(optimizer.state) <= {segment.param for segment in engine.bindings[0].segments}


# ---- the probe


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("fused", ["auto", "none"])
def test_the_probe_takes_them(name, fused):
    require_elementwise(getattr(optim, name)(nn.Linear(4, 4).parameters(), fused=fused, **SETTINGS[name]))


REFUSED = {"Adafactor", "Muon", "SparseAdam", "LBFGS"}


def test_the_probe_knows_every_class_of_torch():
    """Element-wise or not; a class that comes with a new torch must be found here."""
    taken, refused = set(), set()
    for name, kind in vars(torch.optim).items():
        if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer) or kind is torch.optim.Optimizer:
            continue
        try:
            require_elementwise(kind([nn.Linear(4, 4).weight], lr=0.1))
            taken.add(name)
        except UnsupportedError as error:
            assert name in str(error), "by name"
            refused.add(name)
    assert refused == REFUSED
    assert taken == {
        *("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam"),
        *("RAdam", "Adamax", "Adadelta", "Rprop", "ASGD"),
    }


# ---- Lightning


class Ours(LitGPT):
    """Its optimizer is torch's, and becomes ours when the scheduler holds it already."""

    def configure_optimizers(self) -> dict[str, Any]:
        found = super().configure_optimizers()
        optim.fuse(found["optimizer"])
        return found


def save(trainer: pl.Trainer, path: Path) -> str:
    trainer.save_checkpoint(path)
    return type(trainer.optimizers[0]).__module__


@pytest.mark.parametrize("form", ["full", pytest.param("sharded", marks=pytest.mark.thorough)])
def test_checkpoints_pass_between_torchs_class_and_ours_in_other_stages(ranks, tmp_path, form):
    whole = train(Fit(arguments=ADAMW), tmp_path / "whole")
    mine, theirs = tmp_path / "mine.ckpt", tmp_path / "theirs.ckpt"
    first = [
        Fit({"zero": "stage3", "checkpoint": form}, 2, module=Ours, epochs=1, look=partial(save, path=mine)),
        Fit({"zero": "stage1", "checkpoint": form}, 2, module=LitGPT, epochs=1, look=partial(save, path=theirs)),
    ]
    second = [
        Fit({"zero": "stage1"}, 2, module=LitGPT, resume=mine, look=partial(save, path=tmp_path / "1")),
        Fit({"zero": "stage2"}, 2, module=Ours, resume=theirs, look=partial(save, path=tmp_path / "2")),
        Fit({"zero": "stage2", "offload": "cpu"}, 2, module=Ours, resume=theirs),
    ]
    for each in (*first, *second):
        each.arguments = ADAMW
    outcomes = ranks(2).run(train_all, [*first, *second], tmp_path / "ranks", timeout=120)[0]
    kinds = [each.notes.split(".")[0] for each in outcomes[:4]]
    assert kinds == ["lit_zero", "torch", "torch", "lit_zero"]
    for each in outcomes[2:]:
        assert each.steps == whole.steps
        assert distance(each.weights, whole.weights) < 1e-6
    if form == "full":
        plain = train(Fit(arguments=ADAMW, resume=mine), tmp_path / "plain")
        assert distance(plain.weights, whole.weights) < 1e-6, "in plain Lightning too"


def kind_of(trainer: pl.Trainer) -> str:
    return type(trainer.optimizers[0]).__module__


def test_the_strategy_lets_the_users_own_class_step_flat(ranks, tmp_path):
    fits = [Fit({"zero": "stage2", "fused": fused}, 2, look=kind_of, arguments=ADAMW) for fused in ("auto", "none")]
    ours, torchs = ranks(2).run(train_all, fits, tmp_path, timeout=120)[0]
    assert ours.notes == "lit_zero.optim.adam" and torchs.notes.startswith("torch.optim.")
    assert ours.column("train_loss_step") == pytest.approx(torchs.column("train_loss_step"), rel=1e-5)
    assert distance(ours.weights, torchs.weights) < 1e-6


def inner(fabric: Any, model: Any, optimizers: list[Any]) -> list[str]:
    return [type(optimizer.optimizer).__module__ for optimizer in optimizers]


def test_it_does_so_in_fabric(ranks):
    loops = [
        Loop({"zero": "stage2", "fused": fused}, 2, apart=apart, look=inner, steps=2)
        for fused in ("none", "auto")
        for apart in (False, True)
    ]
    plain, *others = ranks(2).run(all_in_fabric, loops)[0]
    assert [each.notes[0].split(".")[0] for each in (plain, *others)] == ["torch", "torch", "lit_zero", "lit_zero"]
    assert all(distance(each.weights, plain.weights) < 1e-9 for each in others)


def test_what_it_does_not_know_is_refused():
    with pytest.raises(ConfigError, match=r"fused='atuo' is not known. Did you mean 'auto'\?"):
        ZeroStrategy(fused="atuo")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="RMSprop has no fused step here"):
        ZeroStrategy(fused="auto").take_optimizers([torch.optim.RMSprop(nn.Linear(2, 2).parameters())])


class ExactOurs(Exact):
    """Steps flat."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.125, momentum=0.5)


def test_a_loss_scaler_with_clipping_equals_torchs_class_bit_for_bit(ranks, tmp_path):
    """Lightning refuses to clip for an optimizer that is given the loss scale; here it is not."""
    clip = {"gradient_clip_val": 2.0**-6, "gradient_clip_algorithm": "value"}
    fit: dict[str, Any] = {"arguments": {"overflows": (0, 3, 6)}, "look": scales}
    alone = train(Fit(trainer=half(**clip), module=Exact, **fit), tmp_path / "alone")
    unclipped = train(Fit(trainer=half(), module=Exact, **fit), tmp_path / "unclipped")
    assert distance(alone.weights, unclipped.weights) > 1e-3, "clipping must matter for the test to mean anything"
    fits = [Fit({"zero": Zero(stage, units=["Linear"])}, 2, half(**clip), module=ExactOurs, **fit) for stage in STAGES]
    for outcomes in ranks(2).run(train_all, fits, tmp_path, timeout=120):
        assert [each.notes for each in outcomes] == [alone.notes] * len(STAGES)
        assert all(same_bits(each.weights, alone.weights) for each in outcomes if each.weights)
