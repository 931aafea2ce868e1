"""Weights from local ``.safetensors`` files: every rank reads its part, and no other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

import lit_zero
from lit_zero.comm import direct
from lit_zero.zero.lane import storage_bytes
from tests.strategy.harness import (
    STAGES,
    VOCAB,
    Fit,
    LitGPT,
    distance,
    loaders,
    make_trainer,
    same_bits,
    train,
    train_all,
)
from tests.strategy.test_checkpoints import save
from tests.zero.harness import GPT

DIM, LAYERS = 48, 6


class Body(GPT):
    """A GPT that can be built twice alike and tells what it was given.

    Args:
        seed: of its weights.
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is not None:
            torch.manual_seed(seed)
        super().__init__(VOCAB, DIM, LAYERS)
        self.register_buffer("table", torch.zeros(5))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.table)


def weights_to_load() -> dict[str, torch.Tensor]:
    model = Body(seed=77)
    model.table += torch.arange(5.0)
    return {name: value for name, value in model.state_dict().items() if name != "head.weight"}  # tied: written once


def write(folder: Path, weights: dict[str, torch.Tensor], files: int = 1, name: str = "model") -> Path:
    """Write weights as Hugging Face does: one file, or several and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if files == 1:
        save_file(weights, folder / f"{name}.safetensors")
        return folder
    names = list(weights)
    index: dict[str, str] = {}
    for number in range(files):
        file = f"{name}-{number + 1:05}-of-{files:05}.safetensors"
        part = {each: weights[each] for each in names[number::files]}
        save_file(part, folder / file)
        index.update(dict.fromkeys(part, file))
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(content))
    return folder


class Loaded(LitGPT):
    """Builds its model when the Trainer asks for it, and gives it pretrained weights.

    Args:
        path: of the weights.
        how: further arguments of ``load_pretrained``.
    """

    body = Body

    def __init__(self, path: Path, how: dict[str, Any] | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model: Any = None
        self.path, self.how = Path(path), how or {}

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.body()
            lit_zero.load_pretrained(self, self.path, into=self.model, **self.how)


def still(path: Path, **more: Any) -> dict[str, Any]:
    """Return arguments of a module that learns nothing."""
    return {"path": str(path), "lr": 0.0, **more}


SHORT = {"max_steps": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0}


def given(weights: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]) -> bool:
    """Return whether a fit without learning ended with ``weights``."""
    model = {name.removeprefix("model."): value for name, value in trained.items() if name.startswith("model.")}
    return same_bits(
        {**weights, "head.weight": weights["embedding.weight"]},
        {name: model[name] for name in weights} | {"head.weight": model["head.weight"]},
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pretrained")
    weights = weights_to_load()
    return {
        "one file": write(folder / "one", weights),
        "several files": write(folder / "several", weights, files=3),
        "path of a file": write(folder / "file", weights, name="weights") / "weights.safetensors",
        "a body in a model": write(folder / "body", {f"inner.{name}": value for name, value in weights.items()}),
    }


@pytest.mark.parametrize("kind", ["one file", "several files", "path of a file", "a body in a model"])
def test_weights_are_those_of_the_files(ranks, tmp_path, folders, kind):
    arguments = still(folders[kind], how={"prefix": "inner."} if kind == "a body in a model" else {})
    fit = Fit(module=Loaded, arguments=arguments, trainer=SHORT)
    outcomes = [train(fit, tmp_path / "alone")]
    for size in (2, 1):
        fits = [replace(fit, zero={"zero": stage}, devices=size) for stage in STAGES]
        outcomes += ranks(size).run(train_all, fits, tmp_path / str(size), timeout=120)[0]
    weights = weights_to_load()
    assert all(given(weights, each.weights) for each in outcomes)


@pytest.mark.thorough("bf16-mixed", "bf16-true")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_training_goes_on_from_them_as_in_one_process(ranks, tmp_path, folders, precision):
    fit = Fit(module=Loaded, arguments={"path": folders["several files"]}, epochs=1, trainer={"precision": precision})
    alone = train(fit, tmp_path / "alone")
    fits = [replace(fit, zero={"zero": stage}, devices=2) for stage in STAGES]
    stages = ranks(2).run(train_all, fits, tmp_path / "ranks", timeout=120)[0]
    for each in stages:
        assert (
            distance(each.weights, alone.weights) < {"32-true": 1e-6, "bf16-mixed": 1e-3, "bf16-true": 1e-2}[precision]
        )
        assert precision == "bf16-true" or same_bits(each.weights, stages[0].weights)
    assert alone.column("train_loss_step")[-1] < alone.column("train_loss_step")[0]


# ---- what is read


class Counting:
    """safetensors' ``safe_open``, which adds up the bytes of every tensor that is asked for."""

    asked = 0

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self.file = real_safe_open(*arguments, **more)

    def __enter__(self) -> Counting:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def keys(self) -> Sequence[str]:
        return self.file.keys()

    def get_slice(self, name: str) -> CountingSlice:
        return CountingSlice(self.file.get_slice(name))

    def get_tensor(self, name: str) -> torch.Tensor:
        return count(self.file.get_tensor(name))


