"""The memory of one dtype lane of a unit: full parameters, master shard, gradients.

What is held, by placement (P: elements of the lane, N: ranks):

====================  =====================================  ==========================================
tensor                replicated                             sharded
====================  =====================================  ==========================================
``full`` parameters   ``[P]``, permanent                     a view of a slot, filled while in use
``master``            ``[P]``                                ``[P/N]``
full gradients        ``[P]``, permanent                     a landing buffer, recycled, gone after the backward
``grad_own``          the rank's slice of it                 ``[P/N]``, from its reduction to the step
====================  =====================================  ==========================================

Without a 2-byte copy the master *is* (the rank's slice of) the full parameters wherever those are replicated: no second
copy. With one, and parameters sharded, the 2-byte shard is not stored: a gather casts the master straight into the
rank's slice of the slot.

[Note: masters that live elsewhere] With offload the master is apart from what the device computes with, and so there
is always a second copy: the rank's slice of the full parameters, or with sharded parameters ``shard`` (``[P/N]``,
compute dtype), which lies on the device, or elsewhere too. A master that lies elsewhere in the compute dtype is itself
the shard, if parameters may leave the device. The step updates the master and ``spread``s it to the second copy.

[Note: masters of which the copy is a part] A master in two halves is the 2-byte copy and a remainder: with replicated
parameters the rank's slice of ``full``, with sharded ones ``shard``. Whoever writes the master writes the copy, and
nobody else may write to that: another rounding would change the master.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from lit_zero.comm.exchange import Exchange, Gather
from lit_zero.core.keeping import Keeping, Kept
from lit_zero.core.layout import ALIGN_BYTES, FlatLayout, Overlap
from lit_zero.core.piece import Piece
from lit_zero.core.ticket import DONE, Ticket
from lit_zero.zero.gradients import Gradients
from lit_zero.zero.info import ParamInfo
from lit_zero.zero.policy import Placement, Row


class Lane(Gradients):
    """Parameters of one unit that share compute dtype, master dtype, trainability and optimizer, in one flat buffer.

    Args:
        infos: the parameters, equal groups adjacent.
        row: the ZeRO stage.
        exchange: the ranks; gives the memory that they exchange.
        device: where the memory lies.
        gradient_dtype: dtype in which gradients wait for the step.
        hold: with several micro-batches, sum them locally and reduce once.
        counts: this rank answers for it; else another one of a pipeline, which holds the same, does.
        keeping: where the master lives.
    """

    def __init__(
        self,
        infos: Sequence[ParamInfo],
        row: Row,
        exchange: Exchange,
        device: torch.device,
        gradient_dtype: torch.dtype,
        hold: bool,
        counts: bool = True,
        keeping: Keeping | None = None,
    ) -> None:
        first = infos[0]
        self.infos = list(infos)
        self.row, self.device, self.hold, self.counts = row, device, hold, counts
        self.holders = first.holders
        self.compute_dtype, self.master_dtype, self.trainable = first.compute_dtype, first.master_dtype, first.trainable
        self.optimizer = first.optimizer
        self.lowered = self.compute_dtype != self.master_dtype
        keeping = keeping or Keeping()
        align = max(ALIGN_BYTES // min(self.compute_dtype.itemsize, self.master_dtype.itemsize), keeping.align)
        entries = [(info.name, tuple(info.param.shape), info.group) for info in infos]
        self.layout = FlatLayout.pack(entries, exchange.size, max(align, 1))
        self.start, self.end = self.layout.shard(exchange.rank)
        self.numel, self.shard_numel = self.layout.numel, self.layout.shard_numel

        self.full: torch.Tensor | None = None  # [P]
        if row.parameter is Placement.REPLICATE:
            self.full = exchange.zeros(self.numel, self.compute_dtype, device)
        # [P] or [P/N]; the elements of the lane that the optimizer updates on this rank
        self.master_start, self.master_end = (
            (0, self.numel) if row.optimizer is Placement.REPLICATE else (self.start, self.end)
        )
        self._place_master(keeping, exchange)

        self._versions: list[int] = []  # of the parameters' values, as far as we have changed them
        self._begin_gradients(exchange, gradient_dtype)

    def _place_master(self, keeping: Keeping, exchange: Exchange) -> None:
        """Make the master, and where a gather reads a sharded parameter from."""
        numel, sharded = self.master_end - self.master_start, self.row.parameter is Placement.SHARD
        self.stepped: Ticket = DONE  # of the master and its second copy
        # Where neither a step nor a cast needs the master, it is all that the device has of the parameters.
        self.keeper = keeping.keeper(numel, self.trainable or self.lowered, sharded)
        self.split = self.lowered and self.keeper.splits
        if self.split:
            copy = exchange.zeros(numel, self.compute_dtype, self.device) if self.full is None else self._own_slice()
            self.master, self.shard = self.keeper.beside(copy), Kept(copy)
            self._sent = sharded
            return
        if self.keeper.away:
            self.master = self.keeper.keep(numel, self.master_dtype)
        elif self.full is not None and not self.lowered:
            self.master = Kept(self._own_slice())
        else:
            self.master = Kept(exchange.zeros(numel, self.master_dtype, self.device))
        self.shard = self.master
        if sharded and self.keeper.away and not self.keeper.params:
            self.shard = Kept(exchange.zeros(numel, self.compute_dtype, self.device))
        elif sharded and self.keeper.away and self.lowered:
            self.shard = self.keeper.keep(numel, self.compute_dtype)
        # Ranks of one machine may read it where it lies; anything else is first brought to the rank's part of a slot.
        elsewhere = self.keeper.away and self.keeper.params
        self._sent = sharded and self.shard.dtype == self.compute_dtype and not elsewhere

    def _own_slice(self) -> torch.Tensor:
        """Return what lies in ``full`` of the elements that this rank updates."""
        assert self.full is not None
        return self.full[self.master_start : self.master_end]

    # ---- parameters

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return each parameter's view of a flat buffer of shape ``[P]``."""
        return [flat[e.offset : e.end].view(e.shape) for e in self.layout.entries]

    def seat(self, full: torch.Tensor) -> None:
        """Make every parameter a view of ``full`` (shape ``[P]``, compute dtype), for good."""
        self.full = full
        for info, view in zip(self.infos, self.views(full), strict=True):
            # ``p.data`` keeps the parameter's identity and its own version counter, so refilling the buffer disturbs no
            # saved tensor.
            info.param.data = view

    def displaced(self) -> str | None:
        """Return the name of a parameter whose memory is no longer ours (``.to()``, ``assign=True``), ``None`` if
        all is well.
        """
        assert self.full is not None
        base, size = self.full.data_ptr(), self.full.element_size()
        for info, entry in zip(self.infos, self.layout.entries, strict=True):
            if info.param.data_ptr() != base + entry.offset * size:
                return info.name
        return None

    def note_versions(self) -> None:
        """Take the parameters' present values for ours."""
        self._versions = [info.param._version for info in self.infos]

    def count_step(self) -> None:
        """Tell autograd that the values have changed: a graph that needs the old ones is refused, as in one process."""
        torch.autograd.graph.increment_version([info.param for info in self.infos])
        self.note_versions()

    def overwritten(self) -> str | None:
        """Return the name of a parameter that somebody else has written to where the master does not see it, ``None``
        if all is well.
        """
        # The parameter's memory is all there is, or every rank has written the same to all of it.
        seen = not self.lowered and self.row.parameter is Placement.REPLICATE
        if seen and (not self.trainable or self.row.optimizer is Placement.REPLICATE):
            return None
        versions = zip(self.infos, self._versions, strict=True)
        return next((info.name for info, version in versions if info.param._version != version), None)

    def store(self, index: int, value: torch.Tensor) -> None:
        """Take over the value of parameter ``index`` (full shape, any dtype or device): this rank's part of it is
        kept.
        """
        entry = self.layout.entries[index]
        flat = value.detach().reshape(-1)
        if self.row.parameter is Placement.REPLICATE:
            assert self.full is not None
            whole = self.full[entry.offset : entry.end]  # rounded on every rank as the master's own copy is
            (self.keeper.beside(whole) if self.split else Kept(whole)).write(0, flat)
        lo, hi = max(entry.offset, self.master_start), min(entry.end, self.master_end)
        if lo < hi:
            mine = flat[lo - entry.offset : hi - entry.offset]
            self.master.write(lo - self.master_start, mine)  # last: a part of ``full`` may be a part of the master
            if self.shard is not self.master and not self.split:
                self.shard.write(lo - self.master_start, mine)

    def gather(self) -> Gather:
        """Describe the exchange that fills ``full``."""
        assert self.full is not None
        if self._sent:
            return Gather(self.full, self.shard.read(), self.stepped)
        own = self.full[self.start : self.end]
        if self.row.parameter is Placement.SHARD:
            self.stepped.wait()
            return Gather(self.full, own, self.shard.fetch(own))
        return Gather(self.full, own, self.stepped)

    def own_master(self) -> torch.Tensor:
        """Return the part of the master that this rank answers for, shape ``[P/N]``, on the device."""
        own = self.master.part(self.start - self.master_start, self.end - self.master_start).read()
        return own.to(self.device)

    def pieces(self, to_load: bool) -> list[Piece]:
        """Return the parts of the parameters' masters that this rank answers for.

        Args:
            to_load: all that this rank holds, as a destination; else every element belongs to exactly one rank.
        """
        start, end = self.answers_for(to_load)
        found = []
        for part in self.layout.overlaps(start, end):
            first = part.local + start - self.master_start
            held = self.master.part(first, first + part.length)
            data = held.read() if held.live else held
            found.append(Piece(part.entry.name, part.entry.shape, part.start, data))
        return found

    def answers_for(self, to_load: bool) -> tuple[int, int]:
        """Return the range of the lane that :meth:`pieces` give."""
        if to_load and self.row.optimizer is Placement.REPLICATE:
            return 0, self.numel
        return (self.start, self.end) if to_load or self.counts else (self.start, self.start)

    def give_back(self, exchange: Exchange) -> None:
        """Let go of the memory; nothing reads it any more."""
        mine = [self.master.read()] if not self.keeper.away and not self.split else []
        if self.split or (self.keeper.away and self.shard is not self.master and not self.keeper.params):
            mine = [self.shard.read()]
        if self.row.parameter is Placement.REPLICATE and self.full is not None:
            mine = [self.full, *(mine if self.lowered and not self.split else [])]
        for tensor in (*mine, self.grad_full):
            if tensor is not None:
                exchange.give_back(tensor.view(torch.uint8))

    def publish(self) -> None:
        """After the master changed: bring this rank's second copy of the parameters up to date, if there is one."""
        if self.split:
            return
        if self.row.parameter is Placement.REPLICATE:
            assert self.full is not None
            if self.lowered or self.keeper.away:
                self.master.fetch(self._own_slice()).wait()
        elif self.shard is not self.master:
            self.shard.write(0, self.master.read())

    def copy_of(self, first: int, last: int) -> torch.Tensor | None:
        """Return where the 2-byte copy of elements ``[first, last)`` of the master lies, if the device has both."""
        if self.full is None or not self.lowered or self.keeper.walks or self.row.parameter is not Placement.REPLICATE:
            return None
        return self.full[self.master_start + first : self.master_start + last]

    def take_from_first_holder(self, exchange: Exchange) -> None:
        """Overwrite the master with what the first of the ranks that hold the same has.

        Args:
            exchange: the ranks of a pipeline that hold these parameters.
        """
        held = self.master.read()
        values = held.to(self.device)  # ranks exchange what lies on their devices
        exchange.broadcast(values)
        if values is not held or not self.master.live:
            self.master.write(0, values)

    def spread(self, first: int, values: torch.Tensor) -> None:
        """Bring this rank's second copy of the parameters up to date with new ``values`` (shape ``[m]``) of the master,
        from element ``first`` of it on.
        """
        if self.split or not (self.lowered or self.keeper.away):
            return
        if self.row.parameter is Placement.REPLICATE:
            assert self.full is not None
            begin = self.master_start + first
            self.full[begin : begin + values.numel()].copy_(values, non_blocking=True)
        elif self.shard is not self.master:
            self.shard.write(first, values)

    def master_overlaps(self) -> list[Overlap]:
        """Return, for every parameter in order, its part inside ``master``."""
        return self.layout.overlaps(self.master_start, self.master_end)

    def state_tensors(self) -> dict[str, list[torch.Tensor]]:
        """Return the tensors that live on the device from step to step, by kind (``parameter``, ``master``,
        ``gradient``).
        """
        kinds: dict[str, list[torch.Tensor]] = {"parameter": [], "master": [], "gradient": []}
        if self.row.parameter is Placement.REPLICATE and self.full is not None:
            kinds["parameter"].append(self.full)
        if self.split:
            copy, *remainder = self.master.tensors()
            kinds["parameter"].append(copy)
            kinds["master"] += remainder
        elif not self.keeper.away:
            kinds["master"] += self.master.tensors()
        elif self.shard is not self.master and not self.keeper.params:
            kinds["parameter"].append(self.shard.read())
        kinds["gradient"] += [g for g in (self.grad_full, self.grad_own) if g is not None]
        return kinds

    def kept(self) -> list[Kept]:
        """Return the arrays that live elsewhere."""
        away = [self.master] if self.keeper.away else []
        apart = self.keeper.params and self.shard is not self.master and not self.split
        return [*away, *([self.shard] if apart else [])]


def storage_bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Return the bytes of the tensors' storages, each counted once; ``seen`` takes their addresses."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen and storage.nbytes():
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
