"""A script without Hydra: ``plain.py FAILURE FOLDER``. Every rank leaves its process number in FOLDER."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
from tiny import Tiny, before_fit, data

import lit_zero
from lit_zero.strategy import ranks

if __name__ == "__main__":
    failure, folder = sys.argv[1], Path(sys.argv[2])
    ranks.STUCK_SECONDS = 6.0
    (folder / f"pid{os.environ.get('LOCAL_RANK', 0)}").write_text(str(os.getpid()))
    before_fit(failure)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=lit_zero.ZeroStrategy("stage2"), max_steps=3, **quiet)
    trainer.fit(Tiny(failure=failure), data())
    (folder / f"done{trainer.global_rank}").write_text(str(trainer.global_step))
