"""LAMB and Muon on a GPU: by their kernels, and in a stage of ZeRO, against the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.optim import LAMB, AdamW, Muon
from lit_zero.strategy.precision import agreeing_scaler
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine
from tests.optim.whole import groups
from tests.zero.harness import GPT, tokens

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def stepped(kind: type[torch.optim.Optimizer], device: torch.device, **settings: object) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in ((70, 61), (5000,), (3, 4))]
    optimizer = kind(params, lr=0.01, **settings)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(device)
        optimizer.step()
    return [param.detach().cpu() for param in params]


@pytest.mark.parametrize(("kind", "settings"), [(LAMB, {}), (Muon, {"ns_dtype": "float32"})])
def test_equals_the_cpu(kind, settings):
    both = (stepped(kind, device, **settings) for device in (CUDA, torch.device("cpu")))
    for got, expected in zip(*both, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [LAMB, Muon])
@pytest.mark.parametrize("stage", ["none", "stage3"])
def test_under_the_engine_it_learns(kind, stage):
    torch.manual_seed(0)
    model = GPT()
    optimizer = kind(groups(model), lr=0.02)
    engine = Engine(model, [optimizer], zero=Zero(stage), exchange=open_exchange(Comm(), CUDA), device=CUDA)
    losses = []
    for _ in range(20):
        loss = model.loss(tokens(0).to(CUDA))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.detach()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("stage", ["none", "stage3"])
def test_a_clipped_step_with_a_loss_scale_waits_for_nothing(stage):
    """But for the first, which compiles and uploads."""
    torch.manual_seed(0)
    model = GPT()
    optimizer = AdamW(groups(model), lr=1e-2)
    engine = Engine(model, [optimizer], zero=Zero(stage), exchange=open_exchange(Comm(), CUDA), device=CUDA)
    scaler = agreeing_scaler(torch.amp.GradScaler("cuda", init_scale=2.0**10), lambda _: engine)
    for number in range(3):
        loss = scaler.scale(model.loss(tokens(number).to(CUDA)))
        engine.backward(loss * float("inf") if number == 1 else loss)
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            scaler.unscale_(optimizer)
            engine.clip_grad_norm(0.1, optimizer=optimizer)
            scaler.step(optimizer)
            scaler.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**9
    assert {state["step"].item() for state in optimizer.state.values()} == {2.0}
    engine.detach()
    assert all(param.isfinite().all() for param in model.parameters())
