"""Train a small GPT on real text: ``python examples/train.py``.

Every word of the configuration in ``conf/`` can be changed on the command line::

    python examples/train.py zero=stage3 optimizer.lr=1e-3 trainer.devices=2
    python examples/train.py -m zero=none,stage1,stage2,stage3
    python examples/train.py data.path=my_text.txt trainer=gpu precision=bf16-mixed
"""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig, OmegaConf
from reporting import FinalReport, summarize

import lit_zero.config
from lit_zero.config.sweep import write_result
from lit_zero.core.errors import ConfigError


@lit_zero.config.main(config_name="train")
def train(cfg: DictConfig) -> float | None:
    """Run one job in every rank's process; returns the metric that a sweeper of Hydra's may optimize."""
    # A batch is read in less than a millisecond, so worker processes would not help; the other is Lightning's own.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated.*")
    pl.seed_everything(cfg.seed, workers=True)

    data: pl.LightningDataModule = instantiate(cfg.data)
    model: pl.LightningModule = instantiate(cfg.model)
    loggers = _instances(cfg.logger)
    callbacks = _instances(cfg.callbacks)
    if not loggers:  # it writes to loggers only, and Lightning refuses it without one
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    # _partial_: objects go to the Trainer as they are, not through the configuration
    trainer: pl.Trainer = instantiate(cfg.trainer, _partial_=True)(
        strategy=instantiate(cfg.strategy), callbacks=callbacks, logger=loggers or False
    )
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))

    trainer.fit(model, datamodule=data, ckpt_path=cfg.ckpt_path)
    report = next((callback for callback in callbacks if isinstance(callback, FinalReport)), None)
    result: dict[str, Any] = dict(summarize(trainer) if report is None else report.summary)
    # After the last step, whichever step the last check inside fit was at.
    for measured in trainer.validate(model, datamodule=data, verbose=False):  # nothing with trainer.limit_val_batches=0
        result |= {key: float(value) for key, value in measured.items()}

    if trainer.is_global_zero:
        write_result(cfg.paths.output_dir, result)
        print(f"Results, checkpoints and logs: {cfg.paths.output_dir}", flush=True)
    if cfg.optimized_metric is None:
        return None
    if cfg.optimized_metric not in result:
        raise ConfigError(
            f"optimized_metric={cfg.optimized_metric} is not measured: expected one of {', '.join(sorted(result))}."
        )
    return float(result[cfg.optimized_metric])


def _instances(group: DictConfig | None) -> list[Any]:
    """Build every member of a group such as ``callbacks``; a member set to null is left out."""
    return [instantiate(node) for node in (group or {}).values() if node is not None]


if __name__ == "__main__":
    train()
