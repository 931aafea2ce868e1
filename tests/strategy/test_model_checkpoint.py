"""ModelCheckpoint, ``ckpt_path`` by name, and checkpoints that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lit_zero.core.errors import CheckpointError, LitZeroError
from tests.pool import RankPool
from tests.strategy.harness import Fit, LitGPT, loaders, make_trainer, outcome, same_bits, train
from tests.strategy.test_checkpoints import save

Ranks = Callable[[int], RankPool]
# Its validation loss falls and rises again within four epochs.
FIT = Fit(arguments={"optimizer": "sgd", "lr": 0.3}, epochs=4)


def fit_and_use(fit: Fit, folder: Path, last: Any) -> dict[str, Any]:
    """Train with a ModelCheckpoint, then use what it has saved by name; call it on every rank."""
    torch.manual_seed(0)
    keep = ModelCheckpoint(
        folder / "kept",
        "{epoch}-{step}",
        monitor="val_loss",
        save_top_k=2,
        save_last=last,
        auto_insert_metric_name=False,
    )
    callbacks = {"enable_checkpointing": True, "callbacks": [keep, LearningRateMonitor("step")]}
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder, **callbacks)
    trainer.fit(module, *loaders(fit))
    trained = outcome(trainer, fit, folder)
    validation = loaders(fit)[1]
    found: dict[str, Any] = {
        "names": sorted(path.name for path in (folder / "kept").iterdir()),
        "best": Path(keep.best_model_path).name,
        "score": float(keep.best_model_score),
        "losses": trained.column("val_loss"),
        "last": trainer.test(module, validation, ckpt_path="last", verbose=False)[0]["test_loss"],
        "tested": trainer.test(module, validation, ckpt_path="best", verbose=False)[0]["test_loss"],
    }
    trainer.fit_loop.max_epochs = 6
    trainer.fit(module, *loaders(fit), ckpt_path="last")
    found["continued"] = trainer.global_step
    found["weights"] = outcome(trainer, fit, folder).weights
    return found


@pytest.mark.thorough("full-stage2-True", "sharded-stage3-link")
@pytest.mark.parametrize("last", [True, "link"])
@pytest.mark.parametrize(("form", "stage"), [("full", "stage2"), ("sharded", "stage3")])
def test_top_k_best_and_last(ranks, tmp_path, form, stage, last):
    alone = fit_and_use(FIT, tmp_path / "alone", last)
    found = ranks(2).run(
        fit_and_use, replace(FIT, zero={"zero": stage, "checkpoint": form}, devices=2), tmp_path / "ranks", last
    )
    for mine in found:
        for key in ("names", "best", "continued"):
            assert mine[key] == alone[key]
        for key in ("score", "last", "tested"):
            assert mine[key] == pytest.approx(alone[key], rel=1e-5)
    assert alone["score"] == pytest.approx(min(alone["losses"])) and alone["tested"] == pytest.approx(alone["score"])
    assert alone["last"] == pytest.approx(alone["losses"][-1]) != pytest.approx(alone["score"])
    assert len(alone["names"]) == 3
    kept = tmp_path / "ranks" / "kept"
    assert (kept / alone["best"]).is_dir() == (form == "sharded")
    assert (kept / "last.ckpt").is_symlink() == (last == "link")
    for name, value in found[0]["weights"].items():
        torch.testing.assert_close(value, alone["weights"][name], rtol=1e-4, atol=1e-5)


# ---- checkpoints that do not fit: every rank says so, and the ranks go on living


def refused(fit: Fit, folder: Path, kind: type[Exception]) -> str:
    """Return the words in which a fit is refused."""
    with pytest.raises(kind) as caught:
        train(fit, folder)
    return str(caught.value)


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each format."""
    folder = tmp_path_factory.mktemp("saved")
    for form in ("full", "sharded"):
        fit = Fit({"zero": "stage2", "checkpoint": form}, 2, epochs=1, look=save)
        ranks(2).run(train, fit, folder / form)
    return {form: folder / form / "saved.ckpt" for form in ("full", "sharded")}


class Wider(LitGPT):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model.norm = torch.nn.LayerNorm(12, bias=False)
        self.more = torch.nn.Linear(5, 3)


@pytest.mark.parametrize("stage", ["none", "stage3"])
@pytest.mark.parametrize("form", ["full", "sharded"])
def test_a_checkpoint_of_another_model(ranks, tmp_path, saved, form, stage):
    fit = Fit({"zero": stage}, 2, module=Wider, resume=saved[form])
    for words in ranks(2).run(refused, fit, tmp_path, CheckpointError):
        assert words == (
            f"The checkpoint '{saved[form]}' is not one of this model. not in the checkpoint (2): more.weight, "
            "more.bias; only in the checkpoint (1): model.norm.bias. Build the model with the settings that wrote the "
            "checkpoint, or set strict_loading=False on the LightningModule to load what has the same name."
        )


