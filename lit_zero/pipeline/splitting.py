"""Run an unmodified model as one stage of a pipeline.

Every stage runs the user's own step on the micro-batch. Three kinds of modules get a ``forward`` of their own, as an
attribute of the instance, so hooks, names and classes stay:

1. A *ghost*, a module outside the block list whose work belongs to an earlier stage, answers with stand-ins.
2. A block of an earlier stage does the same. The stage's first block takes what has been received in place of the
   stand-ins among its arguments; from there on everything is real. A stand-in that the user's code hands to a later
   block again (the encoder's output, to every decoder block) is replaced there too.
3. The first block of the next stage ends the step: it raises with its arguments, which are what must be sent.

On the last stage nothing is raised, and the user's own loss, metrics and logging code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from lit_zero.core.errors import ConfigError, UnsupportedError
from lit_zero.core.parameters import exchange
from lit_zero.pipeline.answers import Answers
from lit_zero.pipeline.facts import Recording, Slot
from lit_zero.pipeline.leaves import call_leaves, map_leaves, tensors
from lit_zero.pipeline.plan import SplitPlan, StagePlan
from lit_zero.pipeline.stand_in import StandIns

_F = TypeVar("_F", bound=Callable[..., Any])

# Attributes of stand-ins, for a checkpoint that recomputes blocks when the visit is over (micro-batches later).
_MARK = "_lit_zero_received"  # what was received for it
_VISIT = "_lit_zero_visit"  # the visit in which it was made

# torch.compile must not look into what decides, only into what the modules compute.
_uncompiled: Callable[[_F], _F] = torch.compiler.disable


@dataclass
class Crossing:
    """A stage has ended at its boundary.

    Attributes:
        tensors: what the next stage must receive, in the order of its plan's ``receives``.
    """

    tensors: list[torch.Tensor]


@dataclass
class Finished:
    """The user's step has ended, on the last stage.

    Attributes:
        result: what it has returned.
    """

    result: Any


class _Exit(BaseException):
    """Ends the step at the boundary; no ``Exception``, so that the user's ``except`` does not catch it."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors


class _Visit:
    """One run of the step as one stage."""

    def __init__(
        self, piece: StagePlan, receive: Callable[[], Sequence[torch.Tensor]], on_entry: Callable[[], None]
    ) -> None:
        self.piece, self.receive, self.on_entry = piece, receive, on_entry
        self.received: Sequence[torch.Tensor] | None = None  # before the first block has been reached
        self.failure: BaseException | None = None  # of the receive
        self.ghosts = set(piece.ghosts)
        self.next = piece.first  # number of the block that must run next

    @property
    def entered(self) -> bool:
        return self.next > self.piece.first


class _Mark:
    def __init__(self, visit: _Visit, tensor: torch.Tensor, slot: Slot) -> None:
        self.visit, self.tensor, self.slot = visit, tensor, slot


