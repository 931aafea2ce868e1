"""Models and steps that a pipeline could get wrong without a word: each equals one process."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchmetrics.classification import MulticlassAccuracy

from lit_zero import ZeroStrategy
from lit_zero.core.errors import UnsupportedError
from lit_zero.pipeline.micro_batches import together
from lit_zero.strategy.work import Work
from tests.pipeline.reference import DropBlock, Random
from tests.pipeline.test_training import SCHEDULES, equal, piped
from tests.pool import RankFailure
from tests.strategy.harness import STAGES, VOCAB, Fit, LitGPT, Short, distance, loaders, make_trainer, train, train_all
from tests.zero.harness import GPT, Block

SPLIT = {name: SCHEDULES[name] for name in ("zero_bubble", "zbv")}


# ---- split backwards: gradients that do not meet the path of what was received


class FrozenFront(LitGPT):
    """Only the second half is trained, so nothing that crosses the boundary needs a gradient."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{**arguments, "tied": False})
        for module in (self.model.embedding, self.model.blocks[0], self.model.blocks[1]):
            module.requires_grad_(False)


class Turned(Block):
    """Its output is a view."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).mT.contiguous().mT


class Views(LitGPT):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for index in range(len(self.model.blocks)):
            self.model.blocks[index] = Turned(12)


class Attending(Block):
    """Given what comes from another list of blocks beside its own input."""

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        return super().forward(x + memory.mean(1, keepdim=True))


class TwoLists(GPT):
    """The second list's input is made on the stage of the first list's last block, from parameters of its own, and one
    parameter goes into both outputs of that stage.
    """

    def __init__(self) -> None:
        super().__init__(VOCAB, tied=False, layers=2)
        self.second = nn.Embedding(VOCAB, 12)
        self.scale = nn.Parameter(torch.ones(12))
        self.decoder = nn.ModuleList(Attending(12) for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        memory, y = x * self.scale, self.second(tokens.flip(1)) * self.scale
        for block in self.decoder:
            y = block(y, memory=memory)
        return self.head(self.norm(y))


class EncoderDecoder(LitGPT):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        torch.manual_seed(1)
        self.model = TwoLists()


CUT: dict[str, tuple[Any, dict[str, Any]]] = {
    "frozen front": (FrozenFront, {}),
    "views": (Views, {}),
    "two outputs": (EncoderDecoder, {"blocks": ["model.blocks", "model.decoder"]}),
}


@pytest.mark.thorough("views", "frozen front")
@pytest.mark.parametrize("name", CUT)
def test_split_backwards_reach_every_weight(ranks: Any, tmp_path: Path, name: str) -> None:
    module, given = CUT[name]
    arguments = {"layers": 4, "optimizer": "adamw", "lr": 1e-2}
    alone = train(Short(module=module, arguments=arguments), tmp_path / "alone")
    start = module(**arguments).state_dict()
    moved = {key for key in alone.weights if not torch.equal(alone.weights[key], start[key])}
    assert any("norm" in key for key in moved)
    fits = []
    for way in SPLIT.values():
        fit = replace(piped("stage2", **{"stages": 2, **way, **given}), module=module, arguments=arguments)
        fits.append(fit)
    for each in ranks(2).run(train_all, fits, tmp_path, timeout=120)[0]:
        equal(each, alone)


# ---- steps that do more than call the model


class Calling(LitGPT):
    """Calls itself, as most modules do; its steps name their arguments as they like."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens)

    def training_step(self, batch: list[torch.Tensor], _: int) -> dict[str, Any]:
        logits = self(batch[0][:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return {"loss": loss}

    def validation_step(self, *given: Any) -> None:
        batch, number = given
        super().validation_step(batch, number)


def validate_then_fit(fit: Fit, folder: Path) -> Any:
    torch.manual_seed(0)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    train_data, val_data = loaders(fit)
    trainer.validate(module, val_data, verbose=False)
    trainer.fit(module, train_data, val_data)
    return trainer.strategy.lightning_module_state_dict()


def test_a_module_that_calls_itself_is_validated_and_then_trained(ranks: Any, tmp_path: Path) -> None:
    fit = Short(module=Calling, arguments={"layers": 4})
    alone = validate_then_fit(fit, tmp_path / "alone")
    mine = ranks(2).run(validate_then_fit, replace(piped(), module=Calling), tmp_path)[0]
    assert distance(mine, alone) < 1e-6


class Probing(LitGPT):
    """Validation uses what training does not: a parameter that is registered long before it is used."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        model = self.model
        del self.model
        self.probe = nn.Linear(VOCAB, VOCAB)
        self.model = model

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        logits = self.model(batch[0])
        self.log("val_loss", logits.square().mean(), sync_dist=True)
        self.log("probed", self.probe(logits).square().mean(), sync_dist=True)


@pytest.mark.thorough
def test_validation_uses_what_training_does_not(ranks: Any, tmp_path: Path) -> None:
    fit = Short(module=Probing, arguments={"layers": 4})
    alone = train(fit, tmp_path / "alone")
    fits = [replace(piped(stage), module=Probing) for stage in STAGES]
    for each in ranks(2).run(train_all, fits, tmp_path)[0]:
        equal(each, alone)
        assert each.column("probed") == pytest.approx(alone.column("probed"), rel=1e-5)


class DrawingBlock(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (random.random() if self.training else 1.0)


class Drawing(Random):
    """Blocks that draw with Python's generator."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(dropout=False, **arguments)
        for index in range(len(self.model.blocks)):
            self.model.blocks[index] = DrawingBlock(12)


@pytest.mark.thorough
def test_draws_of_other_generators(ranks: Any, tmp_path: Path) -> None:
    alone = train(Short(module=Drawing, arguments={"layers": 4, "pieces": True}), tmp_path / "alone")
    fits = [replace(piped("stage2", **way), module=Drawing) for way in SCHEDULES.values()]
    for each in ranks(2).run(train_all, fits, tmp_path, timeout=120)[0]:
        equal(each, alone)


class Unsynchronised(LitGPT):
    """Its metric never exchanges states, and the ranks of a pipeline must agree all the same."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.accuracy = MulticlassAccuracy(VOCAB, average="micro", sync_on_compute=False)


def test_a_metric_that_does_not_exchange_is_the_same_on_every_rank(ranks: Any, tmp_path: Path) -> None:
    alone = train(Short(module=Unsynchronised, arguments={"layers": 4}), tmp_path / "alone")
    for each in ranks(2).run(train, replace(piped(), module=Unsynchronised), tmp_path / "piped"):
        assert each.metrics["val_accuracy"] == pytest.approx(alone.metrics["val_accuracy"], rel=1e-6)


def test_results_that_are_lists_are_put_together_as_batches_are_cut() -> None:
    parts = [[torch.ones(2, 3), torch.zeros(2)], [torch.ones(1, 3), torch.zeros(1)]]
    first, second = together(parts, [2 / 3, 1 / 3])
    assert first.shape == (3, 3) and second.shape == (3,)
    assert together([["a", "b"], ["c"]], [2 / 3, 1 / 3]) == ["a", "b", "c"]


class Recomputing(GPT):
    """The first block draws with Python's generator; the third, whose dropout draws with torch's, is recomputed."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = self.blocks[0](x) * (1 + (random.random() if self.training else 0))
        for block in self.blocks[1:]:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


class Recomputed(Random):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(dropout=False, **arguments)
        torch.manual_seed(1)
        self.model = Recomputing(VOCAB, layers=4)
        self.model.blocks[2] = DropBlock(12)


def test_a_stage_that_is_recomputed_after_other_micro_batches(ranks: Any, tmp_path: Path) -> None:
    """Of what came with the activation, only Python's generator had moved; torch's goes on from its own seed."""
    alone = train(Short(module=Recomputed, arguments={"pieces": True}), tmp_path / "alone")
    fits = [replace(piped("none", **SCHEDULES[name]), module=Recomputed) for name in ("gpipe", "zero_bubble")]
    for each in ranks(2).run(train_all, fits, tmp_path, timeout=120)[0]:
        equal(each, alone)


class OneElement(LitGPT):
    """Its loss has a dimension, as that of ``loss.mean(keepdim=True)``; what it returns beside it are numbers."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.notes: list[Any] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx).reshape(1)
        return loss if batch_idx % 2 else {"loss": loss, "index": batch_idx, "rows": len(batch[0])}

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        assert outputs["loss"].shape == (1,)
        self.notes.append([float(outputs["loss"]), outputs.get("index")])


def noted(trainer: pl.Trainer) -> Any:
    return trainer.lightning_module.notes


def test_a_loss_of_shape_1(ranks: Any, tmp_path: Path) -> None:
    alone = train(Short(module=OneElement, arguments={"layers": 4}, look=noted), tmp_path / "alone")
    fits = [replace(piped("stage2", **SCHEDULES[n]), module=OneElement, look=noted) for n in ("1f1b", "zero_bubble")]
    found = ranks(2).run(train_all, fits, tmp_path, timeout=120)
    for outcomes in found:
        for each in outcomes:
            assert [index for _, index in each.notes] == [index for _, index in alone.notes]
            assert [loss for loss, _ in each.notes] == pytest.approx([loss for loss, _ in alone.notes], rel=1e-5)
    for each in found[0]:
        equal(each, alone)


def test_numbers_that_a_step_returns_are_means() -> None:
    """One that is the same for every micro-batch stays what it is."""
    weights = [0.5, 0.25, 0.25]
    parts = [{"index": 3, "right": right, "fit": True, "share": right / 8} for right in (2, 4, 8)]
    assert together(parts, weights) == {"index": 3, "right": 4.0, "fit": True, "share": 0.5}
    assert type(together(parts, weights)["index"]) is int


# ---- what is saved


def averaged(fit: Fit, folder: Path) -> Any:
    """Return what a checkpoint of an average holds of the statistics that the last stage keeps."""
    callbacks = [EMAWeightAveraging(decay=0.8), ModelCheckpoint(folder, save_last=True)]
    train(replace(fit, trainer={"callbacks": callbacks, "enable_checkpointing": True}), folder)
    found = torch.load(folder / "last.ckpt", weights_only=False)["state_dict"]
    return {name: value for name, value in found.items() if "running" in name}


def test_an_averages_statistics_are_those_of_the_stage_that_keeps_them(ranks: Any, tmp_path: Path) -> None:
    arguments = {"layers": 4, "dropout": False, "norms": True}
    alone = averaged(Short(module=Random, arguments={**arguments, "pieces": True}), tmp_path / "alone")
    mine = ranks(2).run(averaged, replace(piped(), module=Random, arguments=arguments), tmp_path / "piped")[0]
    assert len(mine) == 4 and distance(mine, alone) < 1e-6


def state_bytes(fit: Fit, folder: Path) -> tuple[int, int]:
    """Return the bytes of this rank's model states, and the parameters of its stage."""
    torch.manual_seed(0)
    trainer = make_trainer(fit, folder)
    trainer.fit(fit.module(**fit.arguments), *loaders(fit))
    strategy = trainer.strategy
    assert isinstance(strategy, ZeroStrategy)
    here = sum(math.prod(info.shape) for lane in strategy.engine.lanes for info in lane.infos)
    return sum(strategy.engine.model_state_bytes().values()), here


@pytest.mark.thorough
def test_a_rank_holds_the_states_of_its_stage(ranks: Any, tmp_path: Path) -> None:
    """AdamW in fp32 holds 16 bytes for each parameter, whether the ranks are stages or not."""
    arguments = {"layers": 4, "tied": False, "optimizer": "adamw"}
    whole = sum(p.numel() for p in LitGPT(**arguments).parameters())
    for size in (2, 4):
        fit = replace(piped("none", size, stages=size), arguments=arguments, epochs=1)
        found = ranks(size).run(state_bytes, fit, tmp_path / str(size))
        assert sum(here for _, here in found) == whole
        assert max(here for _, here in found) < 1.5 * whole / size
        for used, here in found:
            assert used == pytest.approx(16 * here, rel=0.05)


# ---- failures in the middle


class Failing(LitGPT):
    """The step fails in the third batch, on one rank alone."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == 2 and self.hparams["lr"] == 1.0 and self.global_rank == 1:
            raise ValueError("before the model, on the last rank")
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2 and self.hparams["lr"] == 2.0:
            raise ValueError("after the model")
        return loss


@pytest.mark.parametrize(("lr", "words"), [(1.0, "before the model, on the last rank"), (2.0, "after the model")])
def test_a_step_that_fails_on_one_rank_ends_all(ranks: Any, tmp_path: Path, lr: float, words: str) -> None:
    fit = replace(piped(), module=Failing, arguments={"layers": 4, "lr": lr})
    with pytest.raises(RankFailure, match=words) as failure:
        ranks(2).run(train, fit, tmp_path, timeout=60)
    assert failure.value.rank == 1


@pytest.mark.parametrize(
    "loss", [torch.zeros(2, requires_grad=True), torch.zeros((), dtype=torch.cfloat).requires_grad_()]
)
def test_a_loss_that_is_not_one_real_number_is_refused(loss):
    work = object.__new__(Work)
    with pytest.raises(UnsupportedError, match="loss of shape .* but a backward starts from one real number"):
        work.loss(0, {"loss": loss})
