"""Train under the engine with shards that live elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_zero.core.keeping import Keeping
from lit_zero.offload import Offload
from lit_zero.offload.open import open_keeping
from lit_zero.precision import Lowering
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine
from tests.zero.harness import Outcome, Run, with_engine

STAGES = ("stage1", "stage2", "stage3")
CPU = torch.device("cpu")


def own_kernel(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW by the kernel that torch takes for one process: offload takes a faster one unless it is told."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, foreach=False)


def plain(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW as most people write it."""
    # Elements whose true gradient is zero (a key's bias) move by rounding alone; a larger eps takes those out.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


RUN = Run(optimizer=own_kernel, steps=4, dtype=torch.float32)


def disk(folder: Path, **more: Any) -> Offload:
    return Offload("disk", folder=folder, chunk=more.pop("chunk", 1 << 16), **more)


def trained(
    stage: str,
    offload: Offload | None = None,
    run: Run = RUN,
    lowering: Lowering | None = None,
    look: Callable[[Engine], Any] | None = None,
    overlap: bool = True,
    streams: bool = False,
    **zero: Any,
) -> Outcome:
    """Train; call it on every rank. ``streams``: gradients are copied to where the step reads them, as from a GPU."""
    keeping = open_keeping(offload or Offload(), CPU, overlap=overlap)
    if streams:
        as_from_a_gpu(keeping)
    return with_engine(run, Zero(stage, **zero), lowering=lowering, look=look, keeping=keeping)


def as_from_a_gpu(keeping: Keeping) -> None:
    """Let the engine take the way of a GPU, with the host's memory in the place of the device's."""
    keeping._keeper.streams = True  # type: ignore[attr-defined]
    keeping.settle = lambda: None  # type: ignore[method-assign]


def with_steps(run: Run, **changes: Any) -> Run:
    return replace(run, **changes)
