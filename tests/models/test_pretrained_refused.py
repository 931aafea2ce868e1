"""What ``load_pretrained`` refuses, and in which words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lit_zero
from lit_zero.core.errors import CheckpointError, ConfigError, LitZeroError
from tests.models.test_pretrained import DIM, SHORT, Body, Loaded, folders, still, weights_to_load, write
from tests.strategy.harness import Fit, loaders, make_trainer
from tests.strategy.test_model_checkpoint import refused

__all__ = ["folders"]  # a fixture


class Unguarded(Loaded):
    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.body()
        lit_zero.load_pretrained(self, self.path, into=self.model)


def fit_then_validate(fit: Fit, folder: Path) -> str:
    torch.manual_seed(0)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    trainer.fit(module, *loaders(fit))
    with pytest.raises(LitZeroError) as caught:
        trainer.validate(module, loaders(fit)[1], verbose=False)
    return str(caught.value)


def test_weights_that_would_undo_a_training(ranks, tmp_path, folders):
    fit = Fit({"zero": "stage3"}, 2, module=Unguarded, arguments=still(folders["one file"]), trainer=SHORT)
    for words in ranks(2).run(fit_then_validate, fit, tmp_path):
        assert words == (
            f"load_pretrained('{folders['one file']}') was called for a model that has been set up already, and would "
            "throw away what it has learned. Let configure_model do its work once: if self.model is None: ..."
        )


class Replaced(Loaded):
    def configure_model(self) -> None:
        super().configure_model()
        self.model.norm.weight = nn.Parameter(torch.ones(DIM))


def test_a_parameter_that_is_replaced_afterwards(ranks, tmp_path, folders):
    path = folders["one file"]
    fit = Fit({"zero": "stage3"}, 2, module=Replaced, arguments=still(path), trainer=SHORT)
    for words in ranks(2).run(refused, fit, tmp_path, LitZeroError):
        assert words == (
            f"'norm.weight' was replaced after load_pretrained had found its value in '{path}', which would be lost. "
            "Call load_pretrained after what replaces it."
        )


def load(path: Path, model: nn.Module, **how: Any) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        lit_zero.load_pretrained(model, path, **how)
    return str(caught.value)


def test_names_and_shapes_that_differ(tmp_path):
    weights = weights_to_load()
    weights["norms.weight"] = weights.pop("norm.weight")
    weights["blocks.0.up.weight"] = torch.zeros(3, 3)
    path = write(tmp_path / "saved", weights)
    assert load(path, Body()) == (
        f"The weights in '{path}' are not those of Body. not in the files (1): norm.weight; only in the files (1): "
        "norms.weight; different shapes (1): blocks.0.up.weight is (3, 3) in the files and (192, 48) in the model. "
        "Build the model with the settings of the files, load into the part of it that they belong to (into=, "
        "prefix=), or name in ignore=[...] what is to keep its own initialisation or is not wanted."
    )
    wanted = ["norm.weight", "norms.weight", "blocks.0.up.weight"]
    model = Body()
    lit_zero.load_pretrained(model, path, ignore=wanted)
    assert torch.equal(model.norm.bias, weights["norm.bias"]) and torch.equal(
        model.head.weight, weights["embedding.weight"]
    )


def test_a_pattern_without_effect(folders):
    words = load(folders["one file"], Body(), ignore=["score.*"])
    assert words == (
        f"ignore='score.*' has no effect: neither Body nor '{folders['one file']}' has such a name. Names look like "
        "table, embedding.weight and blocks.0.down.bias, blocks.0.down.weight."
    )


def test_a_model_without_memory(folders):
    with torch.device("meta"):
        model = Body()
    assert load(folders["one file"], model) == (
        f"'table' is on the meta device, where it cannot take a value from '{folders['one file']}'. Call "
        "load_pretrained in configure_model under ZeroStrategy, which reads the weights once it has given the model "
        "memory; or build the model on a real device."
    )


def test_files_that_are_not_there(tmp_path):
    nowhere, empty, two = tmp_path / "nowhere", tmp_path / "empty", tmp_path / "two"
    assert load(nowhere, Body()) == (
        f"There is no '{nowhere}': a .safetensors file was expected, or a folder with one. lit_zero downloads nothing; "
        "a model of a hub has to be on this machine."
    )
    empty.mkdir()
    start = "must hold one *.safetensors.index.json or else one *.safetensors; it holds"
    assert f"{start} nothing." in load(empty, Body())
    write(two, {"a": torch.zeros(1)}, name="one")
    write(two, {"a": torch.zeros(1)}, name="two")
    assert f"{start} one.safetensors, two.safetensors. Give the path" in load(two, Body())


def test_files_that_are_damaged(tmp_path):
    path = write(tmp_path / "several", weights_to_load(), files=3)
    index, first = path / "model.safetensors.index.json", path / "model-00001-of-00003.safetensors"
    content = first.read_bytes()
    first.unlink()
    assert load(path, Body()) == f"'{index}' names files that are not there (1): {first.name}."
    first.write_bytes(content[:-8])
    assert load(path, Body()).startswith(f"'{first}' cannot be read as a .safetensors file: ")
    first.write_bytes((path / "model-00002-of-00003.safetensors").read_bytes())
    assert load(path, Body()).startswith(f"'{first}' does not hold blocks.0.")
    index.write_text("[]")
    assert load(path, Body()).startswith(f"'{index}' cannot be read as an index of .safetensors files: ")


def test_the_package_is_missing(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert load(folders["one file"], Body()).startswith(
        "Reading .safetensors needs the package safetensors: pip install safetensors"
    )
