"""Offload from a GPU: equal to no offload, and the device's memory is what the arithmetic says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_zero.comm.exchange import Exchange
from lit_zero.offload import Offload
from lit_zero.offload.open import open_keeping
from lit_zero.precision import Lowering, Precision
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine
from tests.offload.harness import STAGES, own_kernel
from tests.zero.harness import GPT, tokens

pytestmark = pytest.mark.gpu


def trained(stage: str, offload: Offload, lowering: Lowering | None = None, layers: int = 3, dim: int = 12) -> Any:
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    model = GPT(layers=layers, dim=dim)
    engine = Engine(
        model,
        [own_kernel(model)],
        zero=Zero(stage),
        exchange=Exchange(),
        device=device,
        lowering=lowering,
        keeping=open_keeping(offload, device),
    )
    for step in range(4):
        for micro in range(2):
            with torch.autocast("cuda", torch.bfloat16, enabled=lowering is not None):
                loss = model.loss(tokens(2 * step + micro).to(device))
            if micro == 0:
                with engine.no_reduce():
                    engine.backward(loss)
            else:
                engine.backward(loss)
        engine.clip_grad_norm(0.5)
        engine.step()
    engine.wait_for_parameters()
    torch.cuda.synchronize()
    allocated, sizes = torch.cuda.memory_allocated(device), engine.model_state_bytes()
    engine.detach()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu(), allocated, sizes


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_equal_to_no_offload(stage: str, mixed: bool, tmp_path: Path) -> None:
    lowering = Lowering(Precision(lower="all"), torch.bfloat16) if mixed else None
    expected, *_ = trained("none", Offload(), lowering)
    ways = [Offload("cpu"), Offload("disk", folder=tmp_path), Offload("cpu", ratio=0.5)]
    if stage == "stage3":
        ways += [Offload("cpu", params=True), Offload("disk", folder=tmp_path, params=True)]
    for way in ways:
        weights, *_ = trained(stage, way, lowering)
        assert torch.allclose(weights, expected, rtol=1e-2 if mixed else 1e-4, atol=1e-3 if mixed else 1e-5)


def test_the_device_holds_the_parameters_only() -> None:
    _, allocated, sizes = trained("stage3", Offload("cpu", params=True), layers=8, dim=96)
    assert sizes["parameter"] == sizes["master"] == sizes["optimizer"] == 0
    assert allocated < sizes["slots"] + (8 << 20)
