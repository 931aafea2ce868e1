"""``fabric.save`` and ``fabric.load``: any stage, rank count and format to any other, and to and from stock Fabric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_zero.cli import main
from tests.fabric.harness import (
    STAGES,
    Loop,
    Outcome,
    go_on,
    make_fabric,
    one_adamw,
    save,
    set_up,
    train,
    two,
    whole,
)
from tests.pool import RankPool
from tests.strategy.harness import distance, same_bits
from tests.strategy.test_checkpoints import _same as same_content

Ranks = Callable[[int], RankPool]
STEPS = 4
HALF = Loop(steps=STEPS // 2, optimizers=two)


def first_half(loop: Loop, path: Path) -> list[float]:
    """Train, and save."""
    fabric = make_fabric(loop)
    model, optimizers = set_up(fabric, loop)
    losses, _ = go_on(fabric, model, optimizers, loop, range(loop.steps))
    save(fabric, path, model, optimizers, loop.steps)
    return losses


def second_half(loop: Loop, path: Path, order: int = 1) -> Outcome:
    """Go on from a checkpoint with a model of other weights."""
    fabric = make_fabric(loop)
    model, optimizers = set_up(fabric, replace(loop, model=other_weights(loop.model)))
    named = {f"optimizer{number}": each for number, each in enumerate(optimizers)}
    state: dict[str, Any] = {"model": model, "step": 0, **named}
    rest = fabric.load(path, dict(list(state.items())[::order]) if order < 0 else state)
    assert rest == {}
    if order > 0:
        assert state["step"] == STEPS // 2
    losses, _ = go_on(fabric, model, optimizers, loop, range(STEPS // 2, STEPS))
    return Outcome(whole(fabric, model), losses, [])


def other_weights(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        torch.manual_seed(7)
        return build()

    return built


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """Stock Fabric on one device: the uninterrupted run, and the checkpoint of its first half."""
    path = tmp_path_factory.mktemp("plain") / "half.ckpt"
    first_half(HALF, path)
    return train(replace(HALF, steps=STEPS)), path


def check(found: Outcome, expected: Outcome) -> None:
    assert distance(found.weights, expected.weights) < 1e-9
    assert found.losses == pytest.approx(expected.losses[STEPS // 2 :], rel=1e-6)


@pytest.mark.parametrize(
    ("form", "stage", "size", "other_stage", "other_size"),
    [
        ("full", "stage3", 2, "stage1", 1),
        ("full", "none", 1, "stage3", 2),
        ("full", "stage2", 2, "stage2", 2),
        ("sharded", "stage3", 2, "none", 1),
        ("sharded", "stage1", 2, "stage3", 4),
        ("sharded", "none", 1, "stage2", 2),
    ],
)
def test_from_any_stage_and_size_to_any_other(ranks, tmp_path, plain, form, stage, size, other_stage, other_size):
    path = tmp_path / "half"
    ranks(size).run(first_half, replace(HALF, zero={"zero": stage, "checkpoint": form}, devices=size), path)
    assert path.is_dir() == (form == "sharded")
    loop = replace(HALF, zero={"zero": other_stage}, devices=other_size)
    check(ranks(other_size).run(second_half, loop, path, -1 if form == "full" else 1)[0], plain[0])


def test_stock_checkpoints_go_on_in_every_stage(ranks, plain):
    for stage in STAGES:
        check(ranks(2).run(second_half, replace(HALF, zero={"zero": stage}, devices=2), plain[1])[0], plain[0])


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_a_full_or_consolidated_checkpoint_is_a_stock_one(ranks, tmp_path, plain, form, capsys):
    path = tmp_path / "half"
    ranks(2).run(first_half, replace(HALF, zero={"zero": "stage3", "checkpoint": form}, devices=2), path)
    if form == "sharded":
        assert main(["consolidate", str(path), str(tmp_path / "half.ckpt")]) == 0, capsys.readouterr().err
        path = tmp_path / "half.ckpt"
    mine, theirs = (torch.load(each, weights_only=True) for each in (path, plain[1]))
    same_content({key: mine[key] for key in theirs}, theirs, "")
    assert mine.keys() == theirs.keys()
    check(second_half(HALF, path), plain[0])


def test_bf16_mixed_goes_on_bit_equal(ranks, tmp_path):
    for form in ("full", "sharded"):
        loop = Loop({"zero": "stage3", "checkpoint": form}, 2, {"precision": "bf16-mixed"}, steps=2, optimizers=two)
        expected = ranks(2).run(train, replace(loop, steps=STEPS))[0]
        ranks(2).run(first_half, loop, tmp_path / form)
        assert same_bits(ranks(2).run(second_half, loop, tmp_path / form)[0].weights, expected.weights)


# ---- filters, strictness, parts


def only_blocks(name: str, value: torch.Tensor) -> bool:
    assert value.shape != ()  # a value of the whole shape, which a sharded save keeps on no rank
    return name.startswith("blocks")


def filtered(loop: Loop, folder: Path) -> dict[str, Any]:
    """Save the blocks alone and load them into other weights; return both, and what is refused."""
    fabric = make_fabric(loop)
    model, _ = set_up(fabric, loop)
    model.module.register_buffer("batches", torch.zeros(1, dtype=torch.int64))  # of a shape
    before = whole(fabric, model)
    fabric.save(folder / "part", {"model": model, "step": 3}, filter={"model": only_blocks})
    target, _ = set_up(fabric, replace(loop, model=other_weights(loop.model)))
    elsewhere = whole(fabric, target)
    words = []
    for arguments in ({}, {"strict": False}):
        try:
            rest = fabric.load(folder / "part", {"model": target}, **arguments)
        except Exception as error:
            words.append(str(error))
    return {"before": before, "elsewhere": elsewhere, "after": whole(fabric, target), "rest": rest, "words": words}


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_a_filter(ranks, tmp_path, form):
    found = ranks(2).run(filtered, Loop({"zero": "stage3", "checkpoint": form}, 2, {}), tmp_path)[0]
    for name, value in found["after"].items():
        assert torch.equal(value, found["before" if name.startswith("blocks") else "elsewhere"][name]), name
    assert found["rest"] == {"step": 3}
    assert len(found["words"]) == 1 and "not in the checkpoint (4): embedding.weight" in found["words"][0]
    if form == "full":
        saved = torch.load(tmp_path / "part", weights_only=True)["model"]
        assert set(saved) == {name for name in found["before"] if name.startswith("blocks")}


def parts(loop: Loop, folder: Path) -> dict[str, Any]:
    """Save one of two optimizers, a scheduler, a plain module and a raw state dict; load them in other ways."""
    fabric = make_fabric(loop)
    model, optimizers = set_up(fabric, loop)
    go_on(fabric, model, optimizers, loop, range(2))
    side, schedule = nn.Linear(2, 2), torch.optim.lr_scheduler.StepLR(optimizers[1].optimizer, 1)
    schedule.last_epoch = 5
    state = {"net": model, "second": optimizers[1], "side": side, "schedule": schedule, "words": ["a"]}
    fabric.save(folder / "parts", state)
    expected = whole(fabric, model)
    target, targets = set_up(fabric, replace(loop, model=other_weights(loop.model)))
    fresh, clock = nn.Linear(2, 2), torch.optim.lr_scheduler.StepLR(targets[1].optimizer, 1)
    again: dict[str, Any] = {"second": targets[1], "side": fresh, "schedule": clock, "words": None, "net": target}
    rest = fabric.load(folder / "parts", again)
    missing = ""
    try:
        fabric.load(folder / "parts", {"absent": 1})
    except KeyError as error:
        missing = str(error)
    fabric.load(folder / "parts", {"absent": 1}, strict=False)
    momenta = [fabric.strategy.get_optimizer_state(each.optimizer) for each in (optimizers[1], targets[1])]
    empty = fabric.strategy.get_optimizer_state(targets[0].optimizer)
    raw, _ = set_up(fabric, replace(loop, model=other_weights(loop.model)))
    weights = fabric.strategy.get_module_state_dict(model)
    if fabric.is_global_zero:
        torch.save(weights, folder / "raw.pt")
        torch.save(momenta[0], folder / "momenta.pt")
    fabric.barrier()
    fabric.load_raw(folder / "raw.pt", raw)
    fabric.load_raw(folder / "momenta.pt", targets[1])
    return {
        "weights": [expected, whole(fabric, target), whole(fabric, raw)],
        "momenta": momenta,
        "empty": empty,
        "same": torch.equal(side.weight, fresh.weight) and clock.last_epoch == 5,
        "words": again["words"],
        "rest": rest,
        "missing": missing,
    }


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_parts_of_a_state(ranks, tmp_path, form):
    loop = Loop({"zero": "stage3", "checkpoint": form}, 2, {}, optimizers=two)
    found = ranks(2).run(parts, loop, tmp_path)[0]
    assert same_bits(found["weights"][1], found["weights"][0])
    assert same_bits(found["weights"][2], found["weights"][0])
    same_content(found["momenta"][0], found["momenta"][1], "")
    assert found["momenta"][0]["state"] and not found["empty"]["state"]
    assert found["same"] and found["words"] == ["a"] and found["rest"] == {}
    assert "The requested state contains a key 'absent'" in found["missing"]


def refusals(loop: Loop, folder: Path) -> dict[str, str]:
    """Try what a sharded checkpoint cannot do; return the words of every error."""
    fabric = make_fabric(loop)
    model, [optimizer] = set_up(fabric, loop)
    other, _ = set_up(fabric, loop)
    save(fabric, folder / "whole", model, [optimizer], 1)
    found: dict[str, str] = {}

    def note(name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            found[name] = str(error)

    note("two", lambda: fabric.save(folder / "x", {"a": model, "b": other}))
    note("foreign", lambda: fabric.save(folder / "x", {"b": other, "optimizer": optimizer}))
    keep = {"optimizer": lambda name, value: True}
    note("filter", lambda: fabric.save(folder / "x", {"a": model, "optimizer": optimizer}, filter=keep))
    reads = {"a": lambda name, value: bool((value > 0).any())}
    note("reads", lambda: fabric.save(folder / "x", {"a": model}, filter=reads))
    note("nothing", lambda: fabric.load(folder / "whole"))
    note("key", lambda: fabric.load(folder / "whole", {"step": model}))
    note("optimizer key", lambda: fabric.load(folder / "whole", {"step": optimizer}))
    note("unmanaged", lambda: fabric.load(folder / "whole", {"model": nn.Linear(2, 2)}))
    note("alone", lambda: fabric.load_raw(folder / "whole", optimizer))
    note("none", lambda: fabric.load(folder / "none", {"model": model}))
    return found


def test_refusals(ranks, tmp_path):
    loop = Loop({"zero": "stage3", "checkpoint": "sharded"}, 2, {}, optimizers=one_adamw)
    found = ranks(2).run(refusals, loop, tmp_path)[0]
    words = {
        "two": "holds 2 modules (a, b)",
        "foreign": "Save every module in a folder of its own, or use checkpoint='full'",
        "filter": "Filter the module only, or use checkpoint='full'",
        "reads": "meta",
        "nothing": "give fabric.load a state with the module to read it into (its key is 'model')",
        "key": "holds a module under 'model', not under 'step'",
        "optimizer key": "holds optimizers under optimizer0, not under 'step'",
        "unmanaged": "Call fabric.setup first",
        "alone": "not into a AdamW alone",
        "none": "There is no checkpoint",
    }
    assert found.keys() == words.keys()
    for name, part in words.items():
        assert part in found[name], (name, found[name])


# ---- checkpoints of a Trainer


def from_trainer(loop: Loop, folder: Path, form: str) -> list[dict[str, torch.Tensor]]:
    """Let a Trainer write a checkpoint and read its weights with Fabric."""
    from tests.strategy.harness import Fit, LitGPT, loaders, make_trainer

    torch.manual_seed(0)
    fit = Fit({"zero": "stage3", "checkpoint": form}, 2)
    module, trainer = LitGPT(), make_trainer(fit, folder)
    trainer.validate(module, loaders(fit)[1], verbose=False)
    trainer.save_checkpoint(folder / "trainer.ckpt")
    expected = {name: value.clone() for name, value in trainer.strategy.checkpoints.whole_weights().items()}
    fabric = make_fabric(loop)
    torch.manual_seed(7)
    model = fabric.setup_module(LitGPT())
    fabric.load(folder / "trainer.ckpt", {"state_dict": model})
    return [expected, whole(fabric, model)]


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_weights_of_a_trainer(ranks, tmp_path, form):
    expected, found = ranks(2).run(from_trainer, Loop("zero2", 2, {}), tmp_path, form)[0]
    assert same_bits(found, expected)
