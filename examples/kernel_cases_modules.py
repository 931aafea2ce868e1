"""What is measured of fused layers: each against plain torch, and against Liger where it is installed.

    python examples/kernel_cases_modules.py                      # time and memory of each, on this machine
    python examples/kernel_cases_modules.py --only loss --rounds 9
    python examples/kernel_cases_modules.py --device cuda --dtype bfloat16

A run is one forward and backward. Times are medians of rounds in which the contenders take turns; the peak is of tensor
memory beyond what stood before, counted by one more run without the clock.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_worker import TensorMemory
from kernel_timing import Case, Contender, Run
from torch import Tensor

from lit_zero.layers import angles, gated, layer_norm, linear_cross_entropy, rms_norm, rotary
from lit_zero.layers.replacing import Replacement

OURS, PLAIN = "lit_zero", "plain torch"


def _case(
    name: str,
    moved: int,
    inputs: Callable[[], Sequence[Tensor]],
    device: torch.device,
    liger: Callable[[], Callable[..., Any]] | None = None,
    **functions: Callable[..., Tensor],
) -> Case:
    """Return a case in which functions work on the same kind of inputs, forward and backward.

    Args:
        name: see ``Case``.
        moved: see ``Case``.
        inputs: makes them.
        device: where.
        liger: imports Liger's function, which needs a GPU.
        functions: ``ours`` and ``plain``.
    """

    def build(function: Callable[..., Tensor]) -> Run:
        given = inputs()
        leaves = [value for value in given if value.requires_grad]
        upstream = torch.randn_like(function(*given))
        return lambda: torch.autograd.grad(function(*given), leaves, upstream)

    found = [
        Contender(OURS, lambda: build(functions["ours"])),
        Contender(PLAIN, lambda: build(functions["plain"])),
    ]
    if liger is not None and device.type == "cuda":
        found.append(Contender("Liger", lambda: build(liger())))
    return Case(name, moved, found)


def losses(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Linear cross-entropy: sizes of a GPT with 30 million parameters, or on a GPU of one with 1 billion."""
    sizes = [(2048, 384, 8192), (2048, 512, 8192), (512, 512, 32768), (2048, 512, 32768)]
    if device.type != "cpu":
        sizes = [(8192, 2048, 32768), (8192, 4096, 131072)]

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    def liger() -> Callable[..., Any]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        return lambda hidden, weight, targets: loss(weight, hidden, targets)

    for rows, dim, vocabulary in sizes:

        def inputs(rows: int = rows, dim: int = dim, vocabulary: int = vocabulary) -> list[Tensor]:
            hidden = torch.randn(rows, dim, device=device, dtype=dtype, requires_grad=True)
            weight = (torch.randn(vocabulary, dim, device=device, dtype=dtype) * dim**-0.5).requires_grad_()
            return [hidden, weight, torch.randint(vocabulary, (rows,), device=device)]

        moved = 4 * (rows + vocabulary) * dim * dtype.itemsize  # both read, for logits and for gradients, and written
        name = f"loss, {rows:,} rows, {dim} x {vocabulary:,}"
        yield _case(name, moved, inputs, device, liger, ours=linear_cross_entropy, plain=plain)


