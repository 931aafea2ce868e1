"""Kernels of layers are compiled for a GPU that need not be there: the interpreter accepts what a compiler refuses."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

pytest.importorskip("triton", reason="no triton on this platform")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pytestmark = pytest.mark.thorough

NORM = {"x": "*bf16", "weight": "*bf16", "means": "*fp32", "rstds": "*fp32", "stride": "i32", "width": "i32"}
STRIDES = {f"{tensor}_{axis}": "i64" for tensor in "xcsy" for axis in "bht"}

# (module, function, types of arguments, constants); an argument that is None is a constant.
KERNELS: list[tuple[str, str, dict[str, str], dict[str, Any]]] = [
    (
        "normalization",
        "_forward",
        {**NORM, "bias": "*bf16", "y": "*bf16", "eps": "fp32", "offset": "fp32"},
        {"CENTRED": True, "WEIGHT": True, "BIAS": True, "BLOCK": 1024},
    ),
    (
        "normalization",
        "_backward",
        {
            **{**NORM, "grad": "*bf16", "grad_x": "*bf16", "grad_weight": "*fp32", "grad_bias": "*fp32"},
            **{"grad_stride": "i32", "rows": "i32", "each": "i32", "offset": "fp32"},
        },
        {"CENTRED": False, "WEIGHT": False, "BLOCK": 1024, "weight": None, "means": None},
    ),
    *(
        (
            "gated",
            "_backward",
            {
                **dict.fromkeys(("grad", "gate", "up", "grad_gate", "grad_up"), "*bf16"),
                **dict.fromkeys(("grad_stride", "gate_stride", "up_stride", "width"), "i32"),
            },
            {"KIND": kind, "BLOCK": 1024},
        )
        for kind in (0, 1, 2)
    ),
    *(
        (
            "rotary",
            "_turn",
            {
                **{"x": "*bf16", "cos": "*fp32", "sin": "*fp32", "y": "*fp32"},
                **{**STRIDES, "times": "i32", "heads": "i32", "half": "i32"},
            },
            {"INTERLEAVED": interleaved, "BACKWARD": not interleaved, "HEADS": 8, "BLOCK": 64},
        )
        for interleaved in (False, True)
    ),
    *(
        (
            "cross_entropy",
            "_losses",
            {
                **{"logits": "*bf16", "targets": "*i64", "losses": "*fp32", "scales": "*fp32", "stride": "i32"},
                **{"scale_stride": "i32", "width": "i32", "ignore_index": "i32"},
                **{"smoothing": "fp32", "z_loss": "fp32"},
            },
            {"SMOOTH": gradient, "GRADIENT": gradient, "BLOCK": 4096, **({} if gradient else {"scales": None})},
        )
        for gradient in (False, True)
    ),
]


@pytest.mark.parametrize(("module", "name", "types", "constants"), KERNELS)
def test_compiles_for_compute_capability_9(module, name, types, constants):
    kernel = getattr(importlib.import_module(f"lit_zero.kernels.triton_{module}"), name)
    signature = {key: kind for key, kind in types.items() if key not in constants}
    source = ASTSource(fn=kernel, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["ptx"] and compiled.asm["cubin"]
