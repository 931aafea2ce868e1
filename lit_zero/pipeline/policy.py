"""The user's choice of a pipeline: how many pieces the model is in, and in which order they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lit_zero.core.errors import ConfigError, check_choice

# By schedule: how many stages a rank has. ``interleaved`` takes any number from 2.
STAGES_PER_RANK = {"none": 1, "gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 1, "zbv": 2}
BALANCES = ("parameters", "activations", "flops", "time")

Split = Callable[[Any, int], Sequence[Any]]


@dataclass(frozen=True)
class Pipeline:
    """How the model is divided into stages, and a batch into micro-batches that run through them.

    Args:
        schedule: ``none`` (no pipeline), ``gpipe``, ``1f1b``, ``interleaved``, ``zero_bubble`` (ZB-H1) or ``zbv``; see
            ``lit-zero schedule``.
        stages: pieces of the model.
        micro_batches: pieces of a batch; a batch with fewer rows has as many pieces as rows. Default: four times the
            ranks of a pipeline.
        stages_per_rank: ``interleaved`` only: stages that a rank runs in turn, 2 or more. Default 2.
        blocks: the list of modules between which the model is cut: ``auto`` (the largest repeated ``ModuleList`` or
            ``Sequential``), its path, or the paths of several in the order in which they run.
        boundaries: the numbers of the blocks that begin a stage, for every stage but the first. Default: as ``balance``
            says.
        balance: what is evened out over the stages: ``parameters``, ``activations`` (bytes kept for the backward),
            ``flops``, ``time`` (rank 0 runs the step a few times before the run, on the whole module and one
            micro-batch), or a cost for each block.
        split: ``(batch, count) -> micro-batches``, where the batch is not to be cut along the first dimension of its
            tensors.

    Raises:
        ConfigError: for an unknown name, a wrong type, or a setting that has no effect.
    """

    schedule: str = "none"
    stages: int = 1
    micro_batches: int | None = None
    stages_per_rank: int | None = None
    blocks: str | Sequence[str] = "auto"
    boundaries: Sequence[int] | None = None
    balance: str | Sequence[float] = "parameters"
    split: Split | None = None

    def __post_init__(self) -> None:
        check_choice("pipeline.schedule", self.schedule, STAGES_PER_RANK)
        for key, least in (("stages", 1), ("micro_batches", 1), ("stages_per_rank", 2)):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < least):
                raise ConfigError(f"pipeline.{key}={value!r} is not valid: expected an integer of at least {least}.")
        self._check_lists()
        if self.split is not None and not callable(self.split):
            raise ConfigError(
                f"pipeline.split={self.split!r} is not valid: expected a function (batch, count) -> micro-batches."
            )
        if self.schedule == "none":
            self._refuse_without_effect()
            return
        if self.stages_per_rank is not None and self.schedule != "interleaved":
            raise ConfigError(
                f"pipeline.stages_per_rank={self.stages_per_rank} has no effect with pipeline.schedule="
                f"{self.schedule!r}, which runs {STAGES_PER_RANK[self.schedule]} on every rank. Remove it, or use "
                "pipeline.schedule='interleaved'."
            )
        if self.boundaries is not None and len(self.boundaries) != self.stages - 1:
            raise ConfigError(
                f"pipeline.boundaries={list(self.boundaries)} makes {len(self.boundaries) + 1} stages, but "
                f"pipeline.stages={self.stages}."
            )
        if self.boundaries is not None and self.balance != "parameters":
            raise ConfigError("pipeline.balance has no effect beside pipeline.boundaries. Remove one of them.")
        if self.stages % self.per_rank or self.stages < 2:
            least = max(2, self.per_rank)
            raise ConfigError(
                f"pipeline.stages={self.stages} does not fit pipeline.schedule={self.schedule!r}, which runs "
                f"{self.per_rank} stage{'s' * (self.per_rank > 1)} on every rank: expected a multiple of "
                f"{self.per_rank}, and at least {least}. pipeline=none trains without a pipeline."
            )

    def _check_lists(self) -> None:
        """Check what may be a list, and keep it as a tuple, whatever kind of list it was (Hydra has its own)."""
        for key, kind, what in (
            ("blocks", str, "'auto', the path of a list of modules, or several paths"),
            ("boundaries", int, "the number of the first block of every stage but the first, for example [4, 8]"),
            ("balance", (int, float), f"one of {', '.join(BALANCES)}, or a number for each block"),
        ):
            value = getattr(self, key)
            if value is None and key == "boundaries":
                continue
            if isinstance(value, str) and key != "boundaries":
                if key == "balance":
                    check_choice("pipeline.balance", value, BALANCES)
                continue
            listed = isinstance(value, Sequence) and not isinstance(value, str)
            if not listed or any(not isinstance(entry, kind) or isinstance(entry, bool) for entry in value):
                raise ConfigError(f"pipeline.{key}={value!r} is not valid: expected {what}.")
            object.__setattr__(self, key, tuple(value))
        if self.boundaries is not None and any(a >= b for a, b in pairwise((0, *self.boundaries))):
            raise ConfigError(
                f"pipeline.boundaries={list(self.boundaries)} leaves a stage empty or is out of order: expected "
                "increasing numbers of blocks from 1, the first block of every stage but the first."
            )

    def _refuse_without_effect(self) -> None:
        for key, default in (
            ("stages", 1),
            ("micro_batches", None),
            ("stages_per_rank", None),
            ("blocks", "auto"),
            ("boundaries", None),
            ("balance", "parameters"),
            ("split", None),
        ):
            if getattr(self, key) != default:
                raise ConfigError(
                    f"pipeline.{key}={getattr(self, key)!r} has no effect without a schedule. Remove it, or choose "
                    "pipeline=1f1b."
                )

    @property
    def per_rank(self) -> int:
        """Stages on every rank."""
        return self.stages_per_rank or STAGES_PER_RANK[self.schedule]

    @property
    def ranks(self) -> int:
        """Ranks of one pipeline."""
        return self.stages // self.per_rank

    @property
    def pieces(self) -> int:
        """Micro-batches of a batch with rows enough."""
        return self.micro_batches or 4 * self.ranks
