"""From the user's choice to places: which lanes' shards go where."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from lit_zero.core.errors import ConfigError
from lit_zero.core.keeping import Keeper, Keeping
from lit_zero.core.ticket import Ticket
from lit_zero.core.worker import Worker
from lit_zero.offload.disk import DiskKeeper
from lit_zero.offload.file import StateFile
from lit_zero.offload.host import HostKeeper, say_saves_nothing
from lit_zero.offload.policy import Offload


def open_keeping(offload: Offload, device: torch.device, speaks: bool = True, overlap: bool = True) -> Keeping:
    """Return where the shards of this rank live.

    Args:
        offload: the user's choice.
        device: where the model computes.
        speaks: this rank tells the user what concerns all.
        overlap: the step runs beside the computation that follows it, where that waits for what it needs.

    Raises:
        ConfigError: if no file can be made in ``offload.folder``.
    """
    if not offload.away:
        return Keeping()
    if offload.folder is None:
        if device.type != "cuda" and speaks:
            say_saves_nothing()
        return Moving(offload, device, HostKeeper(offload.params, device), None, overlap)
    file = StateFile(Path(offload.folder))
    return Moving(offload, device, DiskKeeper(file, offload.portion, offload.params, device), file, overlap)


class Moving(Keeping):
    """Moves a part of the lanes to one place.

    The part is spread evenly over the lanes, in the order in which they are made: a lane leaves if the part that has
    left is then nearer to ``ratio`` than without it.

    Args:
        offload: the user's choice.
        device: where the model computes.
        keeper: the place.
        file: what the place lies in, if it is a file.
        overlap: steps run on a thread of their own.
    """

    apart = walks = True
    knobs = "offload=cpu and offload=disk"

    def __init__(
        self,
        offload: Offload,
        device: torch.device,
        keeper: HostKeeper,
        file: StateFile | None,
        overlap: bool,
    ) -> None:
        self._worker = Worker("lit_zero-step") if overlap else None
        self._offload, self._device, self._keeper, self._file = offload, device, keeper, file
        self._seen = self._left = 0  # elements
        self._least = 1.0  # ratio at which a lane leaves
        self._end = weakref.finalize(self, _end, self._worker, file)

    def run(self, job: Callable[[], None]) -> Ticket:
        return super().run(job) if self._worker is None else self._worker.submit(job)

    def keeper(self, numel: int, used: bool, sharded: bool) -> Keeper:
        if not used and not (sharded and self._offload.params):
            return Keeper()
        self._seen += numel
        self._least = min(self._least, numel / 2 / self._seen)
        if self._left + numel / 2 > self._offload.ratio * self._seen:
            return Keeper()
        self._left += numel
        return self._keeper

    def check(self, needs: Mapping[str, int], to_come: Sequence[int]) -> None:
        if self._seen and not self._left:
            raise ConfigError(
                f"offload.ratio={self._offload.ratio} moves nothing: blocks, or thirds of them, leave whole. Expected "
                f"at least {math.ceil(self._least * 1000) / 1000} with this model. Raise offload.ratio, or use "
                "offload=none."
            )
        if self._file is None:
            _check_limit(self._offload, needs, "lower offload.ratio, or use offload=disk")
        else:
            in_memory = {"two portions": 2 * self._offload.portion, "gradients": needs["gradients"]}
            _check_limit(self._offload, in_memory, "lower offload.chunk or offload.ratio")
            self._file.promise(to_come)

    def settle(self) -> None:
        if self._keeper.streams:
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        self._end()


def _check_limit(offload: Offload, needs: Mapping[str, int], advice: str) -> None:
    """Check that ``needs`` (bytes of host memory by kind) are within the limit.

    Raises:
        ConfigError: if they are not.
    """
    total = sum(needs.values())
    if offload.limit is None or total <= offload.limit:
        return
    parts = ", ".join(f"{what} {size:,}" for what, size in needs.items() if size)
    raise ConfigError(
        f"offload.limit={offload.limit:,} bytes is too little: this rank needs {total:,} bytes of host memory "
        f"({parts}) with offload.ratio={offload.ratio}. Raise the limit, {advice}."
    )


def _end(worker: Worker | None, file: StateFile | None) -> None:
    """End the step first, which works on the file; at the end of the process too."""
    if worker is not None:
        worker.close()
    if file is not None:
        file.close()
