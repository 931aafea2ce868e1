"""The only door to torch.distributed.checkpoint (DCP): ranges of flattened tensors into its files and out of them.

[Note: DCP as a file format] DCP is used for its format, so that its own tools and every other DCP user can read our
folders. Taken from it is only what describes and moves bytes on one rank: the metadata classes, ``FileSystemWriter``,
``FileSystemReader`` and the arithmetic of overlapping boxes. Who talks to whom stays with ``comm.World``:
``dcp.save`` and ``dcp.load`` would be a second door to the process group. This file needs no process group and
exchanges nothing.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import filesystem as dcp_files
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from lit_zero.checkpoint.parts import check_tiling
from lit_zero.core.boxes import Box, boxes
from lit_zero.core.errors import CheckpointError
from lit_zero.core.piece import Piece

METADATA = ".metadata"  # DCP's index of a folder

_RUN_BYTES = 32 << 20  # of pieces that are read while they are written

Place = tuple[str | int, ...]  # where a tensor belongs in nested dicts and lists: ("state_dict", "layer.weight")


class Stored(NamedTuple):
    """One tensor of a checkpoint and this rank's piece of it."""

    place: Place
    piece: Piece


class Range(NamedTuple):
    """``length`` elements that a rank has written, from ``start`` on, counted in the row-major flattened tensor."""

    place: Place
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    length: int


class Written(NamedTuple):
    """What one rank has written: its ranges, DCP's own record of it, and the size in bytes of each file."""

    ranges: list[Range]
    results: list[Any]
    files: dict[str, int]


def key_of(place: Place) -> str:
    """Return the flat key of a tensor, as DCP flattens nested state dicts."""
    return ".".join(map(str, place))


def write(folder: Path, stored: Sequence[Stored], rank: int) -> Written:
    """Write this rank's pieces to one file of its own, or several for pieces that do not lie in memory, flushed to the
    disk.

    Args:
        folder: where to write; must exist.
        stored: what this rank holds; empty pieces are welcome and write nothing.
        rank: names the file.
    """
    ranges, runs, tensors = [], list[list[WriteItem]]([[]]), {}
    away = 0  # bytes of the last run
    for place, piece in stored:
        shape = tuple(piece.shape)
        ranges.append(Range(place, shape, piece.dtype, piece.start, piece.numel))
        if not piece.live:  # DCP holds what it has read until the end of a run
            away += piece.numel * piece.dtype.itemsize
            if away > _RUN_BYTES:
                runs.append([])
                away = piece.numel * piece.dtype.itemsize
        for box in boxes(shape, piece.start, piece.end):
            index = MetadataIndex(key_of(place), torch.Size(box.offsets))
            data = TensorWriteData(_chunk(box), TensorProperties(dtype=piece.dtype), torch.Size(shape))
            runs[-1].append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
            tensors[index] = piece, box
    results: list[Any] = []
    for number, items in enumerate(each for each in runs if each):
        writer = FileSystemWriter(folder)
        # The writer names a plan's file by the plan's position in the list.
        plan = writer.prepare_global_plan([SavePlan([])] * rank + [SavePlan(items)])[rank]
        if number:
            named = dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            plan = dataclasses.replace(plan, storage_data=named)
        results += writer.write_data(plan, _SavePlanner(tensors)).value()
    names = sorted({result.storage_data.relative_path for result in results})
    return Written(ranges, results, {name: (folder / name).stat().st_size for name in names})


def write_index(folder: Path, written: Sequence[Written]) -> list[Place]:
    """Write DCP's index after all ranks have written, on one rank.

    Args:
        folder: where all have written.
        written: what each rank has written.

    Returns:
        The places of all tensors, in the order of the first rank that has them.

    Raises:
        CheckpointError: if elements of a tensor are held by no rank or by two.
    """
    tensors: dict[str, Any] = {}
    held: dict[Place, list[Range]] = {}
    for found in (r for rank in written for r in rank.ranges):
        properties = TensorProperties(dtype=found.dtype)
        entry = tensors.setdefault(key_of(found.place), TensorStorageMetadata(properties, torch.Size(found.shape), []))
        entry.chunks += [_chunk(box) for box in boxes(found.shape, found.start, found.start + found.length)]
        held.setdefault(found.place, []).append(found)
    for place, ranges in held.items():
        check_tiling(key_of(place), ranges[0].shape, [(r.start, r.length) for r in ranges])
    index = Metadata(tensors, planner_data={key_of(place): place for place in held})
    _Writer(folder).finish(index, [rank.results for rank in written])
    return list(held)


