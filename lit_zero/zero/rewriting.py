"""Writing to the masters from outside the optimizer: what loads, averages or prunes weights.

[Note: settle, write, spread] A gather that is under way reads the very memory that is written to, so it is waited for
first. Afterwards each rank holds new values of what it owns. Where masters are sharded, the next gather carries them;
where they are replicated, the ranks exchange their parts at once. What several stages of a pipeline hold is owned by
the first of them, and brought to the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lit_zero.comm.exchange import Gather
from lit_zero.zero.engine import Engine
from lit_zero.zero.policy import Placement


@contextlib.contextmanager
def rewriting(engine: Engine, whole: bool = False) -> Iterator[None]:
    """Inside, this rank may write to the masters; from then on all ranks compute with what was written.

    All ranks must enter and leave together [Note: settle, write, spread].

    Args:
        engine: whose masters.
        whole: every rank writes all that it holds of a master, the same as others that hold it. Else a rank writes
            what ``engine.parameter_pieces()`` gives it.
    """
    engine.settle()
    with torch.no_grad():
        yield
    if not whole:
        for lane in engine.lanes:
            if lane.holders in engine.ties:
                lane.take_from_first_holder(engine.ties[lane.holders])
    if engine.row.optimizer is Placement.REPLICATE and not whole and engine.exchange.size > 1:
        live = [lane for lane in engine.lanes if lane.master.live]
        engine.exchange.all_gather([Gather(lane.master.read(), lane.own_master()) for lane in live]).wait()
        for lane in engine.lanes:
            if not lane.master.live:
                values = lane.master.read()
                engine.exchange.all_gather([Gather(values, lane.own_master())]).wait()
                lane.master.write(0, values)
    engine.refresh()
