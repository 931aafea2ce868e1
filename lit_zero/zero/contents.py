"""What an engine holds, for those who save, load or count it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch

from lit_zero.core.keeping import Keeping
from lit_zero.core.piece import ParamState, Piece
from lit_zero.core.ticket import DONE
from lit_zero.zero.binding import Binding
from lit_zero.zero.gathering import Gatherer
from lit_zero.zero.info import ParamInfo
from lit_zero.zero.lane import Lane, storage_bytes
from lit_zero.zero.reducing import Reducer
from lit_zero.zero.unit import Unit


class Contents:
    """The parameters, masters and optimizer states of an engine.

    Attributes:
        units: all units with parameters on this rank, the root first.
        bindings: what stands for each optimizer.
        absent: parameters that other ranks of a pipeline hold.
        device: where the model computes.
        keeping: where shards live between uses.
    """

    keeping: Keeping
    units: list[Unit]
    bindings: list[Binding]
    absent: list[ParamInfo]
    device: torch.device
    _position: dict[str, int]  # of every parameter in the order of registration
    _gatherer: Gatherer
    _reducer: Reducer
    _gradient_bytes: int
    _host_gradient_bytes: int

    @property
    def infos(self) -> list[ParamInfo]:
        """All managed parameters, those that other ranks of the pipeline hold included; the same order on every
        rank.
        """
        found = [*(info for lane in self.lanes for info in lane.infos), *self.absent]
        return sorted(found, key=lambda info: self._position[info.name])

    @property
    def lanes(self) -> list[Lane]:
        """All lanes of all units."""
        return [lane for unit in self.units for lane in unit.lanes]

    def join(self) -> None:
        """Return when the last step is over [Note: the step beside the next forward]; raise what it has raised, now
        and whenever it is asked again: what a step has left half done must not be saved.
        """
        for lane in self.lanes:
            lane.stepped.wait()
            lane.stepped = DONE

    def _check_room(self) -> None:
        """Make sure that there is room for what lives elsewhere now, and for the states that come with the first step.

        Raises:
            ConfigError: if not.
        """
        lanes = [lane for lane in self.lanes if lane.keeper.away]
        kept = [lane.kept() for lane in lanes]
        to_come = [size for binding in self.bindings for size in binding.states_to_come()]
        needs = {
            "masters": sum(master.nbytes for master, *_ in kept),
            "parameters": sum(each.nbytes for _, *others in kept for each in others),
            "optimizer state": sum(each.nbytes for binding in self.bindings for each in binding.kept()) + sum(to_come),
            "gradients": sum(lane.shard_numel * lane.waiting_bytes for lane in lanes if lane.trainable),
        }
        self.keeping.check(needs, to_come)

    def wait_for_parameters(self) -> None:
        """Return when the last step is over and replicated parameters are up to date; sharded ones stay where they
        are.
        """
        self.join()
        for unit in self.units:
            if not unit.sharded:
                self._gatherer.need(unit)

    @contextlib.contextmanager
    def whole_parameters(self, unit: Unit) -> Iterator[None]:
        """Inside, ``unit``'s full parameters may be read. All ranks together."""
        unit.active += 1
        self._gatherer.need(unit)
        try:
            yield
        finally:
            unit.active -= 1
            self._gatherer.release(unit)

    def parameter_pieces(self, to_load: bool = False) -> list[Piece]:
        """Return this rank's part of every parameter's master copy, in the same order on every rank.

        Args:
            to_load: all that this rank holds, as a destination; else every element belongs to exactly one rank.
        """
        self.join()
        here = [piece for lane in self.lanes for piece in lane.pieces(to_load)]
        nothing = [
            Piece(info.name, info.shape, 0, torch.empty(0, dtype=info.master_dtype, device=self.device))
            for info in self.absent
        ]
        return sorted([*here, *nothing], key=lambda piece: self._position[piece.name])

    def describe_states(self, index: int, gather: Callable[[Any], list[Any]]) -> dict[str, Any]:
        """Return which state optimizer ``index`` has for which parameter, over all ranks.

        Args:
            index: number of the optimizer.
            gather: returns every rank's value of an object, in rank order.
        """
        self.join()
        described: dict[str, Any] = {}
        for found in gather(self.bindings[index].describe()):
            described.update(found)
        return described

    def optimizer_pieces(self, index: int, described: dict[str, Any], to_load: bool = False) -> list[ParamState]:
        """Return this rank's part of optimizer ``index``'s state, see :meth:`parameter_pieces`."""
        self.join()
        return self.bindings[index].states(described, to_load)

    def _count_gradients(self) -> None:
        """Note the bytes of the gradients as they are now."""
        seen: set[int] = set()
        here = [lane.grad_full for lane in self.lanes]
        here += [lane.grad_own for lane in self.lanes if not lane.keeper.away]
        segments = [segment for binding in self.bindings for segment in binding.segments]
        here += [segment.param.grad for segment in segments if not segment.lane.keeper.away]
        away = [*(lane.grad_own for lane in self.lanes), *(segment.param.grad for segment in segments)]
        self._gradient_bytes = storage_bytes((grad for grad in here if grad is not None), seen)
        self._host_gradient_bytes = storage_bytes((grad for grad in away if grad is not None), seen)

    def model_state_bytes(self) -> dict[str, int]:
        """Return the bytes of model states on this rank, counted from storages, each once.

        Returns:
            ``parameter``, ``master``, ``gradient`` and ``optimizer``: the model states of the ZeRO paper, as far as
            they lie on the device; gradients as they stood between the last backward and its step. ``slots``: buffers
            in which gathered parameters and landing gradients take turns, at their most. ``host`` and ``file``: the
            states that lie there instead; the gradients of masters in files wait in host memory too.
        """
        self.join()
        seen: set[int] = set()
        tensors = [lane.state_tensors() for lane in self.lanes]
        found = {kind: storage_bytes(chain(*(t[kind] for t in tensors)), seen) for kind in ("parameter", "master")}
        found["gradient"] = self._gradient_bytes
        found["optimizer"] = storage_bytes(chain(*(binding.state_tensors() for binding in self.bindings)), seen)
        found["host"], found["file"] = self._host_gradient_bytes, 0
        kept = [(lane.keeper.place, each) for lane in self.lanes for each in lane.kept()]
        for binding in self.bindings:
            away = [segment for segment in binding.segments if segment.lane.keeper.away]
            kept += [(segment.lane.keeper.place, each) for segment in away for each in segment.kept.values()]
        for place, each in kept:
            found[place] += each.nbytes
        found["slots"] = storage_bytes([s.buffer for s in self._gatherer.slots], seen) + self._reducer.peak_bytes
        return found
