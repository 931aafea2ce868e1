"""The steps of the element-wise optimizers: kernels against their references in fp64, tensor by tensor."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from lit_zero.kernels import (
    AdagradGroup,
    AdamGroup,
    LionGroup,
    Segment,
    SGDGroup,
    Tables,
    adagrad_step,
    adamw_step,
    lion_step,
    sgd_step,
)
from lit_zero.kernels.lion import lion_reference
from lit_zero.kernels.segments import by_format, in_portions

SIZES = (1, 63, 1000, 2048, 2049)  # a block has 2048
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {FP32: 3e-6, BF16: 2.0**-8, FP16: 2.0**-11}  # relative, with what a step adds to half a unit


@dataclass(frozen=True)
class Case:
    """An optimizer: its step, its states by name, and groups that differ in all that they can differ in."""

    step: Callable[..., None]
    states: tuple[str, ...]
    groups: tuple[Any, ...]
    counted: bool = False


ADAM_GROUPS = (
    AdamGroup(1e-2, 0.9, 0.95, 1e-8, 0.1),
    AdamGroup(3e-3, 0.0, 0.999, 1e-3, 0.2, decoupled=False),
    AdamGroup(1e-3, 0.8, 0.9999, 1e-6, 0.0, maximize=True),
)
CASES = {
    "adamw": Case(adamw_step, ("exp_avg", "exp_avg_sq"), ADAM_GROUPS, True),
    "amsgrad": Case(adamw_step, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), ADAM_GROUPS, True),
    "lion": Case(lion_step, ("exp_avg",), (LionGroup(1e-3, 0.9, 0.99, 0.1), LionGroup(1e-2, maximize=True))),
    "momentum": Case(
        sgd_step,
        ("momentum_buffer",),
        (
            SGDGroup(0.1, 0.9, 0.0, 0.1, nesterov=True),
            SGDGroup(0.1, 0.8, 0.3, maximize=True),
            SGDGroup(0.1, 0.8, 0.3, first=True),
        ),
    ),
    "sgd": Case(sgd_step, (), (SGDGroup(0.1, weight_decay=0.1), SGDGroup(0.2, maximize=True))),
    "adagrad": Case(
        adagrad_step, ("sum",), (AdagradGroup(0.1, 0.2, 1e-6, 0.1), AdagradGroup(0.01, maximize=True)), True
    ),
}
# Of the parameter, the gradient, the states and the copy.
FORMATS = [
    (FP32, FP32, FP32, BF16),
    (FP32, BF16, BF16, None),
    (FP32, FP16, FP32, FP16),
    (BF16, BF16, BF16, None),
    (FP16, FP16, FP32, BF16),
]


def guarded(values: torch.Tensor, shift: int) -> torch.Tensor:
    """Return a copy of ``values`` with NaN before and behind it, ``shift`` elements from an aligned address."""
    memory = torch.full((values.numel() + 16,), torch.nan, dtype=values.dtype, device=values.device)
    memory[shift : shift + values.numel()] = values
    return memory[shift : shift + values.numel()]


def refuse_touched_guards(segments: Sequence[Segment]) -> None:
    for segment in segments:
        for tensor in (each for each in segment.tensors if each is not None):
            memory = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
            assert int(memory.isnan().sum()) == 16, "something was written beside a tensor"


def make(case: Case, formats: Sequence[torch.dtype | None], device: torch.device) -> list[Segment]:
    """Return a segment of each size, by turns of each group, every other one not aligned."""
    param, grad, state, copy = formats
    generator, segments = torch.Generator().manual_seed(0), []
    for number, size in enumerate(SIZES):
        shift = number % 2

        def draw(dtype: torch.dtype | None, shift: int = shift, size: int = size) -> torch.Tensor:
            return guarded(torch.randn(size, generator=generator).to(device, dtype), shift)

        states = [draw(state) for _ in case.states]
        for key, value in zip(case.states, states, strict=True):
            if key.endswith("sq") or key == "sum":
                value.abs_()
        poison = None if copy is None else guarded(torch.full((size,), 7.0, dtype=copy, device=device), shift)
        segments.append(
            Segment(
                number % len(case.groups),
                draw(param),
                draw(grad),
                tuple(states),
                torch.tensor(float(number), device=device) if case.counted else None,
                poison,
            )
        )
    return segments


def in_fp64(segment: Segment) -> Segment:
    return replace(
        segment,
        param=segment.param.double().cpu(),
        grad=segment.grad.double().cpu(),
        states=tuple(state.double().cpu() for state in segment.states),
        step=None if segment.step is None else segment.step.cpu().clone(),
        copy=None,
    )


def check(case: Case, device: torch.device, formats: Sequence[torch.dtype | None], scale: float | None) -> None:
    """Take three steps; each must give what the reference in fp64 gives from the same values."""
    segments, tables = make(case, formats, device), Tables()
    factor = None if scale is None else torch.tensor(scale, device=device)
    found = torch.zeros((), device=device)
    for _ in range(3):
        expected = [in_fp64(segment) for segment in segments]
        reference(case, expected, scale)
        case.step(segments, case.groups, factor, found, tables)
        for mine, theirs in zip(segments, expected, strict=True):
            what = f"{len(mine.param)} elements, {formats}"
            near(mine.param, theirs.param, f"param of {what}")
            for name, state, other in zip(case.states, mine.states, theirs.states, strict=True):
                near(state, other, f"{name} of {what}")
            if mine.copy is not None:
                near(mine.copy, theirs.param, f"copy of {what}")
                if formats[0] == FP32:
                    assert torch.equal(mine.copy, mine.param.to(mine.copy.dtype)), f"bits of the copy of {what}"
            if mine.step is not None:
                assert torch.equal(mine.step.cpu(), theirs.step)
        refuse_touched_guards(segments)


def reference(case: Case, segments: Sequence[Segment], scale: float | None) -> None:
    """Step fp64 segments, which no kernel takes."""
    factor = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    case.step(segments, case.groups, factor)


def near(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    rounding = ROUNDING[found.dtype]
    torch.testing.assert_close(
        found.double().cpu(), expected, rtol=rounding, atol=rounding, msg=lambda text: f"{what}: {text}"
    )


def check_overflow(case: Case, device: torch.device) -> None:
    """A step that is to be skipped changes no bit, and the one after it goes on as if it had not been."""
    segments, tables = make(case, FORMATS[0], device), Tables()
    before = [[None if t is None else t.clone() for t in (*each.tensors, each.step)] for each in segments]
    case.step(segments, case.groups, None, torch.ones((), device=device), tables)
    for segment, values in zip(segments, before, strict=True):
        for tensor, value in zip((*segment.tensors, segment.step), values, strict=True):
            assert tensor is value is None or torch.equal(tensor, value)
    other = make(case, FORMATS[0], device)
    case.step(segments, case.groups, None, torch.zeros((), device=device), tables)
    case.step(other, case.groups)
    for one, two in zip(segments, other, strict=True):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(one.tensors, two.tensors, strict=True))
        assert one.step is two.step is None or torch.equal(one.step, two.step)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_equals_the_reference_in_fp64(interpreted, name):
    check(CASES[name], interpreted, FORMATS[0], 0.25)
    for formats in FORMATS[1:] if name == "adamw" else FORMATS[1:3]:
        check(CASES[name], interpreted, formats, None)


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_interpreted_in_all_formats(interpreted, name):
    for formats in FORMATS:
        for scale in (None, 0.25):
            check(CASES[name], interpreted, formats, scale)


@pytest.mark.parametrize("name", CASES)
def test_an_overflow_changes_nothing(interpreted, name):
    check_overflow(CASES[name], interpreted)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_the_reference_in_fp64(compiled, name):
    for formats in FORMATS:
        for scale in (None, 0.25):
            check(CASES[name], compiled, formats, scale)
    check_overflow(CASES[name], compiled)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_in_portions_equals_itself_in_fp64(name):
    for formats in (FORMATS[0], FORMATS[1], FORMATS[4]):
        check(CASES[name], torch.device("cpu"), formats, 0.25)
    check_overflow(CASES[name], torch.device("cpu"))


def test_portions_cover_all():
    seen: list[int] = []
    segment = Segment(0, torch.zeros(10), torch.zeros(10), step=torch.zeros(()))

    def reference(part: Segment) -> None:
        seen.append(part.param.numel())
        part.param.add_(float(part.step))

    in_portions(segment, reference, None, size=4)
    assert seen == [4, 4, 2]
    assert segment.param.tolist() == [1.0] * 10, "every portion sees the same count"


def test_segments_without_a_copy_share_the_launch_of_those_with_one():
    def one(dtype: torch.dtype, copy: torch.dtype | None) -> Segment:
        return Segment(0, torch.zeros(1, dtype=dtype), torch.zeros(1), copy=copy and torch.zeros(1, dtype=copy))

    found = by_format([one(FP32, None), one(FP32, BF16), one(BF16, None), one(FP32, None)])
    assert {key: len(each) for key, each in found.items()} == {(FP32, FP32, BF16): 3, (BF16, FP32, None): 1}


def test_what_lies_without_a_copy_beside_others_is_stepped_in_one_launch(interpreted, monkeypatch):
    launches: list[int] = []
    walk = importlib.import_module("lit_zero.kernels.triton_walk")
    inner = walk.launch
    monkeypatch.setattr(walk, "launch", lambda *args: (launches.append(1), inner(*args)))
    mine, theirs = make(CASES["adamw"], FORMATS[0], interpreted), make(CASES["adamw"], FORMATS[0], interpreted)
    mine[2] = replace(mine[2], copy=None)
    adamw_step(mine, ADAM_GROUPS)
    assert len(launches) == 1
    adamw_step(theirs, ADAM_GROUPS)
    assert all(torch.equal(one.param, two.param) for one, two in zip(mine, theirs, strict=True))


def test_not_a_number_shows(interpreted):
    for name, case in CASES.items():
        segments = make(case, FORMATS[0], interpreted)
        segments[2].grad[5] = torch.nan
        case.step(segments, case.groups)
        assert segments[2].param.isnan().nonzero().flatten().tolist() == [5], name
        assert segments[2].copy.isnan().nonzero().flatten().tolist() == [5], name


def test_an_empty_segment_is_no_obstacle(interpreted):
    empty = Segment(0, torch.zeros(0), torch.zeros(0), (torch.zeros(0), torch.zeros(0)), torch.zeros(()))
    adamw_step([empty], [AdamGroup(0.1)])
    segments = make(CASES["adamw"], FORMATS[0], interpreted)
    expected = make(CASES["adamw"], FORMATS[0], interpreted)
    adamw_step([empty, *segments], ADAM_GROUPS)
    adamw_step(expected, ADAM_GROUPS)
    assert all(torch.equal(one.param, two.param) for one, two in zip(segments, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.thorough
def test_more_elements_than_32_bits_count(compiled):
    size = 2**31 + 5
    param = torch.zeros(size, dtype=BF16, device=compiled)
    grad = torch.ones(size, dtype=BF16, device=compiled)
    sgd_step([Segment(0, param, grad)], [SGDGroup(0.5)])
    assert param[-5:].tolist() == [-0.5] * 5 and bool((param == -0.5).all())


@pytest.mark.thorough
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_kernels_compile_and_load_several_elements_at_once(compiled, name, capability):
    """No GPU is needed to compile for one."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    walk, rules = (importlib.import_module(f"lit_zero.kernels.triton_{each}") for each in ("walk", "rules"))
    case = CASES[name]
    rule = {"amsgrad": "adamw", "momentum": "sgd"}.get(name, name)
    constants = {
        **{"RULE": getattr(rules, f"{rule}_rule"), "STATES": len(case.states), "COUNTED": case.counted},
        **dict.fromkeys(("PARAM", "GRAD", "FIRST", "SECOND", "THIRD"), tl.float32),
        **{"COPY": tl.bfloat16, "BLOCK": walk.BLOCK, "HEAD": walk.HEAD, "WIDTH": 17, "NUMBERS": 11},
        **dict.fromkeys(("COPIED", "SCALED", "CHECKED"), True),
    }
    pointers = {"rows": "*i64", "owners": "*i32", "counters": "*i32"}
    pointers |= dict.fromkeys(("numbers", "grad_scale", "found_inf"), "*fp32")
    source = ASTSource(walk.walk, {**pointers, **dict.fromkeys(constants, "constexpr")}, constants)
    options = {"num_warps": walk.WARPS, "enable_fp_fusion": True}
    text = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    assert "ld.global.v4" in text and "st.global.v4" in text


