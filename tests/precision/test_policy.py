"""Which parameters compute in 2 bytes, and in which dtype gradients wait: tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_zero.core.errors import ConfigError
from lit_zero.precision import Lowering, Precision

FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"reduce_dtype": "float23"},
            "precision.reduce_dtype='float23' is not known. Did you mean 'float32'? Choose one of: float32, compute.",
        ),
        (
            {"gradient_dtype": "bf16"},
            "precision.gradient_dtype='bf16' is not known. Choose one of: float32, compute.",
        ),
        (
            {"lower": "matmuls"},
            "precision.lower='matmuls' is not known. Did you mean 'matmul'? Choose one of: matmul, all.",
        ),
        ({"lower": True}, "precision.lower=True is not known. Choose one of: matmul, all."),
        (
            {"master": "splt"},
            "precision.master='splt' is not known. Did you mean 'split'? Choose one of: float32, split.",
        ),
        (
            {"moments": "int4"},
            "precision.moments='int4' is not known. Did you mean 'int8'? Choose one of: float32, bfloat16, int8.",
        ),
        ({"step": "before"}, "precision.step='before' is not known. Choose one of: after, backward."),
    ],
)
def test_unknown_choices_are_named(settings, message):
    with pytest.raises(ConfigError) as caught:
        Precision(**settings)
    assert str(caught.value) == message


def test_gradients_of_two_bytes_are_summed_in_fp32_unless_told_otherwise():
    assert Lowering().reduce_dtype is FP32
    assert Lowering(Precision(reduce_dtype="compute")).reduce_dtype is None


LINEAR, NORM, EMBEDDING, CONV = nn.Linear(2, 2), nn.LayerNorm(2), nn.Embedding(2, 2), nn.Conv2d(2, 2, 1)
TRANSPOSED, ATTENTION = nn.ConvTranspose1d(2, 2, 1), nn.MultiheadAttention(2, 1)


@pytest.mark.parametrize("low", [BF16, FP16])
@pytest.mark.parametrize(
    ("owners", "matmul"),
    [
        ([LINEAR], True),
        ([CONV], True),
        ([TRANSPOSED], True),
        ([ATTENTION], True),
        ([NORM], False),
        ([EMBEDDING], False),
        ([LINEAR, LINEAR], True),
        ([LINEAR, EMBEDDING], False),  # tied: the embedding needs it in full
    ],
)
def test_compute_dtype_in_mixed_modes(low, owners, matmul):
    param = nn.Parameter(torch.ones(2))
    assert Lowering(Precision(), low).compute_dtype(param, owners) is (low if matmul else FP32)
    assert Lowering(Precision(lower="all"), low).compute_dtype(param, owners) is low


@pytest.mark.parametrize("dtype", [FP64, BF16, FP16, torch.int8])
def test_only_fp32_parameters_are_lowered(dtype):
    param = nn.Parameter(torch.ones(2).to(dtype), requires_grad=False)
    assert Lowering(Precision(lower="all"), BF16).compute_dtype(param, [LINEAR]) is dtype


def test_outside_mixed_modes_every_parameter_computes_in_its_own_dtype():
    assert Lowering(Precision(lower="all")).compute_dtype(nn.Parameter(torch.ones(2)), [LINEAR]) is FP32


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("float32", FP32), ("compute", BF16)],
)
def test_gradient_dtype_of_lowered_parameters(choice, expected):
    lowering = Lowering(Precision(gradient_dtype=choice), BF16)
    assert lowering.gradient_dtype(compute=BF16, master=FP32) is expected


@pytest.mark.parametrize("choice", ["float32", "compute"])
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
def test_gradients_of_other_parameters_keep_their_dtype(choice, dtype):
    assert Lowering(Precision(gradient_dtype=choice), BF16).gradient_dtype(dtype, dtype) is dtype
