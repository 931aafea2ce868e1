"""The default process group: is there one, end it, and the few things the rest may ask of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def is_initialized() -> bool:
    """Return whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def size() -> int:
    """Return the number of ranks that this process belongs to, itself included."""
    return dist.get_world_size() if is_initialized() else 1


def default_backend(device: torch.device) -> str:
    """Return the backend that serves ``device``: ``nccl`` for CUDA, ``gloo`` for the rest."""
    return "nccl" if device.type == "cuda" else "gloo"


def destroy() -> None:
    """Leave the process group, if this process is in one."""
    if is_initialized():
        dist.destroy_process_group()


def leave(*groups: dist.ProcessGroup) -> None:
    """Give up groups that this process has opened; they are gone already once the default group has been left."""
    for group in groups:
        if is_initialized():
            dist.destroy_process_group(group)


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Return rank ``source``'s ``value`` (any picklable object) on every rank."""
    if not is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, source)
    return box[0]


def barrier(device: torch.device) -> None:
    """Return once every rank has called this."""
    if not is_initialized():
        return
    if device.type == "cuda":
        dist.barrier(device_ids=[device.index])
    else:
        dist.barrier()
