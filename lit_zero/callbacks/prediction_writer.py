"""What ``trainer.predict`` returns on each rank, put together: every sample once, in the order of the dataset."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lit_zero.checkpoint.files import save_file_atomic
from lit_zero.checkpoint.together import on_zero
from lit_zero.comm.world import World
from lit_zero.core.errors import LitZeroError
from lit_zero.strategy.flavour import BasePredictionWriter


class PredictionWriter(BasePredictionWriter):
    """Writes the predictions of all ranks to one file: every sample once, in the order of the dataset.

    ``predict_step`` may return a tensor whose first dimension counts the samples of the batch, a list with an entry
    for each of them, or dicts and tuples of these. The file holds the same for the whole dataset; tensors whose other
    dimensions differ from batch to batch become a list with a tensor for each sample. Several dataloaders give a list.
    Predictions wait in each rank's host memory until the last batch, and pass to rank 0 batch by batch.

    Args:
        path: file that rank 0 writes when the prediction ends; ``torch.load(path)`` opens it. ``None``: nothing is
            written.

    Attributes:
        predictions: on rank 0, what has been written; ``None`` on the others.

    Raises:
        LitZeroError: while predicting, if a batch's samples are unknown (the data is no DataLoader that draws batches
            from a dataset by index), or if what ``predict_step`` returns does not have one entry for each sample.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        super().__init__("batch")
        self.path = path
        self.predictions: Any = None
        self._held: list[tuple[int, list[int], Any]] = []  # (loader, indices of its samples, output) of each batch
        self._last: Any = None

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget what an earlier prediction has given."""
        self.predictions, self._held, self._last = None, [], None

    def write_on_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep the predictions of one batch."""
        if not batch_indices or batch_indices is self._last:  # Lightning leaves those of the batch before
            raise LitZeroError(
                f"PredictionWriter does not know which samples batch {batch_idx} of dataloader {dataloader_idx} holds, "
                "so it cannot put predictions in order. Predict on a DataLoader over a dataset with indices, with a "
                "batch_size or a batch sampler; for other data, write your own BasePredictionWriter."
            )
        self._last = batch_indices
        grid = getattr(trainer.strategy, "grid", None)
        if grid is not None and grid.position(trainer.global_rank) > 0:
            return  # the first rank of this pipeline has the same
        indices = [int(index) for index in batch_indices]
        self._held.append((dataloader_idx, indices, _kept(prediction, len(indices))))

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Put everything together on rank 0 and write it."""
        world = World()
        batches: list[tuple[int, list[int], Any]] = []
        for number in range(max(world.all_gather_object(len(self._held)))):
            mine = self._held[number] if number < len(self._held) else None
            found = world.gather_object_to_zero(mine)
            batches += [each for each in found or [] if each is not None]
        self._held, self._last = [], None
        title = "Putting predictions together" if self.path is None else f"Writing predictions to '{self.path}'"
        on_zero(world, title, lambda: self._finish(batches))

    def _finish(self, batches: list[tuple[int, list[int], Any]]) -> None:
        loaders = sorted({loader for loader, _, _ in batches})
        parts = [_in_order([batch[1:] for batch in batches if batch[0] == loader]) for loader in loaders]
        self.predictions = parts[0] if loaders == [0] else parts
        if self.path is not None:
            save_file_atomic(self.predictions, self.path)


def _kept(output: Any, count: int) -> Any:
    """Return a copy of one batch's predictions in host memory.

    Raises:
        LitZeroError: if there is not one for each of the ``count`` samples.
    """
    if isinstance(output, Mapping):
        return {key: _kept(value, count) for key, value in output.items()}
    if isinstance(output, tuple):
        return tuple(_kept(value, count) for value in output)
    if isinstance(output, torch.Tensor) and output.ndim and len(output) == count:
        return output.detach().to("cpu", copy=True)
    if isinstance(output, list) and len(output) == count:
        return [each.detach().to("cpu", copy=True) if isinstance(each, torch.Tensor) else each for each in output]
    shape = f" of shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else ""
    size = f" of length {len(output)}" if isinstance(output, list) else ""
    raise LitZeroError(
        f"predict_step returned a {type(output).__name__}{shape}{size} for {count} samples. PredictionWriter expects a "
        f"tensor whose first dimension is {count}, a list of {count} entries, or dicts and tuples of these."
    )


def _in_order(batches: list[tuple[list[int], Any]]) -> Any:
    """Return the predictions of all samples, each once, by rising index."""
    position: dict[int, int] = {}
    for place, index in enumerate(index for indices, _ in batches for index in indices):
        position.setdefault(index, place)
    return _merged([output for _, output in batches], [position[index] for index in sorted(position)])


def _merged(outputs: list[Any], places: list[int]) -> Any:
    """Return what ``outputs`` hold at the given places, counted over all of them."""
    first = outputs[0]
    if isinstance(first, dict):
        return {key: _merged([each[key] for each in outputs], places) for key in first}
    if isinstance(first, tuple):
        return tuple(_merged(list(each), places) for each in zip(*outputs, strict=True))
    if isinstance(first, torch.Tensor) and len({each.shape[1:] for each in outputs}) == 1:
        return torch.cat(outputs)[places]
    rows = [row for each in outputs for row in each]
    return [rows[place].clone() if isinstance(rows[place], torch.Tensor) else rows[place] for place in places]
