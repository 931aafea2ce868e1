"""What the Trainer's strategy and Fabric's have in common: the settings, and the processes.

Lightning has two base classes of strategies, which share no code. Either is put behind ``Common`` in a list of bases,
and what ``Common`` says then holds for both.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch

from lit_zero.checkpoint.policy import Checkpoint
from lit_zero.comm import process_group
from lit_zero.comm.policy import Comm
from lit_zero.config.validate import check_cpu_processes
from lit_zero.core.errors import ConfigError, LitZeroError, check_choice
from lit_zero.precision.policy import Precision
from lit_zero.strategy.flavour import (
    _init_dist_connection,
    _sync_ddp_if_available,
    fabric_rank_zero_only,
    rank_zero_only,
    reset_seed,
)
from lit_zero.strategy.launcher import JobLauncher, new_job
from lit_zero.zero.policy import Placement, Zero

if TYPE_CHECKING:
    from typing import Any as _Base
else:
    _Base = object  # either of Lightning's two base classes, which look alike from here


class Common(_Base):
    """Settings and processes of a strategy; see :class:`~lit_zero.strategy.strategy.ZeroStrategy` for the arguments."""

    _launcher: Any

    def __init__(
        self,
        zero: str | Zero = "stage2",
        precision: Precision | None = None,
        comm: Comm | None = None,
        checkpoint: str | Checkpoint = "full",
        nonfinite_loss: Literal["error", "ignore"] = "error",
        timeout: float | timedelta = 1800.0,
        process_group_backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        # All arguments, as they came [Note: one word for Trainer and Fabric].
        self._given = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__")} | kwargs
        new_job()
        super().__init__(**kwargs)
        self.zero = Zero(zero) if isinstance(zero, str) else _instance("zero", zero, Zero)
        self.precision_policy = _instance("precision", precision or Precision(), Precision)
        self.comm = _instance("comm", comm or Comm(), Comm)
        self.checkpoint_policy = (
            Checkpoint(checkpoint) if isinstance(checkpoint, str) else _instance("checkpoint", checkpoint, Checkpoint)
        )
        check_choice("nonfinite_loss", nonfinite_loss, ("error", "ignore"))
        self._nonfinite_loss = nonfinite_loss
        self._timeout = _duration("timeout", timeout)
        if process_group_backend is not None:
            check_choice("process_group_backend", process_group_backend, ("gloo", "nccl", "cpu:gloo,cuda:nccl"))
        self._backend = process_group_backend
        self._num_nodes = 1

    # ---- processes

    @property
    def root_device(self) -> torch.device:
        """This rank's device."""
        if self.parallel_devices is None:
            raise LitZeroError("The strategy has no devices yet: it is used outside a Trainer or Fabric.")
        device: torch.device = self.parallel_devices[self.local_rank]
        return device

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
    def data_parallel_size(self) -> int:
        """Ranks over which batches are divided."""
        return self.num_nodes * self.num_processes

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which share of the data this rank reads."""
        return {"num_replicas": self.data_parallel_size, "rank": self.global_rank}

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None and self.parallel_devices is not None
        if self.parallel_devices[0].type == "cpu" and not self.cluster_environment.creates_processes_externally:
            check_cpu_processes("devices", self.num_processes)
        launcher: Any = JobLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        self._launcher = launcher

    def set_world_ranks(self) -> None:
        """Tell the cluster environment and the rank-zero helpers who this process is."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        for only in (rank_zero_only, fabric_rank_zero_only):
            only.rank = self.global_rank  # type: ignore[attr-defined]

    def setup_environment(self) -> None:
        """Join the process group."""
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        self._backend = self._backend or process_group.default_backend(self.root_device)
        device = self.root_device if self.root_device.type != "cpu" else None
        assert self.cluster_environment is not None
        _init_dist_connection(self.cluster_environment, self._backend, timeout=self._timeout, device_id=device)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Return once every rank has called this."""
        process_group.barrier(self.root_device)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return rank ``src``'s ``obj`` on every rank."""
        return process_group.broadcast_object(obj, src)

    def _reduced(self, tensor: Any, group: Any | None, reduce_op: Any) -> Any:
        """Return ``tensor`` reduced over the data-parallel ranks; anything else as it is."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)

    @property
    def _shards_parameters(self) -> bool:
        return self.zero.row.over(self.data_parallel_size).parameter is Placement.SHARD


def _instance(key: str, value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise ConfigError(f"{key}={value!r} is not valid: expected a {kind.__name__}, got a {type(value).__name__}.")
    return value


def _duration(key: str, value: Any) -> timedelta:
    if not isinstance(value, timedelta):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ConfigError(f"{key}={value!r} is not valid: expected seconds, more than 0, or a timedelta.")
        value = timedelta(seconds=value)
    return value
