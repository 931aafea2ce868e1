"""On CUDA: copies on a stream of their own give the same bits, free device memory, and overlap the computation."""

from __future__ import annotations

import pytest
import torch
from benchmark_activation import Trial

from lit_zero.activation.policy import Activation
from tests.activation.harness import VARIANTS

pytestmark = pytest.mark.gpu

SIZES: dict[str, float] = {"vocab_size": 256, "block_size": 256, "dim": 512, "layers": 8, "heads": 8, "dropout": 0.1}


def test_every_variant_gives_the_same_bits_with_less_memory() -> None:
    device = torch.device("cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        plain = Trial(Activation(), SIZES, 8, device).look()
        for variant in (VARIANTS["full"], VARIANTS["every_n"], VARIANTS["selective"], Activation("offload")):
            found = Trial(variant, SIZES, 8, device).look()
            assert all(torch.equal(a, b) for a, b in zip(found.gradients, plain.gradients, strict=True)), variant
            assert found.saved < 0.8 * plain.saved, variant
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_limit_of_one_byte_in_flight_waits_and_gives_the_same() -> None:
    device = torch.device("cuda")
    plain = Trial(Activation(), SIZES, 4, device).look()
    found = Trial(Activation("offload", threshold=1, in_flight=1), SIZES, 4, device).look()
    assert all(torch.equal(a, b) for a, b in zip(found.gradients, plain.gradients, strict=True))


def test_copies_run_beside_the_computation() -> None:
    """A profile shows copies to pinned memory while kernels run."""
    trial = Trial(Activation("offload"), SIZES, 8, torch.device("cuda"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        trial.step()
        torch.cuda.synchronize()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profile.events():
        copy = "Memcpy DtoH (Device -> Pinned)" in event.name or "Memcpy HtoD (Pinned -> Device)" in event.name
        spans[copy].append((event.time_range.start, event.time_range.end))
    assert spans[True]
    beside = sum(
        max(0.0, min(end, other_end) - max(start, other_start))
        for start, end in spans[True]
        for other_start, other_end in spans[False]
    )
    assert beside > 0