def plain_lion(segments: Sequence[Segment], groups: Sequence[LionGroup]) -> None:
    for segment in segments:
        in_portions(segment, partial(lion_reference, group=groups[segment.group]), None)


@pytest.mark.parametrize("step", [lion_step, plain_lion])
def test_lion_shows_what_is_no_number(device, step):
    grad = torch.tensor([torch.nan, 1.0, -1.0, 0.0], device=device)
    segment = Segment(0, torch.ones(4, device=device), grad, (torch.zeros(4, device=device),))
    step([segment], [LionGroup(0.5)])
    assert segment.param[0].isnan()
    assert segment.param[1:].tolist() == [0.5, 1.5, 1.0]


@pytest.mark.parametrize("found", [None, 0.0, 1.0])
def test_segments_of_nothing_count_too_and_autograd_hears_of_the_step(device, found):
    segments = [
        Segment(0, *(torch.zeros(size, device=device) for _ in range(2)), (torch.zeros(size, device=device),) * 2, step)
        for size in (0, 5)
        for step in [torch.zeros((), device=device)]
    ]
    versions = [segment.param._version for segment in segments]
    for number in (1, 2):
        adamw_step(segments, ADAM_GROUPS[:1], None, None if found is None else torch.tensor(found, device=device))
        assert [segment.step.item() for segment in segments] == [0.0 if found else number] * 2
    assert segments[1].param._version > versions[1]
