"""What offload costs: the step of the optimizer on the CPU by kernel, and a training step under each setting.

    python examples/benchmark_offload.py                               # both parts, 2 ranks, 2M and 30M parameters
    python examples/benchmark_offload.py --part kernels --elements 100000000
    python examples/benchmark_offload.py --part training --sizes 30M --rounds 5
    python examples/benchmark_offload.py --device cuda --ranks 1 --sizes 30M

In both parts the contenders take turns (A B C A B C ...). The first part steps AdamW on one flat tensor of fp32 with
all cores and says how many bytes a second that is: an element takes 28 (master, two states and gradient are read, all
but the gradient are written). DeepSpeed's CPUAdam runs where it is installed and can be compiled. The second part
trains the same GPT with the same batches; ``half`` is ``offload.ratio=0.5``, ``params`` is ``offload.params=true``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark import SIZES, Measured, describe_machine, take_turn
from benchmark_offload_worker import OFFLOAD
from benchmark_worker import Turn

WORKER = Path(__file__).with_name("benchmark_offload_worker.py")
BYTES = 28  # of memory traffic for each element
CHUNK = 1 << 22  # elements of a portion


# ---- the step of the optimizer


def _torch_step(elements: int, portion: int, **kind: bool) -> Callable[[], None]:
    parts = [torch.nn.Parameter(part) for part in torch.randn(elements).split(portion)]
    for part in parts:
        part.grad = torch.randn_like(part)
    optimizer = torch.optim.AdamW(parts, lr=1e-3, **kind)  # type: ignore[arg-type]
    return lambda: optimizer.step() and None


def _deepspeed_step(elements: int, portion: int) -> Callable[[], None]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    part = torch.nn.Parameter(torch.randn(elements))
    part.grad = torch.randn_like(part)
    optimizer = DeepSpeedCPUAdam([part], lr=1e-3, adamw_mode=True)
    return lambda: optimizer.step() and None


KERNELS: dict[str, Callable[[int], Callable[[], None]]] = {
    "torch fused, portions": lambda n: _torch_step(n, CHUNK, fused=True),
    "torch fused, one tensor": lambda n: _torch_step(n, n, fused=True),
    "torch foreach": lambda n: _torch_step(n, n, foreach=True),
    "torch, one by one": lambda n: _torch_step(n, n, foreach=False),
    "DeepSpeed CPUAdam": lambda n: _deepspeed_step(n, n),
}


def kernels(elements: int, rounds: int) -> str:
    """Return the table of the first part."""
    steps, failed = dict[str, Callable[[], None]](), dict[str, str]()
    for name, build in KERNELS.items():
        try:
            steps[name] = build(elements)
            steps[name]()  # makes the state
        except Exception as error:  # not installed, or no compiler for it
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            steps.pop(name, None)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    fastest = min(statistics.median(each) for each in seconds.values())
    rows = ["| step of AdamW | median, ms | best, ms | GB/s | of the fastest |", "|---|---|---|---|---|"]
    for name, each in seconds.items():
        middle = statistics.median(each)
        cells = [name, f"{middle * 1e3:.1f}", f"{min(each) * 1e3:.1f}", f"{elements * BYTES / middle / 1e9:.1f}"]
        rows.append("| " + " | ".join([*cells, f"{middle / fastest:.2f}"]) + " |")
    rows += [f"| {name} | did not run: {reason} | | | |" for name, reason in failed.items()]
    return "\n".join(rows)


# ---- training


def training(size: str, options: argparse.Namespace) -> str:
    """Return the table of the second part for one size."""
    model, batch_size = SIZES[size]
    measured = {name: Measured() for name in OFFLOAD if options.only is None or name in options.only}
    for memory in [False] * options.rounds + [True] * (options.device == "cpu" and not options.no_memory):
        warmup, steps = (2, 2) if memory else (options.warmup, options.steps)
        for name, found in measured.items():
            if found.failure:
                continue
            turn = Turn(name, options.ranks, model, batch_size, warmup, steps, options.device, memory)
            try:
                found.add(take_turn(turn, options.timeout, WORKER))
            except RuntimeError as error:
                found.failure = str(error)
            print(f"{size}, {name}: {found.failure or 'done'}", file=sys.stderr, flush=True)
    rows = [
        "| setting | step, ms (each round) | of none | tokens/s | peak memory, MB | last loss |",
        "|---|---|---|---|---|---|",
    ]
    tokens = options.ranks * batch_size * model["block_size"]
    for name, found in measured.items():
        if found.failure:
            rows.append(f"| {name} | did not run: {found.failure} | | | | |")
            continue
        none = measured.get(name.split()[0])
        relative = f"{found.step / none.step:.2f}" if none and none.seconds else ""
        each = ", ".join(f"{seconds * 1e3:.0f}" for seconds in found.rounds)
        peak = f"{found.peak_bytes / 1e6:.1f}" if found.peak_bytes else ""
        cells = [name, f"{found.step * 1e3:.1f} ({each})", relative, f"{tokens / found.step:,.0f}", peak]
        rows.append("| " + " | ".join([*cells, f"{found.losses[-1]:.6f}"]) + " |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["kernels", "training", "both"], default="both")
    parser.add_argument("--elements", type=int, default=30_000_000, help="of the flat tensor that is stepped")
    parser.add_argument("--threads", type=int, default=None, help="of the first part; all cores by default")
    parser.add_argument("--ranks", type=int, default=2, help="processes that train")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["2M", "30M"])
    parser.add_argument("--only", nargs="+", choices=list(OFFLOAD), help="settings to train with")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=5, help="measured steps per turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the measured ones")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="skip the turns that measure peak memory (CPU)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a turn is given up")
    options = parser.parse_args(arguments)
    print(describe_machine(options.device))
    if options.part != "training":
        torch.set_num_threads(options.threads or torch.get_num_threads())
        print(f"\n### AdamW on {options.elements:,} elements, {torch.get_num_threads()} threads\n")
        print(kernels(options.elements, 3 * options.rounds), flush=True)
    for size in options.sizes if options.part != "kernels" else []:
        print(f"\n### {size} parameters, {options.ranks} ranks\n")
        print(training(size, options), flush=True)


if __name__ == "__main__":
    main()
