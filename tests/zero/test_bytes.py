"""Live bytes per rank equal the table of the ZeRO paper; bytes sent per step equal the arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_zero.comm.open import open_exchange
from lit_zero.precision import Lowering, Precision
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine
from tests.zero.harness import GPT, adamw, tokens

STAGES = ("none", "stage1", "stage2", "stage3")
BF16 = torch.bfloat16


def model() -> GPT:
    return GPT(vocab=31, dim=48, layers=8)  # blocks hold 99 % of the parameters


def train(stage: str, lowering: Lowering, dtype: torch.dtype, micro_batches: int) -> dict[str, Any]:
    torch.manual_seed(0)
    net = model().to(dtype)
    optimizer = adamw(net)
    exchange = open_exchange(comm=_plain(), device=torch.device("cpu"))
    engine = Engine(net, [optimizer], zero=Zero(stage), exchange=exchange, lowering=lowering)
    sizes = {unit.name: sum(lane.numel for lane in unit.lanes) for unit in engine.units}
    sent = []
    for step in range(3):
        exchange.counters.reset()
        for micro in range(micro_batches):
            with torch.autocast("cpu", BF16, enabled=lowering.dtype is not None):
                loss = net.loss(tokens(step * 3 + micro))
            if micro < micro_batches - 1:
                with engine.no_reduce():
                    engine.backward(loss)
            else:
                engine.backward(loss)
        engine.step()
        engine.wait_for_parameters()
        sent.append(exchange.counters.sent_elements)
        grads = engine.bindings[0].segments
        assert all(segment.param.grad is None for segment in grads), "gradients go with the step that used them"
    states = engine.model_state_bytes()
    engine.exchange.close()
    return {"states": states, "sizes": sizes, "sent": sent, "count": engine.parameter_count}


def _plain():
    from lit_zero.comm import Comm

    return Comm(overlap=False)


TABLE = {  # bytes per parameter on each of N ranks
    "32-true": {
        "none": lambda n: 4 + 4 + 8,
        "stage1": lambda n: 4 + 4 + 8 / n,
        "stage2": lambda n: 4 + 4 / n + 8 / n,
        "stage3": lambda n: 16 / n,
    },
    "bf16-mixed": {  # gradients are summed in fp32 and stay so
        "none": lambda n: 2 + 4 + 4 + 8,
        "stage1": lambda n: 2 + 4 + (4 + 8) / n,
        "stage2": lambda n: 2 + 4 / n + (4 + 8) / n,
        "stage3": lambda n: 16 / n,  # the 2-byte shard is cast when it is sent, not stored
    },
    "bf16-mixed compute": {  # as in the ZeRO paper, and what it leaves out: for the step they are copied to fp32
        "none": lambda n: 2 + 2 + 4 + 4 + 8,
        "stage1": lambda n: 2 + 2 + (4 + 4 + 8) / n,
        "stage2": lambda n: 2 + 2 / n + (4 + 4 + 8) / n,
        "stage3": lambda n: (2 + 4 + 4 + 8) / n,
    },
    "bf16-true": {
        "none": lambda n: 2 + 2 + 4,
        "stage1": lambda n: 2 + 2 + 4 / n,
        "stage2": lambda n: 2 + 2 / n + 4 / n,
        "stage3": lambda n: 8 / n,
    },
}


@pytest.mark.parametrize(
    ("mode", "stage", "size"),
    [
        *((mode, stage, 2) for mode in TABLE for stage in STAGES),
        *((mode, "stage3", 4) for mode in TABLE),
        *(("bf16-mixed", stage, 4) for stage in STAGES[:3]),
    ],
)
def test_live_bytes_equal_the_table(ranks, size, stage, mode):
    stored = "compute" if mode.endswith("compute") else "float32"
    lowering = Lowering(Precision(lower="all", gradient_dtype=stored), BF16 if "mixed" in mode else None)
    dtype = BF16 if mode == "bf16-true" else torch.float32
    for found in ranks(size).run(train, stage, lowering, dtype, 1):
        states = found["states"]
        live = states["parameter"] + states["master"] + states["gradient"] + states["optimizer"]
        assert live / found["count"] == pytest.approx(TABLE[mode][stage](size), rel=0.02)


def test_slots_are_two_units_and_the_root(ranks):
    lowering = Lowering()
    for found in ranks(2).run(train, "stage3", lowering, torch.float32, 1):
        block, root = found["sizes"]["blocks.0"], found["sizes"][""]
        gathered = 2 * block + root
        landing = 2 * block + root  # at their most; they are gone after the backward
        assert found["states"]["slots"] == pytest.approx(4 * (gathered + landing), rel=0.01)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_sent_elements_equal_the_arithmetic(ranks, size, stage):
    for found in ranks(size).run(train, stage, Lowering(), torch.float32, 1):
        total = sum(found["sizes"].values())
        share = (size - 1) / size
        expected = 2 * total * share  # reduce, and gather what the optimizer updated
        if stage == "stage3":
            # Gathered for forward and again for backward, except what is still there when the backward begins: the
            # root, which stays, and the last two blocks, which lie in the two slots.
            kept = found["sizes"][""] + 2 * found["sizes"]["blocks.0"]
            expected = 3 * total * share - kept * share
        assert found["sent"][1:] == [pytest.approx(expected)] * 2
        assert found["count"] / total > 0.98, "padding is small"
