"""What is measured of the kernels of layers: each against plain torch, and against Liger where it is installed.

    python examples/kernel_cases_modules.py                     # a table of time and memory, on this machine
    python examples/kernel_cases_modules.py --only loss --rounds 9
    python examples/kernel_cases_modules.py --device cuda --dtype bfloat16

A case is one forward and backward. Times are medians of rounds in which plain torch, ours and the peers take turns; the
peak is of tensor memory beyond what stands before, counted by one more run without the clock.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_worker import TensorMemory
from torch import Tensor

from lit_zero.layers import angles, gated, layer_norm, linear_cross_entropy, rms_norm, rotary
from lit_zero.layers.replacing import Replacement

Run = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        name: what it is, and of which size.
        plain: forward and backward in plain torch.
        ours: the same by lit_zero.
        moved: bytes that a perfect implementation reads and writes; 0 where arithmetic is the limit.
        peers: the same by others, by their name.
    """

    name: str
    plain: Run
    ours: Run
    moved: int
    peers: dict[str, Run] = field(default_factory=dict)


def _run(function: Callable[..., Tensor], *inputs: Tensor) -> Run:
    """Return a forward and backward of ``function``, which leaves no gradient behind."""
    leaves = [value for value in inputs if value.requires_grad]
    upstream: list[Tensor] = []

    def run() -> None:
        y = function(*inputs)
        if not upstream:
            upstream.append(torch.randn_like(y))
        torch.autograd.grad(y, leaves, upstream[0])

    return run


def _random(*shape: int, device: str, dtype: torch.dtype, grad: bool = True) -> Tensor:
    return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(grad)


