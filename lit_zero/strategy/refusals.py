"""What is read off a Trainer before training starts, and what lit_zero cannot do yet and refuses."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from lit_zero.core.errors import ConfigError, UnsupportedError, check_local
from lit_zero.offload.policy import Offload
from lit_zero.strategy.flavour import TorchCheckpointIO
from lit_zero.zero.policy import Placement, Zero

_SAME_DEVICES = (
    "Give every Trainer of a script the same devices and num_nodes, or train with another number in a script of its "
    "own."
)


def refuse_unsupported(trainer: Any) -> None:
    """Check a Trainer for what ZeroStrategy cannot train with.

    Raises:
        UnsupportedError: naming the feature and what to use instead.
    """
    plugin = trainer.strategy.checkpoint_io
    if type(plugin) is not TorchCheckpointIO:
        refuse_checkpoint_plugin(plugin, "Trainer")
    for callback in trainer.callbacks:
        if is_a(callback, "Checkpoint") and getattr(callback, "dirpath", None) is not None:
            check_local(
                f"{type(callback).__name__}.dirpath (by default below Trainer.default_root_dir)", callback.dirpath
            )


def refuse_checkpoint_plugin(plugin: Any, where: str) -> NoReturn:
    """Refuse a plugin that would write checkpoints.

    Args:
        plugin: what the user has given.
        where: to what: ``Trainer`` or ``Fabric``.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        f"The plugin {type(plugin).__name__} has no effect: ZeroStrategy writes checkpoints itself, from all ranks. "
        f"Remove it from {where}(plugins=...)."
    )


def refuse_storage_options(options: Any) -> None:
    """Refuse options for another writer of checkpoints.

    Raises:
        ConfigError: unless ``options`` is ``None``.
    """
    if options is not None:
        raise ConfigError(
            f"storage_options={options!r} has no effect: ZeroStrategy writes checkpoints to file systems itself. "
            "Remove it."
        )


def refuse_offload_without_shards(offload: Offload, zero: Zero) -> None:
    """Check that what is to leave the device is sharded.

    Raises:
        ConfigError: if not.
    """
    if offload.away and zero.row.optimizer is Placement.REPLICATE:
        raise ConfigError(
            f"offload.where={offload.where!r} moves shards of optimizer state, and with zero.stage={zero.stage!r} "
            "there are none: every rank keeps it whole. Use zero.stage='stage1' or higher, on one process too, or "
            "offload=none."
        )
    if offload.params and zero.row.parameter is Placement.REPLICATE:
        raise ConfigError(
            f"offload.params=True has no effect with zero.stage={zero.stage!r}: every rank keeps all parameters on its "
            "device there. Remove offload.params, or use zero.stage='stage3'."
        )


def refuse_other_devices(kind: str, backend: str | None) -> None:
    """Check that the ranks' devices are of a kind on which ranks can exchange.

    Args:
        kind: ``cpu``, ``cuda``, ``mps``, ...
        backend: the user's choice of the process group's backend, ``None`` for what serves the device.

    Raises:
        UnsupportedError: for a kind of device without exchange, such as Apple's ``mps``.
        ConfigError: for a backend that does not serve the device.
    """
    serving = {"cpu": ("gloo", "cpu:gloo,cuda:nccl"), "cuda": ("nccl", "cpu:gloo,cuda:nccl")}
    if kind not in serving:
        raise UnsupportedError(
            f"The Trainer has chosen the accelerator {kind!r}, between whose devices torch exchanges nothing; "
            "ZeroStrategy runs on 'cpu' and 'cuda'. Use Trainer(accelerator='cpu')."
        )
    if backend is not None and backend not in serving[kind]:
        raise ConfigError(
            f"process_group_backend={backend!r} does not serve the device {kind!r}: expected one of "
            f"{', '.join(map(repr, serving[kind]))}, or None."
        )


def refuse_other_size(size: int, wanted: int) -> None:
    """Check that this process belongs to as many ranks as the Trainer asks for.

    Args:
        size: ranks of the process group.
        wanted: ``devices`` times ``num_nodes``.

    Raises:
        ConfigError: naming both.
    """
    if size != wanted:
        raise ConfigError(
            f"The Trainer asks for {wanted} processes (devices times num_nodes), but this one belongs to a group of "
            f"{size}: an earlier Trainer of this script has started {size}. {_SAME_DEVICES}"
        )


