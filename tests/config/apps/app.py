"""A user's own Hydra app. Every rank leaves a file that says what it was and what it trained."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tiny import Tiny, before_fit, data

import lit_zero.config
from lit_zero.config.sweep import write_result


@lit_zero.config.main(config_path="conf", config_name="app")
def app(cfg: DictConfig) -> float:
    torch.manual_seed(0)
    before_fit(cfg.failure)
    trainer = instantiate(cfg.trainer, strategy=instantiate(cfg.strategy))
    model = Tiny(cfg.lr, cfg.failure)
    begin = time.monotonic()
    trainer.fit(model, data())
    seconds = time.monotonic() - begin
    held = dict(trainer.strategy.engine.model_state_bytes())
    loss = trainer.validate(model, data(), verbose=False)[0]["loss"]
    folder = Path(HydraConfig.get().runtime.output_dir)
    seen = {
        "pid": os.getpid(),
        "world_size": trainer.world_size,
        "group_size": torch.distributed.get_world_size(),
        "stage": trainer.strategy.zero.stage,
        "lr": model.lr,
        "steps": trainer.global_step,
        "loss": loss,
        "threads": torch.get_num_threads(),
        "config": OmegaConf.to_container(cfg, resolve=True),
    }
    (folder / f"seen{trainer.global_rank}.json").write_text(json.dumps(seen))
    if trainer.is_global_zero:
        result = {
            "val_loss": loss,
            "buffer_bytes_per_rank": held.pop("slots"),
            "state_bytes_per_rank": sum(held.values()),
            "tokens_per_second": 8 * trainer.global_step * trainer.world_size / seconds,
        }
        write_result(folder, result)
    return float(loss)


if __name__ == "__main__":
    app()
