"""The small exchanges that Lightning asks of a strategy, and what becomes of them after an error."""

from __future__ import annotations

from typing import Any

import torch

from lit_zero.comm.roll_call import RollCall
from lit_zero.strategy.flavour import ParallelStrategy, _sync_ddp_if_available
from lit_zero.strategy.ranked import Ranked


class Talking(Ranked, ParallelStrategy):
    """The ranks of a Trainer; barrier, broadcast and reduce over all of them.

    [Note: a rank that has failed alone] Lightning calls ``on_exception``, where callbacks may save a checkpoint, on the
    rank that has failed, while the others are in the middle of a step. Nothing that takes all ranks must begin there,
    or both sides wait for ever. So once a run is interrupted, the ranks first find out whether all of them are.
    """

    _roll_call: RollCall | None = None  # from setup_environment on

    @property
    def is_distributed(self) -> bool:
        """Tells the Trainer to divide the data over the ranks."""
        return True

    def together(self) -> bool:
        """Return whether ranks may wait for one another; see the note above."""
        trainer = getattr(self.lightning_module, "_trainer", None)
        return self._roll_call is None or trainer is None or not trainer.interrupted or self._roll_call.all_here()

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Return once every rank has called this."""
        if self.together():
            super().barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return rank ``src``'s ``obj`` on every rank."""
        return super().broadcast(obj, src) if self.together() else obj

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce ``tensor`` over the data-parallel ranks; anything else is returned as it is."""
        if not isinstance(tensor, torch.Tensor) or not self.together():
            return tensor
        if reduce_op in ("mean", "avg") and not (tensor.is_floating_point() or tensor.is_complex()):
            # Lightning rounds a mean of integers down, and weighs what is logged by such a mean of batch sizes.
            tensor = tensor.to(torch.promote_types(torch.get_default_dtype(), torch.float32))
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)
