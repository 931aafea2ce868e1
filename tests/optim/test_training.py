"""LAMB and Muon in the Trainer: checkpoints of any layout, pipelines, and groups that change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lit_zero import Pipeline
from lit_zero.core.errors import UnsupportedError
from lit_zero.optim import LAMB, Muon
from tests.fabric.harness import Loop
from tests.fabric.harness import train as in_fabric
from tests.fabric.harness import train_all as all_in_fabric
from tests.optim.whole import groups
from tests.strategy.harness import STAGES, Fit, LitGPT, Outcome, distance, loaders, make_trainer, train, train_all

OPTIMIZERS = ("lamb", "muon")


class Whole(LitGPT):
    """Trained by LAMB or Muon."""

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer: torch.optim.Optimizer
        if self.hparams["optimizer"] == "lamb":
            optimizer = LAMB(groups(self), lr=0.02, eps=1e-3)
        else:
            optimizer = Muon(groups(self, use_muon=False), lr=0.02, ns_dtype="float32", eps=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.1 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(name: str, stage: str | None = None, devices: int = 2, **more: Any) -> Fit:
    """Return a fit of two epochs in a stage, or on one device without lit_zero."""
    arguments = {"module": Whole, "arguments": {"optimizer": name, "layers": 2}, **more}
    return Fit(**arguments) if stage is None else Fit({"zero": stage}, devices, **arguments)


def saved(trainer: pl.Trainer) -> None:
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "end.ckpt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Outcome]]:
    """Two epochs on one device, and a checkpoint of the first in ``{name}/end.ckpt``."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for name in OPTIMIZERS:
        (folder / name).mkdir()
        train(fit(name, epochs=1, look=saved), folder / name)
        found[name] = train(fit(name), folder / f"{name}-whole")
    return folder, found


def equal(one: Outcome, other: Outcome) -> None:
    assert one.steps == other.steps
    assert distance(one.weights, other.weights) < 1e-5
    assert one.column("train_loss_step") == pytest.approx(other.column("train_loss_step"), rel=1e-4)


def there_and_back(folder: Path) -> dict[str, list[Outcome]]:
    """Train as a whole; go on from one device's checkpoint; save one for another number of ranks."""
    found = {}
    for name in OPTIMIZERS:
        mine = folder / name
        found[name] = [
            train(fit(name, "stage3"), mine / "whole"),
            train(fit(name, "stage2", resume=folder / "alone" / name / "end.ckpt"), mine / "resumed"),
        ]
        train(fit(name, "stage1", epochs=1, look=saved), mine / "first")
    return found


def test_checkpoints_know_no_layout(ranks: Any, alone: tuple[Path, dict[str, Outcome]], tmp_path: Path) -> None:
    (tmp_path / "alone").symlink_to(alone[0])
    found = ranks(2).run(there_and_back, tmp_path)[0]
    for name, expected in alone[1].items():
        whole, resumed = found[name]
        equal(whole, expected)
        assert distance(resumed.weights, expected.weights) < 1e-5 and resumed.steps == expected.steps
        back = train(fit(name, resume=tmp_path / name / "first" / "end.ckpt"), tmp_path / f"{name}-back")
        assert distance(back.weights, expected.weights) < 1e-5 and back.steps == expected.steps


def piped(name: str, stage: str, devices: int = 2) -> Fit:
    zero = {"zero": stage, "pipeline": Pipeline("1f1b", stages=2, micro_batches=4)}
    return Fit(zero, devices, module=Whole, arguments={"optimizer": name, "layers": 2})


def test_in_a_pipeline(ranks: Any, alone: tuple[Path, dict[str, Outcome]], tmp_path: Path) -> None:
    """Every position does it for what it holds; the embedding is held at both ends."""
    fits = [piped(name, "stage2") for name in OPTIMIZERS]
    for result, name in zip(ranks(2).run(train_all, fits, tmp_path)[0], OPTIMIZERS, strict=True):
        equal(result, alone[1][name])


@pytest.mark.thorough
def test_in_two_pipelines_and_every_stage(ranks: Any, alone: tuple[Path, dict[str, Outcome]], tmp_path: Path) -> None:
    names = [(name, stage) for name in OPTIMIZERS for stage in STAGES]
    fits = [piped(name, stage, 4) for name, stage in names]
    for result, (name, _) in zip(ranks(4).run(train_all, fits, tmp_path, timeout=240)[0], names, strict=True):
        equal(result, alone[1][name])


def both(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Matrices by Muon, vectors by LAMB."""
    params = list(model.parameters())
    return [
        Muon([p for p in params if p.ndim >= 2], lr=0.02, ns_dtype="float64"),
        LAMB([p for p in params if p.ndim < 2], lr=0.02, eps=1e-3),
    ]


def test_two_of_them_in_fabric(ranks: Any) -> None:
    """Gradients stay after a step there, and optimizers come after the module."""
    loop = Loop(optimizers=both, apart=True, clip={"max_norm": 0.3})
    alone = in_fabric(loop)
    loops = [replace(loop, zero={"zero": stage}, devices=2) for stage in STAGES]
    for each in ranks(2).run(all_in_fabric, loops)[0]:
        assert distance(each.weights, alone.weights) < 1e-9


def refused(folder: Path) -> str:
    given = Fit({"zero": "stage2", "offload": "cpu"}, 1, module=Whole, arguments={"optimizer": "muon"})
    try:
        make_trainer(given, folder).fit(Whole("muon"), *loaders(given))
    except UnsupportedError as error:
        return str(error)
    return ""


def test_with_offload_it_is_refused(ranks: Any, tmp_path: Path) -> None:
    [words] = ranks(1).run(refused, tmp_path)
    assert words.startswith("Muon looks at whole parameters, but with offload=cpu and offload=disk the step walks")
