"""Every launch of a kernel compiles for GPUs: none is needed for that. Results are not looked at."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from lit_zero.kernels import Scheme, pack, pack_signs, quantize, unpack, unpack_signs, unscale
from lit_zero.kernels.lamb import LambGroup, LambPiece, lamb_apply, lamb_moments
from lit_zero.kernels.moments import from_int8, to_bfloat16, to_int8
from lit_zero.kernels.quantize import Quantized, dequantize
from lit_zero.kernels.small import DITHERED, PLAIN, ROUNDED, SIGNED, SPLIT, UNSIGNED, Array, SmallSegment, small_step
from lit_zero.kernels.split import join, split

pytestmark = pytest.mark.thorough
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHOOSING = ("unscale", "pack", "quantize", "signs", "lamb", "moments", "split")  # modules that choose a kernel


class Compiled:
    """Stands where kernels are launched, and compiles them.

    Attributes:
        texts: PTX of each kernel that was compiled, by its name and constants.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.runtime.jit import mangle_type

        given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        constants = {kernel.arg_names[number]: given[kernel.arg_names[number]] for number in kernel.constexprs}
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        signature = {n: "constexpr" if n in constants else mangle_type(given[n]) for n in kernel.arg_names}
        # As a launch finds out by itself: addresses are multiples of 16.
        hints = {
            (number,): [["tt.divisibility", 16]]
            for number, name in enumerate(kernel.arg_names)
            if isinstance(given[name], torch.Tensor)
        }
        source = ASTSource(kernel, signature, constants, hints)
        for capability in (80, 90):
            found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            self.texts[f"{kernel.__name__} {capability} {constants}"] = found.asm["ptx"]


@pytest.fixture
def launches() -> Iterator[Compiled]:
    """Let kernels be chosen, and compiled instead of launched."""
    pytest.importorskip("triton", reason="triton has no build for this system")
    from triton.runtime.jit import JITFunction

    compiled = Compiled()
    for name in [name for name in sys.modules if name.startswith("lit_zero.kernels.triton_")]:
        assert not os.environ.get("TRITON_INTERPRET"), name
    chosen = [f"lit_zero.kernels.{each}.runs_kernel" for each in CHOOSING]
    patches = [mock.patch(each, return_value=True) for each in chosen]
    patches.append(mock.patch.object(JITFunction, "run", lambda kernel, *args, **kw: compiled.run(kernel, *args, **kw)))
    for each in patches:
        each.start()
    try:
        yield compiled
    finally:
        for each in patches:
            each.stop()


def all_unscale() -> None:
    for dtype in (*DTYPES, torch.float64):
        for tensor in (torch.ones(64, dtype=dtype), torch.ones(65, dtype=dtype)[1:]):
            unscale([tensor], torch.ones(()), torch.zeros(()))
    unscale([torch.ones(64)])


def all_pack() -> None:
    for dtype in (*DTYPES, torch.float64):
        for other in DTYPES:
            pack([torch.ones(64, dtype=dtype)], torch.ones(64, dtype=other))
            unpack(torch.ones(64, dtype=other), [torch.ones(64, dtype=dtype)])


def all_quantize() -> None:
    for code in ("int8", "dynamic8", "int4", "nf4"):
        for dtype in DTYPES:
            scheme = Scheme(code, 64)
            codes = torch.zeros(128 // scheme.per_byte, dtype=torch.uint8)
            dequantize(Quantized(scheme, 128, codes, torch.ones(2)), torch.empty(128, dtype=dtype))
            quantize(torch.ones(128, dtype=dtype), scheme)
            quantize(torch.ones(128, dtype=dtype), scheme, torch.Generator().manual_seed(0))


def all_signs() -> None:
    for dtype in DTYPES:
        found = pack_signs(torch.ones(128, dtype=dtype), torch.zeros(128), block=64)
        unpack_signs(found, torch.empty(128, dtype=dtype))


def all_lamb() -> None:
    for param, state in ((DTYPES[0], DTYPES[0]), (DTYPES[1], DTYPES[1]), (DTYPES[2], DTYPES[0])):
        tensors = [torch.ones(64, dtype=dtype) for dtype in (param, param, state, state)]
        piece = LambPiece(LambGroup(0.1), *tensors, torch.zeros(()), slice(0, 40))
        for scalar in (None, torch.ones(())):
            lamb_apply([piece], lamb_moments([piece], scalar, scalar), scalar)


def all_split() -> None:
    master, copy, remainder = (torch.zeros(300, dtype=dtype) for dtype in (DTYPES[0], DTYPES[1], torch.int16))
    split(master, copy, remainder)
    join(copy, remainder, master)


def all_moments() -> None:
    values, codes, scales = torch.zeros(512), torch.zeros(512, dtype=torch.int8), torch.zeros(2)
    for step in (0, torch.zeros(())):
        to_bfloat16(values, torch.zeros(512, dtype=torch.bfloat16), (1, step, 2))
        for signed in (True, False):
            to_int8(values, codes, scales, signed, (1, step, 2))
    for signed in (True, False):
        to_int8(values, codes, scales, signed)
        from_int8(codes, scales, signed, values)


def small_array(form: int) -> Array:
    kind, other = {
        PLAIN: (torch.float32, None),
        SPLIT: (torch.int16, torch.int16),
        ROUNDED: (torch.bfloat16, None),
        DITHERED: (torch.bfloat16, None),
        SIGNED: (torch.int8, torch.float32),
        UNSIGNED: (torch.int8, torch.float32),
    }[form]
    return Array(form, torch.zeros(512, dtype=kind), None if other is None else torch.zeros(512, dtype=other))


def all_small() -> None:
    numbers = [[1.0] * 11]
    for param, first, second in itertools.product(
        (PLAIN, SPLIT), (PLAIN, ROUNDED, SIGNED), (PLAIN, DITHERED, UNSIGNED)
    ):
        for dtype in DTYPES:
            moments = tuple(map(small_array, (first, second)))
            one = SmallSegment(0, small_array(param), torch.zeros(300, dtype=dtype), moments, torch.zeros(()))
            small_step("adamw_rule", [one], numbers)
    plain = small_array(SPLIT), torch.zeros(300)
    small_step("adagrad_rule", [SmallSegment(0, *plain, (small_array(UNSIGNED),), torch.zeros(()))], numbers)
    for rule in ("lion_rule", "sgd_rule"):
        small_step(rule, [SmallSegment(0, *plain, (small_array(SIGNED),))], numbers)
    small_step("sgd_rule", [SmallSegment(0, *plain, ())], numbers)
    small_step("sgd_rule", [SmallSegment(0, *plain, ())], numbers, None, torch.ones(()))


EVERYTHING = [all_unscale, all_pack, all_quantize, all_signs, all_lamb, all_split, all_moments, all_small]


@pytest.mark.parametrize("launch", EVERYTHING)
def test_kernels_compile(launches: Compiled, launch: Callable[[], None]) -> None:
    launch()
    assert launches.texts


def test_aligned_tensors_are_read_and_written_several_elements_at_once(launches: Compiled) -> None:
    unscale([torch.ones(64)], torch.ones(()))
    pack([torch.ones(64)], torch.ones(64, dtype=torch.bfloat16))
    for text in launches.texts.values():
        assert "ld.global.v4" in text and ("st.global.v4" in text or "st.global.v2" in text)
