"""One step of a pipeline, from the user's side: their code on each micro-batch, and what it draws, returns and logs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lit_zero.core.errors import UnsupportedError
from lit_zero.core.randomness import drawn_since, random_marks, random_states, seed_everything, set_random_states
from lit_zero.pipeline.micro_batches import MicroBatches, mean, together
from lit_zero.strategy.logged import Logged, Told, to_device
from lit_zero.strategy.measured import Metrics
from lit_zero.zero.engine import Engine


class Work:
    """Runs the user's step, and hands gradients to the engine.

    Args:
        strategy: whose module and precision.
        engine: takes the gradients.
        metrics: of the module.
        name: of the user's step.
        last: number of the last stage.
        micro: the micro-batches.
        seed: from which every micro-batch's own is made.
        step: runs the user's step on a micro-batch.
    """

    def __init__(
        self,
        strategy: Any,
        engine: Engine,
        metrics: Metrics,
        name: str,
        last: int,
        micro: MicroBatches,
        seed: int,
        step: Callable[[Any], Any],
    ) -> None:
        self._module, self._engine, self._plugin = strategy.lightning_module, engine, strategy.precision_plugin
        self._metrics, self._last, self._micro, self._seed, self._step = metrics, last, micro, seed, step
        self._training = name == "training_step"
        self._accumulate = self._module.trainer.accumulate_grad_batches if self._training else 1
        self._logged = Logged(self._module)
        self._begun = False  # a backward of this step has run

    @contextlib.contextmanager
    def set_apart(self) -> Iterator[None]:
        """Inside, random numbers are those of micro-batches, and what is logged is kept."""
        before, module = random_states(), self._module
        self._metrics.begin()
        with self._engine.buffers.at_rest():
            self._log_by(self._logged.ignore)
            self._metrics.in_step = True
            try:
                yield
            finally:
                del module.log
                self._metrics.in_step = False
                set_random_states(before)

    def forward(self, number: int, micro_batch: int) -> Any:
        """Run the user's step on a micro-batch, as stage ``number``."""
        self._engine.begin_forward(share_buffers=False)
        seed_everything(seed_of(self._seed, micro_batch))
        self._marks = {} if number == self._last else random_marks()  # the last stage tells nobody
        part = self._micro.parts[micro_batch]
        if number == self._last:
            self._log_by(self._logged.keep)
            return self._step(part)
        self._log_by(self._logged.ignore)
        with self._metrics.unchanged():
            return self._step(part)

    def _log_by(self, log: Callable[..., None]) -> None:
        vars(self._module)["log"] = log  # as module.log = log, which first looks whether it is a parameter or a module

    def loss(self, micro_batch: int, result: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return a micro-batch's loss, scaled as the precision wants it, and as its gradient its share of the whole.

        Raises:
            UnsupportedError: for a loss that is not one real number.
        """
        loss = _loss(result)
        if loss is None:
            return None
        if loss.requires_grad and (loss.numel() != 1 or loss.is_complex()):
            raise UnsupportedError(
                f"training_step returned a loss of shape {list(loss.shape)} and {loss.dtype}, but a backward starts "
                "from one real number. Return the mean over the rows."
            )
        scaler = getattr(self._plugin, "scaler", None)
        if scaler is not None:
            loss = scaler.scale(loss)
        share = self._micro.weights[micro_batch] / self._accumulate
        return loss, torch.full_like(loss, share)

    def backward(self, last: bool, run: Callable[[], None]) -> None:
        """Run a part of the backward; the last one begins to reduce the gradients."""
        continues, self._begun = self._begun, True
        if last:
            self._engine.begin_backward(continues=continues)
            run()
            return
        with self._engine.no_reduce(unseen=True):
            self._engine.begin_backward(continues=continues)
            run()
            self._engine.end_backward()

    def finish(self) -> None:
        """Return when the gradients are reduced."""
        if self._training:
            self._engine.end_backward()

    def landed(self, param: nn.Parameter) -> None:
        """Take a gradient that was computed outside of a backward."""
        self._engine.take(param)

    def random_state(self) -> Any:
        """Return the states of the random generators that have moved since the micro-batch was seeded, if any has."""
        return drawn_since(self._marks) or None

    def set_random_state(self, micro_batch: int, state: Any) -> None:
        """Go on from the state that has come with an activation: now, or in the backward, where a checkpoint recomputes
        what came after it and other micro-batches have drawn since.
        """
        if state:  # else nothing has been drawn before, here neither
            seed_everything(seed_of(self._seed, micro_batch))
            set_random_states(state)

    def told(self, results: dict[int, Any]) -> tuple[Any, Told, dict[str, int]]:
        """Return what the step has returned, what it has logged, and which metrics it has updated, as if it had run
        once.

        Args:
            results: what it has returned for each micro-batch; those of ``None`` count as nothing.
        """
        weights = self._micro.weights
        there = [number for number in sorted(results) if results[number] is not None]
        join = _joined if self._training else together
        whole = join([results[n] for n in there], [weights[n] for n in there]) if there else None
        return to_device(whole, torch.device("cpu")), self._logged.told(weights), self._metrics.updated()


def _loss(result: Any) -> Any:
    return result.get("loss") if isinstance(result, Mapping) else result


def _joined(results: list[Any], weights: list[float]) -> Any:
    """Put together what ``training_step`` has returned: a loss of shape ``[1]`` is one number, and not a row."""
    whole, losses = together(results, weights), [_loss(result) for result in results]
    if not all(isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.dim() for loss in losses):
        return whole
    loss = mean([loss.reshape(()) for loss in losses], weights).reshape(losses[0].shape)
    return {**whole, "loss": loss} if isinstance(whole, Mapping) else loss


def seed_of(seed: int, micro_batch: int) -> int:
    """Return the seed with which a micro-batch's step starts.

    Args:
        seed: drawn for the step, by ``torch.randint(0, 1 << 62, ())`` on the first rank of the pipeline.
        micro_batch: its number.
    """
    return (seed + 0x9E3779B97F4A7C15 * micro_batch) % (1 << 63)
