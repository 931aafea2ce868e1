"""Models that are built on the meta device, in the Trainer: each rank gives memory to its own stage alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.pipeline.test_refusals import refusals
from tests.pipeline.test_training import SCHEDULES, equal, piped
from tests.strategy.harness import VOCAB, LitGPT, Short, train, train_all
from tests.zero.harness import GPT

LAYERS = 8


class Late(LitGPT):
    """Built in ``configure_model``.

    Args:
        device: where to build; by default where the strategy wants it.
    """

    def __init__(self, device: str | None = None, **arguments: Any) -> None:
        super().__init__(tied=False)
        del self.model
        self.wanted, self.built = device, ""
        torch.manual_seed(0)

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            with torch.device(self.wanted or torch.empty(0).device):
                self.model = GPT(VOCAB, layers=LAYERS, tied=False)
            self.built = self.model.norm.weight.device.type

    def setup(self, stage: str) -> None:
        self.notes: list[int] = []

    def on_fit_start(self) -> None:
        """Count the bytes of parameters before the first step."""
        owners = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in self.parameters()}
        self.notes.append(sum(owners.values()))
        self.start = {name: self.read(name) for name, _ in self.named_parameters()}

    def read(self, name: str) -> torch.Tensor:
        strategy: Any = self.trainer.strategy
        full = getattr(strategy, "full", None)
        found: torch.Tensor = self.get_parameter(name).detach() if full is None else full.parameter(name)
        return found.clone()


def looked(trainer: pl.Trainer) -> Any:
    module, strategy = trainer.lightning_module, trainer.strategy
    engine = getattr(strategy, "engine", None)
    if engine is None:
        return module.built, module.start
    here = sum(math.prod(info.shape) for lane in engine.lanes for info in lane.infos)
    return module.built, module.start, module.notes[0], 4 * here


def test_only_a_stages_own_parameters_get_memory(ranks: Any, tmp_path: Path) -> None:
    """On the meta device by stage3, or by the user's own wish."""
    alone = train(Short(module=Late, look=looked), tmp_path / "alone")
    built, start = alone.notes
    assert built == "cpu"
    whole = 4 * sum(value.numel() for value in start.values())
    ways: list[tuple[str, dict[str, Any], Any]] = [
        ("stage3", {}, None),
        ("none", {}, "meta"),
        ("stage2", SCHEDULES["zbv"], "meta"),
        ("stage2", {}, None),
    ]
    fits = [
        replace(piped(stage, **way), module=Late, arguments={"device": device}, look=looked)
        for stage, way, device in ways
    ]
    found = ranks(2).run(train_all, fits, tmp_path, timeout=120)
    assert [each.notes[0] for each in found[0]] == ["meta", "meta", "meta", "cpu"]
    for outcomes in found:
        for each in outcomes:
            for name, value in start.items():
                assert torch.equal(each.notes[1][name], value), name
            *_, used, here = each.notes
            assert used == pytest.approx(here, rel=0.05) and here < 0.6 * whole
    for each in found[0]:
        equal(each, alone)


def test_pretrained_weights(ranks: Any, tmp_path: Path) -> None:
    """Each rank reads those of its stage; there are none to measure a time with."""
    pytest.importorskip("safetensors", reason="pip install lit-zero[models]")
    from tests.models.test_pretrained import Loaded, weights_to_load, write

    given: dict[str, Any] = {"module": Loaded, "arguments": {"path": write(tmp_path / "saved", weights_to_load())}}
    alone = train(Short(**given), tmp_path / "alone")
    fits = [replace(piped(stage), epochs=1, **given) for stage in ("none", "stage3")]
    for each in ranks(2).run(train_all, fits, tmp_path, timeout=120)[0]:
        equal(each, alone)
    refused = ranks(2).run(refusals, [replace(piped(balance="time"), **given)], tmp_path / "time")
    for [(_, words)] in refused:
        assert "has no values there: it is on the meta device, on other ranks, or read from a file later." in words
