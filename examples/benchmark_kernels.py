"""Time kernels against the other ways to do the same, and against the bandwidth of a copy on the same machine.

    python examples/benchmark_kernels.py                                   # on the CPU, all that runs there: minutes
    python examples/benchmark_kernels.py --only AdamW --sizes 30M --rounds 11
    python examples/benchmark_kernels.py --device cuda --plot kernels.svg

What is timed stands in the files ``kernel_cases_*.py`` beside this one: each has a function ``cases(device, sizes)``.
Contenders take turns (A B C, B C A, ...), in memory that is new in each turn, so that a machine that slows down slows
all of them; the table shows medians over the turns, of ratios too. A package that is not installed has a row that says
so.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch
from benchmark import SIZES, describe_machine
from kernel_timing import Case, Timed, measure, plot, table


def all_cases(device: torch.device, sizes: list[str]) -> list[Case]:
    """Return the cases of all files beside this one."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("kernel_cases_*.py"))
    return [case for name in names for case in importlib.import_module(name).cases(device, sizes)]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark and print a table for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["2M", "30M"], help="of the GPT")
    parser.add_argument("--only", nargs="+", help="cases whose name begins with one of these")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--repeats", type=int, default=5, help="runs in a turn")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; all cores by default")
    parser.add_argument("--plot", type=Path, help="an SVG to write")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    title = f"{describe_machine(options.device)}, torch {torch.__version__}"
    print(f"{title}; {options.rounds} turns of {options.repeats} runs", flush=True)
    done: list[Timed] = []
    for case in all_cases(device, options.sizes):
        if options.only and not case.name.startswith(tuple(options.only)):
            continue
        done.append(measure(case, device, options.rounds, options.repeats))
        print(f"\n{table(done[-1])}", flush=True)
    if not done:
        print(f"no case begins with {' or '.join(options.only)}", file=sys.stderr)
        return 1
    if options.plot:
        options.plot.write_text(plot(done, title))
    return 0


if __name__ == "__main__":
    sys.exit(main())
