"""The command ``lit-zero``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lit_zero._version import __version__
from lit_zero.core.errors import LitZeroError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 done, 1 failed with a message, 2 wrong usage.

    Args:
        argv: the words after the command's name; the process's own by default.
    """
    arguments = _parser().parse_args(argv)
    try:
        _consolidate(arguments)
    except (LitZeroError, OSError) as error:
        print(f"lit-zero: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lit-zero: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lit-zero", description="Tools for checkpoints of lit_zero.")
    parser.add_argument("--version", action="version", version=f"lit-zero {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    consolidate = commands.add_parser(
        "consolidate",
        help="turn a sharded checkpoint into one plain file",
        description="Turn a sharded checkpoint (a folder) into one plain file that opens without lit_zero.",
    )
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
    return parser


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