class CountingSlice:
    def __init__(self, stored: Any) -> None:
        self.stored = stored

    def get_shape(self) -> Sequence[int]:
        return self.stored.get_shape()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return count(self.stored[index])


def count(tensor: torch.Tensor) -> torch.Tensor:
    Counting.asked += tensor.nbytes
    return tensor


real_safe_open = safetensors.safe_open


def held(trainer: pl.Trainer) -> int:
    """Return the bytes of this rank's part of the weights, as fp32."""
    return 4 * sum(piece.data.numel() for piece in trainer.strategy.engine.parameter_pieces())


def count_bytes(fits: list[Fit], folder: Path) -> list[tuple[int, int]]:
    """Return for every fit the bytes that this rank has read, and those that it holds."""
    safetensors.safe_open = Counting
    found = []
    try:
        for number, fit in enumerate(fits):
            Counting.asked = 0
            outcome = train(fit, folder / str(number))
            found.append((Counting.asked, outcome.notes))
    finally:
        safetensors.safe_open = real_safe_open
    return found


@pytest.mark.thorough("4")
@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_reads_only_its_part(ranks, tmp_path, folders, size):
    """Field: each rank loads all states (22)."""
    weights = weights_to_load()
    table = weights["table"].nbytes  # a buffer, whole on every rank
    whole = sum(value.nbytes for value in weights.values()) - table
    for kind in ("one file", "several files"):
        fit = Fit(None, size, module=Loaded, arguments=still(folders[kind]), trainer=SHORT, look=held)
        fits = [replace(fit, zero={"zero": stage}) for stage in STAGES]
        for number, found in enumerate(zip(*ranks(size).run(count_bytes, fits, tmp_path / kind), strict=True)):
            read = [each - table for each, _ in found]
            if STAGES[number] == "none":
                assert read == [whole] * size, "where every rank holds all, every rank reads all"
            else:
                assert read == [own for _, own in found], "what a rank holds, to the byte"
                assert sum(read) == whole, "every byte is read by one rank"
                assert max(read) < 1.1 * whole / size


class Weighed(Loaded):
    """Looks at the memory of its parameters between ``configure_model`` and the setup."""

    def configure_model(self) -> None:
        super().configure_model()
        self.memory = storage_bytes(self.model.parameters(), set())
        self.meta = sum(p.is_meta for p in self.model.parameters())


def memory(trainer: pl.Trainer) -> tuple[int, int]:
    return trainer.lightning_module.memory, trainer.lightning_module.meta


def test_what_waits_for_its_value_takes_no_memory(ranks, tmp_path, folders):
    """What a rank holds afterwards is the subject of tests/strategy/test_deferred.py and tests/zero/test_bytes.py."""
    fit = Fit(module=Weighed, arguments=still(folders["several files"]), trainer=SHORT, look=memory)
    fits = [replace(fit, zero={"zero": stage}, devices=2) for stage in STAGES]
    for each in ranks(2).run(train_all, fits, tmp_path):
        assert [outcome.notes for outcome in each] == [(16, 0)] * 4


def test_nothing_of_the_model_is_sent(ranks, tmp_path, folders):
    """What comes from files need not be agreed on first."""
    fit = Fit({"zero": "stage3"}, 2, module=Loaded, arguments=still(folders["one file"]), trainer=SHORT)
    whole = sum(value.nbytes for value in weights_to_load().values())
    sent = ranks(2).run(bytes_sent_in_setup, fit, tmp_path)
    assert max(sent) < 0.01 * whole
    plain = replace(fit, module=LitGPT, arguments={"lr": 0.0})
    assert ranks(2).run(bytes_sent_in_setup, plain, tmp_path)[0] > 4 * sum(p.numel() for p in GPT(VOCAB).parameters())


def bytes_sent_in_setup(fit: Fit, folder: Path) -> int:
    sent = 0
    real = direct.DirectExchange.broadcast

    def counted(self: Any, value: torch.Tensor) -> None:
        nonlocal sent
        sent += value.nbytes
        real(self, value)

    direct.DirectExchange.broadcast = counted
    try:
        train(fit, folder)
    finally:
        direct.DirectExchange.broadcast = real
    return sent


# ---- models that differ from the files


