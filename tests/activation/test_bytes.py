"""What the forward leaves for the backward, counted from live storages, and the FLOPs and gathers that it costs."""

from __future__ import annotations

import pytest
from benchmark_activation import Found, compare, table

from tests.activation.harness import CPU

SMALL: dict[str, float] = {
    "vocab_size": 32,
    "block_size": 32,
    "dim": 32,
    "heads": 2,
    "dropout": 0.1,
}


@pytest.fixture(scope="module", params=[4, 24])
def found(request: pytest.FixtureRequest) -> dict[str, Found]:
    return compare({**SMALL, "layers": request.param}, batch=2, rounds=1, device=CPU, threshold=64) | {
        "layers": request.param
    }


def test_bytes_flops_and_bits(found: dict[str, Found]) -> None:
    layers = found.pop("layers")
    none = found["none"]
    text = table(found)
    assert text.count("yes") == len(found), text
    fewer = {name: none.saved / each.saved for name, each in found.items()}
    more = {name: (each.flops - none.flops) / none.flops for name, each in found.items()}
    assert fewer["full"] > (10 if layers == 24 else 5), text
    assert fewer["offload"] > (20 if layers == 24 else 10), text
    assert 1.3 < fewer["selective"] < fewer["full"], text
    assert 1.5 < fewer["every_n (2)"] < 2.1, text
    assert fewer["budget (40 %)"] > 1.5, text
    # A forward more, of a forward and a backward twice as long; the head, and what comes after a block's last saved
    # tensor, are not computed again.
    assert 0.32 < more["full"] < 1 / 3, text
    assert 0.16 < more["every_n (2)"] < 1 / 6, text
    assert more["selective"] == more["offload"] == 0, text
    assert 0 < more["budget (40 %)"] <= more["full"], text
    assert found["budget (40 %)"].saved <= 0.4 * none.saved, text  # and what is computed again fits beside it
    assert found["offload"].host > 0.8 * none.saved
