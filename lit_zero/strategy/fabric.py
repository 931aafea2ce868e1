"""``ZeroStrategy`` in Fabric: the engine inside a training loop that the user writes.

Every module that Fabric sets up gets an engine of its own, so a program may have several (a generator and a
discriminator). Optimizers may come with their module or after it.

[Note: whose backward] In ``fabric.backward(loss)`` with one module, all ranks take its engine through the backward,
whatever their loss reaches. With several modules only those that the loss reaches exchange gradients, or the one given
as ``fabric.backward(loss, model=...)``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import nn

from lit_zero.activation.policy import Activation
from lit_zero.checkpoint.policy import Checkpoint
from lit_zero.comm.batch_norm import serve_the_cpu
from lit_zero.comm.open import open_exchange
from lit_zero.comm.policy import Comm
from lit_zero.core.errors import LitZeroError, UnsupportedError
from lit_zero.layers.policy import Layers
from lit_zero.offload.policy import Offload
from lit_zero.precision.policy import Lowering, Precision
from lit_zero.strategy import fabric_checkpoints
from lit_zero.strategy.fabric_checkpoints import Managed, ManagedModule
from lit_zero.strategy.flavour import (
    _BackwardSyncControl,
    _sync_ddp_if_available,
    fabric_plugins,
    fabric_strategies,
)
from lit_zero.strategy.launcher import new_job
from lit_zero.strategy.layers import refuse_max_norm
from lit_zero.strategy.precision import agreeing_scaler, lowered_dtype
from lit_zero.strategy.processes import choose_launcher
from lit_zero.strategy.ranked import Ranked
from lit_zero.strategy.refusals import (
    refuse_checkpoint_plugin,
    refuse_storage_options,
    refuse_tensors_without_memory,
)
from lit_zero.strategy.small import refuse_early_step_by_hand
from lit_zero.zero.access import Access
from lit_zero.zero.engine import Engine
from lit_zero.zero.norms import scale_to_norm
from lit_zero.zero.policy import Zero

_OF_A_TRAINER = {
    "evaluation": ("once", "Fabric's loops are the user's own"),
    "nonfinite_norm": ("error", "say fabric.clip_gradients(error_if_nonfinite=...)"),
    "pipeline": ("none", "a loop of the user's own has no step that could run once for each micro-batch"),
    "start_method": ("popen", "start several processes by script, torchrun or a cluster"),
}


class NonfiniteNormError(LitZeroError, RuntimeError):
    """The gradients that were to be clipped hold NaN or infinity; a ``RuntimeError`` as in torch."""


class FabricZeroStrategy(Ranked, fabric_strategies.ParallelStrategy):
    """Shards the model states of every module that Fabric sets up; results equal those of one process.

    ``Fabric(strategy=ZeroStrategy("stage3"))``, or by name once lit_zero is imported: ``Fabric(strategy="zero3")``.

    Args:
        zero: as for a Trainer, see :class:`~lit_zero.strategy.strategy.ZeroStrategy`, and so are the others.
        precision: how mixed modes treat parameters and gradients; the mode itself is ``Fabric(precision=...)``.
        comm: how bytes travel.
        activation: what lives between forward and backward.
        layers: what computes known layers.
        checkpoint: format of what is written.
        offload: where shards live between uses.
        nonfinite_loss: what becomes of a loss that is NaN or infinite.
        timeout: seconds, or a timedelta, that a collective waits for a rank that does not come.
        process_group_backend: by default what serves the device.
        fused: whether torch's optimizers step by fused kernels.
        kwargs: what Lightning passes to every parallel strategy. Arguments that only a Trainer knows may have their
            defaults.

    Attributes:
        data_parallel_size: ranks over which batches are divided.

    Raises:
        ConfigError: for a wrong setting.
        UnsupportedError: for a setting that only a Trainer knows.
    """

    def __init__(
        self,
        zero: str | Zero = "stage2",
        precision: Precision | None = None,
        comm: Comm | None = None,
        checkpoint: str | Checkpoint = "full",
        offload: str | Offload = "none",
        nonfinite_loss: Literal["error", "ignore"] = "error",
        timeout: float | timedelta = 1800.0,
        process_group_backend: str | None = None,
        activation: str | Activation = "none",
        layers: str | Layers = "plain",
        fused: Literal["auto", "none"] = "none",
        **kwargs: Any,
    ) -> None:
        new_job()
        for name, (default, advice) in _OF_A_TRAINER.items():
            value = kwargs.pop(name, default)
            if value != default:
                raise UnsupportedError(f"{name}={value!r} has no effect in Fabric: {advice}. Leave it out.")
        super().__init__(**kwargs)
        self._settle(
            zero, precision, comm, checkpoint, offload, nonfinite_loss, "error", timeout, process_group_backend
        )
        self._apply(activation, layers, fused)
        self._managed = Managed()
        self._backward_sync_control = _NoReduce(self._managed)
        if self._checkpoint_io is not None:
            self.checkpoint_io = self._checkpoint_io

    def engine(self, module: nn.Module) -> Engine:
        """Return the engine of a module that was set up; the module itself or what Fabric made of it."""
        return self._managed.of(module).engine

    def _engine_of(self, optimizer: torch.optim.Optimizer) -> Engine:
        found = self._managed.find_optimizer(optimizer)
        return (self._managed.any() if found is None else found[0]).engine

    # ---- what Fabric's connector sets

    @property
    def precision(self) -> Any:
        """The precision plugin."""
        return super().precision

    @precision.setter
    def precision(self, plugin: Any) -> None:
        known = (fabric_plugins.MixedPrecision, fabric_plugins.HalfPrecision, fabric_plugins.DoublePrecision)
        if plugin is not None and not isinstance(plugin, known) and type(plugin) is not fabric_plugins.Precision:
            raise UnsupportedError(
                f"The precision plugin {type(plugin).__name__} does not work with ZeroStrategy. Use "
                "Fabric(precision=...) with one of '32-true', '64-true', 'bf16-mixed', '16-mixed', 'bf16-true', "
                "'16-true'."
            )
        if isinstance(plugin, fabric_plugins.MixedPrecision) and plugin.scaler is not None:
            plugin.scaler = agreeing_scaler(plugin.scaler, self._engine_of)
        self._precision = plugin

    @property
    def checkpoint_io(self) -> Any:
        """Not used: checkpoints are written by all ranks."""
        return super().checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, plugin: Any) -> None:
        refuse_checkpoint_plugin(plugin, "Fabric")

    def _set_world_ranks(self) -> None:
        self.set_world_ranks()

    def _configure_launcher(self) -> None:
        self._launcher = choose_launcher(self, "popen")

    # ---- setup

    @contextlib.contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Where ``fabric.init_module`` builds: on the meta device if parameters are sharded, so that no rank ever
        holds the full model. ``fabric.setup`` then initialises it, module by module.
        """
        if self.builds_on_meta(empty_init):
            with torch.device("meta"), self.precision.module_init_context():
                yield
        else:
            with super().module_init_context(empty_init):
                yield

    def module_to_device(self, module: nn.Module) -> None:
        """Leave the module where it is: ``setup`` moves it piece by piece, so that no device ever holds the whole."""

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[torch.optim.Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[torch.optim.Optimizer], Any]:
        """Shard a module and its optimizers together."""
        return self._manage(module, optimizers), optimizers, scheduler

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Shard a module; optimizers may follow."""
        return self._manage(module, [])

    def setup_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Shard an optimizer of a module that was set up before."""
        self.take_optimizers([optimizer])
        params = {param for group in optimizer.param_groups for param in group["params"]}
        for each in self._managed:
            if params <= set(each.module.parameters()):
                each.engine.add_optimizer(optimizer)
                return optimizer
        raise LitZeroError(
            f"{type(optimizer).__name__} holds parameters that are not all of one module that Fabric has set up. Call "
            "fabric.setup_module(model) first, build the optimizer from model.parameters(), then call "
            "fabric.setup_optimizers(optimizer); give every module an optimizer of its own."
        )

    def _manage(self, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> ManagedModule:
        self._managed.refuse_shared(module)
        refuse_max_norm(module, self.data_parallel_size)
        self.take_optimizers(optimizers)
        previous = Engine.of(module)
        if previous is not None:  # of another Fabric
            previous.detach()
        serve_the_cpu(module)
        replaced = self.layers.apply(module, self.root_device)
        self.activations.apply(self, module, [list(range(self.world_size))])
        refuse_early_step_by_hand(self.precision_policy, "a loop of Fabric's")
        self.precision_policy.check_mode(str(self.precision.precision))
        lowering = Lowering(self.precision_policy, lowered_dtype(self.precision))
        engine = Engine(
            module,
            optimizers,
            zero=self.zero,
            exchange=open_exchange(self.comm, self.root_device, lowering.reduce_dtype, self.timeout),
            device=self.root_device,
            lowering=lowering,
            keeping=self.keeping(),
            keep_gradients=True,  # the loop is the user's own: they stay until zero_grad, as in torch
        )
        engine.until_detached(replaced)
        refuse_tensors_without_memory(module)
        module.to(self.root_device)  # what the engine does not manage: metric states
        return self._managed.add(module, engine, self.checkpoint_policy)

    # ---- steps

    # "wraps": Fabric forbids loss.backward() and torch.autograd.grad where a strategy has a backward of its own. They
    # work here, except with a loss scaler, and then Fabric forbids them on the scaler's behalf.
    @functools.wraps(fabric_strategies.Strategy.backward)
    def backward(  # type: ignore[override]
        self, tensor: torch.Tensor, module: nn.Module | None, *args: Any, **kwargs: Any
    ) -> None:
        """Run a backward and leave the reduced gradients with the optimizers [Note: whose backward]."""
        if tensor.numel() == 1:
            self.refuse_loss(tensor, self.precision)
        if module is not None:
            taking_part = [self._managed.of(module).engine]
        else:
            alone = self._managed.alone
            taking_part = [] if alone is None else [alone.engine]
        for engine in taking_part:
            self.activations.choose(engine.exchange)
            engine.begin_backward(tensor)
        super().backward(tensor, module, *args, **kwargs)
        for engine in taking_part:
            engine.end_backward()

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Step an optimizer; replicated parameters are complete afterwards: what the user's loop reads next (a moving
        average, a penalty on weights) goes through no module.
        """
        found = self._managed.find_optimizer(optimizer)
        if found is not None:
            self.activations.choose(found[0].engine.exchange)  # if loss.backward() has told nobody
        output = super().optimizer_step(optimizer, **kwargs)
        if found is not None:
            found[0].engine.wait_for_parameters()
        return output

    def full(self, module: nn.Module) -> Access:
        """Return what reads and writes whole parameters, gradients and optimizer states of a module by name, in every
        stage. All ranks must use it together.
        """
        return Access(self._managed.of(module).engine)

    def gradient_norm(self, module: nn.Module, norm_type: float = 2.0) -> torch.Tensor:
        """Return the norm of a module's reduced gradients over all ranks. All ranks must call this."""
        return self._managed.of(module).engine.grad_norm(norm_type)

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = True,
    ) -> torch.Tensor:
        """Scale the optimizer's gradients so that their norm is at most ``max_norm``; return the norm before.

        Raises:
            NonfiniteNormError: if the norm is NaN or infinite, unless ``error_if_nonfinite`` is false.
        """
        engine = self._managed.of_optimizer(optimizer)[0].engine
        self.precision.unscale_gradients(optimizer)
        norm = engine.grad_norm(float(norm_type), optimizer)
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise NonfiniteNormError(
                f"The total norm of order {float(norm_type)} of the gradients is non-finite ({norm.item()}), so they "
                "cannot be clipped. Set error_if_nonfinite=False to scale the gradients by it anyway."
            )
        scale_to_norm(engine.bindings_of(optimizer), norm, max_norm)
        return norm

    def clip_gradients_value(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip_val: float) -> None:
        """Clamp every element of the optimizer's gradients to ``[-clip_val, clip_val]``."""
        engine = self._managed.of_optimizer(optimizer)[0].engine
        self.precision.unscale_gradients(optimizer)
        engine.clip_grad_value(clip_val, optimizer)

    # ---- collectives (all_gather is Lightning's own)

    def all_reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce ``tensor`` over the data-parallel ranks; anything else is returned as it is."""
        if not isinstance(tensor, torch.Tensor):
            return tensor
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)

    # ---- checkpoints

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Return a module's whole state dict on rank 0, ``{}`` on the others. All ranks must call this."""
        return self._managed.of(module).checkpoints.whole_weights()

    def get_optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return an optimizer's state dict as one process would have it, on rank 0. All ranks must call this."""
        each, number = self._managed.of_optimizer(optimizer)
        return each.checkpoints.whole_optimizer(number)

    def save_checkpoint(
        self,
        path: Any,
        state: dict[str, Any],
        storage_options: Any | None = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Write a checkpoint. All ranks must call this."""
        refuse_storage_options(storage_options)
        fabric_checkpoints.save(path, state, filter or {}, self._managed, self.checkpoint_policy)

    def load_checkpoint(
        self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of either format, of a Trainer, or of Fabric with another strategy, into ``state``. All
        ranks must call this.

        Returns:
            What ``state`` did not ask for.
        """
        return fabric_checkpoints.load(self.broadcast(path), state, strict, weights_only, self._managed)


class _NoReduce(_BackwardSyncControl):
    """``fabric.no_backward_sync``: inside, a backward is not the last of its step.

    Args:
        managed: all modules.
    """

    def __init__(self, managed: Managed) -> None:
        self._managed = managed

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[None]:
        """Return the context for one module."""
        return self._managed.of(module).engine.no_reduce() if enabled else contextlib.nullcontext()
