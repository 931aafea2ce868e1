"""Block-wise quantisation: the codes, the error they leave, stochastic rounding, kernel against reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from lit_zero.kernels import Scheme, dequantize, quantize
from lit_zero.kernels.codes import BITS, LEVELS, table
from lit_zero.kernels.quantize import quantize_reference

CPU = torch.device("cpu")
CODES = ("int8", "dynamic8", "int4", "nf4")
# Appendix E of the QLoRA paper.
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def values(size: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> torch.Tensor:
    """Return numbers of many magnitudes, at an address that is no multiple of 16 bytes."""
    generator = torch.Generator().manual_seed(size)
    scales = 10.0 ** torch.randint(-4, 3, (size + 1,), generator=generator)
    return (scales * torch.randn(size + 1, generator=generator)).to(device, dtype)[1:]


# ---- the codes


def test_nf4_is_the_papers():
    torch.testing.assert_close(table("nf4"), torch.tensor(NF4), rtol=0, atol=2e-7)


def test_the_dynamic_map_spans_seven_decades():
    codes = table("dynamic8")
    assert codes.shape == (256,) and torch.equal(codes, codes.sort().values) and len(codes.unique()) == 256
    assert codes[-1] == 1.0 and (codes == 0).sum() == 1
    positive = codes[codes > 0]
    assert torch.equal(-codes[codes < 0].flip(0), positive[:-1]), "every number but 1 has a negative"
    assert positive[0].item() == pytest.approx(0.55e-6) and len(positive) == 128
    for exponent in range(7):  # 2 ** exponent numbers in every decade, evenly spaced
        low, high = 10.0 ** (exponent - 7), 10.0 ** (exponent - 6)
        inside = positive[(positive > low) & (positive < high * 0.9999)]
        assert len(inside) == 2**exponent
        if len(inside) > 1:
            steps = inside.diff() / high
            torch.testing.assert_close(steps, torch.full_like(steps, 0.9 / 2**exponent), rtol=1e-3, atol=0)


@pytest.mark.parametrize("code", CODES)
def test_rounding_to_nearest_picks_the_nearest_number(code):
    given = torch.linspace(-1, 1, 2001)
    numbers = torch.arange(-LEVELS[code], LEVELS[code] + 1) / LEVELS[code] if code in LEVELS else table(code)
    nearest = (given[:, None] - numbers).abs().amin(1)
    got = dequantize(quantize(given, Scheme(code, 2002)))
    torch.testing.assert_close((got - given).abs(), nearest, rtol=1e-5, atol=1e-7)


def test_codes_lie_in_bytes_as_they_say():
    given = torch.tensor([7.0, -7.0, 0.0, 3.0, 1.0])
    assert quantize(given, Scheme("int4", 6)).codes.tolist() == [0x97, 0x30, 0x01]
    assert quantize(given, Scheme("nf4", 6)).codes.tolist()[0] == 0x0F
    assert quantize(127 * given / 7, Scheme("int8", 5)).codes.view(torch.int8).tolist() == [127, -127, 0, 54, 18]


# ---- the reference


@pytest.mark.parametrize("code", CODES)
def test_error_is_bounded_by_the_gaps_of_each_block(code):
    given, block = values(1000), 64
    got = dequantize(quantize(given, Scheme(code, block)))
    # Half the widest gap between neighbours, times the block's largest magnitude.
    gap = 1 / LEVELS[code] if code in LEVELS else float(table(code).diff().amax())
    lowest = 0.0 if code in LEVELS else 1 + float(table(code)[0])  # the dynamic map has no -1
    for one, other in zip(given.split(block), got.split(block), strict=True):
        assert (one - other).abs().max() <= one.abs().max() * max(gap / 2, lowest) * 1.0001


@pytest.mark.parametrize("code", CODES)
def test_zeros_stay_zero_and_what_is_not_finite_spoils_its_block(code):
    given = torch.randn(40)
    given[:8], given[9], given[30] = 0.0, float("inf"), float("nan")
    got = dequantize(quantize(given, Scheme(code, 8)))
    assert torch.equal(got[:8], torch.zeros(8))
    assert got[8:16].isnan().all() and got[24:32].isnan().all()
    assert got[16:24].isfinite().all() and got[32:].isfinite().all()
    assert torch.equal(dequantize(quantize(torch.full((8,), 1e-45), Scheme(code, 8))).isfinite(), torch.ones(8) > 0)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("code", CODES)
def test_bytes_are_what_the_scheme_says(code, double):
    for size in (1, 63, 1000):
        scheme = Scheme(code, 64, double)
        found = quantize(values(size), scheme)
        blocks = -(-size // 64)
        scales = blocks + 4 + 4 if double else 4 * blocks  # one block of codes, its scale and the mean
        assert found.nbytes == scheme.bytes_for(size) == -(-size * BITS[code] // 8) + scales


def test_double_quantisation_costs_a_hundredth():
    given = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0))
    single, double = (dequantize(quantize(given, Scheme("nf4", 64, double))) for double in (False, True))
    error = (double - given).norm() / (single - given).norm()
    assert 1.0 < error < 1.02
    bits = 8 * quantize(given, Scheme("nf4", 64, double=True)).nbytes / len(given)
    assert bits == pytest.approx(4.127, abs=0.003), "as the paper counts"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("int7",), "code='int7' is not known. Choose one of: int8, dynamic8, int4, nf4."),
        (("int8", 0), "block=0 is not valid for int8: expected a positive number of elements."),
        (("nf4", 63), "block=63 is not valid for nf4: expected an even number of elements."),
    ],
)
def test_a_wrong_scheme_is_refused(settings, words):
    with pytest.raises(ValueError) as caught:
        Scheme(*settings)
    assert str(caught.value) == words


# ---- kernel against reference


def check_equal(code: str, block: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Codes and scales bit for bit, numbers too; outputs are poisoned before."""
    given, scheme = values(size, dtype, device), Scheme(code, block)
    if size > 2 * block:
        given[block : 2 * block] = 0.0
        given[-1] = float("nan")
    found = quantize(given, scheme)
    codes, scales = quantize_reference(given, scheme)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.scales, scales, rtol=0, atol=0, equal_nan=True)
    for into in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.full((size + 3,), 7.0, dtype=into, device=device)
        dequantize(found, out[1:-2])
        expected = dequantize_cpu(found).to(into)
        torch.testing.assert_close(out[1:-2].cpu(), expected, rtol=0, atol=0, equal_nan=True)
        assert out[0] == 7.0 and (out[-2:] == 7.0).all(), "nothing beside it is written"


