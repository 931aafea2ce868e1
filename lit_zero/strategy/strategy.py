"""``ZeroStrategy``: the engine inside Lightning's Trainer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, Literal

import torch

from lit_zero.activation.policy import Activation
from lit_zero.checkpoint.policy import Checkpoint
from lit_zero.comm.batch_norm import serve_the_cpu
from lit_zero.comm.open import open_exchange
from lit_zero.comm.policy import Comm
from lit_zero.comm.roll_call import RollCall
from lit_zero.core.errors import LitZeroError, check_choice
from lit_zero.layers.policy import Layers
from lit_zero.offload.policy import Offload
from lit_zero.pipeline.policy import Pipeline
from lit_zero.precision.policy import Lowering, Precision
from lit_zero.strategy.arguments import instance
from lit_zero.strategy.averaging import StochasticOnShards, WeightAveragingOnShards
from lit_zero.strategy.becoming import BecomesFabric
from lit_zero.strategy.checkpoints import Checkpoints
from lit_zero.strategy.finetuning import name_groups
from lit_zero.strategy.flavour import TrainerFn, pl
from lit_zero.strategy.launcher import new_job
from lit_zero.strategy.layers import refuse_max_norm, refuse_norms_that_do_more
from lit_zero.strategy.loading import Loading
from lit_zero.strategy.manual import toggle_parameters, untouched
from lit_zero.strategy.overlay import lay_over
from lit_zero.strategy.piping import Piping
from lit_zero.strategy.precision import bare, hold_with_skipped_steps, lowered_dtype, over_shards
from lit_zero.strategy.pretrained import Pending
from lit_zero.strategy.processes import choose_launcher
from lit_zero.strategy.pruning import PruningOnShards
from lit_zero.strategy.refusals import (
    refuse_no_optimizer,
    refuse_storage_options,
    refuse_tensors_without_memory,
    refuse_unsupported,
)
from lit_zero.strategy.small import check_small_state
from lit_zero.zero.access import Access
from lit_zero.zero.engine import Engine
from lit_zero.zero.policy import Zero

_CALLBACKS = (WeightAveragingOnShards, StochasticOnShards, PruningOnShards)


class ZeroStrategy(BecomesFabric, Loading, Piping):
    """Trains a LightningModule with its model states sharded over the ranks; results equal those of one process.

    ``Trainer(strategy=ZeroStrategy("stage3"))``, or by name once lit_zero is imported: ``Trainer(strategy="zero3")``.
    The same words work in Fabric, see :class:`~lit_zero.strategy.fabric.FabricZeroStrategy`.

    Args:
        zero: what is sharded: ``"none"``, ``"stage1"``, ``"stage2"``, ``"stage3"``, or a :class:`~lit_zero.zero.Zero`
            with more to say.
        precision: how mixed modes treat parameters and gradients; the mode itself is ``Trainer(precision=...)``.
        comm: how bytes travel.
        checkpoint: format of what is written, ``"full"`` (one plain ``.ckpt``) or ``"sharded"`` (a folder). Both are
            read.
        pipeline: pieces of the module on several ranks, a :class:`~lit_zero.pipeline.policy.Pipeline`. ``"none"``:
            every rank runs the whole module.
        activation: what lives between forward and backward, a word or an
            :class:`~lit_zero.activation.policy.Activation`. ``"none"``: all that autograd saves.
        layers: what computes known layers: ``"plain"`` (the model's own code), ``"fused"``, or a
            :class:`~lit_zero.layers.policy.Layers` with more to say.
        offload: where shards live between uses: ``"none"`` (on the device), ``"cpu"``, or an
            :class:`~lit_zero.offload.policy.Offload` with more to say.
        nonfinite_loss: ``"error"``: a loss that is NaN or infinite ends the run before it can reach a weight (not in
            ``16-mixed``, where the loss scaler skips the step). ``"ignore"``: train on, as Lightning does.
        nonfinite_norm: ``"error"``: a gradient norm that is to be clipped and is NaN or infinite ends the run before it
            reaches a weight (not in ``16-mixed``). ``"ignore"``: clip with it, as torch does by default.
        timeout: seconds, or a timedelta, that a collective waits for a rank that does not come.
        process_group_backend: ``"gloo"``, ``"nccl"`` or ``"cpu:gloo,cuda:nccl"``; by default what serves the device.
        evaluation: ``"once"``: every sample of an evaluation counts once, however many ranks there are.
            ``"lightning"``: data is divided as Lightning does by itself, which repeats samples to even the ranks out.
        start_method: how the Trainer starts the ranks: ``"popen"`` runs the script once more for each, ``"spawn"``,
            ``"fork"`` and ``"forkserver"`` hand its objects to new processes and bring back the trained weights.
            Notebooks need ``"fork"``.
        fused: ``"auto"``: a ``torch.optim.AdamW``, ``Adam``, ``SGD`` or ``Adagrad`` becomes that of ``lit_zero.optim``
            and steps by fused kernels; other classes are refused. ``"none"``: optimizers stay what they are.
        kwargs: what Lightning passes to every parallel strategy (``accelerator``, ``parallel_devices``,
            ``cluster_environment``, ...).

    Attributes:
        engine: the :class:`~lit_zero.zero.engine.Engine`, from ``setup`` on.
        data_parallel_size: ranks over which batches are divided.
        pretrained: weights that :func:`~lit_zero.load_pretrained` has found and that wait for ``setup``.

    Raises:
        ConfigError: for a wrong setting.
    """

    def __init__(
        self,
        zero: str | Zero = "stage2",
        precision: Precision | None = None,
        comm: Comm | None = None,
        checkpoint: str | Checkpoint = "full",
        pipeline: str | Pipeline = "none",
        activation: str | Activation = "none",
        layers: str | Layers = "plain",
        offload: str | Offload = "none",
        nonfinite_loss: Literal["error", "ignore"] = "error",
        nonfinite_norm: Literal["error", "ignore"] = "error",
        timeout: float | timedelta = 1800.0,
        process_group_backend: str | None = None,
        evaluation: Literal["once", "lightning"] = "once",
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        fused: Literal["auto", "none"] = "none",
        **kwargs: Any,
    ) -> None:
        self._remember(locals())
        new_job()
        super().__init__(evaluation, **kwargs)
        self._settle(
            zero, precision, comm, checkpoint, offload, nonfinite_loss, nonfinite_norm, timeout, process_group_backend
        )
        self._apply(activation, layers, fused)
        check_choice("start_method", start_method, ("popen", "spawn", "fork", "forkserver"))
        self._start_method = start_method
        self._open_stages(Pipeline(pipeline) if isinstance(pipeline, str) else instance("pipeline", pipeline, Pipeline))
        self._engine: Engine | None = None
        self._checkpoints: Checkpoints | None = None
        self.pretrained = Pending()

    @property
    def engine(self) -> Engine:
        """The engine; it exists from ``setup`` on."""
        if self._engine is None:
            raise LitZeroError("The strategy has not been set up: call trainer.fit, validate, test or predict first.")
        return self._engine

    # ---- processes

    def _configure_launcher(self) -> None:
        self.activations.groups(self.grid.data_groups())  # refuses ranks that do not divide before any is started
        self._launcher = choose_launcher(self, self._start_method)

    def setup_environment(self) -> None:
        """Join the process group."""
        super().setup_environment()
        self._roll_call = RollCall()
        trainer: Any = self.lightning_module.trainer if self.lightning_module is not None else None
        lay_over(self, trainer.callbacks, _CALLBACKS)

    # ---- setup

    @contextlib.contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Where ``configure_model`` builds: on the meta device if parameters are sharded, so that no rank ever holds
        the full model.
        """
        if self.builds_on_meta(empty_init):
            with torch.device("meta"), self.precision_plugin.tensor_init_context():
                yield
        else:
            with super().tensor_init_context(empty_init):
                yield

    def model_to_device(self) -> None:
        """Move what the engine does not manage (metric states), once it has placed the parameters."""
        assert self.lightning_module is not None
        refuse_tensors_without_memory(self.lightning_module)
        self.lightning_module.to(self.root_device)

    def connect(self, model: pl.LightningModule) -> None:
        """Take the module that is about to run."""
        super().connect(model)
        if self._checkpoints is None or self._engine is None or self._engine is not Engine.of(model):
            # Nothing to go on with: another module, or another Trainer has taken this one over in the meantime.
            self._engine, self._checkpoints = None, Checkpoints(self.checkpoint_policy, model)

    def setup(self, trainer: pl.Trainer) -> None:
        """Build the engine on the module and, for ``fit``, on its optimizers."""
        assert self.accelerator is not None and self.lightning_module is not None and self._checkpoints is not None
        self.accelerator.setup(trainer)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            refuse_unsupported(trainer)
            refuse_max_norm(self.lightning_module, trainer.world_size)
            if self._layer_sync is not None:
                refuse_norms_that_do_more(self.lightning_module)
                self.model = self._layer_sync.apply(self.lightning_module)
            serve_the_cpu(self.lightning_module)
        self.precision_plugin = over_shards(self.precision_plugin, lambda: self.engine, self._nonfinite_norm == "error")
        if self._engine is None or fitting:
            self._build_engine(trainer, fitting)
        self.model_to_device()
        self.setup_precision_plugin()
        self.pretrained.read(self.engine)
        self._checkpoints.attach(self.engine)

    def _build_engine(self, trainer: pl.Trainer, fitting: bool) -> None:
        module = self.lightning_module
        assert module is not None
        previous = Engine.of(module)
        self.stages.accept(module, previous)
        if previous is not None:
            previous.detach()
        self.activations.remove()
        self.pretrained.locate(module)
        self.precision_plugin.convert_module(module)
        self.pretrained.leave_empty(module)
        if fitting:
            self.setup_optimizers(trainer)
            refuse_no_optimizer(self.optimizers)
            self.take_optimizers(self.optimizers)
            for config in (each for each in self.lr_scheduler_configs if each.interval == "step"):
                hold_with_skipped_steps(config.scheduler, self.precision_plugin)
            check_small_state(self.precision_policy, str(self.precision_plugin.precision), trainer)
        lowering = Lowering(self.precision_policy, lowered_dtype(self.precision_plugin))
        pieces = self.stages.plan(trainer)
        groups = self.grid.data_groups()
        self.layers.apply(module, self.root_device)
        if fitting:
            self.activations.apply(self, module, groups)
        self._engine = Engine(
            module,
            self.optimizers if fitting else (),
            zero=self.stages.zero(self.zero),
            exchange=open_exchange(self.comm, self.root_device, lowering.reduce_dtype, self.timeout, groups),
            device=self.root_device,
            lowering=lowering,
            training=fitting,
            keep_gradients=fitting and not module.automatic_optimization,
            keeping=self.keeping(),
            **pieces,
        )
        self.stages.attach(self._engine)
        if fitting:
            toggle_parameters(module, lambda: self.engine)
            name_groups(trainer, lambda: self.engine)

    def on_train_end(self) -> None:
        """Bring replicated parameters and buffers up to date, so that each rank may use what it holds of the module on
        its own after ``fit``.
        """
        self.engine.wait_for_parameters()
        self.stages.share_buffers()

    def teardown(self) -> None:
        """End the run. The module stays sharded, so that checkpoints can be saved and further runs started after
        ``fit``.
        """
        assert self.cluster_environment is not None and self.accelerator is not None
        if self.lightning_module is not None:
            untouched(self.lightning_module)
        self.activations.remove()
        self.layers.restore()
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    # ---- steps

    def on_validation_start(self) -> None:
        """Let rank 0's buffers (batch statistics) stand for all."""
        super().on_validation_start()
        self.engine.buffers.share()

    def on_test_start(self) -> None:
        """Let rank 0's buffers stand for all."""
        super().on_test_start()
        self.engine.buffers.share()

    def on_predict_start(self) -> None:
        """Let rank 0's buffers stand for all."""
        super().on_predict_start()
        self.engine.buffers.share()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's ``training_step``."""
        self.engine.follow_groups()
        self.engine.begin_forward()
        return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's ``validation_step``."""
        self.engine.begin_forward(share_buffers=False)
        return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's ``test_step``."""
        self.engine.begin_forward(share_buffers=False)
        return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's ``predict_step``."""
        self.engine.begin_forward(share_buffers=False)
        return super().predict_step(*args, **kwargs)

    def pre_backward(self, closure_loss: torch.Tensor) -> None:
        """Stop before a loss that is no number reaches a weight."""
        self.activations.choose(self.engine.exchange, self.stages.crowd)
        assert self.lightning_module is not None
        self.refuse_loss(
            closure_loss,
            self.precision_plugin,
            f" at step {self.lightning_module.global_step}",
            ": the last checkpoint and the weights are those of the step before",
        )

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Inside, the backward is not the last of its step."""
        with self.engine.no_reduce():
            yield

    # ---- whole parameters

    @property
    def full(self) -> Access:
        """Reads and writes the full value, gradient and optimizer state of single parameters, in every stage:
        ``trainer.strategy.full.gradient("model.head.weight")``. All ranks must call it.
        """
        return Access(self.engine)

    def gradient_norm(self, norm_type: float = 2.0, optimizer: Any | None = None) -> torch.Tensor:
        """Return the norm of the gradients as they are, over all parameters and ranks; the same number in every stage.
        All ranks must call this, after a backward and, for the norm before clipping, no later than
        ``on_before_optimizer_step``.

        Args:
            norm_type: 2, another power, or infinity for the largest element.
            optimizer: whose parameters; ``None``: all.
        """
        return self.engine.grad_norm(norm_type, None if optimizer is None else bare(optimizer))

    # ---- checkpoints

    @property
    def checkpoints(self) -> Checkpoints:
        """Reads and writes this module's checkpoints."""
        if self._checkpoints is None:
            raise LitZeroError("The strategy has no module yet: call trainer.fit, validate, test or predict first.")
        return self._checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what Lightning saves as ``state_dict``: :meth:`full_state_dict`, or with ``checkpoint="sharded"`` the
        buffers alone, because every rank then writes its own part of the parameters. All ranks must call this.
        """
        if self._checkpoints is None and self._start_method != "popen" and self.lightning_module is not None:
            return self.lightning_module.state_dict()  # no rank: the ranks have handed the whole weights over
        if not self.together():
            return {}
        self.stages.share_buffers()
        return self.checkpoints.weights()

    def full_state_dict(self) -> dict[str, Any]:
        """Return the module's whole state dict in host memory on rank 0, ``{}`` on the others, whichever checkpoint
        format is chosen. All ranks must call this.
        """
        self.stages.share_buffers()
        return self.checkpoints.whole_weights()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return an optimizer's state dict as one process would have it, on rank 0. All ranks must call this."""
        if not self.together():
            return {}
        mine = bare(optimizer)
        number = next((i for i, b in enumerate(self.engine.bindings) if b.optimizer is mine), None)
        if number is None:
            raise LitZeroError(
                f"The Trainer still holds the {type(mine).__name__} of an earlier fit, but has run another module "
                "since, whose weights it would be saved with. Save right after fit, or with weights_only=True."
            )
        return self.checkpoints.optimizer(number)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint. All ranks must call this."""
        refuse_storage_options(storage_options)
        if not self.together():
            reason = "a rank has failed alone, and saving takes all of them. Earlier checkpoints are unharmed."
            print(
                f"lit_zero: rank {self.global_rank} does not save '{filepath}': {reason}", file=sys.stderr, flush=True
            )
            return
        self.checkpoints.save(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Open a checkpoint of either format, or a plain Lightning one."""
        return self.checkpoints.load(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Read this rank's part of the weights, as soon as the engine exists."""
        self.checkpoints.load_weights(checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read this rank's part of the optimizers' state."""
        self.engine.follow_groups()  # a finetuning callback may have put those of the checkpoint in place
        self.checkpoints.load_optimizers(checkpoint)
