"""Doing one thing on several ranks: all of them succeed or all of them raise, and none waits for one that failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from lit_zero.comm.world import World
from lit_zero.core.errors import CheckpointError

T = TypeVar("T")


def on_zero(world: World, doing: str, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and return its result (any picklable object) on every rank.

    Args:
        world: all ranks; each must call this.
        doing: what is being done, for the message: "Saving 'x'".
        action: what rank 0 runs.

    Raises:
        CheckpointError: on every rank, if ``action`` raised on rank 0.
    """
    result: T | None = None
    failure: Exception | None = None
    if world.rank == 0:
        try:
            result = action()
        except Exception as error:
            failure = error
    message, result = world.broadcast_object((failure and _describe(0, doing, failure), result))
    if message is not None:
        raise CheckpointError(message) from failure
    return cast(T, result)


def on_all(world: World, doing: str, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank and return each rank's own result.

    Args:
        world: all ranks; each must call this.
        doing: what is being done, for the message.
        action: what each rank runs; it must not exchange anything with other ranks.

    Raises:
        CheckpointError: on every rank, if ``action`` raised on any; the message is that of the first such rank.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    messages = world.all_gather_object(failure and _describe(world.rank, doing, failure))
    for message in messages:
        if message is not None:
            raise CheckpointError(message) from failure
    return cast(T, result)


def _describe(rank: int, doing: str, error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)  # it names the file and the next move already
    return f"{doing} failed on rank {rank}: {type(error).__name__}: {error}"
