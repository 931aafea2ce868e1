"""Tensors of more than 2**31 elements: indices that do not fit into 32 bits, on GPUs with the memory for it."""

from __future__ import annotations

import pytest
import torch
from lit_zero.kernels import Scheme, SGDGroup, dequantize, pack, pack_signs, quantize, unpack, unpack_signs, unscale
from lit_zero.kernels.moments import BLOCK, from_int8, to_bfloat16, to_int8
from lit_zero.kernels.small import SIGNED, SPLIT, Array, SmallSegment, small_step
from lit_zero.kernels.split import join, split

pytestmark = pytest.mark.gpu
SIZE = 2**31 + 4097
MARKS = (0, 2**31 - 1, 2**31, SIZE - 1)  # elements that differ from the rest


@pytest.fixture
def marked() -> torch.Tensor:
    """A tensor of bf16 halves, with ones at the marks."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    tensor = torch.full((SIZE,), 0.5, dtype=torch.bfloat16, device="cuda")
    tensor[list(MARKS)] = 1.0
    return tensor


def check_marks(tensor: torch.Tensor, others: float = 0.5, marks: float = 1.0) -> None:
    assert [tensor[mark].item() for mark in MARKS] == [marks] * len(MARKS)
    assert (tensor == others).sum().item() == SIZE - len(MARKS)


def test_unscale(marked):
    total = unscale([marked], torch.tensor(2.0, device="cuda"), torch.zeros((), device="cuda"))
    assert total.item() == pytest.approx(SIZE - len(MARKS) + 4 * len(MARKS), rel=1e-6)
    check_marks(marked, 1.0, 2.0)


def test_pack_and_unpack(marked):
    flat = torch.zeros(SIZE, dtype=torch.float16, device="cuda")
    pack([marked[: 2**31], marked[2**31 :]], flat)
    check_marks(flat)
    marked.zero_()
    unpack(flat, [marked[: 2**31], marked[2**31 :]])
    check_marks(marked)


@pytest.mark.parametrize("code", ["int8", "nf4"])
def test_quantize(marked, code):
    found = quantize(marked, Scheme(code, 4096))
    assert found.codes.numel() == -(-SIZE * (1 if code == "int8" else 0.5) // 1)
    marked.zero_()
    got = dequantize(found, marked)
    assert [got[mark].item() for mark in MARKS] == [1.0] * len(MARKS)
    assert ((got > 0.4) & (got < 0.6)).sum().item() + (got == 1.0).sum().item() == SIZE


def test_signs(marked):
    marked[list(MARKS)] = -1.0
    error = torch.zeros(SIZE, device="cuda")
    got = unpack_signs(pack_signs(marked, error), marked)
    assert (got < 0).sum().item() == len(MARKS) and all(got[mark] < 0 for mark in MARKS)


def test_split_and_join(marked):
    master = marked.float()
    master[list(MARKS)] += 2.0**-12  # what the copy cannot hold
    remainder = torch.full((SIZE,), 7, dtype=torch.int16, device="cuda")
    split(master, marked, remainder)
    assert (remainder != 0).sum().item() == len(MARKS)
    check_marks(join(marked, remainder, master.zero_()), 0.5, 1.0 + 2.0**-12)


def test_moments(marked):
    whole = SIZE // BLOCK * BLOCK
    values = marked[:whole].float()
    codes = torch.full((whole,), 101, dtype=torch.int8, device="cuda")
    scales = torch.full((whole // BLOCK,), 9.0, device="cuda")
    to_int8(values, codes, scales, True)
    assert (scales == 1.0).sum().item() == len(MARKS) - 1 and (scales == 0.5).sum().item() == len(scales) - 3
    found = from_int8(codes, scales, True, values.zero_())
    assert [found[mark].item() for mark in MARKS[:-1]] == [1.0] * 3
    assert (found == 0.5).sum().item() > whole - 4 * BLOCK
    to_bfloat16(found, marked[:whole], (1, 2, 3))
    assert [marked[mark].item() for mark in MARKS[:-1]] == [1.0] * 3


def test_small_step(marked):
    """SGD with an 8-bit momentum of zeros: each element goes by its gradient."""
    blocks = -(-SIZE // BLOCK)
    master = Array(SPLIT, torch.zeros_like(marked), torch.zeros(SIZE, dtype=torch.int16, device="cuda"))
    codes = torch.zeros(blocks * BLOCK, dtype=torch.int8, device="cuda")
    moment = Array(SIGNED, codes, torch.zeros(blocks, device="cuda"))
    segment = SmallSegment(0, master, marked, (moment,))
    small_step("sgd_rule", [segment], [SGDGroup(lr=1.0, momentum=0.9).numbers()])
    check_marks(master.values, -0.5, -1.0)
    assert all(codes[mark].item() == 127 for mark in MARKS)
