"""Checkpointed units: when their gradients are complete, and how much memory waits for that."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine
from tests.zero.harness import GPT, momentum, tokens
from tests.zero.test_models import Checkpointed, Reentrant


def peak_bytes(kind: type[GPT], stage: str, between: str) -> int:
    """Return the most bytes of buffers, after two steps and what is done between them."""
    torch.manual_seed(0)
    model = kind(layers=8)
    exchange = open_exchange(Comm(), torch.device("cpu"))
    engine = Engine(model, [momentum(model)], zero=Zero(stage), exchange=exchange)
    for number in range(2):
        if number == 1 and between == "evaluation":
            model.eval()
        if number == 1 and between != "nothing":
            with torch.no_grad():
                for _ in range(2):
                    model(tokens(9))
            model.train()
        engine.backward(model.loss(tokens(number)))
        engine.step()
    bytes_used = engine.model_state_bytes()["slots"]
    engine.detach()
    return bytes_used


def peaks(kind: type[GPT], stage: str) -> dict[str, int]:
    cases = ["nothing", "evaluation"]
    if kind is Checkpointed:
        cases.append("a forward without gradient")  # in training, as for a teacher that is the model itself
    return {between: peak_bytes(kind, stage, between) for between in cases}


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
@pytest.mark.parametrize("kind", [Checkpointed, Reentrant], ids=lambda kind: kind.__name__)
def test_forwards_without_gradient_do_not_make_gradients_wait(ranks, kind, stage):
    for found in ranks(2).run(peaks, kind, stage):
        plain = found.pop("nothing")
        assert plain > 0 and all(value == plain for value in found.values()), (plain, found)


def peak_of_one_block(stage: str) -> Any:
    return peak_bytes(Checkpointed, stage, "nothing"), peak_bytes(GPT, stage, "nothing")


def test_recomputation_alone_does_not_make_gradients_wait(ranks):
    for checkpointed, plain in ranks(2).run(peak_of_one_block, "stage2"):
        assert checkpointed == plain
