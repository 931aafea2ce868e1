"""One bit an element: signs and scales, the error that is fed back, and the kernel against the reference."""

from __future__ import annotations

import pytest
import torch
from lit_zero.kernels import pack_signs, unpack_signs
from lit_zero.kernels.signs import Signs, pack_signs_reference, unpack_signs_reference


def test_bits_and_scales_are_what_they_say():
    error = torch.zeros(11)
    values = torch.tensor([1.0, -1.0, 0.0, 2.0, -4.0, 0.0, 0.0, 0.0, -3.0, 1.0, 2.0])
    signs = pack_signs(values, error, block=8)
    assert signs.bits.tolist() == [0b11101101, 0b110]
    assert signs.scales.tolist() == [1.0, 2.0]
    got = unpack_signs(signs)
    assert got.tolist() == [1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, -2.0, 2.0, 2.0]
    assert torch.equal(error, values - got)
    assert signs.nbytes == 2 + 2 * 4


def check_feedback(device: torch.device) -> None:
    """What was sent over many rounds, and the last error, add up to what was given."""
    generator = torch.Generator().manual_seed(0)
    given, sent = (torch.zeros(1000, dtype=torch.float64, device=device) for _ in range(2))
    error = torch.zeros(1000, device=device)
    for _ in range(20):
        values = torch.randn(1000, generator=generator).to(device)
        given += values
        sent += unpack_signs(pack_signs(values, error, block=128))
    torch.testing.assert_close(sent + error, given, rtol=0, atol=1e-4)
    assert (sent - given).norm() < 0.8 * given.norm(), "it follows"


def test_errors_are_fed_back(device):
    check_feedback(device)


def test_kernel_equals_the_reference(device):
    generator = torch.Generator().manual_seed(0)
    for size, block in ((1, 8), (63, 8), (1000, 64), (1000, 1000), (4097, 2048), (5000, 24)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            values = torch.randn(size + 1, generator=generator).to(device, dtype)[1:]
            fed = torch.full((size + 3,), 7.0, device=device)
            fed[1:-2] = torch.randn(size, generator=generator)
            expected_error = fed[1:-2].clone()
            bits, scales = pack_signs_reference(values, expected_error, block)
            found = pack_signs(values, fed[1:-2], block)
            assert torch.equal(found.bits, bits)
            torch.testing.assert_close(found.scales, scales, rtol=1e-6, atol=0)
            torch.testing.assert_close(fed[1:-2], expected_error, rtol=0, atol=1e-5)
            assert fed[0] == 7.0 and (fed[-2:] == 7.0).all()
            out = torch.full((size + 3,), float("nan"), dtype=dtype, device=device)
            unpack_signs(found, out[1:-2])
            assert torch.equal(out[1:-2], unpack_signs_reference(found).to(dtype))
            assert out[0].isnan() and out[-2:].isnan().all(), "nothing beside it is written"


def test_nothing_has_no_bits(device):
    found = pack_signs(torch.empty(0, device=device), torch.empty(0, device=device))
    assert found.bits.numel() == found.scales.numel() == 0 and unpack_signs(found).shape == (0,)
    assert isinstance(found, Signs)


@pytest.mark.parametrize("block", [0, -8, 12])
def test_a_wrong_block_is_refused(block):
    with pytest.raises(ValueError) as caught:
        pack_signs(torch.ones(4), torch.zeros(4), block)
    assert str(caught.value) == f"block={block} is not valid: expected a positive multiple of 8 elements."


def test_tensors_that_do_not_fit_are_refused(device):
    values, error = torch.ones(16, device=device), torch.zeros(16, device=device)
    with pytest.raises(ValueError, match=r"error has 16 elements of torch.float64: expected 16 of torch.float32"):
        pack_signs(values, error.double(), 8)
    with pytest.raises(ValueError, match=r"error has 15 elements of torch.float32: expected 16 of torch.float32"):
        pack_signs(values, error[1:], 8)
    with pytest.raises(ValueError, match="is not contiguous"):
        pack_signs(values[::2], error[:8], 8)
    signs = pack_signs(values, error, 8)
    with pytest.raises(ValueError, match="out has 15 elements: expected 16, one for each sign."):
        unpack_signs(signs, values[1:])
    with pytest.raises(ValueError, match="is not contiguous"):
        unpack_signs(signs, torch.zeros(32, device=device)[::2])
