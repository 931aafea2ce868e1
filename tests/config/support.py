"""Run the scripts in ``apps/`` and compose lit_zero's groups."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

import lit_zero.config
from tests.warm import Finished, run_python

APPS = Path(__file__).parent / "apps"
EXAMPLES = Path(__file__).parents[2] / "examples"

# What a launcher, or the test before, may have left in this process's environment.
_NOT_INHERITED = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def run(script: Path, *arguments: str, cwd: Path, timeout: float = 200.0) -> Finished:
    """Run a script to its end."""
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED and not k.startswith("LIT_ZERO_")}
    return run_python([str(script), *arguments], cwd, environment, timeout)


def composed(*overrides: str, hydra: bool = False) -> DictConfig:
    """Compose the root config of the main job."""
    with initialize_config_module("lit_zero.conf", version_base="1.3"):
        # there is no job, so no output folder that Hydra could name
        return compose("train", ["paths.output_dir=out", *overrides], return_hydra_config=hydra)


def refusal(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str | None:
    """Return why the main job's command line is refused, ``None`` if it is not and the job would start."""
    ran: list[Any] = []

    @lit_zero.config.main()
    def job(cfg: DictConfig) -> None:
        ran.append(cfg)

    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    start: Callable[[], None] = job
    try:
        start()
    except SystemExit as stop:
        assert not ran, "the job was started and then refused"
        return str(stop.code)
    assert ran
    return None


def in_order(text: str, words: Sequence[str]) -> bool:
    """Return whether the words occur in ``text``, one after the other."""
    at = 0
    for word in words:
        at = text.find(word, at)
        if at < 0:
            return False
        at += len(word)
    return True