def norms(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """RMS norm as Llama writes it, and torch's layer norm."""
    rows, width = (2048, 512) if device.type == "cpu" else (16384, 4096)

    def inputs(columns: int) -> list[Tensor]:
        sizes = [(rows, width), *[(width,)] * columns]
        return [torch.randn(*size, device=device, dtype=dtype, requires_grad=True) for size in sizes]

    def llama(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda x, weight: LigerRMSNormFunction.apply(x, weight, 1e-6)

    moved = 5 * rows * width * dtype.itemsize  # x, y; then x, the gradient of y and of x
    yield _case(
        f"RMS norm, {rows:,} x {width:,}",
        moved,
        lambda: inputs(1),
        device,
        liger,
        ours=lambda x, weight: rms_norm(x, (width,), weight, 1e-6),
        plain=llama,
    )
    yield _case(
        f"layer norm, {rows:,} x {width:,}",
        moved,
        lambda: inputs(2),
        device,
        ours=lambda x, weight, bias: layer_norm(x, (width,), weight, bias),
        plain=lambda x, weight, bias: F.layer_norm(x, (width,), weight, bias),
    )


def feed_forwards(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The middle of SwiGLU."""
    rows, width = (2048, 1376) if device.type == "cpu" else (16384, 11008)

    def liger() -> Callable[..., Any]:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return LigerSiLUMulFunction.apply

    yield _case(
        f"SwiGLU, {rows:,} x {width:,}",
        8 * rows * width * dtype.itemsize,  # gate, up, y; then gate, up, the gradient of y, of gate and of up
        lambda: [torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2)],
        device,
        liger,
        ours=gated,
        plain=lambda gate, up: F.silu(gate) * up,
    )


def rotaries(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Rotary positions of queries, in the order in which attention makes them."""
    batch, heads, times, dim = (4, 8, 512, 64) if device.type == "cpu" else (8, 32, 2048, 128)

    def inputs() -> list[Tensor]:
        q = torch.randn(batch, times, heads, dim, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        return [q, *(table[None, None].to(dtype) for table in angles(times, dim, device=device))]

    def llama(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = dim // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin

    moved = 4 * batch * heads * times * dim * dtype.itemsize
    yield _case(
        f"rotary, {batch} x {heads} x {times} x {dim}", moved, inputs, device, ours=rotary, plain=llama
    )  # fmt: skip


def models(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """A Llama of Hugging Face without its head, as it is and with ``layers=fused``."""
    batch, length, dim, layers = (4, 256, 512, 4) if device.type == "cpu" else (8, 2048, 2048, 8)

    def build(variant: str) -> Run:
        from transformers import LlamaConfig, LlamaModel

        heads = {"num_attention_heads": dim // 64, "num_key_value_heads": dim // 128}
        sizes = {"vocab_size": 1024, "hidden_size": dim, "intermediate_size": dim * 11 // 4}
        model = LlamaModel(LlamaConfig(num_hidden_layers=layers, use_cache=False, **heads, **sizes)).to(device, dtype)
        Replacement(variant).apply(model, device)
        tokens = torch.randint(1024, (batch, length), device=device)

        def run() -> None:
            model(input_ids=tokens).last_hidden_state.square().mean().backward()
            model.zero_grad()

        return run

    contenders = [Contender(OURS, lambda: build("fused")), Contender(PLAIN, lambda: build("plain"))]
    parameters = layers * dim**2 * (3 * 11 / 4 + 3)
    moved = int(3 * parameters * dtype.itemsize)  # read forward and backward, and their gradients: the least there is
    yield Case(f"Llama, {layers} layers, dim {dim}, {batch} x {length} tokens", moved, contenders)


GROUPS = {"loss": losses, "norms": norms, "feed_forwards": feed_forwards, "rotary": rotaries, "models": models}


def cases(device: torch.device, sizes: Sequence[str] = ()) -> list[Case]:
    """Return every case, in float32 on a CPU and bfloat16 on a GPU.

    Args:
        device: where.
        sizes: of a GPT, which mean nothing here.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return [case for group in GROUPS.values() for case in group(device, dtype)]


def peak(run: Run, device: torch.device) -> int:
    """Return the most bytes of tensors that stand at a time, beyond what stood before."""
    run()
    if device.type == "cpu":
        with TensorMemory() as memory:
            run()
        return memory.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def seconds(runs: dict[str, Run], device: torch.device, rounds: int) -> dict[str, float]:
    """Return the median seconds of each run, which take turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first one warms up
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--only", default=None, choices=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    missing = {"models"} if importlib.util.find_spec("transformers") is None else set[str]()
    names = [arguments.only] if arguments.only else [name for name in GROUPS if name not in missing]
    print(f"torch {torch.__version__}, {device}, {arguments.dtype}, {torch.get_num_threads()} threads")
    print("| forward and backward | by | ms | of plain torch | peak MiB | of plain torch |")
    print("|---|---|---|---|---|---|")
    for case in (case for name in names for case in GROUPS[name](device, dtype)):
        runs = {}
        for contender in case.contenders:
            try:
                runs[contender.name] = contender.build()
            except ImportError as error:
                print(f"| {case.name} | {contender.name} | did not run: {error} | | | |")
        times = seconds(runs, device, arguments.rounds)
        bytes_ = {name: peak(run, device) for name, run in runs.items()}
        for name in runs:
            ratios = times[name] / times[PLAIN], bytes_[name] / max(1, bytes_[PLAIN])
            print(
                f"| {case.name} | {name} | {1e3 * times[name]:.1f} | {ratios[0]:.2f} | {bytes_[name] / 2**20:.1f} "
                f"| {ratios[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
