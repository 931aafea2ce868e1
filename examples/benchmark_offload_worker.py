"""One rank of one turn of the benchmark of offload: ``benchmark_worker.py`` with further contenders."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmark_worker import CONTENDERS, Step, Turn, main, make_deepspeed, make_floor, make_lit_zero
from torch import nn


def make_offload(model: nn.Module, turn: Turn, stage: str, **offload: Any) -> Step:
    import torch

    from lit_zero.offload import Offload
    from lit_zero.offload.open import open_keeping

    device = torch.device(turn.device, torch.cuda.current_device() if turn.device == "cuda" else None)
    if offload["where"] == "disk":
        offload["folder"] = tempfile.gettempdir()
    return make_lit_zero(model, turn, stage, keeping=open_keeping(Offload(**offload), device, speaks=False))


def make_deepspeed_offload(model: nn.Module, turn: Turn, stage: int) -> Step:
    return make_deepspeed(model, turn, stage, offload_optimizer={"device": "cpu", "pin_memory": turn.device == "cuda"})


OFFLOAD: dict[str, Callable[[nn.Module, Turn], Step]] = {
    "floor": make_floor,
    "stage2": partial(make_lit_zero, stage="stage2"),
    "stage2 cpu": partial(make_offload, stage="stage2", where="cpu"),
    "stage2 cpu half": partial(make_offload, stage="stage2", where="cpu", ratio=0.5),
    "stage2 disk": partial(make_offload, stage="stage2", where="disk"),
    "stage3": partial(make_lit_zero, stage="stage3"),
    "stage3 cpu": partial(make_offload, stage="stage3", where="cpu"),
    "stage3 cpu params": partial(make_offload, stage="stage3", where="cpu", params=True),
    "stage3 disk": partial(make_offload, stage="stage3", where="disk"),
    "stage3 disk params": partial(make_offload, stage="stage3", where="disk", params=True),
    "deepspeed2": partial(make_deepspeed, stage=2),
    "deepspeed2 cpu": partial(make_deepspeed_offload, stage=2),
}
CONTENDERS.update(OFFLOAD)

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
