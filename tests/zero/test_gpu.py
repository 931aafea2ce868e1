"""The engine on CUDA: one rank for each stage against plain torch, and NCCL where there are two GPUs."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.precision import Lowering, Precision
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine
from tests.zero.harness import BATCH, GPT, adamw, tokens

pytestmark = pytest.mark.gpu
STAGES = ("none", "stage1", "stage2", "stage3")


def plain(steps: int, device: torch.device) -> torch.Tensor:
    torch.manual_seed(0)
    model = GPT().double().to(device)
    optimizer = adamw(model)
    for step in range(steps):
        model.loss(tokens(step).to(device)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()


def managed(stage: str, steps: int, device: torch.device, comm: Comm | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    model = GPT().double()  # on the host: the engine moves it, part by part
    optimizer = adamw(model)
    exchange = open_exchange(comm or Comm(), device)
    engine = Engine(model, [optimizer], zero=Zero(stage), exchange=exchange, device=device)
    share = BATCH // exchange.size
    rows = slice(exchange.rank * share, (exchange.rank + 1) * share)
    for step in range(steps):
        engine.backward(model.loss(tokens(step, rows).to(device)))
        engine.clip_grad_norm(0.5)
        engine.step()
    engine.detach()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_equals_plain_torch(stage):
    device = torch.device("cuda", 0)
    assert torch.allclose(managed(stage, 5, device), plain(5, device), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_in_bf16_learns(stage):
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    model = GPT()
    engine = Engine(
        model,
        [adamw(model)],
        zero=Zero(stage),
        exchange=open_exchange(Comm(), device),
        device=device,
        lowering=Lowering(Precision(), torch.bfloat16),
    )
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.loss(tokens(0).to(device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def _rank(rank: int, size: int, port: int, path: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, device_id=device)
    found = {(stage, on): managed(stage, 5, device, Comm(overlap=on)) for stage in STAGES for on in (True, False)}
    if rank == 0:
        torch.save(found, path)
    dist.barrier()
    dist.destroy_process_group()


def test_two_gpus_equal_plain_torch(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, found one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, args=(2, port, str(tmp_path / "found.pt")), nprocs=2)
    expected = plain(5, torch.device("cuda", 0))
    for found in torch.load(tmp_path / "found.pt").values():
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
