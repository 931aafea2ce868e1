"""``ZeroStrategy``: the engine inside Lightning's Trainer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch

from lit_zero.comm.open import open_exchange
from lit_zero.core.errors import ConfigError, LitZeroError, UnsupportedError
from lit_zero.precision.policy import Lowering
from lit_zero.strategy.checkpoints import Checkpoints
from lit_zero.strategy.common import Common
from lit_zero.strategy.fabric import FabricZeroStrategy
from lit_zero.strategy.flavour import ParallelStrategy, TrainerFn, pl
from lit_zero.strategy.precision import hold_with_skipped_steps, lowered_dtype, over_shards
from lit_zero.strategy.refusals import (
    accumulates,
    refuse_no_optimizer,
    refuse_tensors_without_memory,
    refuse_unsupported,
)
from lit_zero.zero.engine import Engine


class ZeroStrategy(Common, ParallelStrategy):
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
        nonfinite_loss: ``"error"``: a loss that is NaN or infinite ends the run before it can reach a weight (not in
            ``16-mixed``, where the loss scaler skips the step). ``"ignore"``: train on, as Lightning does.
        timeout: seconds, or a timedelta, that a collective waits for a rank that does not come.
        process_group_backend: ``"gloo"``, ``"nccl"`` or ``"cpu:gloo,cuda:nccl"``; by default what serves the device.
        kwargs: what Lightning passes to every parallel strategy (``accelerator``, ``parallel_devices``,
            ``cluster_environment``, ...).

    Attributes:
        engine: the :class:`~lit_zero.zero.engine.Engine`, from ``setup`` on.
        data_parallel_size: ranks over which batches are divided.

    Raises:
        ConfigError: for a wrong setting.
    """

    _engine: Engine | None = None
    _checkpoints: Checkpoints | None = None

    @property
    def engine(self) -> Engine:
        """The engine; it exists from ``setup`` on."""
        if self._engine is None:
            raise LitZeroError("The strategy has not been set up: call trainer.fit, validate, test or predict first.")
        return self._engine

    def _become_fabric(self, plugin: Any) -> None:
        """Take a precision plugin from Fabric, and be its strategy from here on [Note: one word for Trainer and
        Fabric].
        """
        if type(self) is not ZeroStrategy:
            raise UnsupportedError(
                f"{type(self).__name__} is a strategy for a Trainer. Derive it from lit_zero.strategy.fabric."
                "FabricZeroStrategy to use it in Fabric."
            )
        given, accelerator, this = self._given, self.accelerator, cast(Any, self)
        this.__dict__.clear()
        this.__class__ = FabricZeroStrategy
        this.__init__(**given)
        this.accelerator, this.precision = accelerator, plugin

    precision = property(None, _become_fabric)  # a Trainer says precision_plugin
    _precision = None  # Fabric looks whether the strategy brings one

    # ---- processes

    @property
    def is_distributed(self) -> bool:
        """Tells the Trainer to divide the data over the ranks."""
        return True

    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce ``tensor`` over the data-parallel ranks; anything else is returned as it is."""
        return self._reduced(tensor, group, reduce_op)

    # ---- setup

    @contextlib.contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Where ``configure_model`` builds: on the meta device if parameters are sharded, so that no rank ever holds
        the full model.
        """
        if self._shards_parameters and empty_init is not False:
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
            refuse_unsupported(trainer, self.lightning_module)
            if self._layer_sync is not None:
                self.model = self._layer_sync.apply(self.lightning_module)
        self.precision_plugin = over_shards(self.precision_plugin, lambda: self.engine)
        if self._engine is None or fitting:
            self._build_engine(trainer, fitting)
        self.model_to_device()
        self.setup_precision_plugin()
        self._checkpoints.attach(self.engine)

    def _build_engine(self, trainer: pl.Trainer, fitting: bool) -> None:
        module = self.lightning_module
        assert module is not None
        previous = Engine.of(module)
        if previous is not None:
            previous.detach()
        self.precision_plugin.convert_module(module)
        if fitting:
            self.setup_optimizers(trainer)
            refuse_no_optimizer(self.optimizers)
            for config in self.lr_scheduler_configs:
                if config.interval == "step":
                    hold_with_skipped_steps(config.scheduler, self.precision_plugin)
        lowering = Lowering(self.precision_policy, lowered_dtype(self.precision_plugin), accumulates(trainer))
        self._engine = Engine(
            module,
            self.optimizers if fitting else (),
            zero=self.zero,
            exchange=open_exchange(self.comm, self.root_device, lowering.reduce_dtype, self._timeout),
            device=self.root_device,
            lowering=lowering,
            training=fitting,
        )

    def on_train_end(self) -> None:
        """Bring replicated parameters up to date, so that each rank may use the module on its own after ``fit``."""
        self.engine.wait_for_parameters()

    def teardown(self) -> None:
        """End the run. The module stays sharded, so that checkpoints can be saved and further runs started after
        ``fit``.
        """
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    # ---- steps

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's ``training_step``."""
        self.engine.begin_forward()
        return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's ``validation_step``."""
        self.engine.begin_forward()
        return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's ``test_step``."""
        self.engine.begin_forward()
        return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's ``predict_step``."""
        self.engine.begin_forward()
        return super().predict_step(*args, **kwargs)

    def pre_backward(self, closure_loss: torch.Tensor) -> None:
        """Stop before a loss that is no number reaches a weight."""
        if self._nonfinite_loss == "ignore" or getattr(self.precision_plugin, "scaler", None) is not None:
            return
        value = float(closure_loss.detach())
        if not math.isfinite(value):
            assert self.lightning_module is not None
            raise LitZeroError(
                f"The loss is {value} on rank {self.global_rank} at step {self.lightning_module.global_step}. No "
                "weight has been changed by it: the last "
                "checkpoint and the weights are those of the step before. Set nonfinite_loss='ignore' in ZeroStrategy "
                "to train on."
            )

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Inside, the backward is not the last of its step."""
        with self.engine.no_reduce():
            yield

    # ---- checkpoints

    @property
    def checkpoints(self) -> Checkpoints:
        """Reads and writes this module's checkpoints."""
        if self._checkpoints is None:
            raise LitZeroError("The strategy has no module yet: call trainer.fit, validate, test or predict first.")
        return self._checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's whole state dict on rank 0, ``{}`` on the others. All ranks must call this."""
        return self.checkpoints.weights()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return an optimizer's state dict as one process would have it, on rank 0. All ranks must call this."""
        bare = getattr(optimizer, "_optimizer", optimizer)  # out of Lightning's wrapper
        return self.checkpoints.optimizer(next(i for i, b in enumerate(self.engine.bindings) if b.optimizer is bare))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint. All ranks must call this."""
        if storage_options is not None:
            raise ConfigError(
                f"storage_options={storage_options!r} has no effect: ZeroStrategy writes checkpoints to file systems "
                "itself. Remove it."
            )
        self.checkpoints.save(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Open a checkpoint of either format, or a plain Lightning one."""
        return self.checkpoints.load(checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Read this rank's part of the weights, as soon as the engine exists."""
        self.checkpoints.load_weights(checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read this rank's part of the optimizers' state."""
        self.checkpoints.load_optimizers(checkpoint)
