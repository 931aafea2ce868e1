"""Build once what a job would build, without memory and without starting anything, and hear what it says of its
settings.

Most settings are checked by the class that takes them, and only there. Building it is the one check that needs no list
of keys: the strategy, the Trainer and its callbacks as they are, the optimizer on a dummy parameter, the model on the
meta device. Only classes that are known to do nothing else on construction are built.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lit_zero.core.errors import ConfigError, check_choice, check_local

if TYPE_CHECKING:
    from omegaconf import DictConfig

_CALLBACKS = ("lightning.pytorch.callbacks.", "pytorch_lightning.callbacks.", "reporting.")
# Of the Trainer's arguments: those that change this process for good, and those that may open files or connections.
_NOT_TRIED = {
    "benchmark",
    "callbacks",
    "detect_anomaly",
    "deterministic",
    "logger",
    "plugins",
    "profiler",
    "strategy",
}
# What the main job measures.
_LOGGED = ("train_loss", "val_loss", "val_bpb", "tokens_per_second")
_REPORTED = (
    *_LOGGED,
    "steps",
    "parameters",
    "state_bytes_per_rank",
    "ddp_state_bytes",
    "buffer_bytes_per_rank",
    "sent_bytes_per_step",
)
_UNKNOWN = object()  # until the job runs


def try_out(cfg: DictConfig) -> None:
    """Build what is known of a configuration's groups, and compare them with one another.

    Args:
        cfg: a composed configuration of which ``validate`` has checked the single values.

    Raises:
        ConfigError: naming the group, and saying what its class said.
    """
    for name in _names(cfg, "callbacks"):
        check_local(f"callbacks.{name}.dirpath", _value(cfg, f"callbacks.{name}.dirpath"))
    where = next((key for key in ("strategy", "trainer.strategy") if _target(cfg, key).startswith("lit_zero.")), "")
    strategy = _build(cfg, where) if where else None
    callbacks = [
        callback
        for name in _names(cfg, "callbacks")
        if _target(cfg, f"callbacks.{name}").startswith(_CALLBACKS)
        and (callback := _build(cfg, f"callbacks.{name}", partly=True)) is not None
    ]
    if _target(cfg, "trainer").endswith(".Trainer"):
        _try_trainer(cfg, strategy, callbacks)
    _try_optimizer(cfg)
    if _target(cfg, "data") == "text_data.TextDataModule":
        _build(cfg, "data", partly=True)
    if _target(cfg, "model") == "lit_gpt.LitGPT":
        _try_model(cfg, strategy)
        _check_metrics(cfg)
    _check_effect(cfg, strategy)


def check_folder(cfg: DictConfig, multirun: bool) -> None:
    """Check what becomes of an output folder whose name holds the time: it is new in every start of the program.

    Args:
        cfg: a configuration as Hydra composes it for a job, with the node ``hydra``.
        multirun: the job is one of a sweep.

    Raises:
        ConfigError: if ranks that others have started would each make one, or if a checkpoint is expected in it.
    """
    from omegaconf import OmegaConf

    folder = OmegaConf.to_container(cfg.hydra.sweep if multirun else cfg.hydra.run, resolve=False)
    if "${now:" not in str(folder):
        return
    key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    for variable, starter in (("TORCHELASTIC_RUN_ID", "torchrun"), ("SLURM_STEP_NUM_TASKS", "srun")):
        processes = os.environ.get("WORLD_SIZE" if starter == "torchrun" else variable, "1")
        if variable in os.environ and processes.isdigit() and int(processes) > 1:
            raise ConfigError(
                f"{starter} has started {processes} processes, and each would make an output folder of its own: the "
                f"name of the folder, {key}, holds the time. Give them one: {key}=FOLDER."
            )
    if _value(cfg, "ckpt_path") == "last" and not any(
        _value(cfg, f"callbacks.{name}.dirpath") for name in _names(cfg, "callbacks")
    ):
        raise ConfigError(
            f"ckpt_path=last is looked for in this job's own output folder, which is new: its name, {key}, holds the "
            f"time, so nothing would be loaded. Name a checkpoint, or the folder of the job to go on with: "
            f"{key}=FOLDER."
        )


def _try_trainer(cfg: DictConfig, strategy: Any, callbacks: list[Any]) -> None:
    values, _ = _values(cfg, "trainer")
    kept = {
        key: value
        for key, value in values.items()
        if key not in _NOT_TRIED and not (isinstance(value, dict) and "_target_" in value)
    }
    chosen = strategy or values.get("strategy")
    more = {} if chosen is None or isinstance(chosen, dict) else {"strategy": chosen}
    with _quietly():
        _call("trainer", lambda: _instantiate({**kept, "_partial_": True})(callbacks=callbacks, logger=False, **more))


def _try_optimizer(cfg: DictConfig) -> None:
    import torch

    if not _target(cfg, "optimizer").startswith(("torch.optim.", "lit_zero.optim.")):
        return
    build = _build(cfg, "optimizer")
    if build is None or not _value(cfg, "optimizer._partial_"):
        return
    optimizer = _call("optimizer", lambda: build([torch.nn.Parameter(torch.zeros(2, 2))]))
    if not _target(cfg, "scheduler").startswith(("torch.optim.lr_scheduler.", "lit_gpt.")):
        return
    schedule = _build(cfg, "scheduler")
    if schedule is not None and _value(cfg, "scheduler._partial_"):
        steps = {"total_steps": 10} if "total_steps" in inspect.signature(schedule).parameters else {}
        with _quietly():
            _call("scheduler", lambda: schedule(optimizer, **steps))


def _try_model(cfg: DictConfig, strategy: Any) -> None:
    import torch

    from lit_zero.config.no_initialization import no_initialization

    model = _build(cfg, "model")
    if model is None:
        return
    with torch.device("meta"), no_initialization():
        _call("model", model.configure_model)
    if strategy is not None:
        _call("zero", lambda: strategy.check_units(model))
        _call("activation", lambda: strategy.check_activation(model))
        _call("layers", lambda: strategy.layers.check_fit(model))
        _call("pipeline", lambda: strategy.check_blocks(model))


def _check_metrics(cfg: DictConfig) -> None:
    """Check the names of measured values that other settings refer to."""
    wanted = {f"callbacks.{name}.monitor": _LOGGED for name in _names(cfg, "callbacks")}
    for key, known in {"optimized_metric": _REPORTED, **wanted}.items():
        name = _value(cfg, key)
        if not isinstance(name, str) or name.startswith("lr-"):  # LearningRateMonitor's
            continue
        check_choice(key, name, known)
        if name.startswith("val_") and _value(cfg, "trainer.limit_val_batches") == 0:
            raise ConfigError(
                f"{key}={name} is not measured with trainer.limit_val_batches=0. Set {key}=train_loss or {key}=null, "
                "or raise trainer.limit_val_batches."
            )


def _check_alone(cfg: DictConfig, strategy: Any) -> None:
    """Refuse settings of what ranks share that hold the same stages, where no two ranks do."""
    if strategy.parallel_devices is None or strategy.data_parallel_size > 1 or strategy.offload.away:
        return
    for key, default in (("zero.slots", None), ("zero.poison", False)):
        value = _value(cfg, key)
        if value is not None and value != default:
            raise ConfigError(
                f"{key}={str(value).lower()} has no effect: the pipeline takes all {strategy.pipeline.ranks} ranks, so "
                f"no two share the parameters of a stage. Remove {key}, or raise trainer.devices."
            )


def _check_early_step(cfg: DictConfig) -> None:
    """Refuse settings that need all gradients at once, where they are stepped with and dropped one after the other."""
    clip, accumulate = _value(cfg, "trainer.gradient_clip_val"), _value(cfg, "trainer.accumulate_grad_batches")
    if clip:
        raise ConfigError(
            f"trainer.gradient_clip_val={clip} does not go with precision.step=backward: the norm of all gradients is "
            "known only when they are gone. Use trainer.gradient_clip_val=null, or precision.step=after."
        )
    if accumulate is not None and accumulate > 1:
        raise ConfigError(
            f"trainer.accumulate_grad_batches={accumulate} does not go with precision.step=backward: gradients of "
            "several micro-batches would stand all at once. Use trainer.accumulate_grad_batches=1, or "
            "precision.step=after."
        )


def _check_effect(cfg: DictConfig, strategy: Any) -> None:
    """Refuse settings that other settings leave without effect."""
    piped = _target(cfg, "pipeline").startswith("lit_zero.") and _value(cfg, "pipeline.schedule") != "none"
    accumulate = None if piped else _value(cfg, "zero.accumulate")  # a pipeline's step has micro-batches of its own
    scheduled = any("GradientAccumulationScheduler" in _target(cfg, f"callbacks.{n}") for n in _names(cfg, "callbacks"))
    if accumulate is not None and _value(cfg, "trainer.accumulate_grad_batches") == 1 and not scheduled:
        raise ConfigError(
            f"zero.accumulate={accumulate} has no effect with trainer.accumulate_grad_batches=1: a step has one "
            "micro-batch. Remove zero.accumulate, or raise trainer.accumulate_grad_batches."
        )
    if _value(cfg, "precision.step") == "backward":
        _check_early_step(cfg)
    if strategy is not None and piped:
        _check_alone(cfg, strategy)
    if strategy is not None and strategy.offload.away:
        _call("offload", strategy.offload.check_folder)
    if _value(cfg, "trainer.devices") not in (1, "1", [0]) or _value(cfg, "trainer.num_nodes") not in (None, 1):
        return
    apart = _value(cfg, "offload.where") not in (None, "none")  # then one process has shards too
    for key, default in (("zero.slots", None), ("zero.poison", False), ("comm.overlap", True)):
        value = _value(cfg, key)
        if value is not None and value != default and not apart:
            raise ConfigError(
                f"{key}={str(value).lower()} has no effect with trainer.devices=1: one process exchanges nothing. "
                f"Remove {key}, or raise trainer.devices."
            )


# ---- reading a configuration, of which some values are known only when the job runs


def _target(cfg: DictConfig, key: str) -> str:
    return str(_value(cfg, f"{key}._target_") or "")


def _names(cfg: DictConfig, key: str) -> list[str]:
    """Return the keys of a group; none if there is no such group."""
    from omegaconf import DictConfig, OmegaConf

    node = OmegaConf.select(cfg, key, throw_on_missing=False)
    return [str(name) for name in node] if isinstance(node, DictConfig) else []


def _value(cfg: DictConfig, key: str) -> Any:
    """Return the value at ``key`` in plain types, ``None`` where there is none or none that is known yet."""
    value = _look_up(cfg, key)
    return None if value is _UNKNOWN else value


def _values(cfg: DictConfig, key: str) -> tuple[dict[str, Any], bool]:
    """Return the settings of a group that are known, and whether all are."""
    values = {name: _look_up(cfg, f"{key}.{name}") for name in _names(cfg, key)}
    known = {name: value for name, value in values.items() if value is not _UNKNOWN}
    return known, len(known) == len(values)


def _look_up(cfg: DictConfig, key: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        found = OmegaConf.select(cfg, key, throw_on_missing=True)
        return (
            OmegaConf.to_container(found, resolve=True, throw_on_missing=True) if OmegaConf.is_config(found) else found
        )
    except OmegaConfBaseException:  # such as ${hydra:runtime.output_dir}
        return _UNKNOWN


# ---- building


def _build(cfg: DictConfig, key: str, partly: bool = False) -> Any:
    """Build a group.

    Args:
        cfg: the configuration.
        key: the group.
        partly: build it without the settings that are not known yet, such as folders; else then return ``None``.
    """
    values, known = _values(cfg, key)
    return _call(key, lambda: _instantiate(values)) if known or partly else None


def _instantiate(values: dict[str, Any]) -> Any:
    from hydra.utils import instantiate

    return instantiate(values)


def _call(key: str, build: Callable[[], Any]) -> Any:
    """Return what ``build`` returns.

    Raises:
        ConfigError: naming ``key``, for whatever ``build`` raises.
    """
    try:
        return build()
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__
        text = " ".join(line.strip() for line in str(cause).splitlines())
        if isinstance(cause, ConfigError):
            if re.match(r"\w+\.[\w.]+[= ]", text):  # it names the key as the user types it
                raise ConfigError(text) from None
            raise ConfigError(f"{key}.{text}" if re.match(r"\w+=", text) else f"{key}: {text}") from None
        says_it_all = isinstance(cause, ValueError | TypeError) or type(cause).__module__ != "builtins"
        kind = "" if says_it_all else f"{type(cause).__name__}: "
        raise ConfigError(f"{key}: {kind}{text}") from None


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep to itself what is logged and warned of: the job itself will say it again."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
