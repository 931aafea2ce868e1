"""Show what every variant of ``activation`` saves and costs: bytes, FLOPs and seconds of the example GPT, in one run.

    python examples/benchmark_activation.py                          # 4, 12 and 24 layers: a few minutes on one core
    python examples/benchmark_activation.py --layers 4 --rounds 3
    python examples/benchmark_activation.py --device cuda --dim 1024 --heads 16 --length 1024 --batch 8

*Saved* is what is alive on the device after the forward and was not before it: on a CPU every tensor's storage is
followed by weak reference, without asking lit_zero; what was copied to host memory is left out, since on a CPU it lies
in the same memory. *FLOPs* are those of matrix products, attention and convolution, counted by
``torch.utils.flop_counter``. Steps are timed in turn, variant after variant, and the median is given.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field

import torch
from benchmark_worker import TensorMemory
from gpt import GPT
from torch.utils.flop_counter import FlopCounterMode

from lit_zero.activation.applied import Applied
from lit_zero.activation.policy import Activation
from lit_zero.comm.exchange import Exchange

HEADER = ("variant", "saved MiB", "fewer", "to host MiB", "more FLOPs", "step ms", "of none", "same bits")


@dataclass
class Found:
    """What a variant has shown.

    Attributes:
        saved: bytes on the device that the forward leaves for the backward.
        host: bytes in host memory at that time.
        flops: of a step.
        gradients: of a step that starts from a given seed.
        seconds: of every timed step.
    """

    saved: int = 0
    host: int = 0
    flops: int = 0
    gradients: list[torch.Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Trial:
    """One variant on a model of its own.

    Args:
        variant: the choice.
        sizes: arguments of ``GPT``.
        batch: sequences.
        device: where it computes.
    """

    def __init__(self, variant: Activation, sizes: dict[str, float], batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = GPT(**sizes).to(device)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(1)
        shape = (batch, int(sizes["block_size"]))
        self.tokens = torch.randint(int(sizes["vocab_size"]), shape, generator=generator).to(device)
        self.device, self.found = device, Found()
        self.applied = Applied(self.model, variant, "auto", device)
        self.step()  # from which a budget learns

    def forward(self) -> torch.Tensor:
        """Run a forward from a fixed seed."""
        self.model.zero_grad()
        torch.manual_seed(2)
        loss: torch.Tensor = self.model(self.tokens, self.tokens)
        self.applied.step_is_over(Exchange())
        return loss

    def step(self) -> None:
        """Run a forward and a backward."""
        self.forward().backward()

    def look(self) -> Found:
        """Count bytes and FLOPs, and keep the gradients."""
        found = self.found
        found.saved, found.host = self.saved()
        with FlopCounterMode(display=False) as counter:
            self.step()
        found.flops = counter.get_total_flops()
        found.gradients = [param.grad for param in self.model.parameters() if param.grad is not None]
        return found

    def saved(self) -> tuple[int, int]:
        """Return the bytes that a forward leaves on the device, and in host memory."""
        self.model.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            loss = self.forward()
            torch.cuda.synchronize()
            left = torch.cuda.memory_allocated() - before
        else:
            with TensorMemory() as memory:
                memory.follow([self.tokens, *self.model.parameters()])  # their views are not new memory
                before = memory.living()
                loss = self.forward()
                left = memory.living() - before - self._elsewhere()
        host = self._elsewhere()
        del loss
        return left, host

    def _elsewhere(self) -> int:
        return 0 if self.applied.host is None else self.applied.host.held

    def clock(self) -> None:
        """Time a step."""
        start = time.perf_counter()
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.found.seconds.append(time.perf_counter() - start)


def variants(saved: int, threshold: int) -> dict[str, Activation]:
    """Return what is compared.

    Args:
        saved: bytes that are saved without any of it, of which a budget takes two fifths.
        threshold: of ``offload``.
    """
    return {
        "full": Activation("full"),
        "every_n (2)": Activation("every_n", n=2),
        "selective": Activation("selective"),
        "offload": Activation("offload", threshold=threshold),
        "budget (40 %)": Activation("budget", budget=max(1, saved * 2 // 5), threshold=threshold),
    }


def compare(
    sizes: dict[str, float], batch: int, rounds: int, device: torch.device, threshold: int = 1 << 12
) -> dict[str, Found]:
    """Measure every variant on one model.

    Args:
        sizes: arguments of ``GPT``.
        batch: sequences.
        rounds: timed steps of each.
        device: where it computes.
        threshold: bytes below which ``offload`` leaves a tensor.
    """
    trials = {"none": Trial(Activation(), sizes, batch, device)}
    saved = trials["none"].look().saved
    for name, variant in variants(saved, threshold).items():
        trials[name] = Trial(variant, sizes, batch, device)
        trials[name].look()
    for _ in range(rounds):
        for trial in trials.values():
            trial.clock()
    return {name: trial.found for name, trial in trials.items()}


def table(found: dict[str, Found]) -> str:
    """Return a table; all relative to the first row."""
    first = next(iter(found.values()))
    rows = [HEADER]
    for name, each in found.items():
        step, of = statistics.median(each.seconds), statistics.median(first.seconds)
        equal = all(torch.equal(a, b) for a, b in zip(each.gradients, first.gradients, strict=True))
        rows.append(
            (
                name,
                f"{each.saved / 2**20:.2f}",
                f"{first.saved / max(1, each.saved):.1f} x",
                f"{each.host / 2**20:.2f}",
                f"{100 * (each.flops - first.flops) / first.flops:.1f} %",
                f"{1e3 * step:.1f}",
                f"{step / of:.2f}",
                "yes" if equal else "no",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def main() -> None:
    """Measure what the command line says and print a table for each number of layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 24], help="blocks of the models")
    parser.add_argument("--dim", type=int, default=128, help="width of the residual stream")
    parser.add_argument("--heads", type=int, default=4, help="attention heads")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--vocab", type=int, default=256, help="different tokens")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of every variant")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for layers in given.layers:
        sizes = {
            "vocab_size": given.vocab,
            "block_size": given.length,
            "dim": given.dim,
            "layers": layers,
            "heads": given.heads,
            "dropout": given.dropout,
        }
        found = compare(sizes, given.batch, given.rounds, torch.device(given.device))
        print(f"\n{layers} layers, dim {given.dim}, {given.batch} x {given.length} tokens, {given.device}")
        print(table(found), flush=True)


if __name__ == "__main__":
    main()
