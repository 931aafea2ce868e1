"""An app that trains nothing. Its jobs leave a mark each time they run, and end as they are told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import lit_zero.config
from lit_zero.config.sweep import write_result


@lit_zero.config.main(config_path="conf", config_name="light")
def light(cfg: DictConfig) -> float:
    folder = Path(HydraConfig.get().runtime.output_dir)
    with (folder / "ran").open("a") as file:
        file.write(f"{os.getpid()} {HydraConfig.get().sweep.dir}\n")
    if cfg.fails == cfg.x and not Path(cfg.mended).exists():
        raise ValueError(f"x={cfg.x} fails until {cfg.mended} is there")
    if cfg.hangs == cfg.x:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        (folder / "hangs").write_text(f"{os.getpid()} {child.pid}")
        time.sleep(300)
    write_result(folder, {"val_loss": cfg.x**2})
    return cfg.x**2


if __name__ == "__main__":
    light()
