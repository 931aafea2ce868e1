"""The ranks of a pipeline train on one batch, whatever their data loaders give; batches of every structure and size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lit_zero import Zero
from lit_zero.core.errors import ConfigError
from tests.pipeline.test_training import SCHEDULES, equal, piped
from tests.pool import RankFailure
from tests.strategy.harness import VOCAB, Fit, LitGPT, Short, distance, loaders, make_trainer, outcome, train, train_all


class Rolled(Dataset[Any]):
    """Rows that are drawn anew each time, from generators that differ from process to process."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randint(0, VOCAB, (9,))


class Seeing(LitGPT):
    """Notes what it is given."""

    def __init__(self) -> None:
        super().__init__(layers=4)
        self.seen: list[tuple[int, ...]] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append(tuple(batch.flatten().tolist()))
        loss = self.model.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)  # each rank weights it by rows for itself
        return loss


def random_data(fit: Fit, folder: Path, workers: int) -> Any:
    """Train with data loaders that do not agree: every rank has a seed of its own, and shuffles by itself."""
    torch.manual_seed(0)
    module = Seeing()
    trainer = make_trainer(fit, folder, use_distributed_sampler=False)
    rank = dist.get_rank()
    torch.manual_seed(rank)
    size = 8 if rank == 0 else 10  # three batches for both; the last one has 6 rows for one and 2 for the other
    data = DataLoader(Rolled(), size, shuffle=True, num_workers=workers)
    trainer.fit(module, data)
    weights = trainer.strategy.lightning_module_state_dict()
    return module.seen, {k: float(v) for k, v in trainer.callback_metrics.items()}, weights


@pytest.mark.parametrize("workers", [0, 1])
def test_ranks_never_train_on_different_batches(ranks: Any, tmp_path: Path, workers: int) -> None:
    fit = replace(piped("stage2"), epochs=2)
    one, other = ranks(2).run(random_data, fit, tmp_path, workers)
    assert len(one[0]) == 2 * 3 * 4 and len(set(one[0])) == len(one[0])
    assert one[0] == other[0]
    assert one[1] == other[1] and {"train_loss", "train_loss_step", "train_loss_epoch"} <= set(one[1])


# ---- structure


class Nested(LitGPT):
    """A batch of mappings, tuples, texts and numbers."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        tokens, (weight, texts) = batch["tokens"], batch["more"]
        assert len(texts) == len(tokens) and [int(text) for text in texts] == tokens[:, 0].tolist()
        assert batch["scale"].dim() == 0
        losses = F.cross_entropy(self.model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
        loss = (losses * weight).mean() * batch["scale"]
        self.log("train_loss", loss, on_step=True, on_epoch=True, batch_size=len(tokens))
        return loss


def nested(rows: list[Any]) -> dict[str, Any]:
    tokens = torch.stack([row[0] for row in rows])
    texts = [str(int(number)) for number in tokens[:, 0]]
    return {"tokens": tokens, "more": (tokens[:, 1] / VOCAB, texts), "scale": torch.tensor(2.0)}


def shorter(rows: list[Any]) -> list[torch.Tensor]:
    """Return a batch whose length depends on what is in it."""
    tokens = torch.stack([row[0] for row in rows])
    return [tokens[:, : 4 + int(tokens.sum()) % 5]]


def interleave(batch: Any, count: int) -> list[Any]:
    """Deal the rows out, and make fewer micro-batches than are asked for."""
    return [[batch[0][number::3]] for number in range(3) if len(batch[0][number::3])]


def collated(fit: Fit, folder: Path, collate: Any) -> Any:
    """Train with a collate function for the training data."""
    torch.manual_seed(0)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    train_data, val_data = loaders(fit)
    train_data.collate_fn = collate
    trainer.fit(module, train_data, val_data)
    return outcome(trainer, fit, folder)


def collated_all(fits: list[Fit], folder: Path, collate: Any) -> list[Any]:
    return [collated(fit, folder / str(number), collate) for number, fit in enumerate(fits)]


def test_nested_batches(ranks: Any, tmp_path: Path) -> None:
    trainer = {"limit_val_batches": 0}
    alone = collated(Short(module=Nested, arguments={"layers": 4}, trainer=trainer), tmp_path / "alone", nested)
    fits = [replace(piped(stage), module=Nested, trainer=trainer) for stage in ("none", "stage3")]
    for each in ranks(2).run(collated_all, fits, tmp_path, nested)[0]:
        equal(each, alone)


@pytest.mark.thorough
def test_lengths_that_change_from_step_to_step(ranks: Any, tmp_path: Path) -> None:
    alone = collated(Short(arguments={"layers": 4}, trainer=ACCUMULATED), tmp_path / "alone", shorter)
    fits = [replace(piped("stage3", **way), trainer=ACCUMULATED) for way in SCHEDULES.values()]
    for each in ranks(2).run(collated_all, fits, tmp_path, shorter, timeout=120)[0]:
        equal(each, alone)


ACCUMULATED = {"accumulate_grad_batches": 2}


@pytest.mark.thorough("34")
@pytest.mark.parametrize("rows", [33, 34, 37])
def test_a_last_batch_that_does_not_divide(ranks: Any, tmp_path: Path, rows: int) -> None:
    """Of 1 row, fewer than micro-batches; of 2; of 5."""
    alone = train(Short(arguments={"layers": 4}, rows=rows), tmp_path / "alone")
    fits = [replace(piped("stage2", **way), rows=rows) for way in SCHEDULES.values()]
    for each in ranks(2).run(train_all, fits, tmp_path, timeout=120)[0]:
        equal(each, alone)


def test_a_splitter_of_the_users_own(ranks: Any, tmp_path: Path) -> None:
    alone = train(Short(arguments={"layers": 4}), tmp_path / "alone")
    fits = [piped("stage2", split=interleave), piped("stage3", split=interleave, schedule="gpipe")]
    for each in ranks(2).run(train_all, fits, tmp_path)[0]:
        assert distance(each.weights, alone.weights) < 1e-6


def uneven(fit: Fit, folder: Path) -> Any:
    """Validate on data that does not divide over two pipelines, with few slots."""
    torch.manual_seed(0)
    trainer = make_trainer(fit, folder)
    tokens = torch.randint(0, VOCAB, (11, 9), generator=torch.Generator().manual_seed(2))
    data = DataLoader(TensorDataset(tokens), 4 if fit.devices > 1 else 8)
    return trainer.validate(LitGPT(layers=4), data, verbose=False)[0]


def test_pipelines_with_different_numbers_of_rows(ranks: Any, tmp_path: Path) -> None:
    alone = uneven(Short(), tmp_path / "alone")
    fit = piped("stage3", 4)
    few = replace(fit, zero={**fit.zero, "zero": Zero("stage3", slots=1)})  # type: ignore[dict-item]
    for each in ranks(4).run(uneven, few, tmp_path):
        assert each == pytest.approx(alone, rel=1e-5)
    for each in ranks(4).run(uneven, fit, tmp_path):
        assert each == pytest.approx(alone, rel=1e-5)


class Ending(IterableDataset[Any]):
    """As many rows as the rank wants."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        yield from torch.randint(0, VOCAB, (self.rows, 9), generator=torch.Generator().manual_seed(2))


