"""Refuse a configuration that cannot work, before any process is launched."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_zero.config.trial import try_out
from lit_zero.core.errors import ConfigError, check_local, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

PROCESSES_PER_CORE = 4  # more processes on a CPU than this only wait for one another

# The settings of lit_zero.Precision that have an effect in each of Lightning's precision modes.
_PRECISION_KEYS = {
    "64-true": set[str](),
    "32-true": {"moments", "step"},
    "bf16-true": {"reduce_dtype"},
    "16-true": {"reduce_dtype"},
    "bf16-mixed": {"reduce_dtype", "gradient_dtype", "lower", "master", "moments", "step"},
    "16-mixed": {"reduce_dtype", "gradient_dtype", "lower", "moments"},
}


def validate(cfg: DictConfig) -> None:
    """Check a composed configuration, without changing it and without starting anything.

    Only what is known is checked: lit_zero's own classes, Lightning's Trainer, torch's optimizers, and the model and
    data of the main job. So an app of the user's own may call this with any part of lit_zero's groups.

    Args:
        cfg: the configuration that Hydra composed.

    Raises:
        ConfigError: naming the key, what was expected, what came, and the knob to turn.
    """
    _check_policies(cfg)
    if _target(cfg, "trainer").endswith(".Trainer"):
        _check_precision(cfg)
        _check_devices(cfg)
        _check_at_least(cfg, 1, "trainer.accumulate_grad_batches", "trainer.num_nodes")
        _check_at_least(cfg, 0, "trainer.gradient_clip_val")
    if _target(cfg, "optimizer").startswith(("torch.optim.", "lit_zero.optim.")):
        _check_at_least(cfg, 0, "optimizer.lr", "optimizer.weight_decay")
        _check_fused(cfg)
    if _target(cfg, "data") == "text_data.TextDataModule":
        _check_at_least(cfg, 1, "data.batch_size", "data.block_size", "data.vocab_size")
        _check_at_least(cfg, 0, "data.num_workers")
        _check_exists(cfg, "data.path", "a text file or a folder")
    if _target(cfg, "model") == "lit_gpt.LitGPT":
        _check_model(cfg)
    if _target(cfg, "scheduler") == "lit_gpt.warmup_cosine":
        _check_at_least(cfg, 0, "scheduler.warmup_steps", "scheduler.final_fraction")
    _check_seed(cfg)
    if _get(cfg, "ckpt_path") not in ("last", "best", "hpc"):  # which Lightning finds by itself
        check_local("ckpt_path", _get(cfg, "ckpt_path"))
        _check_exists(cfg, "ckpt_path", "a checkpoint")
    _check_logger(cfg)
    try_out(cfg)


def _target(cfg: DictConfig, group: str) -> str:
    """Return the name of what a group builds, empty if it builds nothing."""
    return str(_get(cfg, f"{group}._target_") or "")


def _get(cfg: DictConfig, key: str) -> Any:
    """Return the value at ``key``, ``None`` where there is none, or none that can be known before the job runs.

    Raises:
        ConfigError: if the value refers to a key that does not exist.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError, UnsupportedInterpolationType

    try:
        return OmegaConf.select(cfg, key, throw_on_missing=False)
    except InterpolationKeyError as error:
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None
    except (InterpolationResolutionError, UnsupportedInterpolationType):  # such as ${hydra:runtime.output_dir}
        return None


def _check_policies(cfg: DictConfig) -> None:
    """Build what is lit_zero's own: these classes check themselves."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf.errors import InterpolationKeyError, InterpolationResolutionError

    for group in ("zero", "pipeline", "activation", "layers", "offload", "precision", "comm", "checkpoint"):
        if not _target(cfg, group).startswith("lit_zero."):
            continue
        try:
            instantiate(cfg[group])
        except InterpolationKeyError as error:
            raise ConfigError(f"{group}: {str(error).splitlines()[0]}") from None
        except InterpolationResolutionError:  # a value that is known only when the job runs
            continue
        except InstantiationException as error:
            cause: BaseException = error
            while cause.__cause__ is not None and not isinstance(cause, ConfigError):
                cause = cause.__cause__
            if isinstance(cause, ConfigError):
                raise cause from None
            raise ConfigError(f"{group}: {cause}") from None


def _check_precision(cfg: DictConfig) -> None:
    mode = _get(cfg, "trainer.precision")
    if mode is None or _target(cfg, "precision") != "lit_zero.Precision":
        return
    if mode not in _PRECISION_KEYS:
        raise ConfigError(
            f"trainer.precision={mode} has no precision group. {did_you_mean(mode, _PRECISION_KEYS)} Choose with the "
            "group alone, as in precision=bf16-mixed. A script of your own may give other modes to "
            "Trainer(precision=...)."
        )
    keys = {str(key) for key in cfg.precision if not str(key).startswith("_")}
    if keys != _PRECISION_KEYS[mode]:
        raise ConfigError(
            f"trainer.precision={mode} does not fit the settings of the precision group "
            f"({', '.join(sorted(keys)) or 'none'}), which belong to another mode. "
            f"Choose the mode with the group alone: precision={mode}."
        )
    if mode == "16-mixed" and _device_kind(cfg) == "cpu":
        raise ConfigError(
            "precision=16-mixed needs a GPU: on trainer.accelerator=cpu, Lightning would silently compute in "
            "bf16-mixed instead. Use precision=bf16-mixed, or trainer=gpu."
        )


def _device_kind(cfg: DictConfig) -> str:
    """Return what ``trainer.accelerator`` comes to on this machine: ``cpu``, ``cuda``, or the name as given."""
    accelerator = str(_get(cfg, "trainer.accelerator") or "auto")
    if accelerator not in ("auto", "gpu", "cuda"):
        return accelerator
    import torch

    if accelerator == "gpu" and torch.backends.mps.is_available() and not torch.cuda.is_available():
        return "mps"
    return "cuda" if accelerator != "auto" or torch.cuda.is_available() else "cpu"


def _check_devices(cfg: DictConfig) -> None:
    asked = _get(cfg, "trainer.devices")
    if asked is None:
        return
    devices = _count(asked)
    kind = _device_kind(cfg)
    if kind == "cuda":
        import torch

        present = torch.cuda.device_count()
        if present == 0:
            raise ConfigError("trainer.accelerator=gpu, but torch finds no GPU on this machine. Use trainer=cpu.")
        if devices is not None and devices > present:
            raise ConfigError(
                f"trainer.devices={devices} is more than this machine has: expected at most {present} GPUs."
            )
    elif kind == "cpu" and devices is not None:
        check_cpu_processes("trainer.devices", devices)


def check_cpu_processes(key: str, devices: int) -> None:
    """Check that this machine's CPU cores can run so many processes.

    Args:
        key: what the user has set, for the message.
        devices: processes.

    Raises:
        ConfigError: if they are too many.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if devices > PROCESSES_PER_CORE * cores:
        raise ConfigError(
            f"{key}={devices} is more than this machine can run: expected at most {PROCESSES_PER_CORE * cores} "
            f"processes on its {cores} CPU cores."
        )


