"""Who the ranks are, the small exchanges that Lightning asks of a strategy, and what becomes of them after an error."""

from __future__ import annotations

from typing import Any

import torch

from lit_zero.comm import process_group
from lit_zero.comm.roll_call import RollCall
from lit_zero.core.errors import LitZeroError
from lit_zero.strategy.flavour import ParallelStrategy, _sync_ddp_if_available, fabric_rank_zero_only, rank_zero_only
from lit_zero.strategy.refusals import refuse_surplus_rank


class Talking(ParallelStrategy):
    """The ranks; barrier, broadcast and reduce over all of them.

    Attributes:
        data_parallel_size: ranks over which batches are divided.

    [Note: a rank that has failed alone] Lightning calls ``on_exception``, where callbacks may save a checkpoint, on the
    rank that has failed, while the others are in the middle of a step. Nothing that takes all ranks must begin there,
    or both sides wait for ever. So once a run is interrupted, the ranks first find out whether all of them are.
    """

    _roll_call: RollCall | None = None  # from setup_environment on
    _num_nodes = 1

    @property
    def root_device(self) -> torch.device:
        """This rank's device."""
        if self.parallel_devices is None:
            raise LitZeroError("The strategy has no devices yet: it is used outside a Trainer.")
        refuse_surplus_rank(self.local_rank, self.num_processes)
        return self.parallel_devices[self.local_rank]

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        return self._num_nodes

    @num_nodes.setter
    def num_nodes(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    @property
    def num_processes(self) -> int:
        """Ranks on this machine."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def is_distributed(self) -> bool:
        """Tells the Trainer to divide the data over the ranks."""
        return True

    @property
    def data_parallel_size(self) -> int:
        """Ranks over which batches are divided."""
        return self.num_nodes * self.num_processes

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which share of the data this rank reads."""
        return {"num_replicas": self.data_parallel_size, "rank": self.global_rank}

    def set_world_ranks(self) -> None:
        """Tell the cluster environment and the rank-zero helpers who this process is."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        for only in (rank_zero_only, fabric_rank_zero_only):
            only.rank = self.global_rank  # type: ignore[attr-defined]

    def together(self) -> bool:
        """Return whether ranks may wait for one another; see the note above."""
        trainer = getattr(self.lightning_module, "_trainer", None)
        return self._roll_call is None or trainer is None or not trainer.interrupted or self._roll_call.all_here()

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Return once every rank has called this."""
        if self.together():
            process_group.barrier(self.root_device)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return rank ``src``'s ``obj`` on every rank."""
        return process_group.broadcast_object(obj, src) if self.together() else obj

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce ``tensor`` over the data-parallel ranks; anything else is returned as it is."""
        if not isinstance(tensor, torch.Tensor) or not self.together():
            return tensor
        if reduce_op in ("mean", "avg") and not (tensor.is_floating_point() or tensor.is_complex()):
            # Lightning rounds a mean of integers down, and weighs what is logged by such a mean of batch sizes.
            tensor = tensor.to(torch.promote_types(torch.get_default_dtype(), torch.float32))
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)