def dequantize_cpu(found):
    from lit_zero.kernels.quantize import dequantize_reference

    return dequantize_reference(found, found.plain_scales()).cpu()


@pytest.mark.parametrize("code", CODES)
def test_kernel_equals_the_reference_bit_for_bit(device, code):
    for block, size in ((64, 1), (64, 63), (64, 1000), (100, 1000), (2048, 4097)):
        check_equal(code, block, size, torch.float32, device)
    for dtype in (torch.bfloat16, torch.float16):
        check_equal(code, 64, 1001, dtype, device)


def test_an_empty_tensor_has_no_codes(device):
    for code, double in itertools.product(CODES, (False, True)):
        found = quantize(torch.empty(0, device=device), Scheme(code, 64, double))
        assert found.codes.numel() == 0 and dequantize(found).shape == (0,)


def check_unbiased(code: str, device: torch.device) -> None:
    """Stochastic rounding: only the two neighbours come, and on the average the number itself."""
    size = 1 << 13
    for number in (0.3137, -0.0213):
        given = torch.full((size,), number, device=device)
        given[::64] = 1.0  # every block's scale
        found = quantize(given, Scheme(code, 64), torch.Generator().manual_seed(1))
        got = dequantize(found).view(-1, 64)[:, 1:].double()
        numbers = got.unique()
        assert len(numbers) == 2 and numbers[0] < number < numbers[1]
        gap = (numbers[1] - numbers[0]).item()
        chance = (number - numbers[0].item()) / gap
        deviation = gap * (chance * (1 - chance) / got.numel()) ** 0.5
        assert abs(got.mean().item() - number) < 4 * deviation
        rises = (got > number).double().view(-1)  # neighbours are independent of one another
        relation = torch.corrcoef(torch.stack([rises[1:], rises[:-1]]))[0, 1].abs()
        assert relation < 4 / got.numel() ** 0.5
    again, other = (quantize(given, Scheme(code, 64), torch.Generator().manual_seed(seed)).codes for seed in (1, 2))
    assert torch.equal(again, found.codes) and not torch.equal(other, found.codes)
    assert (dequantize(found).view(-1, 64)[:, 0] == 1.0).all(), "what has a code of its own keeps it"


@pytest.mark.parametrize("code", CODES)
def test_stochastic_rounding_of_the_reference_is_unbiased(code):
    check_unbiased(code, CPU)


@pytest.mark.parametrize("code", CODES)
def test_stochastic_rounding_of_the_kernel_is_unbiased(device, code):
    check_unbiased(code, device)