def _count(devices: Any) -> int | None:
    """Return how many devices are asked for, ``None`` for all there are.

    Raises:
        ConfigError: if it is no number or list of devices.
    """
    from omegaconf import ListConfig

    if isinstance(devices, ListConfig | list):
        number = len(devices)
    elif isinstance(devices, str) and "," in devices:
        number = len([part for part in devices.split(",") if part.strip()])
    elif devices in ("auto", "-1", -1) and not isinstance(devices, bool):
        return None
    else:
        try:
            number = int(devices) if not isinstance(devices, bool | float) else 0
        except (TypeError, ValueError):
            number = 0
    if number < 1:
        raise ConfigError(
            f"trainer.devices={devices!r} is not valid: expected a whole number of at least 1, a list of devices, "
            "or 'auto'."
        )
    return number


def _check_at_least(cfg: DictConfig, least: int, *keys: str) -> None:
    for key in keys:
        value = _get(cfg, key)
        if isinstance(value, int | float) and value < least:
            raise ConfigError(f"{key}={value} is not valid: expected a number of at least {least}.")


def _check_fused(cfg: DictConfig) -> None:
    target, fused = _target(cfg, "optimizer"), _get(cfg, "optimizer.fused")
    if target.startswith("torch.optim.") and isinstance(fused, str):
        raise ConfigError(
            f"optimizer.fused={fused} is a word of lit_zero.optim's classes, and optimizer._target_={target} would "
            "take any word for True. Use optimizer.fused=null, and for fused kernels strategy.fused=auto."
        )


def _check_model(cfg: DictConfig) -> None:
    _check_at_least(cfg, 1, *(f"model.{key}" for key in ("vocab_size", "block_size", "dim", "layers", "heads")))
    for key, what in (("block_size", "sequences of at most {} tokens"), ("vocab_size", "at most {} different tokens")):
        most, came = _get(cfg, f"model.{key}"), _get(cfg, f"data.{key}")
        if isinstance(most, int) and isinstance(came, int) and came > most:
            raise ConfigError(
                f"data.{key}={came} does not fit model.{key}={most}: expected {what.format(most)}. "
                f"Lower data.{key} or raise model.{key}."
            )
    dim, heads = _get(cfg, "model.dim"), _get(cfg, "model.heads")
    if isinstance(dim, int) and isinstance(heads, int) and dim % heads:
        raise ConfigError(f"model.dim={dim} cannot be split over model.heads={heads}: expected a multiple of {heads}.")


def _check_seed(cfg: DictConfig) -> None:
    seed = _get(cfg, "seed")
    if isinstance(seed, str | float | bool) or (isinstance(seed, int) and not 0 <= seed < 2**32):
        raise ConfigError(f"seed={seed!r} is not valid: expected a whole number from 0 to {2**32 - 1}.")


def _check_exists(cfg: DictConfig, key: str, kind: str) -> None:
    path = _get(cfg, key)
    if isinstance(path, str) and not Path(path).expanduser().exists():
        raise ConfigError(f"{key}={path} does not exist: expected {kind}, seen from {os.getcwd()}.")


def _check_logger(cfg: DictConfig) -> None:
    from omegaconf import DictConfig

    loggers = _get(cfg, "logger")
    nodes = list(loggers.values()) if isinstance(loggers, DictConfig) else []
    for node in nodes:
        target = str(node.get("_target_", "")) if isinstance(node, DictConfig) else ""
        if target.endswith(".TensorBoardLogger") and not any(
            map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))
        ):
            raise ConfigError(
                "logger=tensorboard needs the package tensorboard, which is not installed. Install it with "
                "'pip install lit_zero[logging]', or use logger=csv."
            )