class Loose(Wider):
    strict_loading = False


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_strict_loading_off_loads_what_has_the_same_name(ranks, tmp_path, saved, form):
    fit = Fit({"zero": "stage3"}, 2, module=Loose, resume=saved[form])
    for words in ranks(2).run(refused, fit, tmp_path, CheckpointError):
        assert "parameter groups of" in words, "the weights are taken, the optimizer's state cannot be"


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_another_optimizer(ranks, tmp_path, saved, form):
    fit = Fit({"zero": "stage3"}, 2, arguments={"optimizer": "adamw"}, resume=saved[form])
    for words in ranks(2).run(refused, fit, tmp_path, CheckpointError):
        assert words == (
            f"The checkpoint '{saved[form]}' is of another optimizer than AdamW: it lacks betas, eps. Use the "
            "optimizer that wrote the checkpoint, or load only its weights."
        )


def test_a_truncated_checkpoint(ranks, tmp_path, saved):
    path = tmp_path / "cut.ckpt"
    path.write_bytes(saved["full"].read_bytes()[:20_000])
    for words in ranks(2).run(refused, Fit({"zero": "stage2"}, 2, resume=path), tmp_path, CheckpointError):
        assert f"The checkpoint '{path}' (20000 bytes) is damaged" in words
        assert "copy it again, or go on from an earlier checkpoint" in words
    assert path.stat().st_size == 20_000


def copied(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_sharded_checkpoint_that_lost_a_part(ranks, tmp_path, saved):
    path = copied(saved["sharded"], tmp_path / "part.ckpt")
    (path / "__1_0.distcp").unlink(missing_ok=True)
    lost = sorted(path.glob("*.distcp"))[-1]
    lost.unlink()
    for words in ranks(2).run(refused, Fit({"zero": "stage2"}, 2, resume=path), tmp_path, CheckpointError):
        assert f"The checkpoint '{path}' is damaged" in words
        assert f"{lost.name} is missing" in words


def test_a_newer_format(ranks, tmp_path, saved):
    path = copied(saved["sharded"], tmp_path / "new.ckpt")
    header = json.loads((path / "lit_zero.json").read_text())
    (path / "lit_zero.json").write_text(json.dumps({**header, "format_version": 99, "lit_zero": "9.0"}))
    for words in ranks(2).run(refused, Fit({"zero": "stage2"}, 2, resume=path), tmp_path, CheckpointError):
        assert f"The checkpoint '{path}' has format version 99, written by lit_zero 9.0" in words


def test_a_checkpoint_that_is_not_there(ranks, tmp_path):
    fit = Fit({"zero": "stage2"}, 2, resume=tmp_path / "none.ckpt")
    for words in ranks(2).run(refused, fit, tmp_path, CheckpointError):
        assert words == f"There is no checkpoint '{tmp_path / 'none.ckpt'}'."


def test_weights_alone_cannot_be_resumed(ranks, tmp_path):
    for form in ("full", "sharded"):
        first = Fit({"zero": "stage2", "checkpoint": form}, 2, epochs=1, look=save_weights)
        ranks(2).run(train, first, tmp_path / form)
        fit = Fit({"zero": "stage3"}, 2, resume=tmp_path / form / "saved.ckpt")
        for words in ranks(2).run(refused, fit, tmp_path / form / "again", KeyError):
            assert "Trying to restore optimizer state but checkpoint contains only the model" in words


def save_weights(trainer: pl.Trainer) -> None:
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt", weights_only=True)


def test_a_checkpoint_plugin_is_refused(ranks, tmp_path):
    fit = Fit({"zero": "stage2"}, 2, {"plugins": [AsyncCheckpointIO()]})
    for words in ranks(2).run(refused, fit, tmp_path, LitZeroError):
        assert words == (
            "The plugin AsyncCheckpointIO has no effect: ZeroStrategy writes checkpoints itself, from all ranks. "
            "Remove it from Trainer(plugins=...)."
        )


def save_with_options(fit: Fit, folder: Path) -> str:
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    trainer.fit(module, *loaders(fit))
    with pytest.raises(LitZeroError) as caught:
        trainer.save_checkpoint(folder / "saved.ckpt", storage_options={"key": 1})
    return str(caught.value)


def test_storage_options_are_refused(ranks, tmp_path):
    for words in ranks(2).run(save_with_options, Fit({"zero": "stage2"}, 2, epochs=1), tmp_path):
        assert words.startswith("storage_options={'key': 1} has no effect")


def save_before(folder: Path) -> str:
    trainer = make_trainer(Fit({"zero": "stage2"}, 2), folder)
    with pytest.raises(LitZeroError) as caught:
        trainer.strategy.lightning_module_state_dict()
    return str(caught.value)


def test_there_is_nothing_to_save_before_setup(ranks, tmp_path):
    for words in ranks(2).run(save_before, tmp_path):
        assert words == "The strategy has no module yet: call trainer.fit, validate, test or predict first."


def save_over_a_folder(fit: Fit, folder: Path) -> tuple[str, bool]:
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    trainer.fit(module, *loaders(fit))
    before = trainer.strategy.lightning_module_state_dict()
    with pytest.raises(CheckpointError) as caught:
        trainer.save_checkpoint(folder.parent / "mine")
    after = trainer.strategy.lightning_module_state_dict()
    return str(caught.value), same_bits(before, after)


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_a_folder_of_the_users_is_not_replaced(ranks, tmp_path, form):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    fit = Fit({"zero": "stage3", "checkpoint": form}, 2, epochs=1)
    for words, same in ranks(2).run(save_over_a_folder, fit, tmp_path / "run"):
        assert "that is a folder, and not one that lit_zero wrote" in words
        assert same
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
