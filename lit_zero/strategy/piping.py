"""The part of the strategy that runs steps through a pipeline: see ``stages``."""

from __future__ import annotations

from typing import Any

import torch

from lit_zero.core.errors import UnsupportedError
from lit_zero.core.grid import Grid
from lit_zero.pipeline.blocks import check_fit
from lit_zero.pipeline.policy import Pipeline
from lit_zero.precision.policy import Precision
from lit_zero.strategy.one_piece import OnePiece
from lit_zero.strategy.small import refuse_early_step_in_a_pipeline
from lit_zero.strategy.stages import Stages
from lit_zero.strategy.talking import Talking
from lit_zero.zero.policy import Placement


class Piping(Talking):
    """A strategy under which the module may be in several pieces, on ranks that pass micro-batches on.

    Attributes:
        pipeline: the user's choice.
        stages: runs the steps.
    """

    pipeline: Pipeline
    precision_policy: Precision
    stages: OnePiece

    def _open_stages(self, pipeline: Pipeline) -> None:
        refuse_early_step_in_a_pipeline(self.precision_policy, pipeline)
        self.pipeline = pipeline
        self.stages = OnePiece() if pipeline.schedule == "none" else Stages(self)
        self.stages.zero(self.zero)  # which refuses what does not go together

    def check_blocks(self, module: torch.nn.Module) -> None:
        """Refuse a choice of ``pipeline`` that does not fit ``module``, which may be on the meta device.

        Raises:
            ConfigError: naming what is not there, or too much.
        """
        if not self.stages.whole:
            check_fit(module, self.pipeline)

    @property
    def grid(self) -> Grid:
        """How the ranks are laid out."""
        return Grid.of(self.num_nodes * self.num_processes, self.pipeline.ranks)

    @property
    def data_parallel_size(self) -> int:
        """Ranks over which batches are divided."""
        return self.grid.data

    def builds_on_meta(self, empty_init: bool | None) -> bool:
        """Return whether modules are built on the meta device: in ``stage3``, where no rank ever holds the full model,
        whether it is divided over data-parallel ranks or stages.
        """
        ranks = self.data_parallel_size * self.pipeline.ranks
        return self.zero.row.over(ranks).parameter is Placement.SHARD and empty_init is not False

    # Where a run ends well, all that was sent is taken: a process that ends takes along what has not left.

    def on_validation_end(self) -> None:
        """After a validation."""
        super().on_validation_end()
        self.stages.flush()

    def on_test_end(self) -> None:
        """After a test."""
        super().on_test_end()
        self.stages.flush()

    def on_predict_end(self) -> None:
        """After a prediction."""
        super().on_predict_end()
        self.stages.flush()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which share of the data this rank reads: the ranks of a pipeline read the same."""
        return {"num_replicas": self.grid.data, "rank": self.grid.data_rank(self.global_rank)}

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's ``training_step``."""
        return self.stages.run("training_step", super().training_step, args, kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's ``validation_step``."""
        return self.stages.run("validation_step", super().validation_step, args, kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's ``test_step``."""
        return self.stages.run("test_step", super().test_step, args, kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's ``predict_step``."""
        return self.stages.run("predict_step", super().predict_step, args, kwargs)

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the backward; in a pipeline, hand over the gradients that the step has made already."""
        if self.stages.whole:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        self.pre_backward(closure_loss)
        assert self.lightning_module is not None
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        self.stages.publish()
        closure_loss = self.precision_plugin.post_backward(closure_loss, self.lightning_module)
        self.post_backward(closure_loss)
        return closure_loss

    def _refuse_in_step(self, what: str) -> None:
        if self.stages.in_step:
            raise UnsupportedError(
                f"{what} was called in a step. In a pipeline a step runs on one rank at a time, and the others would "
                "be waited for forever. Call it in a hook, such as on_train_batch_end or on_validation_epoch_end; "
                "self.log(..., sync_dist=True) works in a step."
            )

    def all_gather(self, tensor: torch.Tensor, group: Any | None = None, sync_grads: bool = False) -> torch.Tensor:
        """Return the tensors of all ranks."""
        self._refuse_in_step("all_gather")
        return super().all_gather(tensor, group, sync_grads)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Return once every rank has called this."""
        self._refuse_in_step("barrier")
        super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return rank ``src``'s ``obj`` on every rank."""
        self._refuse_in_step("broadcast")
        return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce ``tensor`` over the data-parallel ranks; anything else is returned as it is."""
        self._refuse_in_step("reduce")
        reduced = super().reduce(tensor, group, reduce_op)
        if not isinstance(tensor, torch.Tensor) or self.stages.whole or group is not None:
            return reduced
        summed = "sum" in str(reduce_op).lower()  # "sum", or ReduceOp.SUM
        if summed:  # every rank of a pipeline has added the same
            whole = reduced / self.pipeline.ranks
            return whole if tensor.is_floating_point() or tensor.is_complex() else whole.round().to(tensor.dtype)
        return reduced

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all ranks, or any, have decided so."""
        flag = torch.tensor(int(decision), device=self.root_device)
        found = int(super().reduce(flag, reduce_op="min" if all else "max"))
        return bool(found)
