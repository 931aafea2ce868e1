"""Lightning under either of its names: the package ``lightning``, or ``pytorch_lightning`` where that is what the user
runs.

The two ship the same classes twice, and a Trainer accepts only its own. ``lightning`` is taken unless it is missing, or
unless the program has imported ``pytorch_lightning`` (or ``lightning_fabric``, which comes with it) and not
``lightning``.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning.fabric.plugins as fabric_plugins
    import lightning.fabric.strategies as fabric_strategies
    import lightning.pytorch as pl
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, TorchCheckpointIO
    from lightning.fabric.strategies.strategy import (
        _apply_filter,
        _BackwardSyncControl,
        _validate_keys_for_strict_loading,
    )
    from lightning.fabric.utilities.data import _set_sampler_epoch
    from lightning.fabric.utilities.distributed import (
        DistributedSamplerWrapper,
        _init_dist_connection,
        _sync_ddp_if_available,
    )
    from lightning.fabric.utilities.imports import _IS_INTERACTIVE
    from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
    from lightning.fabric.utilities.seed import reset_seed
    from lightning.pytorch.callbacks import BasePredictionWriter
    from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSamplerWrapper, _IndexBatchSamplerWrapper
    from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
    from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
    from lightning.pytorch.strategies.launchers.multiprocessing import (
        _check_bad_cuda_fork,
        _check_missing_main_guard,
        _GlobalStateSnapshot,
        _MultiProcessingLauncher,
    )
    from lightning.pytorch.strategies.parallel import ParallelStrategy
    from lightning.pytorch.trainer.states import TrainerFn
    from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
else:
    _other = ("pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules) or (
        "lightning_fabric" in sys.modules
        and "lightning" not in sys.modules
        and importlib.util.find_spec("pytorch_lightning")
    )
    if _other or importlib.util.find_spec("lightning") is None:
        _PL, _FABRIC = "pytorch_lightning", "lightning_fabric"
    else:
        _PL, _FABRIC = "lightning.pytorch", "lightning.fabric"

    def _take(module: str, *names: str) -> None:
        found = import_module(module)
        globals().update({name: getattr(found, name) for name in names})

    pl = import_module(_PL)
    fabric_plugins, fabric_strategies = import_module(f"{_FABRIC}.plugins"), import_module(f"{_FABRIC}.strategies")
    _take(
        f"{_FABRIC}.strategies.strategy", "_apply_filter", "_BackwardSyncControl", "_validate_keys_for_strict_loading"
    )
    _take(f"{_FABRIC}.plugins", "CheckpointIO", "ClusterEnvironment", "TorchCheckpointIO")
    _take(f"{_FABRIC}.utilities.data", "_set_sampler_epoch")
    _take(
        f"{_FABRIC}.utilities.distributed",
        "DistributedSamplerWrapper",
        "_init_dist_connection",
        "_sync_ddp_if_available",
    )
    _take(f"{_FABRIC}.utilities.imports", "_IS_INTERACTIVE")
    _take(f"{_FABRIC}.utilities.seed", "reset_seed")
    fabric_rank_zero_only = import_module(f"{_FABRIC}.utilities.rank_zero").rank_zero_only
    _take(f"{_PL}.callbacks", "BasePredictionWriter")
    _take(f"{_PL}.overrides.distributed", "UnrepeatedDistributedSamplerWrapper", "_IndexBatchSamplerWrapper")
    _take(f"{_PL}.plugins.precision", "DoublePrecision", "HalfPrecision", "MixedPrecision", "Precision")
    _take(f"{_PL}.strategies", "DDPStrategy", "StrategyRegistry")
    _take(
        f"{_PL}.strategies.launchers.multiprocessing",
        "_GlobalStateSnapshot",
        "_MultiProcessingLauncher",
        "_check_bad_cuda_fork",
        "_check_missing_main_guard",
    )
    _take(f"{_PL}.strategies.parallel", "ParallelStrategy")
    _take(f"{_PL}.trainer.states", "TrainerFn")
    _take(f"{_PL}.utilities.rank_zero", "rank_zero_only", "rank_zero_warn")

__all__ = [
    "_IS_INTERACTIVE",
    "BasePredictionWriter",
    "CheckpointIO",
    "ClusterEnvironment",
    "DDPStrategy",
    "DistributedSamplerWrapper",
    "DoublePrecision",
    "HalfPrecision",
    "MixedPrecision",
    "ParallelStrategy",
    "Precision",
    "StrategyRegistry",
    "TorchCheckpointIO",
    "TrainerFn",
    "UnrepeatedDistributedSamplerWrapper",
    "_BackwardSyncControl",
    "_GlobalStateSnapshot",
    "_IndexBatchSamplerWrapper",
    "_MultiProcessingLauncher",
    "_apply_filter",
    "_check_bad_cuda_fork",
    "_check_missing_main_guard",
    "_init_dist_connection",
    "_set_sampler_epoch",
    "_sync_ddp_if_available",
    "_validate_keys_for_strict_loading",
    "fabric_plugins",
    "fabric_rank_zero_only",
    "fabric_strategies",
    "pl",
    "rank_zero_only",
    "rank_zero_warn",
    "reset_seed",
]