def of_several_lengths(fit: Fit, folder: Path, what: str, rows: list[int], streamed: bool) -> None:
    trainer = make_trainer(fit, folder, use_distributed_sampler=False)
    dataset = Ending(rows[dist.get_rank()])
    data = DataLoader(dataset if streamed else list(dataset), 4)
    torch.manual_seed(0)
    getattr(trainer, what)(Seeing() if what == "fit" else Whole(layers=4), data)


class Whole(LitGPT):
    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.evaluate("val", batch)

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(batch)


@pytest.mark.parametrize(
    ("what", "rows", "streamed"),
    [("fit", [8, 16], False), ("fit", [16, 8], True), ("validate", [8, 16], True), ("predict", [16, 8], False)],
)
def test_loaders_of_several_lengths(ranks: Any, tmp_path: Path, what: str, rows: list[int], streamed: bool) -> None:
    """They would make the ranks wait for each other for ever."""
    with pytest.raises(RankFailure) as failure:
        ranks(2).run(of_several_lengths, piped(), tmp_path, what, rows, streamed, timeout=30)
    assert failure.value.rank == 1 and isinstance(failure.value.exception, ConfigError)
    words = ("no more batches", "has more") if rows[0] < rows[1] else ("has more batches", "no more:")
    assert all(each in str(failure.value.exception) for each in words)


def combined(fit: Fit, folder: Path) -> Any:
    """Train on two loaders at once, validate on two in turn."""
    torch.manual_seed(0)
    trainer = make_trainer(fit, folder)
    module = Two(layers=4)
    first, second = (loaders(fit)[0] for _ in range(2))
    trainer.fit(
        module, CombinedLoader({"a": first, "b": second}, "max_size_cycle"), [loaders(fit)[1] for _ in range(2)]
    )
    return outcome(trainer, fit, folder)


class Two(LitGPT):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss = self.model.loss(torch.cat([batch["a"][0], batch["b"][0].flip(1)]))
        self.log("train_loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int) -> None:
        self.evaluate("val", batch[0])


def test_several_loaders(ranks: Any, tmp_path: Path) -> None:
    alone = combined(Short(), tmp_path / "alone")
    names = set().union(*alone.rows)
    assert "val_loss/dataloader_idx_1" in names
    mine = ranks(2).run(combined, piped("stage3"), tmp_path / "piped")[0]
    assert distance(mine.weights, alone.weights) < 1e-6
    for name in names:
        assert mine.column(name) == pytest.approx(alone.column(name), rel=1e-5), name
