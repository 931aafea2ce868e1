"""Predictions of all ranks in one file: every sample once, in the order of the dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lit_zero import ZeroStrategy
from lit_zero.callbacks import PredictionWriter
from lit_zero.core.errors import CheckpointError, LitZeroError
from tests.evaluation.support import Case, Stream, dataset, make
from tests.strategy.harness import STAGES, LitGPT

CASES = {
    "one rank has a sample less": Case([9], share=2),
    "and so nothing left for the last step": Case([17], share=4),
    "batches of one": Case([5], share=1),
    "shuffled": Case([7], share=2, options={"shuffle": True}),
    "two loaders": Case([7, 4], share=2, stages=STAGES),
    "incomplete batches are kept": Case([7], share=2, options={"drop_last": True}),
    "stopped early": Case([17], share=2, trainer={"limit_predict_batches": 2}),
    "workers": Case([9], share=2, options={"num_workers": 1}),
}


class Predicting(LitGPT):
    """Predicts a number, a vector, a text and a tensor that is longer where the batch is."""

    def predict_step(self, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> Any:
        tokens, numbers = batch
        logits = self.model(tokens)
        last = logits[:, -1]
        texts = [f"row {number}" for number in numbers.tolist()]
        return {"row": numbers, "both": (last, [*texts]), "long": logits.argmax(-1)[:, : 2 + len(numbers)]}


def predict(case: Case, strategy: Any, folder: Path, **options: Any) -> tuple[Any, Any, int]:
    """Return what the file holds, what the callback keeps, and the number of batches that ``predict`` returned."""
    torch.manual_seed(0)
    writer = PredictionWriter(folder / "predictions.pt")
    trainer = make(case, strategy, folder, callbacks=[writer], **options)
    model = Predicting()
    torch.manual_seed(trainer.global_rank)  # a shuffled order must not depend on it
    returned = trainer.predict(model, case.loaders(strategy == "auto"))
    written = torch.load(folder / "predictions.pt", weights_only=True)
    batches = returned if len(case.rows) == 1 else returned[0]
    return written, writer.predictions, sum(len(batch["row"]) for batch in batches)


def in_all_stages(cases: list[Case], folder: Path) -> list[list[Any]]:
    folder = folder / "ranks"  # the same for all, as it is for users
    return [[predict(case, ZeroStrategy(stage), folder) for stage in case.stages] for case in cases]


def check(written: Any, expected: Any) -> None:
    """Check that a file of predictions of one loader is right."""
    rows = len(expected["row"])
    assert written["row"].tolist() == expected["row"].tolist() == list(range(rows))
    torch.testing.assert_close(written["both"][0], expected["both"][0], rtol=1e-5, atol=1e-5)
    assert written["both"][1] == expected["both"][1] == [f"row {number}" for number in range(rows)]
    assert len(written["long"]) == rows
    for mine, other in zip(written["long"], expected["long"], strict=True):
        size = min(len(mine), len(other))
        assert size >= 3
        assert torch.equal(mine[:size], other[:size])


@pytest.mark.thorough
def test_every_sample_once_in_order(ranks, tmp_path):
    cases = list(CASES.values())
    first, second = ranks(2).run(in_all_stages, cases, tmp_path, timeout=200)
    for name, case, *found in zip(CASES, cases, first, second, strict=True):
        expected = predict(case, "auto", tmp_path / "alone")[0]
        for (written, kept, own), (same, nothing, other) in zip(*found, strict=True):
            for mine, theirs in zip(
                *[each if isinstance(each, list) else [each] for each in (written, expected)], strict=True
            ):
                check(mine, theirs)
            assert nothing is None and str(same) == str(written) == str(kept)
            rows = 8 if "stopped" in name else case.rows[0]
            assert own + other == rows, f"{name}: predict itself returns every sample on one rank only"


def with_ddp(case: Case, folder: Path) -> Any:
    return predict(case, "ddp", folder)[0]


def test_under_another_strategy(ranks, tmp_path):
    case = Case([9], share=2)
    check(ranks(2).run(with_ddp, case, tmp_path)[0], predict(case, "auto", tmp_path / "alone")[0])


def test_a_part_of_a_dataset_keeps_its_order(tmp_path):
    writer = PredictionWriter(None)
    trainer = make(Case(), "auto", tmp_path, callbacks=[writer])
    order = [5, 2, 7]
    trainer.predict(Predicting(), DataLoader(dataset(9), 2, sampler=order), return_predictions=False)
    assert writer.predictions["row"].tolist() == sorted(order)
    trainer.predict(Predicting(), DataLoader(Subset(dataset(9), order), 2), return_predictions=False)
    assert writer.predictions["row"].tolist() == order
    assert not list(tmp_path.iterdir()), "nothing is written"


class Wrong(LitGPT):
    """Returns what is given instead of predictions."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.output


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (torch.tensor(1.0), "a Tensor of shape () for 2 samples"),
        ({"a": torch.zeros(3, 2)}, "a Tensor of shape (3, 2) for 2 samples"),
        (["one"], "a list of length 1 for 2 samples"),
        ("text", "a str for 2 samples"),
    ],
)
def test_predictions_without_one_entry_for_each_sample_are_refused(tmp_path, output, words):
    trainer = make(Case(), "auto", tmp_path, callbacks=[PredictionWriter(tmp_path / "x.pt")])
    with pytest.raises(LitZeroError) as caught:
        trainer.predict(Wrong(output), DataLoader(dataset(4), 2))
    assert str(caught.value).startswith(f"predict_step returned {words}. PredictionWriter expects a tensor whose first")
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("loader", [DataLoader(Stream([[2, 2]], 0), batch_size=None), [{"batch": 1}]])
def test_data_without_indices_is_refused(tmp_path, loader):
    trainer = make(Case(), "auto", tmp_path, callbacks=[PredictionWriter(tmp_path / "x.pt")])
    with pytest.raises(LitZeroError, match="PredictionWriter does not know which samples batch 0 of dataloader 0"):
        trainer.predict(Wrong(torch.zeros(2)), loader)


def cannot_write(folder: Path) -> str:
    (folder / "file").write_text("in the way")
    writer = PredictionWriter(folder / "file" / "predictions.pt")
    trainer = make(Case(), ZeroStrategy("stage3"), folder, devices=2, callbacks=[writer])
    try:
        trainer.predict(Predicting(), DataLoader(dataset(4), 2))
    except CheckpointError as error:
        return str(error)
    return "nothing was raised"


def test_a_file_that_cannot_be_written_is_an_error_on_all_ranks(ranks, tmp_path):
    for message in ranks(2).run(cannot_write, tmp_path, timeout=30):
        assert message.startswith(f"Writing predictions to '{tmp_path}/file/predictions.pt' failed on rank 0: ")