class WithHead(Body):
    """A new head on an old body, and a piece that nobody needs any more."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(DIM, 3)


class LoadedWithHead(Loaded):
    body = WithHead


@pytest.mark.parametrize("size", [1, 2])
def test_a_new_head_keeps_its_own_initialisation(ranks, tmp_path, size):
    weights = {**weights_to_load(), "pooler.weight": torch.zeros(3)}
    path = write(tmp_path / "saved", weights)
    fit = Fit(module=LoadedWithHead, arguments=still(path, how={"ignore": ["score.*", "pooler.weight"]}), trainer=SHORT)
    alone = train(fit, tmp_path / "alone")
    fits = [replace(fit, zero={"zero": stage}, devices=size) for stage in STAGES]
    for each in ranks(size).run(train_all, fits, tmp_path / "ranks", timeout=120)[0]:
        assert given(weights_to_load(), each.weights)
        head = each.weights["model.score.weight"]
        assert head.abs().max() <= DIM**-0.5 and head.std() > 0.1 * DIM**-0.5, "as nn.Linear draws it"
    assert given(weights_to_load(), alone.weights)


def test_another_dtype_in_the_files(ranks, tmp_path):
    rounded = {name: value.bfloat16() for name, value in weights_to_load().items()}
    fit = Fit({"zero": "stage3"}, 2, module=Loaded, arguments=still(write(tmp_path / "saved", rounded)), trainer=SHORT)
    trained = ranks(2).run(train, fit, tmp_path)[0].weights
    assert given({name: value.float() for name, value in rounded.items()}, trained)


def test_a_tied_weight_under_its_other_name(ranks, tmp_path):
    weights = weights_to_load()
    weights["head.weight"] = weights.pop("embedding.weight")
    fit = Fit({"zero": "stage3"}, 2, module=Loaded, arguments=still(write(tmp_path / "saved", weights)), trainer=SHORT)
    assert given(weights_to_load(), ranks(2).run(train, fit, tmp_path)[0].weights)


class Wrapper(nn.Module):
    """What a library wraps a model in."""

    def __init__(self, inner: Body) -> None:
        super().__init__()
        self.inner, self.loss = inner, inner.loss

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.inner(tokens)


class Wrapped(Loaded):
    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            self.model = Wrapper(self.model)


def test_the_model_may_be_wrapped_afterwards(ranks, tmp_path, folders):
    fit = Fit({"zero": "stage3"}, 2, module=Wrapped, arguments=still(folders["one file"]), trainer=SHORT)
    trained = ranks(2).run(train, fit, tmp_path)[0].weights
    assert given(weights_to_load(), {name.replace(".inner", ""): value for name, value in trained.items()})


class InTwoParts(Loaded):
    """Two calls, each for a part."""

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.body()
            lit_zero.load_pretrained(self, self.path, prefix="blocks.", into=self.model.blocks)
            lit_zero.load_pretrained(self, self.path, into=self.model, ignore=["blocks.*"])


@pytest.mark.parametrize("stage", ["none", "stage3"])
def test_in_two_parts(ranks, tmp_path, folders, stage):
    fit = Fit({"zero": stage}, 2, module=InTwoParts, arguments=still(folders["several files"]), trainer=SHORT)
    assert given(weights_to_load(), ranks(2).run(train, fit, tmp_path)[0].weights)


def test_a_checkpoint_stands_above_them(ranks, tmp_path, folders):
    arguments = {"path": str(folders["one file"]), "optimizer": "adamw", "lr": 1e-2}
    whole = Fit({"zero": "stage3"}, 2, module=Loaded, arguments=arguments)
    expected, _ = ranks(2).run(train_all, [whole, replace(whole, epochs=1, look=save)], tmp_path)[0]
    resumed = ranks(2).run(train, replace(whole, resume=tmp_path / "1" / "saved.ckpt"), tmp_path / "second")[0]
    assert same_bits(resumed.weights, expected.weights)


def validate_then_fit(fit: Fit, folder: Path) -> bool:
    torch.manual_seed(0)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    before = trainer.validate(module, loaders(fit)[1], verbose=False)[0]["val_loss"]
    trainer.fit(module, *loaders(fit))
    after = trainer.validate(module, loaders(fit)[1], verbose=False)[0]["val_loss"]
    whole = trainer.strategy.lightning_module_state_dict()
    assert before == after
    return not whole or given(weights_to_load(), whole)


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_validation_first(ranks, tmp_path, folders, stage):
    """Field: validation before training makes two engines on one model (24)."""
    fit = Fit({"zero": stage}, 2, module=Loaded, arguments=still(folders["one file"]), trainer={"max_steps": 1})
    assert ranks(2).run(validate_then_fit, fit, tmp_path) == [True, True]
