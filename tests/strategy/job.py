"""A program whose ranks others start: it trains without and with sharding and writes down what each rank saw.

``python -m tests.strategy.job FOLDER NODES DEVICES``
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tests.strategy.harness import BATCH, Fit, LitGPT, loader, make_trainer

FIT = Fit(arguments={"optimizer": "sgd", "lr": 0.1}, epochs=1)
STAGES = ("none", "stage2", "stage3")  # to add up all, to add up parts, to gather besides
STARTED: list[str] = []  # programs that this process has started


def main(folder: Path, nodes: int, devices: int) -> None:
    """Train once per stage."""
    share = BATCH // (nodes * devices)
    for stage in STAGES:
        fit = replace(FIT, zero={"zero": stage}, devices=devices)
        torch.manual_seed(0)
        module = LitGPT(**fit.arguments)
        trainer = make_trainer(fit, folder / stage, num_nodes=nodes)
        trainer.fit(module, loader(fit.rows, 1, share), loader(16, 2, share))
        weights = trainer.strategy.lightning_module_state_dict()
        if trainer.is_global_zero:
            torch.save(weights, folder / f"{stage}.pt")
    seen = {
        "world": trainer.world_size,
        "rank": trainer.global_rank,
        "local": trainer.local_rank,
        "node": trainer.node_rank,
        "environment": type(trainer.strategy.cluster_environment).__name__,
        "pid": os.getpid(),
        "started": STARTED,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.spawn"):
        STARTED.append(f"{event} {arguments[:2]}")


if __name__ == "__main__":
    sys.addaudithook(_note)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