def refuse_surplus_rank(local_rank: int, devices: int) -> None:
    """Check that there is a device for this rank.

    Args:
        local_rank: number of this rank on its machine.
        devices: what the Trainer asks for there.

    Raises:
        ConfigError: naming both.
    """
    if local_rank >= devices:
        raise ConfigError(
            f"The Trainer asks for devices={devices}, but this process is rank {local_rank} of its machine: an earlier "
            f"Trainer of this script has started more. {_SAME_DEVICES}"
        )


def refuse_no_optimizer(optimizers: Sequence[Any]) -> None:
    """Check that ``configure_optimizers`` returned an optimizer. Several are refused by Lightning itself, outside
    manual optimization.

    Raises:
        UnsupportedError: if there is none.
    """
    if not any(optimizer.param_groups for optimizer in optimizers):  # Lightning puts an empty one in place of None
        raise UnsupportedError(
            "configure_optimizers returned no optimizer; ZeroStrategy trains with exactly one. Return one, or use "
            "trainer.validate, test or predict, which need none."
        )


def refuse_tensors_without_memory(module: nn.Module) -> None:
    """Check a module whose parameters and buffers have been given memory for other tensors that still have none, such
    as the states of metrics.

    Raises:
        UnsupportedError: naming the module and the attribute.
    """
    for name, owner in module.named_modules():
        for key, value in vars(owner).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise UnsupportedError(
                    f"Module {name!r} ({type(owner).__name__}) was built on the meta device and keeps {key!r} there, "
                    "which is neither a parameter nor a buffer, so its value is lost. Build the module (a metric, for "
                    "example) in __init__ instead of configure_model, or under torch.device('cpu')."
                )


def is_a(callback: Any, name: str) -> bool:
    """Return whether ``callback`` is of the class ``name``, of whichever Lightning."""
    return any(kind.__name__ == name for kind in type(callback).__mro__)


def refuse_what_runs_once(module: Any) -> None:
    """Check a module that is to be trained in a pipeline, where its step runs once for each micro-batch on every stage.

    Raises:
        UnsupportedError: saying what.
    """
    name = type(module).__name__
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise UnsupportedError(
            f"{name}.training_step reads the data loader by itself (dataloader_iter); a pipeline cuts the batch into "
            "micro-batches and must see it first. Take (batch, batch_idx), or use pipeline=none."
        )
    if any(isinstance(each, nn.SyncBatchNorm) for each in module.modules()):
        raise UnsupportedError(
            f"{name} normalises over the batches of all ranks (sync_batchnorm=True or nn.SyncBatchNorm), but the ranks "
            "of a pipeline run the same layer at no time together. Remove it, or use pipeline=none."
        )
    if not module.automatic_optimization:
        raise UnsupportedError(
            f"{name} uses manual optimization: its backward is inside training_step, which a pipeline leaves at the "
            "end of each stage. Use automatic optimization, or pipeline=none."
        )
    if "backward" in {
        key
        for kind in type(module).__mro__
        for key in vars(kind)
        if not kind.__module__.startswith(("lightning", "pytorch_lightning", "torch"))
    }:
        raise UnsupportedError(
            f"{name} overrides backward, which a pipeline does not call: every stage has a backward of its own. Remove "
            "it, or use pipeline=none."
        )


def refuse_other_length(position: int, ends: bool) -> None:
    """Say that this rank's data loader has another number of batches than that of the pipeline's first rank.

    Args:
        position: of this rank in the pipeline.
        ends: the first rank's loader has ended.

    Raises:
        ConfigError: always.
    """
    first, here = ("no more batches", "more") if ends else ("more batches", "no more")
    raise ConfigError(
        f"The data loader of the pipeline's first rank has {first} after this step, but that of its rank {position} "
        f"has {here}: the two would wait for each other for ever. All ranks of a pipeline run the first one's batches "
        "and need as many of their own: give them the same data, with one length."
    )