class Reader:
    """Reads ranges of the tensors of a folder.

    Args:
        folder: a folder with a DCP index.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def shape(self, place: Place) -> tuple[int, ...]:
        """Return a tensor's global shape."""
        return tuple(self._saved(place).size)

    def dtype(self, place: Place) -> torch.dtype:
        """Return a tensor's dtype."""
        dtype: torch.dtype = self._saved(place).properties.dtype
        return dtype

    def places(self) -> list[Place]:
        """Return the places of all tensors, in the order in which they were saved."""
        return [tuple(place) for place in (self._index.planner_data or {}).values()]

    def read(self, wanted: Sequence[Stored]) -> None:
        """Read into pieces the ranges that they stand for, cast to the pieces' dtype.

        Raises:
            CheckpointError: if a tensor is not in the checkpoint, has another shape, or cannot be read.
        """
        self._read([each for each in wanted if each.piece.live])
        for place, piece in (each for each in wanted if not each.piece.live):  # by one, for little memory
            buffer = torch.empty(piece.numel, dtype=piece.dtype, device="cpu")
            self._read([Stored(place, dataclasses.replace(piece, data=buffer))])
            piece.write(buffer)

    def _read(self, wanted: Sequence[Stored]) -> None:
        targets, items = {}, []
        for number, (place, piece) in enumerate(wanted):
            shape = tuple(piece.shape)
            if self.shape(place) != shape:
                raise CheckpointError(
                    f"{key_of(place)!r} is {self.shape(place)} in the checkpoint '{self._folder}', not {shape}."
                )
            found = boxes(shape, piece.start, piece.end)
            targets.update({MetadataIndex(str(number), torch.Size(box.offsets)): _part(piece, box) for box in found})
            saved = self._saved(place)
            for item in create_read_items_for_chunk_list(key_of(place), saved, [_chunk(box) for box in found]):
                # By its number, since one saved tensor may go to several pieces.
                target = MetadataIndex(str(number), item.dest_index.offset)
                items.append(dataclasses.replace(item, dest_index=target))
        reader = FileSystemReader(self._folder)
        try:
            reader.set_up_storage_reader(self._index, is_coordinator=True)
            with torch.no_grad():
                reader.read_data(LoadPlan(items), _LoadPlanner(targets)).wait()
        except (MemoryError, torch.OutOfMemoryError):
            raise  # no fault of the checkpoint's
        except Exception as error:
            raise CheckpointError(self._damaged("a tensor cannot be read", error)) from error

    @cached_property
    def _index(self) -> Metadata:
        try:
            with open(self._folder / METADATA, "rb") as file:
                index: Metadata = _IndexUnpickler(file).load()
            return index
        except Exception as error:
            raise CheckpointError(self._damaged(f"{METADATA} cannot be read", error)) from error

    def _saved(self, place: Place) -> TensorStorageMetadata:
        saved = self._index.state_dict_metadata.get(key_of(place))
        if not isinstance(saved, TensorStorageMetadata):
            raise CheckpointError(f"The checkpoint '{self._folder}' holds no tensor {key_of(place)!r}.")
        return saved

    def _damaged(self, what: str, error: Exception) -> str:
        first = (str(error) or type(error).__name__).splitlines()[0]
        return (
            f"The checkpoint '{self._folder}' is damaged: {what} ({first}). Copy it again as a whole, or go on from an"
            " earlier checkpoint."
        )


class _IndexUnpickler(pickle.Unpickler):
    """Opens DCP's index, a pickle, with the few classes that belong there: as safe as ``weights_only=True``."""

    _CLASSES = frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
            "_StorageInfo",
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if module in (dcp_metadata.__name__, dcp_files.__name__) and name in self._CLASSES:
            return super().find_class(module, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no index needs")


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(save_id=self.save_id)  # without the path: the folder is renamed after it is written


class _SavePlanner(DefaultSavePlanner):
    """Gives DCP's writer the elements of a box, when it is about to write them."""

    def __init__(self, boxes_of: Mapping[MetadataIndex, tuple[Piece, Box]]) -> None:
        super().__init__()
        self._boxes_of = boxes_of

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return _part(*self._boxes_of[write_item.index])


class _LoadPlanner(DefaultLoadPlanner):
    """Tells DCP's reader where the elements of a part of a box go."""

    def __init__(self, targets: Mapping[MetadataIndex, torch.Tensor]) -> None:
        super().__init__()
        self._targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = self._targets[read_item.dest_index]
        for dim, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, offset, length)
        return target


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))


def _part(piece: Piece, box: Box) -> torch.Tensor:
    """Return the elements of a box inside a piece, in the box's shape; a view where the piece lies in memory."""
    first = box.start - piece.start
    return piece.part(first, first + box.length).detach().view(box.sizes)
