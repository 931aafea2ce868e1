"""Recurrent layers on CUDA, where cuDNN would like to move their weights."""

from __future__ import annotations

import pytest
import torch

from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine
from tests.models.harness import adamw
from tests.models.test_torch_modules import loss, stack
from tests.zero.harness import tokens

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("stage", ["none", "stage1", "stage2", "stage3"])
def test_recurrent_layers(stage):
    device, found = torch.device("cuda", 0), []
    for managed in (False, True):
        torch.manual_seed(0)
        model = stack("recurrent").double()
        optimizer = adamw(model)
        if managed:
            exchange = open_exchange(Comm(), device)
            engine = Engine(model, [optimizer], zero=Zero(stage), exchange=exchange, device=device)
        model.to(device)  # as the strategy does
        for step in range(3):
            value = loss(model, tokens(step).to(device))
            engine.backward(value) if managed else value.backward()
            optimizer.step()
            optimizer.zero_grad()
        if managed:
            engine.detach()
        found.append(torch.cat([p.detach().flatten().cpu() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
