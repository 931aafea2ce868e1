"""Moments in 2 bytes and in one: nearest, right on average, and the same again when they are read and written."""

from __future__ import annotations

import pytest
import torch
from lit_zero.kernels.moments import (
    BLOCK,
    from_int8,
    from_int8_reference,
    table,
    to_bfloat16,
    to_bfloat16_reference,
    to_int8,
    to_int8_reference,
)
from lit_zero.kernels.noise import random_bits

CPU = torch.device("cpu")


@pytest.fixture(params=["interpreted", pytest.param("compiled", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels run."""
    if request.param == "compiled":
        return torch.device("cuda", 0)
    request.getfixturevalue("interpreted")
    return torch.device("cpu")


def values(blocks: int, signed: bool, seed: int = 0, place: torch.device = CPU) -> torch.Tensor:
    """Return values of very different sizes; every seventh block is zero."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(blocks, BLOCK, generator=generator) * 10.0 ** torch.randint(
        -8, 3, (blocks, BLOCK), generator=generator
    )
    found[::7] = 0
    found = found if signed else found.square()
    return found.flatten().to(place)


def poisoned(numel: int, place: torch.device = CPU) -> tuple[torch.Tensor, torch.Tensor]:
    """Return memory for codes and scales, full of something else."""
    codes = torch.full((numel,), 101, dtype=torch.int8, device=place)
    return codes, torch.full((numel // BLOCK,), float("nan"), device=place)


@pytest.mark.parametrize("signed", [True, False])
def test_each_value_gets_the_nearest_code(signed: bool) -> None:
    given = values(40, signed)
    codes, scales = poisoned(given.numel())
    to_int8(given, codes, scales, signed)
    found = from_int8(codes, scales, signed, torch.full_like(given, float("nan")))
    known = table(signed, CPU).roll(128)[1 if signed else 0 :]  # by code, from the lowest on
    assert bool((known.diff() > 0).all())
    assert float(known[-1]) == 1.0 and float(known[127 if signed else 0]) == 0.0
    assert torch.equal(scales, given.view(-1, BLOCK).abs().amax(1).clamp(min=2.0**-126))
    part = (given.view(-1, BLOCK) / scales[:, None]).double()
    near = (part[..., None] - known.double()).abs().amin(-1)
    mine = (found.view(-1, BLOCK) / scales[:, None] - part).abs()
    # Below 1e-7 of the largest a second moment is rounded up, never to zero.
    small = torch.zeros_like(part, dtype=torch.bool) if signed else (part > 0) & (part < 0.5e-7)
    assert float((mine - near)[~small].max()) < 1e-7
    assert bool((found[given != 0] != 0).all()) or signed
    assert bool((found[given == 0] == 0).all())


@pytest.mark.parametrize("signed", [True, False])
def test_what_is_read_and_written_again_stays(signed: bool) -> None:
    given = values(40, signed)
    codes, scales = poisoned(given.numel())
    to_int8(given, codes, scales, signed, (1, 2, 3))
    found = from_int8(codes, scales, signed, torch.empty_like(given))
    again, scales_again = poisoned(given.numel())
    to_int8(found, again, scales_again, signed)
    assert torch.equal(codes, again) and torch.equal(scales, scales_again)


def test_random_rounding_is_right_on_average() -> None:
    given = values(4, signed=False).clamp(min=1e-3)
    codes, scales = poisoned(given.numel())
    rounded = torch.empty(given.numel(), dtype=torch.bfloat16)
    total, total_bf16, steps = torch.zeros_like(given), torch.zeros_like(given), 400
    for step in range(steps):
        to_int8(given, codes, scales, False, (7, step, 0))
        total += from_int8(codes, scales, False, torch.empty_like(given)) / steps
        to_bfloat16(given, rounded, (7, step, 0))
        total_bf16 += rounded.float() / steps
        up = rounded.float() >= given
        assert bool(((rounded.float() - given).abs() <= given * 2.0**-7).all()) and 0 < int(up.sum()) < up.numel()
    large = given > 1e-3 * scales.repeat_interleave(BLOCK)
    assert float(((total - given) / given)[large].abs().max()) < 0.05
    assert float(((total_bf16 - given) / given).abs().max()) < 0.002
    assert float(((total_bf16 - given) / given).mean().abs()) < 2e-5


def test_a_second_moment_that_decays_slowly_does_not_stand_still() -> None:
    """[Note: which rounding] It shrinks by 1/1000 a step; to nearest, by nothing at all."""
    start = 1.0 + torch.rand(4 * BLOCK, generator=torch.Generator().manual_seed(0))
    nearest, rounded = start.to(torch.bfloat16), start.to(torch.bfloat16)
    codes, scales = poisoned(start.numel())
    to_int8(start, codes, scales, False)
    steps = 500
    for step in range(steps):
        nearest = (nearest.float() * 0.999).to(torch.bfloat16)
        to_bfloat16(rounded.float() * 0.999, rounded, (3, step, 0))
        one = from_int8(codes, scales, False, torch.empty_like(start)) * 0.999
        to_int8(one, codes, scales, False, (3, step, 0))
    true = float((start * 0.999**steps).mean())
    assert float(nearest.float().mean()) > 1.5 * true
    assert float(rounded.float().mean()) == pytest.approx(true, rel=0.01)
    found = from_int8(codes, scales, False, torch.empty_like(start))
    assert float(found.mean()) == pytest.approx(true, rel=0.02)


def test_bits_depend_on_position_and_not_on_the_portion() -> None:
    before = torch.random.get_rng_state()
    whole = random_bits(1000, 5, 9, 0, CPU)
    assert torch.equal(whole[700:], random_bits(300, 5, 9, 700, CPU))
    assert torch.equal(whole, random_bits(1000, 5, torch.tensor(9.0), 0, CPU))
    assert torch.equal(before, torch.random.get_rng_state())
    many = random_bits(1 << 16, 5, 9, 1 << 33, CPU).double()
    assert int(many.min()) >= 0 and int(many.max()) < 1 << 16
    assert float(many.mean()) == pytest.approx(32767.5, rel=0.01)
    for other in (random_bits(1 << 16, 5, 10, 1 << 33, CPU), random_bits(1 << 16, 6, 9, 1 << 33, CPU), many.roll(1)):
        assert abs(float(torch.corrcoef(torch.stack([many, other.double()]))[0, 1])) < 0.02


def test_nothing_that_is_no_number_is_hidden() -> None:
    given = values(3, signed=True)
    given[300] = float("nan")
    given[600] = float("inf")
    codes, scales = poisoned(given.numel())
    to_int8(given, codes, scales, True)
    found = from_int8(codes, scales, True, torch.empty_like(given)).view(3, BLOCK)
    assert not bool(found[1].isfinite().any()) and not bool(found[2].isfinite().any())


def test_what_is_no_number_stays_none(place: torch.device) -> None:
    """Adding random bits to these makes a negative zero of the first, and infinities of the others."""
    given = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32, device=place).view(torch.float32)
    for write in (to_bfloat16, to_bfloat16_reference):
        found = torch.zeros(4, dtype=torch.bfloat16, device=place)
        write(given, found, (11, 4, 0))
        assert bool(found.isnan().all())
    endless = torch.tensor([float("inf"), float("-inf")], device=place)
    found = torch.zeros(2, dtype=torch.bfloat16, device=place)
    to_bfloat16(endless, found, (11, 4, 0))
    assert torch.equal(found.float(), endless)


def test_kernels_equal_the_reference(place: torch.device) -> None:
    draws = [None, (11, 4, 1 << 20), (11, torch.tensor(4.0, device=place), 5)]
    for signed in (True, False):
        for blocks in (0, 1, 9):
            given = values(blocks, signed, place=place)
            for draw in draws[: 3 if blocks == 9 else 1]:
                codes, scales = poisoned(given.numel(), place)
                wanted, wanted_scales = poisoned(given.numel(), place)
                to_int8(given, codes, scales, signed, draw)  # type: ignore[arg-type]
                if blocks:
                    to_int8_reference(given, wanted, wanted_scales, signed, draw)  # type: ignore[arg-type]
                    assert torch.equal(scales, wanted_scales)
                    # A product and a sum may be rounded once or twice: what lies half-way may go either way.
                    assert int((codes.int() - wanted.int()).abs().max()) <= 1
                    assert float((codes != wanted).double().mean()) < 1e-3
                out = torch.full_like(given, float("nan"))
                assert torch.equal(
                    from_int8(codes, scales, signed, out), from_int8_reference(codes, scales, signed, given.clone())
                )
    for numel in (1, 63, 1000):
        given = values(4, True, place=place)[1 : numel + 1]
        for draw in draws[1:]:
            found, wanted_bf16 = (torch.full((numel,), 9.0, dtype=torch.bfloat16, device=place) for _ in range(2))
            to_bfloat16(given, found, draw)  # type: ignore[arg-type]
            to_bfloat16_reference(given, wanted_bf16, draw)  # type: ignore[arg-type]
            assert torch.equal(found.view(torch.int16), wanted_bf16.view(torch.int16))
    given = values(3, signed=True, place=place)
    given[300] = float("nan")
    codes, scales = poisoned(given.numel(), place)
    to_int8(given, codes, scales, True)
    assert not bool(from_int8(codes, scales, True, torch.empty_like(given)).view(3, BLOCK)[1].isfinite().any())
