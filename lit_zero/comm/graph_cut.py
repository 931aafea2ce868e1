"""torch's way to cut a backward in two, under names of our own: it is private, and lives in torch.distributed."""

from __future__ import annotations

from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

__all__ = ["stage_backward_input", "stage_backward_weight"]
