"""Choose and open the exchange that fits the process group."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from lit_zero.comm.direct import DirectExchange
from lit_zero.comm.exchange import Exchange
from lit_zero.comm.native import NativeExchange
from lit_zero.comm.policy import Comm


def open_exchange(
    comm: Comm,
    device: torch.device,
    reduce_dtype: torch.dtype | None = torch.float32,
    timeout: timedelta | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    large: bool = True,
) -> Exchange:
    """Return the exchange over some ranks of the default process group; all ranks of that must call this together.

    Args:
        comm: the user's choice.
        device: this rank's device.
        reduce_dtype: dtype in which 2-byte gradients are summed, ``None`` for their own.
        timeout: how long an exchange waits for a rank that does not come. ``None`` is the backend's own default, not
            that of the default group.
        groups: lists of ranks without a rank in common, the same on every rank: each gets an exchange. ``None``: one
            over all ranks. A rank in no list gets the exchange of a world of one.
        large: what travels may be large; off, threads, streams and shared memory are saved.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Exchange()

    def opened() -> dist.ProcessGroup | None:
        backend = None if device.type == "cuda" else "gloo"
        if groups is None:
            return dist.new_group(backend=backend, timeout=timeout)
        found = [dist.new_group(list(ranks), backend=backend, timeout=timeout) for ranks in groups if len(ranks) > 1]
        mine = [group for group in found if group != dist.GroupMember.NON_GROUP_MEMBER]
        return mine[0] if mine else None

    first = opened()
    if device.type == "cuda":
        second = opened()
        if first is None or second is None:
            return Exchange()
        return NativeExchange(first, second, device, comm.overlap and large, reduce_dtype)
    if first is None:
        return Exchange()
    return DirectExchange(first, comm.overlap and large, reduce_dtype, shared_memory=large)