def losses(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Linear cross-entropy: sizes of a GPT with 30 million parameters, or on a GPU of one with 1 billion."""
    sizes = [(2048, 384, 8192), (2048, 512, 8192), (512, 512, 32768), (2048, 512, 32768)]
    if device != "cpu":
        sizes = [(8192, 2048, 32768), (8192, 4096, 131072)]

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    for rows, dim, vocabulary in sizes:
        hidden = _random(rows, dim, device=device, dtype=dtype)
        weight = (_random(vocabulary, dim, device=device, dtype=dtype, grad=False) * dim**-0.5).requires_grad_()
        targets = torch.randint(vocabulary, (rows,), device=device)
        peers = {}
        if _has_liger(device):
            from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

            def liger(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
                result = LigerFusedLinearCrossEntropyFunction.apply(h, w, t)
                return result[0] if isinstance(result, tuple) else result

            peers["Liger"] = _run(liger, hidden, weight, targets)
        yield Case(
            f"loss, {rows:,} rows, {dim} x {vocabulary:,}",
            _run(plain, hidden, weight, targets),
            _run(linear_cross_entropy, hidden, weight, targets),
            0,
            peers,
        )


def norms(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """RMS norm as Llama writes it, and torch's layer norm."""
    rows, width = (2048, 512) if device == "cpu" else (16384, 4096)
    x = _random(rows, width, device=device, dtype=dtype)
    weight, bias = (_random(width, device=device, dtype=dtype) for _ in range(2))
    moved = 5 * x.nbytes  # x, y; then x, the gradient of y and of x

    def llama(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    peers = {}
    if _has_liger(device):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        peers["Liger"] = _run(lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6), x, weight)
    ours = _run(lambda x, w: rms_norm(x, (width,), w, 1e-6), x, weight)
    yield Case(f"RMS norm, {rows:,} x {width:,}", _run(llama, x, weight), ours, moved, peers)
    yield Case(
        f"layer norm, {rows:,} x {width:,}",
        _run(lambda x, w, b: F.layer_norm(x, (width,), w, b), x, weight, bias),
        _run(lambda x, w, b: layer_norm(x, (width,), w, b), x, weight, bias),
        moved,
    )


def feed_forwards(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """The middle of SwiGLU."""
    rows, width = (2048, 1376) if device == "cpu" else (16384, 11008)
    gate, up = (_random(rows, width, device=device, dtype=dtype) for _ in range(2))
    peers = {}
    if _has_liger(device):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        peers["Liger"] = _run(LigerSiLUMulFunction.apply, gate, up)
    yield Case(
        f"SwiGLU, {rows:,} x {width:,}",
        _run(lambda g, u: F.silu(g) * u, gate, up),
        _run(gated, gate, up),
        8 * gate.nbytes,  # gate, up, y; then gate, up, the gradient of y, of gate and of up
        peers,
    )


def rotaries(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Rotary positions of queries, as attention lays them out."""
    batch, heads, times, dim = (4, 8, 512, 64) if device == "cpu" else (8, 32, 2048, 128)
    q = _random(batch, times, heads, dim, device=device, dtype=dtype, grad=False).transpose(1, 2).requires_grad_()
    cos, sin = (table[None, None].to(dtype) for table in angles(times, dim, device=device))

    def llama(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = dim // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin

    name = f"rotary, {batch} x {heads} x {times} x {dim}"
    yield Case(name, _run(llama, q, cos, sin), _run(rotary, q, cos, sin), 4 * q.nbytes)


def models(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """A Llama of Hugging Face without its head, as it is and with ``layers=fused``."""
    if importlib.util.find_spec("transformers") is None:
        return
    from transformers import LlamaConfig, LlamaModel

    batch, length, dim, layers = (4, 256, 512, 4) if device == "cpu" else (8, 2048, 2048, 8)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=dim,
        intermediate_size=dim * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=dim // 64,
        num_key_value_heads=dim // 128,
        use_cache=False,
    )
    tokens = torch.randint(1024, (batch, length), device=device)
    runs = []
    for variant in ("plain", "fused"):
        model = LlamaModel(config).to(device, dtype)
        Replacement(variant).apply(model, torch.device(device))

        def run(model: Any = model) -> None:
            model(input_ids=tokens).last_hidden_state.square().mean().backward()
            model.zero_grad()

        runs.append(run)
    yield Case(f"Llama, {layers} layers, dim {dim}, {batch} x {length} tokens", *runs, 0)


GROUPS = {"loss": losses, "norms": norms, "feed_forwards": feed_forwards, "rotary": rotaries, "models": models}


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """Yield every case; each makes its tensors when its turn comes."""
    for group in GROUPS.values():
        yield from group(device, dtype)


def _has_liger(device: str) -> bool:
    return device != "cpu" and importlib.util.find_spec("liger_kernel") is not None


def peak(run: Run, device: str) -> int:
    """Return the most bytes of tensors that stand at a time, beyond what stood before."""
    run()
    if device == "cpu":
        with TensorMemory() as memory:
            run()
        return memory.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def seconds(runs: dict[str, Run], device: str, rounds: int) -> dict[str, float]:
    """Return the median seconds of each run, which take turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            if device != "cpu":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:  # the first one warms up
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of fused layers against plain torch.")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--only", default=None, choices=list(GROUPS))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    groups = [GROUPS[arguments.only]] if arguments.only else list(GROUPS.values())
    print(f"torch {torch.__version__}, {arguments.device}, {arguments.dtype}, {torch.get_num_threads()} threads")
    print("| forward and backward | by | ms | of plain | peak MiB | of plain |")
    print("|---|---|---|---|---|---|")
    for group in groups:
        for case in group(arguments.device, dtype):
            runs = {"plain torch": case.plain, "lit_zero": case.ours, **case.peers}
            times = seconds(runs, arguments.device, arguments.rounds)
            bytes_ = {name: peak(run, arguments.device) for name, run in runs.items()}
            for name in runs:
                ratios = times[name] / times["plain torch"], bytes_[name] / max(1, bytes_["plain torch"])
                print(
                    f"| {case.name} | {name} | {1e3 * times[name]:.1f} | {ratios[0]:.2f} | {bytes_[name] / 2**20:.1f} "
                    f"| {ratios[1]:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
