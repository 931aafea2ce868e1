"""Cut a batch into micro-batches, and put together what the user's step has returned for each."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from lit_zero.core.errors import ConfigError, UnsupportedError
from lit_zero.pipeline.policy import Pipeline

_ADVICE = "Give pipeline.split a function (batch, count) -> micro-batches."


@dataclass(frozen=True)
class MicroBatches:
    """The pieces of a batch.

    Attributes:
        parts: of the same structure as the batch.
        rows: how many rows each has.
    """

    parts: list[Any]
    rows: list[int]

    @cached_property
    def weights(self) -> list[float]:
        """The share of the batch's rows in each; their sum is 1."""
        return [rows / sum(self.rows) for rows in self.rows]


def cut(batch: Any, policy: Pipeline, count: int | None = None) -> MicroBatches:
    """Cut a batch along the first dimension of its tensors, in pieces that differ by one row at most.

    Tensors in tuples, lists, mappings and dataclasses of any depth are cut, and so are lists and tuples without tensors
    that have as many entries as the batch has rows. Tensors without a dimension and everything else go into every
    piece.

    Args:
        batch: as the data loader gives it.
        policy: says how many pieces, and how if not so.
        count: fewer pieces than ``policy`` says.

    Raises:
        ConfigError: if the tensors do not have the same number of rows, or ``pipeline.split`` gives something else than
            pieces.
    """
    count = count or policy.pieces
    if policy.split is not None:
        parts = list(policy.split(batch, count))
        if not parts:
            raise ConfigError("pipeline.split returned no micro-batches; at least one was expected.")
        return MicroBatches(parts, [_rows(part) or 1 for part in parts])
    rows = _rows(batch)
    if rows is None:
        raise UnsupportedError(f"A {type(batch).__name__} without tensors cannot be cut into micro-batches. {_ADVICE}")
    if rows == 0:
        raise UnsupportedError("A batch without rows cannot be cut into micro-batches.")
    count = min(count, rows)
    sizes = [rows // count + (number < rows % count) for number in range(count)]
    ends = [sum(sizes[: number + 1]) for number in range(count)]
    return MicroBatches([_part(batch, end - size, end, rows) for size, end in zip(sizes, ends, strict=True)], sizes)


def _rows(batch: Any) -> int | None:
    """Return the rows of a batch, ``None`` if it has no tensor with a dimension."""
    counts = Counter(tensor.shape[0] for tensor in _tensors(batch) if tensor.dim())
    if len(counts) > 1:
        raise ConfigError(
            f"The tensors of the batch have {', '.join(map(str, sorted(counts)))} rows: which dimension is that of the "
            f"batch cannot be told. {_ADVICE}"
        )
    return next(iter(counts), None)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from _tensors(getattr(value, entry.name))
    elif any(isinstance(entry, torch.Tensor) for entry in getattr(value, "__dict__", {}).values()):
        raise ConfigError(f"A batch of class {type(value).__name__} cannot be cut into micro-batches. {_ADVICE}")


def _part(value: Any, first: int, end: int, rows: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[first:end] if value.dim() else value
    if isinstance(value, list | tuple):
        if len(value) == rows and next(_tensors(value), None) is None:
            return value[first:end]
        parts = [_part(entry, first, end, rows) for entry in value]
        if hasattr(value, "_fields"):
            return type(value)(*parts)
        return type(value)(parts)
    if isinstance(value, Mapping):
        found = {key: _part(entry, first, end, rows) for key, entry in value.items()}
        return found if type(value) is dict else type(value)(found)  # type: ignore[call-arg]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _part(getattr(value, f.name), first, end, rows) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


def together(results: Sequence[Any], weights: Sequence[float]) -> Any:
    """Put together what the user's step has returned for every micro-batch, as if it had run once.

    Floats, integers that differ and tensors without a dimension become their mean, weighted by rows; other tensors are
    joined along the first dimension; tuples, mappings and lists with tensors are put together entry by entry, as
    batches are cut; other lists are joined. Of anything else, equal integers among it, the last one stays.

    Args:
        results: one for each micro-batch.
        weights: the share of each in the batch.
    """
    first = results[0]
    if isinstance(first, torch.Tensor):
        if first.dim():
            return torch.cat([result.detach() for result in results])
        return mean(results, weights)
    whole = all(isinstance(result, int) and not isinstance(result, bool) for result in results)
    if isinstance(first, float) or (whole and any(result != first for result in results)):
        return sum(weight * result for weight, result in zip(weights, results, strict=True))
    if isinstance(first, Mapping):
        found = {key: together([result[key] for result in results], weights) for key in first}
        return found if type(first) is dict else type(first)(found)  # type: ignore[call-arg]
    if isinstance(first, tuple):
        parts = [together(entries, weights) for entries in zip(*results, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    if isinstance(first, list) and any(isinstance(entry, torch.Tensor) for entry in first):
        return [together(entries, weights) for entries in zip(*results, strict=True)]
    if isinstance(first, list):
        return [entry for result in results for entry in result]
    return results[-1]


def mean(values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Return the weighted mean of tensors without a dimension, in their dtype (integers: fp32)."""
    stacked = torch.stack([value.detach() for value in values])
    if not stacked.is_floating_point():
        stacked = stacked.float()
    return (stacked * torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)).sum()
