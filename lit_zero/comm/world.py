"""All ranks as a checkpoint sees them: a rank, a size, and a handful of slow, blocking exchanges.

One process without a process group is a world of one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class World:
    """The default process group, or this process alone where there is none.

    Every method must be called by all ranks in the same order. None is meant for the training step: they block, and
    objects are pickled.

    Attributes:
        rank: this process's rank, 0 to ``size - 1``.
        size: number of ranks.
    """

    def __init__(self) -> None:
        self._grouped = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self._grouped else 0
        self.size = dist.get_world_size() if self._grouped else 1

    def barrier(self) -> None:
        """Return once every rank has called this."""
        if self.size > 1:
            device = self._device()
            dist.barrier(device_ids=None if device.type == "cpu" else [device.index])

    def broadcast_object(self, obj: Any) -> Any:
        """Return rank 0's ``obj`` (any picklable object) on every rank."""
        if self.size == 1:
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return every rank's ``obj`` on every rank, in rank order."""
        if self.size == 1:
            return [obj]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, obj)
        return found

    def gather_object_to_zero(self, obj: Any) -> list[Any] | None:
        """Return every rank's ``obj`` in rank order on rank 0, ``None`` elsewhere."""
        if self.size == 1:
            return [obj]
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(obj, found, dst=0)
        return found

    def gather_to_zero(self, tensor: torch.Tensor, lengths: list[int]) -> list[torch.Tensor] | None:
        """Send each rank's elements to rank 0's host memory, one rank after the other.

        On NCCL, which cannot send host memory, a rank's elements pass through a buffer of their own size on the
        device, so rank 0 never holds more than one rank's part there. An object exchange must have come before: NCCL
        wants its first operation from all ranks.

        Args:
            tensor: this rank's elements, shape ``[lengths[rank]]``, any device, any dtype, may be empty. Rank 0's
                dtype must be that of all.
            lengths: elements per rank; looked at on rank 0 only.

        Returns:
            On rank 0 one host tensor per rank, shape ``[lengths[r]]``, this rank's own being ``tensor`` itself if it
            lies on the host; ``None`` elsewhere.
        """
        if self.rank != 0:
            if tensor.numel():
                self._transfer(dist.isend, tensor.detach().contiguous().view(torch.uint8).to(self._device()), 0)
            return None
        parts = [tensor.detach().cpu()]
        for rank in range(1, self.size):
            part = torch.empty(lengths[rank], dtype=tensor.dtype, device="cpu")
            if part.numel():
                raw = part.view(torch.uint8)  # gloo has no float8, and bytes are bytes
                staged = raw.to(self._device())
                self._transfer(dist.irecv, staged, rank)
                if staged is not raw:
                    raw.copy_(staged)
            parts.append(part)
        return parts

    def _transfer(self, operation: Any, raw: torch.Tensor, peer: int) -> None:
        # As a batch of one: a lone NCCL send would open one more communicator for every pair of ranks.
        for work in dist.batch_isend_irecv([dist.P2POp(operation, raw, peer)]):
            work.wait()
        if raw.device.type == "cuda":
            torch.cuda.current_stream(raw.device).synchronize()

    def _device(self) -> torch.device:
        """Return where tensors must lie: on the host if a backend of the group serves it (gloo does, NCCL does not)."""
        if "cpu:" in dist.get_backend_config():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())
