"""Compare lit_zero's pipeline with torch.distributed.pipelining driven by hand: step time on the same GPT, same split.

    python examples/benchmark_pipeline.py                                    # 2 ranks, both sizes
    python examples/benchmark_pipeline.py --sizes 2M --schedules 1f1b --rounds 5

By hand means that the model is rewritten as two stage modules and the schedule is called with their inputs and
targets, as torch's documentation shows: in a loop of one's own, and in Lightning's Trainer with manual optimization,
as a user of Lightning would write it. lit_zero runs the unmodified model in the Trainer. All train with the same
batches, micro-batches, initial weights and optimizer; their losses are printed and must agree. In each round all run
in fresh processes with one thread per rank, side by side: for slices of time by turns, so that a machine whose speed
drifts is as fast for all. A step is everything from one batch to the next: reading it, the schedule, the optimizer,
and what Lightning does around them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from benchmark import SIZES, describe_machine, take_slices
from benchmark_pipeline_worker import CONTENDERS, PipelineTurn

STEPS = {"tiny": 100, "2M": 100, "30M": 30}  # of a turn
SLICES = {"tiny": 0.6, "2M": 0.6, "30M": 15.0}  # seconds: some steps, and shorter than the drifts of a busy machine
WORKER = Path(__file__).with_name("benchmark_pipeline_worker.py")


def measure(size: str, schedule: str, options: argparse.Namespace) -> dict[str, list[list[dict]]]:
    """Let the contenders take turns; return what each rank wrote down, by contender and turn."""
    model, rows = SIZES[size]
    found: dict[str, list[list[dict]]] = {name: [] for name in CONTENDERS}
    steps = options.steps or STEPS[size]
    for _ in range(options.rounds):
        turns = [
            PipelineTurn(
                name,
                schedule,
                options.ranks,
                {**model, "tied": False},
                rows * options.ranks,
                options.micro_batches,
                options.warmup,
                steps,
            )
            for name in CONTENDERS
        ]
        for name, ranks in zip(CONTENDERS, take_slices(turns, SLICES[size], options.timeout, WORKER), strict=True):
            found[name].append(ranks)
            print(f"{size}, {schedule}, {name}: {_step([ranks]) * 1e3:.1f} ms", file=sys.stderr, flush=True)
    return found


def _step(turns: list[list[dict]]) -> float:
    """The median step over all turns, in seconds; a step takes as long as on the rank that takes longest."""
    return statistics.median(max(each) for turn in turns for each in zip(*(r["seconds"] for r in turn), strict=True))


def table(found: dict[str, list[list[dict]]]) -> str:
    """Return the comparison as a Markdown table."""
    rows = ["| contender | step, ms (each round) | of torch's | last loss |", "|---|---|---|---|"]
    reference = _step(found["torch"])
    for name, turns in found.items():
        each = ", ".join(f"{_step([turn]) * 1e3:.1f}" for turn in turns)
        step, loss = _step(turns), turns[-1][-1]["losses"][-1]  # the last rank has the loss
        rows.append(f"| {name} | {step * 1e3:.1f} ({each}) | {step / reference:.3f} | {loss:.7f} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes, one stage each")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["2M", "30M"])
    parser.add_argument("--schedules", nargs="+", choices=["gpipe", "1f1b"], default=["1f1b", "gpipe"])
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, help="measured steps per turn; by default as many as the size needs")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the measured ones")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a turn is given up")
    options = parser.parse_args(arguments)
    print(describe_machine("cpu"))
    for size in options.sizes:
        for schedule in options.schedules:
            found = measure(size, schedule, options)
            print(
                f"\n### {size} parameters, {schedule}, {options.ranks} ranks, {options.micro_batches} micro-batches\n"
            )
            print(table(found), flush=True)


if __name__ == "__main__":
    main()
