"""Which stage holds what: pure functions of a recording and the chosen boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lit_zero.core.errors import ConfigError, UnsupportedError
from lit_zero.pipeline.facts import Recording, Slot


@dataclass(frozen=True)
class StagePlan:
    """One piece of the model.

    Attributes:
        number: from 0 at the input.
        first: number of its first block.
        end: number of the first block past it.
        blocks: names of its blocks.
        parameters: first names of the parameters that it needs.
        buffers: first names of the buffers whose values it decides.
        numel: elements of its parameters.
        ghosts: modules that stand-ins answer for on this stage.
        receives: what it is sent; nothing for the first stage.
        sends: what it sends on; nothing for the last stage.
    """

    number: int
    first: int
    end: int
    blocks: tuple[str, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    numel: int
    ghosts: tuple[str, ...]
    receives: tuple[Slot, ...]
    sends: tuple[Slot, ...]


@dataclass(frozen=True)
class SplitPlan:
    """The stages of a model.

    Attributes:
        stages: from the input to the output.
        tied: parameters that several stages need, and which; their gradients are summed, their norm counts once.
        owners: the one stage that decides a parameter's or buffer's value, for checkpoints and norms.
    """

    stages: tuple[StagePlan, ...]
    tied: dict[str, tuple[int, ...]]
    owners: dict[str, int]

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The number of the first block of every stage but the first."""
        return tuple(piece.first for piece in self.stages[1:])

    def __str__(self) -> str:
        """Return a table with a line for each stage."""
        lines = ["stage  blocks  parameters  receives"]
        for piece in self.stages:
            span = f"{piece.first}-{piece.end - 1}"
            received = "; ".join(map(str, piece.receives)) or "the batch"
            lines.append(f"{piece.number:5}  {span:>6}  {piece.numel:10,}  {received}")
        for name, where in self.tied.items():
            lines.append(f"tied: {name} on stages {', '.join(map(str, where))}")
        return "\n".join(lines)


def check_count(stages: int, blocks: int) -> None:
    """Raise unless ``blocks`` blocks make ``stages`` stages.

    Raises:
        ConfigError: naming both numbers.
    """
    if stages < 1:
        raise ConfigError(f"pipeline.stages={stages} is not possible: expected at least 1.")
    if stages > blocks:
        raise ConfigError(
            f"pipeline.stages={stages} is more than the {blocks} blocks of the block list; every stage needs one. Use "
            "fewer stages, or name a longer list with pipeline.blocks."
        )


def check_boundaries(boundaries: Sequence[int], blocks: int) -> None:
    """Raise unless every stage has a block.

    Raises:
        ConfigError: naming what came and the numbers that are possible.
    """
    edges = (0, *boundaries, blocks)
    if any(type(b) is not int for b in boundaries) or any(a >= b for a, b in pairwise(edges)):
        raise ConfigError(
            f"pipeline.boundaries={list(boundaries)} leaves a stage empty or is out of order: expected increasing "
            f"numbers of blocks from 1 to {blocks - 1}, the first block of every stage but the first."
        )


def check_costs(costs: Sequence[float], blocks: int) -> None:
    """Raise unless there is a cost for each block.

    Raises:
        ConfigError: naming both numbers.
    """
    if len(costs) != blocks:
        raise ConfigError(
            f"pipeline.balance has {len(costs)} costs, but the block list has {blocks} blocks: expected one each."
        )


def plan_split(recording: Recording, boundaries: Sequence[int]) -> SplitPlan:
    """Divide a recorded model into stages.

    Args:
        recording: what the dry run has shown.
        boundaries: the number of the first block of every stage but the first, increasing.

    Raises:
        ConfigError: if the boundaries leave a stage empty, or are not numbers of blocks in increasing order.
        UnsupportedError: if something crosses a boundary that cannot be sent.
    """
    count = len(recording.blocks)
    check_count(len(boundaries) + 1, count)
    check_boundaries(boundaries, count)
    edges = (0, *boundaries, count)
    for boundary in boundaries:
        objection = recording.objection(boundary)
        if objection:
            raise refusal(recording, objection)

    def where(regions: Sequence[int]) -> tuple[int, ...]:
        return tuple(sorted({sum(b <= region for b in boundaries) for region in regions}))

    def within(name: str) -> bool:
        return any(name.startswith(f"{block.name}.") for block in recording.blocks)

    # What the recorded step did not use, another may use anywhere (a probe in validation, a branch taken later).
    homes = {p.name: where(p.regions if p.used or within(p.name) else range(count)) for p in recording.parameters}
    writers = {b.name: where(b.written or b.regions) for b in recording.buffers}
    sizes = {p.name: p.numel for p in recording.parameters}
    pieces = []
    for number, (first, end) in enumerate(pairwise(edges)):
        own = tuple(name for name, on in homes.items() if number in on)
        pieces.append(
            StagePlan(
                number,
                first,
                end,
                tuple(block.name for block in recording.blocks[first:end]),
                own,
                tuple(name for name, on in writers.items() if on[0] == number),
                sum(sizes[name] for name in own),
                _ghosts(recording, first),
                recording.blocks[first].slots if first else (),
                recording.blocks[end].slots if end < count else (),
            )
        )
    tied = {name: on for name, on in homes.items() if len(on) > 1}
    owners = {name: on[0] for name, on in (homes | writers).items()}
    return SplitPlan(tuple(pieces), tied, owners)


def refusal(recording: Recording, objection: str) -> UnsupportedError:
    """Return the error for a boundary at which nothing can be cut."""
    allowed = ", ".join(map(str, recording.allowed())) or "none"
    return UnsupportedError(
        f"The model cannot be split there: {objection}. Choose other boundaries (pipeline.boundaries; possible: "
        f"{allowed}) or another block list (pipeline.blocks), or pass what is needed as an argument of every block."
    )


def _ghosts(recording: Recording, first: int) -> tuple[str, ...]:
    """Return the largest modules that have done all their work before block ``first``."""
    chosen: list[str] = []
    for module in recording.modules:  # in order of registration: a module comes before those inside it
        inside = any(module.name.startswith(f"{outer}.") for outer in chosen)
        if module.whole and module.last < first and not inside:
            chosen.append(module.name)
    return tuple(chosen)
