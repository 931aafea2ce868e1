"""Are all ranks here? Asked without a collective, for after an error: a rank may then be elsewhere, or gone."""

from __future__ import annotations

import uuid
from datetime import timedelta

import torch.distributed as dist

from lit_zero.comm import process_group

SECONDS = 8.0  # for all ranks to come: those that fail together do so within less


class RollCall:
    """One question, to be asked at most once per run. All ranks must construct this together.

    It goes through the key-value store of the process group, so it works for every backend and disturbs no exchange
    that is under way.
    """

    def __init__(self) -> None:
        self._topic = f"lit_zero/roll_call/{process_group.broadcast_object(uuid.uuid4().hex)}"
        self._answer: bool | None = None

    def all_here(self) -> bool:
        """Return whether every rank calls this within ``SECONDS`` of the first; the same answer on each that does."""
        if self._answer is None:
            self._answer = process_group.size() == 1 or self._ask()
        return self._answer

    def _ask(self) -> bool:
        store = dist.distributed_c10d._get_default_store()
        try:
            store.set(f"{self._topic}/{dist.get_rank()}", "here")
            try:
                keys = [f"{self._topic}/{rank}" for rank in range(dist.get_world_size())]
                store.wait(keys, timedelta(seconds=SECONDS))
                vote = "yes"
            except dist.DistError:
                vote = "no"
            # The first vote counts for all: a rank that comes in the last moment must not go where others have left.
            answer: bytes = store.compare_set(f"{self._topic}/answer", "", vote)
            return answer == b"yes"
        except dist.DistError:  # the process that keeps the store is gone
            return False
