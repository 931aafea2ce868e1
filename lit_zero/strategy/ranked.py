"""What the Trainer's strategy and Fabric's have in common: the settings, and who the ranks are.

Lightning has two base classes of strategies, which share no code. Either is put behind ``Ranked`` in a list of bases,
and what ``Ranked`` says then holds for both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from lit_zero.activation.applied import check_fit
from lit_zero.activation.policy import Activation
from lit_zero.checkpoint.policy import Checkpoint
from lit_zero.comm import process_group
from lit_zero.comm.meeting import open_store
from lit_zero.comm.policy import Comm
from lit_zero.core.errors import LitZeroError, check_choice
from lit_zero.core.keeping import Keeping
from lit_zero.layers.policy import Layers
from lit_zero.layers.replacing import Replacement
from lit_zero.offload.open import open_keeping
from lit_zero.offload.policy import Offload
from lit_zero.optim import fuse
from lit_zero.precision.policy import Lowering, Precision
from lit_zero.precision.small import Small
from lit_zero.strategy.activations import Activations
from lit_zero.strategy.arguments import duration, instance
from lit_zero.strategy.flavour import _init_dist_connection, fabric_rank_zero_only, rank_zero_only, reset_seed
from lit_zero.strategy.layers import refuse_sparse_optimizers
from lit_zero.strategy.refusals import refuse_offload_without_shards, refuse_other_size, refuse_surplus_rank
from lit_zero.strategy.small import refuse_offload_of_small_state
from lit_zero.zero.policy import Placement, Row, Zero
from lit_zero.zero.units import plan_units

if TYPE_CHECKING:
    from typing import Any as _Base
else:
    _Base = object  # either of Lightning's two base classes, which look alike from here


class Ranked(_Base):
    """The settings of a strategy and its ranks.

    Attributes:
        data_parallel_size: ranks over which batches are divided.
        activations: the user's choice of what lives between forward and backward, at work.
        layers: the user's choice of what computes known layers, at work.
        fused: ``auto``: optimizers of torch's step by fused kernels.
    """

    _num_nodes = 1
    activations: Activations
    layers: Replacement
    fused: str

    def _settle(
        self,
        zero: str | Zero,
        precision: Precision | None,
        comm: Comm | None,
        checkpoint: str | Checkpoint,
        offload: str | Offload,
        nonfinite_loss: str,
        nonfinite_norm: str,
        timeout: float | timedelta,
        backend: str | None,
    ) -> None:
        """Check and take the arguments that are those of both strategies."""
        self.zero = Zero(zero) if isinstance(zero, str) else instance("zero", zero, Zero)
        self.precision_policy = instance("precision", precision or Precision(), Precision)
        self.comm = instance("comm", comm or Comm(), Comm)
        self.checkpoint_policy = (
            Checkpoint(checkpoint) if isinstance(checkpoint, str) else instance("checkpoint", checkpoint, Checkpoint)
        )
        self.offload = Offload(offload) if isinstance(offload, str) else instance("offload", offload, Offload)
        refuse_offload_without_shards(self.offload, self.zero)
        refuse_offload_of_small_state(self.offload, self.precision_policy)
        check_choice("nonfinite_loss", nonfinite_loss, ("error", "ignore"))
        check_choice("nonfinite_norm", nonfinite_norm, ("error", "ignore"))
        self._nonfinite_loss, self._nonfinite_norm = nonfinite_loss, nonfinite_norm
        self.timeout = duration("timeout", timeout)
        if backend is not None:
            check_choice("process_group_backend", backend, ("gloo", "nccl", "cpu:gloo,cuda:nccl"))
        self.backend = backend

    def _apply(self, activation: str | Activation, layers: str | Layers, fused: str) -> None:
        """Check and take what changes the user's module and optimizers at setup."""
        self.activations, self.layers = Activations(activation), Replacement(layers)
        check_choice("fused", fused, ("auto", "none"))
        self.fused = fused

    def take_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Look at optimizers before anything holds their groups, and let them step by fused kernels if the user wants
        it.

        Raises:
            ConfigError: for one that has no fused step, see :func:`lit_zero.optim.fuse`.
            UnsupportedError: for one that cannot be sharded.
        """
        refuse_sparse_optimizers(optimizers)
        for optimizer in optimizers if self.fused == "auto" else ():
            fuse(optimizer)

    def keeping(self) -> Keeping:
        """Return where the shards of an engine live, and in what form."""
        if self.precision_policy.small:
            return Small(self.precision_policy, self.root_device)
        return open_keeping(self.offload, self.root_device, self.is_global_zero, self.comm.overlap)

    def builds_on_meta(self, empty_init: bool | None) -> bool:
        """Return whether modules are built on the meta device: if parameters are sharded, no rank ever holds the full
        model.
        """
        return self.row.parameter is Placement.SHARD and empty_init is not False

    def refuse_loss(self, loss: torch.Tensor, plugin: Any, when: str = "", then: str = "") -> None:
        """Stop before a loss that is no number reaches a weight, unless the user wants it or a loss scaler sees to it.

        Args:
            loss: one number.
            plugin: the precision plugin.
            when: further words on where it came, for the message.
            then: further words on what is left.

        Raises:
            LitZeroError: if it is NaN or infinite.
        """
        if self._nonfinite_loss == "ignore" or getattr(plugin, "scaler", None) is not None:
            return
        value = float(loss.detach())
        if not math.isfinite(value):
            raise LitZeroError(
                f"The loss is {value} on rank {self.global_rank}{when}. No weight has been changed by it{then}. Set "
                "nonfinite_loss='ignore' in ZeroStrategy to train on."
            )

    def check_units(self, module: torch.nn.Module) -> None:
        """Refuse a choice of ``zero.units`` that does not fit ``module``, which may be on the meta device.

        Raises:
            ConfigError: naming what is not there.
        """
        plan_units(module, self.zero.units, Lowering(self.precision_policy))

    @property
    def activation(self) -> Activation:
        """The user's choice of what lives between forward and backward."""
        return self.activations.policy

    def check_activation(self, module: torch.nn.Module) -> None:
        """Refuse a choice of ``activation`` that does not fit ``module``, which may be on the meta device.

        Raises:
            ConfigError: naming what is not there.
        """
        check_fit(module, self.activation, self.zero.units)

    @property
    def row(self) -> Row:
        """What the ZeRO stage means on these ranks."""
        return self.zero.row.over(self.data_parallel_size, self.offload.away)

    @property
    def root_device(self) -> torch.device:
        """This rank's device."""
        if self.parallel_devices is None:
            raise LitZeroError("The strategy has no devices yet: it is used outside a Trainer or Fabric.")
        refuse_surplus_rank(self.local_rank, self.num_processes)
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
        self.backend = self.backend or process_group.default_backend(self.root_device)
        device = self.root_device if self.root_device.type != "cpu" else None
        here = self.cluster_environment
        assert here is not None
        if not process_group.is_initialized():  # a second run goes on with the group of the first
            store = open_store(here.main_address, here.main_port, here.global_rank(), self.timeout)
            _init_dist_connection(here, self.backend, timeout=self.timeout, device_id=device, store=store)
        refuse_other_size(process_group.size(), self.num_nodes * self.num_processes)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Return once every rank has called this."""
        process_group.barrier(self.root_device)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return rank ``src``'s ``obj`` on every rank."""
        return process_group.broadcast_object(obj, src)