class Split:
    """A model of which this process holds some stages.

    Args:
        model: the module that was recorded.
        recording: what its dry run has shown.
        plan: the stages.
        local: numbers of the stages that this process runs.
        device: where the parameters will be, and the stand-ins for those of other stages.

    Attributes:
        absent: the parameters of other stages, by name; they have shape, dtype and device, and no memory.
    """

    def __init__(
        self,
        model: nn.Module,
        recording: Recording,
        plan: SplitPlan,
        local: Iterable[int],
        device: torch.device | None = None,
    ) -> None:
        self.model, self.recording, self.plan, self.local = model, recording, plan, tuple(local)
        self.device = device or torch.device("cpu")
        self.stand_ins = StandIns()
        self.answers = Answers(self.stand_ins, self.device)
        here = {name for number in self.local for name in plan.stages[number].parameters}
        self.absent = {name: p for name, p in model.named_parameters() if name not in here}
        self._absent = {id(param) for param in self.absent.values()}
        self._visit: _Visit | None = None
        self._before: list[tuple[nn.Module, Any]] = []  # modules and their own instance's forward, if they had one
        self._numbers = {name: index for index, name in enumerate(b.name for b in recording.blocks)}

    @property
    def running(self) -> bool:
        """Whether a step runs as a stage at present."""
        return self._visit is not None

    def is_local(self, param: nn.Parameter) -> bool:
        """Return whether this process holds the values of ``param``."""
        return id(param) not in self._absent

    def apply(self) -> None:
        """Let go of the parameters of other stages and take the blocks' entries."""
        on_meta = set()
        for param in self.absent.values():
            if param.device.type == "meta":
                on_meta.add(param)
            else:
                param.grad = None
                param.data = self.stand_ins.make(param.shape, param.dtype, self.device)  # moved, it would take memory
        exchange(
            self.model,
            on_meta,
            lambda p: nn.Parameter(self.stand_ins.make(p.shape, p.dtype, self.device), requires_grad=p.requires_grad),
        )
        facts = {module.name: module for module in self.recording.modules}
        ghosts = {name for number in self.local for name in self.plan.stages[number].ghosts}
        for name in sorted(ghosts):
            self._take(name, self._ghost(name, facts[name].written))
        for index, block in enumerate(self.recording.blocks):
            self._take(block.name, self._block(index))

    def remove(self) -> None:
        """Give the modules their own ``forward`` back; parameters of other stages stay without values."""
        for module, forward in reversed(self._before):
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward
        self._before.clear()

    def run(
        self,
        number: int,
        step: Callable[[], Any],
        receive: Callable[[], Sequence[torch.Tensor]] = tuple,
        on_entry: Callable[[], None] = lambda: None,
    ) -> Crossing | Finished:
        """Run the user's step as one stage.

        Args:
            number: of the stage; it must be local.
            step: the user's code on one micro-batch.
            receive: called once, right before the stage's first block runs: returns the tensors that the stage before
                has sent; for a gradient they must be leaves that require one.
            on_entry: called right before the stage's first block runs, and again where a checkpoint recomputes that
                block: puts the random state there that has come with the tensors.

        Raises:
            ConfigError: if what was received does not fit the step, so the ranks do not run the same micro-batch.
            UnsupportedError: if the step does not run the blocks once each and in order.
        """
        if number not in self.local:
            raise ConfigError(f"Stage {number} is not held here; local are {list(self.local)}.")
        piece = self.plan.stages[number]
        if self._visit is not None:
            raise UnsupportedError("A stage was run inside another one; run them one after the other.")
        visit = self._visit = _Visit(piece, receive, on_entry)
        try:
            result = step()
        except _Exit as exit:
            return Crossing(exit.tensors)
        finally:
            self._visit = None
            if visit.failure is not None:
                raise visit.failure  # the user's code may have caught it
        if piece.sends:
            raise UnsupportedError(
                f"The step ended on stage {number} without reaching block {self.recording.blocks[piece.end].name!r}, "
                "where the next stage begins. In every step the model must be called once, whatever the batch."
            )
        if visit.next != piece.end:
            raise self._out_of_turn(visit, piece.end)
        return Finished(result)

    # ---- the forwards

    def _take(self, name: str, make: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]) -> None:
        module = self.model.get_submodule(name)
        self._before.append((module, vars(module).get("forward")))
        vars(module)["forward"] = torch.compiler.disable(make(module, module.forward), recursive=False)

    def _ghost(self, name: str, written: bool) -> Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]:
        def make(module: nn.Module, real: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                visit = self._visit
                if visit is None or name not in visit.ghosts:
                    return real(*args, **kwargs)
                if visit.entered:
                    raise UnsupportedError(
                        f"Module {name!r} runs after block {visit.piece.blocks[0]!r}, but ran before it when the step "
                        "was recorded: the model is called twice in one step, or in another order than before. Call it "
                        "once in the step, and its modules in the same order for every batch."
                    )
                return self._answer(visit, name, module, real, (args, kwargs), written)

            return forward

        return make

    def _block(self, index: int) -> Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]:
        facts = self.recording.blocks[index]

        def make(module: nn.Module, real: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                visit = self._visit
                if visit is None:
                    here, args, kwargs = self._again(index, module, real, args, kwargs)
                    return real(*args, **kwargs) if here else args
                piece = visit.piece
                if index < piece.first and not visit.entered:
                    return self._answer(visit, facts.signature, module, real, (args, kwargs), facts.written)
                if index != visit.next:
                    raise self._out_of_turn(visit, index)
                if index == piece.end:
                    raise _Exit(self._collect(piece, args, kwargs))
                if index == piece.first:
                    self._enter(visit, args, kwargs)
                visit.next += 1
                if piece.receives:
                    args, kwargs = _received(index, args, kwargs)
                return real(*args, **kwargs)

            return forward

        return make

    @_uncompiled
    def _enter(self, visit: _Visit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Mark the stand-ins among the arguments with what was received for them."""
        given = dict(call_leaves(args, kwargs))
        for slot, tensor in zip(visit.piece.receives, self._arrived(visit), strict=True):
            for path in slot.paths:
                leaf = self._at(visit.piece.first, given, path)
                if tensor.shape != leaf.shape or tensor.dtype != leaf.dtype:
                    raise ConfigError(
                        f"Stage {visit.piece.number} received {list(tensor.shape)} {tensor.dtype} for {path} of "
                        f"{visit.piece.blocks[0]!r}, but its own micro-batch gives {list(leaf.shape)} {leaf.dtype}: "
                        "all stages must run the same micro-batch, in the same precision and mode."
                    )
                setattr(leaf, _MARK, _Mark(visit, tensor, slot))
        visit.on_entry()

    def _arrived(self, visit: _Visit) -> Sequence[torch.Tensor]:
        if visit.received is None:
            try:
                visit.received, piece = visit.receive(), visit.piece
            except BaseException as failure:
                visit.failure = failure
                raise
            if len(visit.received) != len(piece.receives):
                raise ConfigError(
                    f"Stage {piece.number} was given {len(visit.received)} tensors, but it begins with "
                    f"{len(piece.receives)}: {'; '.join(map(str, piece.receives)) or 'the batch alone'}."
                )
        return visit.received

    @_uncompiled
    def _answer(self, visit: _Visit, group: Any, module: nn.Module, real: Any, call: Any, written: bool) -> Any:
        """Return what a module of an earlier stage answers."""
        output = self.answers.answer(group, module, real, call[0], call[1], written)
        for tensor in tensors(output):
            if self.stand_ins.made(tensor):
                setattr(tensor, _VISIT, visit)
        return output

    @_uncompiled
    def _again(self, index: int, module: nn.Module, real: Any, args: Any, kwargs: Any) -> tuple[bool, Any, Any]:
        """Return whether a block that runs outside a stage runs here, and its arguments, or else its answer.

        That is a block that a checkpoint recomputes. It is given what it was given in its visit; its stand-ins know.
        """
        marks = [getattr(tensor, _MARK, None) for tensor in tensors((args, kwargs))]
        visits = [mark.visit for mark in marks if mark is not None]
        visits += [v for t in tensors((args, kwargs)) if (v := getattr(t, _VISIT, None)) is not None]
        if visits and index < visits[0].piece.first:
            facts = self.recording.blocks[index]
            return False, self._answer(visits[0], facts.signature, module, real, (args, kwargs), facts.written), None
        if visits and index == visits[0].piece.first:
            self._enter(visits[0], args, kwargs)
        if not any(self.plan.stages[n].first <= index < self.plan.stages[n].end for n in self.local):
            raise UnsupportedError(
                f"Block {self.recording.blocks[index].name!r} is on another stage and was called outside a step of the "
                "pipeline. Call the model only in the step; a checkpoint that recomputes several blocks must not reach "
                "over a boundary (pipeline.boundaries)."
            )
        return True, *_received(index, args, kwargs)

    @_uncompiled
    def _collect(self, piece: StagePlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        args, kwargs = _received(piece.end, args, kwargs)
        given = dict(call_leaves(args, kwargs))
        tensors = [self._at(piece.end, given, slot.paths[0]) for slot in piece.sends]
        for slot, tensor in zip(piece.sends, tensors, strict=True):
            if self.stand_ins.made(tensor):
                raise UnsupportedError(
                    f"{slot.paths[0]} of block {self.recording.blocks[piece.end].name!r} is not there on stage "
                    f"{piece.number}: it was not made on this stage and not received. Was the step recorded with "
                    "another batch or in another mode?"
                )
        return tensors

    def _at(self, index: int, given: dict[str, Any], path: str) -> torch.Tensor:
        leaf = given.get(path)
        if not isinstance(leaf, torch.Tensor):
            raise UnsupportedError(
                f"Block {self.recording.blocks[index].name!r} had a tensor at {path} when the step was recorded, and "
                f"now has {type(leaf).__name__}; its arguments: {', '.join(given)}. It must be called alike for every "
                "batch."
            )
        return leaf

    def _out_of_turn(self, visit: _Visit, index: int) -> UnsupportedError:
        blocks = self.recording.blocks
        if index < visit.next:
            return UnsupportedError(
                f"Block {blocks[index].name!r} is called twice in one step; a pipeline runs every block once. Call the "
                "model once in the step."
            )
        return UnsupportedError(
            f"Block {blocks[visit.next].name!r} did not run in this step although it did when the step was recorded. "
            "Blocks that are left out (layer drop) do not work in a pipeline; set their probability to 0."
        )


@_uncompiled
def _received(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a block's arguments with what was received in place of marked stand-ins."""

    def swap(path: str, leaf: Any) -> Any:
        mark = getattr(leaf, _MARK, None) if isinstance(leaf, torch.Tensor) else None
        if mark is None:
            return leaf
        # A tensor that requires a gradient and is nobody's result cannot be written to in place.
        return mark.tensor.clone() if mark.slot.written and index == mark.visit.piece.first else mark.tensor

    return tuple(map_leaves(arg, swap) for arg in args), {key: map_leaves(arg, swap) for key, arg in kwargs.items()}
