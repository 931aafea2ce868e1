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
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lit_zero.comm.exchange import Exchange, Gather, Reduce
from lit_zero.core.layout import ALIGN_BYTES, FlatLayout, Overlap
from lit_zero.core.piece import Piece
from lit_zero.zero.policy import Placement, Row


@dataclass
class ParamInfo:
    """A parameter that the engine manages.

    Attributes:
        name: first fully-qualified name.
        param: the user's parameter; its identity never changes, its memory becomes a view of the lane.
        compute_dtype: dtype in which forward and backward see it.
        master_dtype: dtype of the authoritative copy and of checkpoints.
        aliases: further names of the same parameter (tied weights).
        group: number of the optimizer's parameter group, -1 for none.
        optimizer: number of the optimizer, -1 for none.
        trainable: ``requires_grad`` at setup.
        lowered_dtype: ``compute_dtype`` as the mode of the run wants it.
        holders: positions of a pipeline that hold it, ascending.
        shape: its shape; the parameter's own is not to be asked for while it waits for memory.
    """

    name: str
    param: nn.Parameter
    compute_dtype: torch.dtype
    master_dtype: torch.dtype
    aliases: list[str] = field(default_factory=list)
    group: int = -1
    optimizer: int = -1
    trainable: bool = True
    holders: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        self.lowered_dtype = self.compute_dtype
        self.shape = tuple(self.param.shape)


