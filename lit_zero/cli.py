"""The command ``lit-zero``."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence

from lit_zero._version import __version__
from lit_zero.core.errors import ConfigError, LitZeroError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 done, 1 failed with a message, 2 wrong usage.

    Args:
        argv: the words after the command's name; the process's own by default.
    """
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except (LitZeroError, OSError) as error:
        print(f"lit-zero: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lit-zero: interrupted, nothing was written", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lit-zero", description="Tools beside training with lit_zero.")
    parser.add_argument("--version", action="version", version=f"lit-zero {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    consolidate = commands.add_parser(
        "consolidate",
        help="turn a sharded checkpoint into one plain file",
        description="Turn a sharded checkpoint (a folder) into one plain file that opens without lit_zero.",
    )
    consolidate.set_defaults(run=_consolidate)
    consolidate.add_argument("source", metavar="DIR", help="folder that a run with checkpoint=sharded wrote")
    consolidate.add_argument(
        "target",
        metavar="OUT",
        help="file to write: .ckpt (everything, a plain Lightning checkpoint) or .safetensors (weights alone)",
    )
    consolidate.add_argument("--force", action="store_true", help="replace OUT if it exists")
    consolidate.add_argument(
        "--trust",
        action="store_true",
        help="also open objects other than tensors and plain containers (some hyper-parameters are such), which may run"
        " code: only for checkpoints of your own",
    )
    _add_schedule(commands)
    return parser


def _add_schedule(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    schedule = commands.add_parser(
        "schedule",
        help="draw a pipeline schedule",
        description="Draw what each rank of a pipeline does when, with its idle time and activations in flight.",
    )
    schedule.set_defaults(run=_schedule)
    schedule.add_argument("name", metavar="NAME", help="gpipe, 1f1b, interleaved, zero_bubble, zbv or forward")
    schedule.add_argument("--stages", type=int, required=True, help="pieces that the model is cut into")
    schedule.add_argument("--micro-batches", type=int, required=True, help="pieces that a batch is cut into")
    share = schedule.add_mutually_exclusive_group()
    share.add_argument("--ranks", type=int, help="ranks that share the stages (default: as NAME has it)")
    share.add_argument("--stages-per-rank", type=int, help="the same, said the other way round")
    schedule.add_argument(
        "--costs", default="F=1,I=1,W=1", help="time of F, B, I, W and latency (default: %(default)s)"
    )
    schedule.add_argument("--output", metavar="FILE", help="picture (.svg or .png) or Chrome trace (.json) to write")


def _consolidate(arguments: argparse.Namespace) -> None:
    # Here and not at the top: --help and --version need none of it.
    from lit_zero.checkpoint.consolidate import consolidate

    consolidate(
        arguments.source,
        arguments.target,
        force=arguments.force,
        weights_only=not arguments.trust,
        progress=_Progress(),
    )
    print(f"lit-zero: wrote '{arguments.target}'", file=sys.stderr)


def _schedule(arguments: argparse.Namespace) -> int:
    from lit_zero.pipeline.report import check_ending, headline, report, write
    from lit_zero.pipeline.schedules import build
    from lit_zero.pipeline.timing import Costs, simulate

    try:
        if arguments.output:
            check_ending(arguments.output)
        costs, ranks = Costs.parse(arguments.costs), arguments.ranks
        if arguments.stages_per_rank is not None:
            ranks, left = divmod(arguments.stages, max(1, arguments.stages_per_rank))
            if left or arguments.stages_per_rank < 1:
                raise ConfigError(
                    f"--stages={arguments.stages} is not a multiple of --stages-per-rank={arguments.stages_per_rank}."
                )
        schedule = build(arguments.name, arguments.stages, arguments.micro_batches, ranks=ranks, costs=costs)
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(report(schedule, costs, width))
    except ConfigError as error:
        print(f"lit-zero: error: {error}", file=sys.stderr)
        return 2
    if arguments.output:
        write(simulate(schedule, costs), headline(schedule), arguments.output)
        print(f"lit-zero: wrote '{arguments.output}'", file=sys.stderr)
    return 0


class _Progress:
    """One line that counts on a terminal; a line for every tenth of the way elsewhere."""

    def __init__(self) -> None:
        self._tenth = 0

    def __call__(self, done: int, total: int, name: str) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r\x1b[K{done}/{total} tensors  {name}"[:110], end=end, file=sys.stderr, flush=True)
        elif done * 10 // total > self._tenth:
            self._tenth = done * 10 // total
            print(f"{done}/{total} tensors", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
