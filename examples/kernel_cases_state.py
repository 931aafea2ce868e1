"""What small state and few bytes on the wire are made of: the step on small forms, the forms themselves, and the passes
over many tensors; and the optimizers that look at whole parameters. Each against plain torch, and bytes against a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmark import SIZES
from gpt import GPT
from kernel_timing import Case, Contender, Run
from lit_zero.kernels import Scheme, Tables, dequantize, pack, pack_signs, quantize, runs_kernel, unpack_signs, unscale
from lit_zero.kernels.adamw import AdamGroup
from lit_zero.kernels.moments import BLOCK, from_int8, to_int8
from lit_zero.kernels.pack import move_reference
from lit_zero.kernels.signs import pack_signs_reference, unpack_signs_reference
from lit_zero.kernels.small import SIGNED, SPLIT, UNSIGNED, Array, SmallSegment, small_step
from lit_zero.kernels.split import join, split
from lit_zero.kernels.unscale import unscale_reference
from torch import nn

from lit_zero import optim
from lit_zero.core.forms import Origin
from lit_zero.core.keeping import Content, Kept
from lit_zero.precision import Precision
from lit_zero.precision.small import SmallKeeper
from lit_zero.zero.twin import Twin


def cases(device: torch.device, sizes: Sequence[str]) -> list[Case]:
    """Return the cases for each size of a GPT."""
    return [case for size in sizes for case in _cases(device, [p.shape for p in GPT(**SIZES[size][0]).parameters()])]


def _cases(device: torch.device, shapes: Sequence[torch.Size]) -> list[Case]:
    numel = sum(shape.numel() for shape in shapes)
    whole = -(-numel // BLOCK) * BLOCK  # blocks of 8-bit moments are full

    def case(name: str, moved: float, *contenders: Contender) -> Case:
        return Case(f"{name}, {numel / 1e6:.1f} million elements", int(moved * numel), contenders)

    def flat(length: int = numel, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        torch.manual_seed(0)
        return torch.randn(length, device=device).to(dtype)

    def tensors() -> list[torch.Tensor]:
        torch.manual_seed(0)
        return [torch.randn(shape, device=device) for shape in shapes]

    return [
        # Two bytes of copy, two of remainder and one of each moment are read and written, two of a gradient are read.
        case(
            "small step",
            14,
            Contender("one launch on small forms", lambda: _small(whole, device, fused=True)),
            Contender("portion by portion", lambda: _small(whole, device, fused=False)),
            Contender("fp32, torch fused", lambda: _adamw(numel, device), moved=28 * numel),
        ),
        case("LAMB", 28, *_whole(optim.LAMB, shapes, device)),
        case("Muon", 20, *_whole(optim.Muon, shapes, device)),
        case(
            "unscale",
            8,
            Contender("lit_zero, many tensors", lambda: _unscaled(unscale, tensors())),
            Contender("plain torch", lambda: _unscaled(unscale_reference, tensors())),
        ),
        case(
            "pack to bf16",
            6,
            Contender("lit_zero, many tensors", lambda: _packed(pack, tensors(), numel)),
            Contender("plain torch", lambda: _packed(_pack_one_by_one, tensors(), numel)),
        ),
        case("quantize int8", 5, *_quantized("int8", flat)),
        case("quantize nf4", 4.5, *_quantized("nf4", flat)),
        case("signs", 12.125, *_signs(flat)),
        case("split", 8, *_split(flat)),
        case("moments int8", 5, *_moments(lambda: flat(whole))),
    ]


# ---- steps


def _small(numel: int, device: torch.device, fused: bool) -> Run:
    """Return a step of AdamW on a split master with 8-bit moments."""
    keeper, states = SmallKeeper(Precision(master="split", moments="int8"), device), {}
    copy = torch.randn(numel, device=device).to(torch.bfloat16)
    master, grad = keeper.beside(copy), torch.randn(numel, device=device).to(torch.bfloat16)
    for key, content in (("exp_avg", Content.SIGNED), ("exp_avg_sq", Content.POSITIVE)):
        states[key] = keeper.keep(numel, torch.float32, content)
    if not fused:
        return _portions(keeper, master, states, grad)
    if not runs_kernel(grad):
        raise RuntimeError("there is no kernel for this device: it steps portion by portion")
    moments = tuple(
        Array(form, *kept.tensors()) for form, kept in zip((SIGNED, UNSIGNED), states.values(), strict=True)
    )
    segment = SmallSegment(0, Array(SPLIT, *master.tensors()), grad, moments, torch.zeros((), device=device))
    groups, tables = [AdamGroup(lr=1e-3).numbers()], Tables()
    return lambda: small_step("adamw_rule", [segment], groups, tables)


def _portions(keeper: SmallKeeper, master: Kept, states: dict[str, Kept], grad: torch.Tensor) -> Run:
    like = nn.Parameter(master.stand_in())
    twin, count = Twin(torch.optim.AdamW([like]), away=False), torch.zeros(())

    def run() -> None:
        for first, last, views in keeper.walk({"": master, **states}, 0, Origin()):
            param = nn.Parameter(views[""])
            param.grad = grad[first:last].float()
            twin.step(like, param, {"step": count.clone(), **{key: views[key] for key in states}})

    return torch.no_grad()(run)


def _adamw(numel: int, device: torch.device) -> Run:
    param = nn.Parameter(torch.randn(numel, device=device))
    param.grad = torch.randn_like(param)
    return torch.optim.AdamW([param], fused=True).step


def _whole(
    kind: type[torch.optim.Optimizer], shapes: Sequence[torch.Size], device: torch.device
) -> tuple[Contender, ...]:
    """Return an optimizer that looks at whole parameters, and torch's AdamW as what a step may cost."""

    def build(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Run:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        return make(params).step

    return (
        Contender("lit_zero", lambda: build(kind)),
        Contender("AdamW, torch fused", lambda: build(lambda params: torch.optim.AdamW(params, fused=True))),
    )


# ---- passes over many tensors


def _unscaled(function: Callable[..., Any], tensors: list[torch.Tensor]) -> Run:
    scale, found = (torch.full((), value, device=tensors[0].device) for value in (1.0, 0.0))
    return lambda: function(tensors, scale, found)


def _packed(function: Callable[..., Any], tensors: list[torch.Tensor], numel: int) -> Run:
    buffer = torch.empty(numel, dtype=torch.bfloat16, device=tensors[0].device)
    return lambda: function(tensors, buffer)


def _pack_one_by_one(tensors: Sequence[torch.Tensor], flat: torch.Tensor) -> None:
    starts = [0]
    for tensor in tensors[:-1]:
        starts.append(starts[-1] + tensor.numel())
    move_reference(tensors, flat, starts, True)


# ---- forms


def _both(there: Callable[[torch.Tensor], Any], back: Callable[[Any, torch.Tensor], Any], flat: Any) -> list[Contender]:
    """Return a form's two directions, which move about as much."""

    def first() -> Run:
        values = flat()
        return lambda: there(values)

    def second() -> Run:
        values = flat()
        encoded = there(values)
        return lambda: back(encoded, values)

    return [Contender("there", first), Contender("back", second)]


def _quantized(code: str, flat: Any) -> list[Contender]:
    return _both(lambda values: quantize(values, Scheme(code, 256)), dequantize, flat)


def _signs(flat: Any) -> list[Contender]:
    def ours() -> Run:
        values, error = flat(), torch.zeros_like(flat())
        return lambda: pack_signs(values, error)

    def plain() -> Run:
        values, error = flat(), torch.zeros_like(flat())
        return lambda: pack_signs_reference(values, error, 2048)

    def read(function: Callable[..., Any]) -> Run:
        signs = pack_signs(flat(), torch.zeros_like(flat()))
        return lambda: function(signs)

    moved = int(4.125 * flat().numel())
    return [
        Contender("pack, lit_zero", ours),
        Contender("pack, plain torch", plain),
        Contender("unpack, lit_zero", lambda: read(unpack_signs), moved),
        Contender("unpack, plain torch", lambda: read(unpack_signs_reference), moved),
    ]


def _split(flat: Any) -> list[Contender]:
    def halves(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        copy = torch.empty_like(values, dtype=torch.bfloat16)
        remainder = torch.empty_like(values, dtype=torch.int16)
        split(values, copy, remainder)
        return copy, remainder

    return _both(halves, lambda parts, out: join(*parts, out), flat)


def _moments(flat: Any) -> list[Contender]:
    def coded(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.empty_like(values, dtype=torch.int8)
        scales = torch.empty(values.numel() // BLOCK, device=values.device)
        to_int8(values, codes, scales, True)
        return codes, scales

    return _both(coded, lambda parts, out: from_int8(*parts, True, out), flat)