class Lane:
    """Parameters of one unit that share compute dtype, master dtype, trainability and optimizer, in one flat buffer.

    Args:
        infos: the parameters, equal groups adjacent.
        row: the ZeRO stage.
        exchange: the ranks; gives the memory that they exchange.
        device: where the memory lies.
        gradient_dtype: dtype in which gradients wait for the step.
        hold: with several micro-batches, sum them locally and reduce once.
        counts: this rank answers for it; else another one of a pipeline, which holds the same, does.
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
    ) -> None:
        first = infos[0]
        self.infos = list(infos)
        self.row, self.device, self.hold, self.counts = row, device, hold, counts
        self.holders = first.holders
        self.compute_dtype, self.master_dtype, self.trainable = first.compute_dtype, first.master_dtype, first.trainable
        self.optimizer = first.optimizer
        self.lowered = self.compute_dtype != self.master_dtype
        align = ALIGN_BYTES // min(self.compute_dtype.itemsize, self.master_dtype.itemsize)
        entries = [(info.name, tuple(info.param.shape), info.group) for info in infos]
        self.layout = FlatLayout.pack(entries, exchange.size, max(align, 1))
        self.start, self.end = self.layout.shard(exchange.rank)
        self.numel, self.shard_numel = self.layout.numel, self.layout.shard_numel
        self._gaps = _gaps(self.layout)

        self.full: torch.Tensor | None = None  # [P]
        if row.parameter is Placement.REPLICATE:
            self.full = exchange.zeros(self.numel, self.compute_dtype, device)
        # [P] or [P/N]; the elements of the lane that the optimizer updates on this rank
        self.master_start, self.master_end = (
            (0, self.numel) if row.optimizer is Placement.REPLICATE else (self.start, self.end)
        )
        if self.full is not None and not self.lowered:
            self.master = self.full[self.master_start : self.master_end]
        else:
            self.master = exchange.zeros(self.master_end - self.master_start, self.master_dtype, device)

        self.gradient_dtype = gradient_dtype
        self.landing_dtype = gradient_dtype if hold else self.compute_dtype
        self.grad_full: torch.Tensor | None = None  # [P]
        self.grad_own: torch.Tensor | None = None  # [P/N]
        self.landing: torch.Tensor | None = None  # [P], where gradients of this backward are written
        self.landing_views: list[torch.Tensor] = []
        self.filled = bytearray(len(infos))  # which parameters have content in ``landing``
        self.seen = bytearray(len(infos))  # which parameters have landed in this backward
        self.reached = bytearray(len(infos))  # which parameters have landed since gradients were dropped
        self.accumulated = False  # ``grad_own`` holds reduced gradients that were not dropped
        self._versions: list[int] = []  # of the parameters' values, as far as we have changed them
        self._carry: torch.Tensor | None = None  # reduced gradients set aside while new ones land in their place
        if self.trainable:
            self._allocate_gradients(exchange)

    def _allocate_gradients(self, exchange: Exchange) -> None:
        if self.row.gradient is Placement.REPLICATE:
            self.landing_dtype = self.gradient_dtype
            self.grad_full = exchange.zeros(self.numel, self.gradient_dtype, self.device)
            self.set_landing(self.grad_full)
            if self.hold:
                self.grad_own = self.grad_full[self.start : self.end]

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
        lo, hi = max(entry.offset, self.master_start), min(entry.end, self.master_end)
        if lo < hi:
            self.master[lo - self.master_start : hi - self.master_start].copy_(
                flat[lo - entry.offset : hi - entry.offset]
            )
        if self.row.parameter is Placement.REPLICATE:
            assert self.full is not None
            self.full[entry.offset : entry.end].copy_(flat)

    def gather(self) -> Gather:
        """Describe the exchange that fills ``full``."""
        assert self.full is not None
        own = self.full[self.start : self.end]
        if self.row.parameter is Placement.SHARD:
            if not self.lowered:
                return Gather(self.full, self.master)
            own.copy_(self.master)
        return Gather(self.full, own)

    def own_master(self) -> torch.Tensor:
        """Return the part of the master that this rank answers for, shape ``[P/N]``."""
        return self.master[self.start - self.master_start : self.end - self.master_start]

    def pieces(self, to_load: bool) -> list[Piece]:
        """Return the parts of the parameters' masters that this rank answers for.

        Args:
            to_load: all that this rank holds, as a destination; else every element belongs to exactly one rank.
        """
        start, end = self.answers_for(to_load)
        found = []
        for part in self.layout.overlaps(start, end):
            first = part.local + start - self.master_start
            data = self.master[first : first + part.length]
            found.append(Piece(part.entry.name, part.entry.shape, part.start, data))
        return found

    def answers_for(self, to_load: bool) -> tuple[int, int]:
        """Return the range of the lane that :meth:`pieces` give."""
        if to_load and self.row.optimizer is Placement.REPLICATE:
            return 0, self.numel
        return (self.start, self.end) if to_load or self.counts else (self.start, self.start)

    def give_back(self, exchange: Exchange) -> None:
        """Let go of the memory; nothing reads it any more."""
        mine = [self.master]
        if self.row.parameter is Placement.REPLICATE and self.full is not None:
            mine = [self.full, *(mine if self.lowered else [])]
        for tensor in (*mine, self.grad_full):
            if tensor is not None:
                exchange.give_back(tensor.view(torch.uint8))

    def publish(self) -> None:
        """After the master changed: bring this rank's part of replicated 2-byte parameters up to date."""
        if self.lowered and self.row.parameter is Placement.REPLICATE:
            assert self.full is not None
            self.full[self.master_start : self.master_end].copy_(self.master)

    def master_overlaps(self) -> list[Overlap]:
        """Return, for every parameter in order, its part inside ``master``."""
        return self.layout.overlaps(self.master_start, self.master_end)

    # ---- gradients

    def set_landing(self, buffer: torch.Tensor | None) -> None:
        """Let gradients of the coming backward land in ``buffer`` (shape ``[P]``, landing dtype)."""
        self.landing = buffer
        self.landing_views = [] if buffer is None else self.views(buffer)
        if buffer is not None:
            self._zero_gaps(buffer)  # a recycled buffer holds another unit's numbers; padding must stay zero

    def _zero_gaps(self, buffer: torch.Tensor) -> None:
        for first, last in self._gaps:
            buffer[first:last].zero_()

    def begin_backward(self, fresh: bool) -> None:
        """Prepare for a backward; ``fresh``: earlier gradients have been dropped, else the new ones are added to
        them.
        """
        self.seen = bytearray(len(self.infos))
        if fresh:
            self.accumulated = False
            self.filled, self.reached = bytearray(len(self.infos)), bytearray(len(self.infos))
            if self.grad_full is not None:
                self._zero_gaps(self.grad_full)  # clipping by a norm that is NaN has reached them too
        elif self.accumulated and self._in_place:
            self._carry = self._stored_grad().clone()
            self.accumulated = False

    def end_reduction(self) -> None:
        """Note that the reduction is complete."""
        if self._carry is not None:
            self._stored_grad().add_(self._carry)
            self._carry = None

    @property
    def _in_place(self) -> bool:
        return self.grad_full is not None and self.hold

    def land(self, index: int, grad: torch.Tensor, scale: float) -> None:
        """Write (the first time) or add gradient ``index`` to the landing buffer, times ``scale``."""
        view = self.landing_views[index]
        if self.filled[index]:
            view.add_(grad, alpha=scale)
        elif scale != 1.0 and grad.dtype == view.dtype:
            torch.mul(grad, scale, out=view)
        else:
            view.copy_(grad)
            if scale != 1.0:
                view.mul_(scale)
        self.filled[index] = self.reached[index] = 1

    def fill_missing(self) -> None:
        """Zero the gradients that have not landed: they count as zero in the sum over ranks."""
        for index, view in enumerate(self.landing_views):
            if not self.filled[index]:
                view.zero_()

    def reduction(self, scale: float) -> Reduce:
        """Describe the exchange that turns the landing buffer into this rank's gradient."""
        assert self.landing is not None
        if self.grad_own is None:
            self.grad_own = torch.empty(self.shard_numel, dtype=self.gradient_dtype, device=self.device)
            self.accumulated = False
        accumulate, self.accumulated = self.accumulated, True
        self.filled = bytearray(len(self.infos))
        return Reduce(self.landing, self.grad_own, scale, accumulate, whole=self.row.optimizer is Placement.REPLICATE)

    def drop_gradients(self) -> None:
        """Let go of the reduced gradients: the step has used them, and the next forward needs the memory more."""
        if not self._in_place:
            self.grad_own = None
        self.accumulated = False

    def sum_over_holders(self, exchange: Exchange) -> None:
        """Add the reduced gradients of all ranks of a pipeline that hold these parameters; what one of them has
        reached, all have.
        """
        grad = self._stored_grad()
        grad.copy_(exchange.sum_in_rank_order(grad))
        reached = torch.tensor(list(self.reached), dtype=torch.uint8, device=self.device)
        self.reached = bytearray(exchange.maximum(reached).tolist())

    def master_grad(self) -> torch.Tensor:
        """Return the gradient that belongs to ``master``: same shape, same dtype; a view where the stored dtype
        allows.
        """
        if self.row.optimizer is not Placement.REPLICATE and self.grad_own is None:
            # Held micro-batches wait in the landing buffer: a gradient of no memory stands for them until they are
            # reduced.
            return torch.zeros((), dtype=self.master_dtype, device=self.device).expand(self.shard_numel)
        grad = self._stored_grad()
        return grad if grad.dtype == self.master_dtype else grad.to(self.master_dtype)

    def overwrite_gradient(self, first: int, last: int, value: torch.Tensor) -> None:
        """Replace the reduced gradient of elements ``[first, last)`` of the master."""
        self._stored_grad()[first:last].copy_(value.view(-1))

    def _stored_grad(self) -> torch.Tensor:
        grad = self.grad_full if self.row.optimizer is Placement.REPLICATE else self.grad_own
        assert grad is not None
        return grad

    def state_tensors(self) -> dict[str, list[torch.Tensor]]:
        """Return the tensors that live from step to step, by kind (``parameter``, ``master``, ``gradient``)."""
        kinds: dict[str, list[torch.Tensor]] = {"parameter": [], "master": [self.master], "gradient": []}
        if self.row.parameter is Placement.REPLICATE and self.full is not None:
            kinds["parameter"].append(self.full)
        kinds["gradient"] += [g for g in (self.grad_full, self.grad_own) if g is not None]
        return kinds


def _gaps(layout: FlatLayout) -> list[tuple[int, int]]:
    """Return the ranges of the flat buffer that belong to no parameter, in elements."""
    gaps, end = [], 0
    for entry in layout.entries:
        if entry.offset > end:
            gaps.append((end, entry.offset))
        end = entry.end
    if layout.numel > end:
        gaps.append((end, layout.numel))
    return gaps


def storage_bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Return the bytes of the tensors' storages, each counted once; ``seen`` takes their addresses."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen and storage.nbytes():
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
