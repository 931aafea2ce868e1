"""From the user's choice to places: which lanes' shards go where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lit_zero.core.errors import ConfigError
from lit_zero.core.keeping import Keeper, Keeping
from lit_zero.core.ticket import Ticket
from lit_zero.core.worker import Worker
from lit_zero.offload.disk import DiskKeeper
from lit_zero.offload.file import StateFile
from lit_zero.offload.host import Budget, HostKeeper, say_saves_nothing
from lit_zero.offload.policy import CHUNK, Offload


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
    budget = Budget(offload.limit)
    if offload.folder is None:
        if device.type != "cuda" and speaks:
            say_saves_nothing()
        return Moving(offload, device, HostKeeper(offload.params, device, budget), budget, None, overlap)
    file, chunk = StateFile(Path(offload.folder)), offload.chunk or CHUNK
    budget.take("two portions", 2 * chunk)
    keeper = DiskKeeper(file, chunk, offload.params, device, budget)
    return Moving(offload, device, keeper, budget, file, overlap)


class Moving(Keeping):
    """Moves a part of the lanes to one place.

    The part is spread evenly over the lanes, in the order in which they are made: a lane leaves if the part that has
    left is then still at most ``ratio``.

    Args:
        offload: the user's choice.
        device: where the model computes.
        keeper: the place.
        budget: counts host memory.
        file: what the place lies in, if it is a file.
        overlap: steps run on a thread of their own.
    """

    apart = True

    def __init__(
        self,
        offload: Offload,
        device: torch.device,
        keeper: HostKeeper,
        budget: Budget,
        file: StateFile | None,
        overlap: bool,
    ) -> None:
        self._worker = Worker("lit_zero-step") if overlap else None
        self._offload, self._device, self._keeper, self._budget, self._file = offload, device, keeper, budget, file
        self._seen = self._left = self._smallest = 0  # elements

    def run(self, job: Callable[[], None]) -> Ticket:
        return super().run(job) if self._worker is None else self._worker.submit(job)

    def keeper(self, numel: int, used: bool, sharded: bool) -> Keeper:
        if not used and not (sharded and self._offload.params):
            return Keeper()
        self._seen += numel
        self._smallest = min(self._smallest or numel, numel)
        if self._left + numel > self._offload.ratio * self._seen:
            return Keeper()
        self._left += numel
        return self._keeper

    def reserve(self, keeper: Keeper, what: str, size: int) -> None:
        assert keeper is self._keeper
        self._keeper.reserve(what, size)

    def check(self) -> None:
        if self._seen and not self._left:
            raise ConfigError(
                f"offload.ratio={self._offload.ratio} moves nothing: the smallest part that can leave alone has "
                f"{self._smallest:,} of this rank's {self._seen:,} elements. Raise offload.ratio, or use offload=none."
            )
        self._budget.check(self._offload.ratio, self._file is not None)
        if self._file is not None:
            self._file.promise()

    def settle(self) -> None:
        if self._keeper.streams:
            torch.cuda.current_stream(self._device).synchronize()

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        if self._file is not None:
            self._file.close()
