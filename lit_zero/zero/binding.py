"""The user's optimizer, pointed at flat master shards.

``configure_optimizers`` sees real parameters. Afterwards each parameter group holds *segments* instead: runs of a
lane's master that belong to the group. An element-wise optimizer does to a segment exactly what it would do to the
parameters in it; one that looks at whole parameters (``core.shards``) holds a segment for each, on every rank.
Hyper-parameters stay in the user's group dictionaries, so schedulers work unchanged; state is translated to and from
single parameters where a checkpoint asks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lit_zero.core.copying import TakesCopies
from lit_zero.core.errors import LitZeroError
from lit_zero.core.layout import Entry
from lit_zero.core.owing import Owed, Owing, Pays
from lit_zero.core.shards import WholeParameters
from lit_zero.zero.info import ParamInfo
from lit_zero.zero.lane import Lane
from lit_zero.zero.scaling import Scaling
from lit_zero.zero.segment import Segment, copied_value, is_elementwise, is_live
from lit_zero.zero.states import States
from lit_zero.zero.walking import Walking


class Binding(Walking, Scaling, States):
    """One optimizer and its segments.

    Args:
        optimizer: the user's optimizer; its groups are re-pointed.
        names: for every group, the names of the parameters it was given, in order.
        number: its own, counted from 0.
        lanes: all trainable lanes.
        shaped: give every parameter a segment of its own in its real shape (whole masters only): serves any optimizer.
        absent: parameters that other ranks of a pipeline hold.

    Attributes:
        post_hook: the number of the engine's hook among the optimizer's.
    """

    post_hook: int | None = None

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        names: Sequence[Sequence[str]],
        number: int,
        lanes: Sequence[Lane],
        shaped: bool = False,
        absent: Sequence[ParamInfo] = (),
    ) -> None:
        self.optimizer = optimizer
        self.number = number
        self.group_names = [list(group) for group in names]
        self._lanes, self._absent = [lane for lane in lanes if lane.optimizer == number], absent
        self._groups: list[dict[str, Any]] = []  # as the optimizer had them when its segments were made
        self.segments: list[Segment] = []
        self._shaped, self.looks_at_whole = shaped, isinstance(optimizer, WholeParameters)
        self.granular = shaped or self.looks_at_whole
        self._taken, self.owed = [], Owed()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # A loss scaler is then to unscale before the step, as it does for others: what is clipped are the true
            # gradients, and all ranks have agreed on an overflow before one of them steps.
            vars(optimizer)["_step_supports_amp_scaling"] = False
        self._point()

    @property
    def lanes(self) -> Sequence[Lane]:
        """The lanes that hold its parameters, and no other optimizer's."""
        return self._lanes

    # ---- segments

    def _runs(self) -> Iterable[tuple[Lane, int, int, int]]:
        for lane in self._lanes:
            for group, first, last in lane.layout.group_runs(lane.master_start, lane.master_end):
                yield lane, group, first, last

    def _entries(self) -> Iterable[tuple[Lane, Entry, int, int]]:
        for lane in self._lanes:
            for part in lane.master_overlaps():
                if part.length or self.looks_at_whole:
                    yield lane, part.entry, part.local, part.local + part.length

    def _point(self) -> None:
        ours = {segment.param for segment in self.segments}
        self.segments, self._groups = [], list(self.optimizer.param_groups)
        for group in self._groups:
            for param in group["params"]:
                if param not in ours:  # a state as long as the whole parameter (Adagrad makes it at once) is not read
                    self.optimizer.state.pop(param, None)
            group["params"] = []
        if self.granular:
            for lane, entry, first, last in self._entries():
                view = lane.master.part(first, last).stand_in()
                view = view.view(entry.shape) if self._shaped else view
                self._hold(Segment(lane, first, last, self._param(view), entry), entry.group)
        else:
            for lane, number, first, last in self._runs():
                self._hold(Segment(lane, first, last, self._param(lane.master.part(first, last).stand_in())), number)
        if not self.segments and self._lanes and self.group_names:
            # This rank's shards hold nothing of the optimizer's. An empty segment tells it when gradients are dropped.
            self._hold(Segment(self._lanes[0], 0, 0, self._param(self._lanes[0].master.part(0, 0).stand_in())), 0)
        if isinstance(self.optimizer, TakesCopies):
            copies = ((segment.param, segment.lane.copy_of(segment.first, segment.last)) for segment in self.segments)
            self.optimizer.take_copies({param: copy for param, copy in copies if copy is not None})

    @property
    def has_copied(self) -> bool:
        """Whether the last step has brought the 2-byte copies of parameters up to date by itself, and no hook that ran
        after it and before the engine's may have changed the masters.
        """
        hooks: Mapping[int, Any] = self.optimizer._optimizer_step_post_hooks
        engines_is_first = next(iter(hooks), None) == self.post_hook
        return engines_is_first and isinstance(self.optimizer, TakesCopies) and self.optimizer.has_copied

    def _param(self, elements: torch.Tensor) -> nn.Parameter:
        if not (isinstance(self.optimizer, Pays) and self.optimizer.may_pay):
            return nn.Parameter(elements)  # torch's own optimizers look at the class of what they step
        param = Owing(elements)
        param.owed = self.owed
        return param

    def _hold(self, segment: Segment, number: int) -> None:
        if segment.lane.handed_dtype != segment.lane.master_dtype:
            segment.param.grad_dtype = segment.lane.handed_dtype  # else torch refuses another one than the master's
        self.segments.append(segment)
        self.optimizer.param_groups[number]["params"].append(segment.param)

    def holds(self, names: Collection[str]) -> bool:
        """Return whether one of the parameters is among its own."""
        return any(info.name in names for lane in self._lanes for info in lane.infos)

    def split(self) -> None:
        """Give every parameter a segment of its own, so that single parameters can be left out of a step; state
        moves along.
        """
        if self.granular:
            return
        self.granular = True
        self._point_again()

    def regroup(self, names: Sequence[Sequence[str]], lanes: Sequence[Lane]) -> None:
        """Follow new parameter groups; the state of lanes that are still there moves along.

        Args:
            names: for every group, the names of its parameters.
            lanes: all trainable lanes.
        """
        self.group_names = [list(group) for group in names]
        self._lanes = [lane for lane in lanes if lane.optimizer == self.number]
        self._point_again()

    def _point_again(self) -> None:
        before, state = self.segments, self.optimizer.state
        self._point()
        for segment in self.segments:
            for old in before:
                if not segment.lies_in(old):
                    continue
                cut = slice(segment.first - old.first, segment.last - old.first)
                if old.param.grad is not None:
                    segment.param.grad = old.param.grad.view(-1)[cut].view_as(segment.param)
                    segment.copied = old.copied
                if old.param in state:
                    segment.kept = {key: kept.part(cut.start, cut.stop) for key, kept in old.kept.items()}
                    state[segment.param] = {
                        key: segment.kept[key].stand_in()
                        if key in segment.kept
                        else value.view(-1)[cut].view_as(segment.param).clone()
                        if is_elementwise(value, old.param)
                        else copied_value(value)
                        for key, value in state[old.param].items()
                    }
        for old in before:
            state.pop(old.param, None)

    def names_in(self, group: Mapping[str, Any]) -> list[list[str]]:
        """Return the names of the parameters that one of the optimizer's groups stands for, in a list; an empty list
        for a group that is not known.
        """
        return [names for known, names in zip(self._groups, self.group_names, strict=True) if known is group]

    def foreign(self) -> bool:
        """Return whether the optimizer's groups hold something else than the segments."""
        held = [param for group in self.optimizer.param_groups for param in group["params"]]
        return len(held) != len(self.segments) or {id(p) for p in held} != {id(s.param) for s in self.segments}

    def wanted(self, names_of: Mapping[nn.Parameter, str]) -> list[list[str]]:
        """Return the names of every group's parameters, as the optimizer's groups are now.

        Args:
            names_of: the module's parameters.

        Raises:
            LitZeroError: if a group holds something that is neither ours nor a parameter of the module.
        """
        ours = {id(segment.param) for segment in self.segments}
        wanted = []
        for group in self.optimizer.param_groups:
            known = next((number for number, old in enumerate(self._groups) if old is group), None)
            names = [] if known is None else list(self.group_names[known])
            for param in group["params"]:
                if param in names_of:
                    names.append(names_of[param])
                elif known is None or id(param) not in ours:
                    raise LitZeroError(
                        f"A parameter group of {type(self.optimizer).__name__} holds a tensor of shape "
                        f"{tuple(param.shape)} that is not a parameter of the module. Add groups of the module's own "
                        "parameters, and leave the groups that are there as they are."
                    )
            wanted.append(names)
        return wanted

    # ---- gradients

    def begin_backward(self) -> bool:
        """Return whether the optimizer holds no gradients (``zero_grad`` has been called, or nothing has been reduced
        yet), so that those of the coming backward are not added to any.

        Raises:
            LitZeroError: if a gradient that stands for a sum to come has been changed: the change would be lost.
        """
        self._squares = None
        kept = [segment for segment in self.segments if segment.param.grad is not None]
        for segment in kept:
            grad = segment.param.grad
            assert grad is not None
            if segment.copied is None or grad._version == segment.copied:
                continue
            if not segment.lane.accumulated:
                raise LitZeroError(
                    "Gradients were changed in place (by zero_grad(set_to_none=False), or by clipping) before the last "
                    "micro-batch of a step. They are not summed over the ranks yet, so the change would be lost. Use "
                    "zero_grad(set_to_none=True), and clip right before the step."
                )
            segment.lane.overwrite_gradient(segment.first, segment.last, grad)  # what was changed is a copy
        return not kept

    def attach(self, lanes: Collection[Lane], unreached: set[str]) -> None:
        """Hand the reduced gradients to the optimizer.

        Args:
            lanes: those that the backward has reached; the others keep the gradients that they have.
            unreached: parameters that no rank's loss has reached; they get no gradient, as in one process.

        Raises:
            LitZeroError: if the optimizer's groups hold something else than the segments.
        """
        self._check_groups()
        self._squares = None
        grads: dict[Lane, torch.Tensor] = {}
        for segment in self.segments:
            if segment.lane not in lanes and (segment.first < segment.last or segment.entry is not None):
                continue
            if segment.entry is not None and segment.entry.name in unreached:
                segment.param.grad = None
                continue
            if segment.lane not in grads:
                grads[segment.lane] = segment.lane.master_grad()
            grad = grads[segment.lane]
            segment.param.grad = grad[segment.first : segment.last].view_as(segment.param)
            segment.attached = segment.param.grad._version
            segment.copied = None if is_live(segment.lane, grad) else segment.attached

    def refuse_overwritten(self) -> None:
        """Raise if gradients that were handed over have been written to.

        Raises:
            LitZeroError: then.
        """
        for segment in self.segments:
            if segment.param.grad is not None and segment.param.grad._version != segment.attached:
                raise LitZeroError(
                    "Gradients were zeroed in place between training_step and backward. In a pipeline they are "
                    "complete by then, and would be lost. Use zero_grad(set_to_none=True) in optimizer_zero_grad."
                )

    def _check_groups(self) -> None:
        if self.foreign():
            raise LitZeroError(
                f"The parameter groups of {type(self.optimizer).__name__} were changed in the middle of a step. Add "
                "groups before a training step begins: in a hook such as on_train_epoch_start."
            )

    def drop_cleared(self) -> None:
        """Let go of the memory of gradients that the user has cleared."""
        with self.owed.lent():
            cleared = not self.grads()
        if cleared:
            self.drop_gradients()

    def drop_gradients(self) -> None:
        """Let go of the gradients."""
        self._taken, self._squares = [], None
        self.owed.forgive()
        for segment in self.segments:
            segment.param.grad = None
        for lane in self._lanes:
            lane.drop_gradients()

    @property
    def has_fp64(self) -> bool:
        """Whether any of its masters is fp64, those of other ranks of a pipeline included."""
        dtypes = {lane.master_dtype for lane in self._lanes}
        dtypes |= {info.master_dtype for info in self._absent if info.optimizer == self.number}
        return torch.float64 in dtypes
