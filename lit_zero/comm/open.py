"""Choose and open the exchange that fits the process group."""

from __future__ import annotations

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
) -> Exchange:
    """Return the exchange over all ranks of the default process group; all ranks must call this together.

    Args:
        comm: the user's choice.
        device: this rank's device.
        reduce_dtype: dtype in which 2-byte gradients are summed, ``None`` for their own.
        timeout: how long an exchange waits for a rank that does not come. ``None`` is the backend's own default, not
            that of the default group.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Exchange()
    if device.type == "cuda":
        return NativeExchange(
            dist.new_group(timeout=timeout), dist.new_group(timeout=timeout), device, comm.overlap, reduce_dtype
        )
    return DirectExchange(dist.new_group(backend="gloo", timeout=timeout), comm.overlap, reduce_dtype)
