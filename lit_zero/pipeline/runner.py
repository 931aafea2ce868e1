"""Run one rank's part of a schedule: every step in its order, on the user's own code.

What is alive between the actions of a micro-batch on a stage:

1. after ``F``: the leaves that the stage received, and what it has sent on (or the loss), with the graph between;
2. after ``I``: the gradients at the ends of the graph's weight branches;
3. after ``B`` or ``W``: nothing.

Source of the split backward: Qi et al., "Zero Bubble Pipeline Parallelism", 2023, section 2; how a graph is cut between
``I`` and ``W`` is torch.distributed.pipelining's ``_backward``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from lit_zero.comm.graph_cut import stage_backward_input, stage_backward_weight
from lit_zero.comm.messages import Message as Parcel
from lit_zero.comm.transport import Transport
from lit_zero.pipeline.actions import (
    BACKWARD,
    FORWARD,
    GRADIENT,
    INPUTS,
    POST,
    SEND,
    WAIT,
    WEIGHTS,
    Compute,
    Message,
    Step,
    Transfer,
    given,
    taken,
)
from lit_zero.pipeline.ends import from_root_alone, join
from lit_zero.pipeline.splitting import Finished, Split


class Work(Protocol):
    """What a micro-batch is to the user's code, and what gradients are to the engine."""

    def forward(self, number: int, micro_batch: int) -> Any:
        """Run the user's step on a micro-batch, as stage ``number``; return what it has returned."""

    def loss(self, micro_batch: int, result: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return what the backward of a micro-batch starts from and the gradient there; ``None`` for nothing."""

    def backward(self, last: bool, run: Callable[[], None]) -> None:
        """Run something that makes gradients of parameters; ``last``: nothing of this step makes any after it."""

    def finish(self) -> None:
        """Complete what the last backward has begun; nobody waits for this rank any more."""

    def landed(self, param: nn.Parameter) -> None:
        """Take the gradient that stands in ``param.grad``."""

    def random_state(self) -> Any:
        """Return the state of the random generators, to travel with an activation."""

    def set_random_state(self, micro_batch: int, state: Any) -> None:
        """Go on from a state that has come with an activation of a micro-batch."""


@dataclass
class _Visit:
    """A micro-batch on a stage, from its forward to its backward."""

    received: list[torch.Tensor]
    outputs: list[torch.Tensor] = field(default_factory=list)
    starts: list[torch.Tensor] = field(default_factory=list)  # on the last stage: the gradients of the outputs
    branches: list[dict[str, Any]] = field(default_factory=list)  # of the graph, after ``I``


class Runner:
    """Runs the steps of this rank.

    Args:
        split: the stages of this rank.
        transport: carries messages between ranks.
        parameters: of this rank's stages, by stage.
        stages: how many the model has.
    """

    def __init__(
        self, split: Split, transport: Transport, parameters: dict[int, list[nn.Parameter]], stages: int
    ) -> None:
        self._split, self._transport, self._held, self._stages = split, transport, parameters, stages
        # Set it to a list to have actions timed. An action begins later by the time that it has waited for its input,
        # so that lengths are times of work; what ran before the wait seems to run after it.
        self.timeline: list[tuple[Compute, float, float]] | None = None

    def run(self, steps: Sequence[Step], work: Work, afterwards: Sequence[tuple[Hashable, int]] = ()) -> dict[int, Any]:
        """Run all steps.

        Args:
            steps: of this rank, see ``lowering``.
            work: the user's code and the engine.
            afterwards: keys of messages that come when the steps are over, and positions of their senders.

        Returns:
            What the user's step has returned for each micro-batch, on the rank of the last stage; empty elsewhere.
        """
        self._work = work
        self._visits: dict[tuple[int, int], _Visit] = {}
        self._here: dict[Message, Parcel] = {}
        self._results: dict[int, Any] = {}
        for step in steps:  # the transport knows best how many receives it posts ahead
            if isinstance(step, Transfer) and step.verb == POST:
                self._transport.post(step.message, step.peer)
        for key, source in afterwards:
            self._transport.post(key, source)
        try:
            self._run(steps)
            work.finish()
            return self._results
        except BaseException:
            self._transport.forget()
            raise
        finally:
            del self._work, self._visits, self._here, self._results  # graphs and the user's objects go with the step

    def _run(self, steps: Sequence[Step]) -> None:
        training = any(isinstance(step, Compute) and step.kind != FORWARD for step in steps)
        closing = max(
            (n for n, step in enumerate(steps) if isinstance(step, Compute) and step.kind in (BACKWARD, WEIGHTS)),
            default=-1,
        )
        for number, step in enumerate(steps):
            if isinstance(step, Transfer):
                self._transfer(step)
                continue
            start, self._waited = time.perf_counter(), 0.0
            if step.kind == FORWARD:
                self._forward(step, training)
            elif step.kind == INPUTS:
                self._inputs(step)
            else:
                self._weights(step, last=number == closing)
            if self.timeline is not None:
                self.timeline.append((step, start + self._waited, time.perf_counter()))
        self._transport.flush()

    def _parameters(self, stage: int) -> list[nn.Parameter]:
        """Return a stage's parameters that want a gradient now; they may thaw in the course of a run."""
        return [param for param in self._held[stage] if param.requires_grad]

    # ---- messages

    def _transfer(self, step: Transfer) -> None:
        if step.verb == SEND:
            self._transport.send(self._here.pop(step.message), step.peer)
        elif step.verb == WAIT and step.message.kind == GRADIENT:  # the user's step waits for an activation
            self._here[step.message] = self._transport.wait(step.message)

    def _arrived(self, message: Message) -> Parcel:
        """Return an activation once it is there."""
        if message in self._here:  # from another stage of this rank
            return self._here.pop(message)
        start = time.perf_counter()
        came = self._transport.wait(message)
        self._waited += time.perf_counter() - start
        return came

    def _give(self, action: Compute, tensors: list[torch.Tensor], note: Any = None) -> None:
        message = given(action, self._stages)
        if message is not None:
            self._here[message] = Parcel(message, tensors, note)

    # ---- actions

    def _forward(self, action: Compute, training: bool) -> None:
        work, message = self._work, taken(action, self._stages)
        # No more than this is kept by stand-ins, for a checkpoint: they may be in the graph, which must not keep
        # itself.
        came: list[Parcel] = []
        received: list[torch.Tensor] = []

        def receive() -> list[torch.Tensor]:
            if message is not None:
                came.append(self._arrived(message))
                # Leaves of their own: between stages of one rank nothing is copied, and the graph must end here too.
                received.extend(t.detach().requires_grad_(t.requires_grad and training) for t in came[0].tensors)
            return received

        def enter() -> None:
            work.set_random_state(action.micro_batch, came[0].note if came else None)

        ended = self._split.run(action.stage, lambda: work.forward(action.stage, action.micro_batch), receive, enter)
        visit = _Visit(received)
        if isinstance(ended, Finished):
            self._results[action.micro_batch] = ended.result
            loss = work.loss(action.micro_batch, ended.result) if training else None
            if loss is not None:
                visit.outputs, visit.starts = [loss[0]], [loss[1]]
        else:
            visit.outputs = ended.tensors
            self._give(action, visit.outputs, work.random_state())
        if training:
            self._visits[action.stage, action.micro_batch] = visit

    def _gradients(self, action: Compute, visit: _Visit) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Return what the backward starts from, and the gradients for it."""
        message = taken(action, self._stages)
        if message is None:  # the last stage: from the loss
            pairs = [(t, g) for t, g in zip(visit.outputs, visit.starts, strict=True) if t.requires_grad]
            return [t for t, _ in pairs], [g for _, g in pairs]
        came = self._here.pop(message)
        grads = iter(came.tensors)
        pairs = [(t, next(grads)) for t, there in zip(visit.outputs, came.note, strict=True) if there]
        return [t for t, _ in pairs], [g for _, g in pairs]

    def _return(self, action: Compute, visit: _Visit) -> None:
        """Send the gradients of what was received back."""
        grads = [t.grad for t in visit.received]
        self._give(action, [g for g in grads if g is not None], tuple(g is not None for g in grads))

    def _inputs(self, action: Compute) -> None:
        visit = self._visits[action.stage, action.micro_batch]
        if action.stage == 0:  # there is nobody to send a gradient to; ``W`` does all
            return
        outputs, grads = self._gradients(action, visit)
        if outputs:
            root, leaf = join(outputs, grads)
            node, leaves = root.grad_fn, [t for t in visit.received if t.requires_grad]
            _, visit.branches = stage_backward_input(
                [root], [torch.ones_like(root)], [*leaves, leaf], iter(self._parameters(action.stage))
            )
            from_root_alone(node, visit.branches)
        visit.outputs = []
        self._return(action, visit)
        visit.received = []

    def _weights(self, action: Compute, last: bool) -> None:
        visit = self._visits.pop((action.stage, action.micro_batch))
        if action.kind == WEIGHTS and action.stage > 0:
            self._work.backward(last, lambda: self._branches(action.stage, visit))
            return
        outputs, grads = self._gradients(action._replace(kind=BACKWARD), visit)

        def run() -> None:
            if outputs:
                torch.autograd.backward(outputs, grads)

        self._work.backward(last, run)
        self._return(action._replace(kind=BACKWARD), visit)

    def _branches(self, stage: int, visit: _Visit) -> None:
        parameters = self._parameters(stage)
        stage_backward_weight(iter(parameters), visit.branches)
        for param in parameters:
            if param.grad is not None:
                self._work.landed(param)
