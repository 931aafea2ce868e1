"""Lightning's checkpoint calls, answered from shards.

Lightning asks for the module's and the optimizers' state dicts, adds the rest, and hands everything back to be written;
on loading the other way round. In the full format the state dicts are gathered to rank 0. In the sharded format they
stay where they are, and every rank writes its own pieces when the rest comes back.

[Note: weights wait for setup] Lightning restores weights before ``setup``, when there is no engine yet and a module may
lie on the meta device. They are kept (as an open file, nothing is read) until the engine exists, and each rank then
reads only its part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lit_zero.checkpoint import full, sharded
from lit_zero.checkpoint.parts import OptimizerParts, check_groups
from lit_zero.checkpoint.policy import Checkpoint
from lit_zero.checkpoint.weights import ShardedWeights, StoredWeights, put_back, take_out
from lit_zero.comm.world import World
from lit_zero.core.errors import CheckpointError, LitZeroError, check_local
from lit_zero.core.piece import Piece
from lit_zero.strategy.entries import Entries, entries_of
from lit_zero.strategy.guard import Guard
from lit_zero.zero.engine import Engine
from lit_zero.zero.policy import Placement
from lit_zero.zero.rewriting import rewriting

_OPTIMIZERS, _WEIGHTS = "optimizer_states", "state_dict"
_ADVICE = (
    "Save with trainer.save_checkpoint(path), get the weights with trainer.strategy.full_state_dict() on all ranks, "
    "and load weights before setup (in __init__ or configure_model) or through ckpt_path."
)


class Checkpoints:
    """Reads and writes checkpoints of one module.

    Args:
        policy: the user's choice of format for writing; both are read.
        module: the LightningModule.
        advice: what to do instead of ``module.state_dict()``, for the message.
    """

    def __init__(self, policy: Checkpoint, module: nn.Module, advice: str = _ADVICE) -> None:
        self._policy, self._module, self._advice = policy, module, advice
        self._engine: Engine | None = None
        self._opened: sharded.ShardedCheckpoint | None = None
        self._path: Any = None
        self._waiting: tuple[Mapping[str, Any], bool] | None = None
        self._guard: Guard | None = None
        self._guarded = True

    def attach(self, engine: Engine) -> None:
        """Work on ``engine`` from now on, and give it the weights that have been waiting for it."""
        if self._guard is None:
            self._guard = Guard(self._module, self._check)
        self._engine = engine
        if self._waiting is not None:
            (checkpoint, strict), self._waiting = self._waiting, None
            self.load_weights(checkpoint, strict)

    @property
    def engine(self) -> Engine:
        """The engine; it exists from ``setup`` on."""
        if self._engine is None:
            raise LitZeroError("The strategy has not been set up: call trainer.fit, validate, test or predict first.")
        return self._engine

    # ---- writing

    def weights(self) -> dict[str, Any]:
        """Return what Lightning puts into a checkpoint: :meth:`whole_weights` in the full format, the entries that are
        no parameters in the sharded one.
        """
        return self.state_dict_of(self.engine.parameter_pieces(), {})

    def state_dict_of(self, pieces: Sequence[Piece], others: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state dict of the module with other values than it has, in the form of :meth:`weights`.

        Args:
            pieces: this rank's part of what stands in place of the parameters.
            others: what stands in place of other entries, by name; where there is none, the module's own value does.
        """
        entries = self.entries()
        rest = {key: others.get(key, value) for key, value in entries.others.items()}
        if self._policy.format == "sharded":
            return ShardedWeights(rest, entries.pieces(pieces))
        return self._collected(entries, pieces, rest)

    def whole_weights(self) -> dict[str, Any]:
        """Return the module's whole state dict on rank 0, ``{}`` on the others, in either format. All ranks must call
        this.
        """
        entries = self.entries()
        return self._collected(entries, self.engine.parameter_pieces(), entries.others)

    def _collected(self, entries: Entries, pieces: Sequence[Piece], rest: Mapping[str, Any]) -> dict[str, Any]:
        world = World()
        whole = full.collect(pieces, world)
        if world.rank != 0:
            return {}
        own = {key: whole[name] for key, name in entries.sources.items()}
        return {key: own[key] if key in own else rest[key] for key in entries.keys}

    def optimizer(self, number: int) -> dict[str, Any]:
        """Return optimizer ``number``'s state dict as torch saves it: on rank 0 in the full format, empty in the
        sharded one.
        """
        return {} if self._policy.format == "sharded" else self.whole_optimizer(number)

    def whole_optimizer(self, number: int) -> dict[str, Any]:
        """Return optimizer ``number``'s state dict as torch saves it on rank 0, ``{}`` on the others, in either format.
        All ranks must call this.
        """
        return full.collect_optimizer(self.parts(number), World())

    def save(self, checkpoint: dict[str, Any], path: Any) -> None:
        """Write what Lightning has put together.

        Raises:
            UnsupportedError: for an address such as ``s3://...``.
        """
        check_local("filepath", path)
        if self._policy.format == "full":
            full.save(checkpoint, path, World())
            return
        engine, entries = self.engine, self.entries()
        extras, further = take_out({k: v for k, v in checkpoint.items() if k not in (_WEIGHTS, _OPTIMIZERS)})
        weights = checkpoint.get(_WEIGHTS, {})
        numbers = range(len(engine.bindings)) if _OPTIMIZERS in checkpoint else []
        mine = weights.pieces if isinstance(weights, ShardedWeights) else entries.pieces(engine.parameter_pieces())
        sharded.save(
            path,
            weights=mine,
            others=weights,
            aliases=entries.aliases,
            optimizers=[self.parts(number) for number in numbers],
            extras=extras,
            world=World(),
            further=further,
        )

    # ---- reading

    def load(self, path: Any, weights_only: bool | None) -> dict[str, Any]:
        """Open a checkpoint of either format and return what Lightning wants of it.

        Raises:
            UnsupportedError: for an address such as ``s3://...``.
        """
        check_local("ckpt_path", path)
        self._path, self._opened = path, None
        if not sharded.is_sharded(path):
            return full.load(path, weights_only)
        self._opened = sharded.ShardedCheckpoint(path, World(), weights_only)
        found = {**put_back(self._opened.extras(), self._opened), _WEIGHTS: {}}
        if self._opened.header.optimizers:
            found[_OPTIMIZERS] = [{}] * len(self._opened.header.optimizers)
        return found

    def read_from(self, path: Any, opened: sharded.ShardedCheckpoint | None = None) -> None:
        """Let what is loaded next come from ``opened``, or from the dictionaries that it is given.

        Args:
            path: the checkpoint, for messages.
            opened: the checkpoint, if it is a sharded one.
        """
        self._path, self._opened = path, opened

    def load_weights(self, checkpoint: Mapping[str, Any], strict: bool) -> None:
        """Read the parameters and buffers, now or when the engine exists."""
        if self._engine is None:
            self._waiting = (checkpoint, strict)
            return
        # What lies in a folder counts, whatever a hook has made of the empty dict that stands for it.
        self.take(checkpoint[_WEIGHTS] if self._opened is None else StoredWeights({}, self._opened), strict)

    def take(self, weights: Mapping[str, Any], strict: bool) -> None:
        """Make a state dict the module's parameters and buffers, now. All ranks must call this.

        Args:
            weights: as for :meth:`read`.
            strict: as for :meth:`read`.
        """
        engine = self.engine
        with rewriting(engine, whole=True):
            rest = self.read(weights, engine.parameter_pieces(to_load=True), strict)
            with self._unguarded():
                self._module.load_state_dict(rest, strict=False)

    def read(self, weights: Mapping[str, Any], pieces: Sequence[Piece], strict: bool) -> dict[str, Any]:
        """Read a state dict of the module into ``pieces``. All ranks must call this.

        Args:
            weights: ``state_dict``, or one that stands elsewhere in what :meth:`load` returned.
            pieces: where this rank's part of the parameters goes.
            strict: refuse names that only the module or only ``weights`` has.

        Returns:
            The entries that are no parameters.
        """
        entries = self.entries()
        pieces, others, aliases = entries.pieces(pieces), list(entries.others), entries.aliases
        if isinstance(weights, StoredWeights):
            return weights.load_into(pieces, others=others, aliases=aliases, strict=strict)
        where = self._path or _WEIGHTS
        return full.load_into(pieces, weights, others=others, aliases=aliases, strict=strict, where=where)

    def load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        """Read every optimizer's state and hyper-parameters.

        Raises:
            CheckpointError: if the checkpoint holds another number of optimizers, or other parameter groups.
        """
        saved, mine = len(checkpoint[_OPTIMIZERS]), len(self.engine.bindings)
        if saved != mine:
            raise CheckpointError(
                f"The checkpoint '{self._path}' holds {saved} optimizers, configure_optimizers returned {mine}."
            )
        for number in range(mine):
            self.load_optimizer(number, checkpoint[_OPTIMIZERS][number], number)

    def load_optimizer(self, number: int, saved: Mapping[str, Any], source: int) -> None:
        """Read one optimizer's state and hyper-parameters.

        Args:
            number: which optimizer of this run.
            saved: its whole state as torch saves it; not looked at where the checkpoint is a sharded one.
            source: which optimizer of a sharded checkpoint.

        Raises:
            CheckpointError: if the checkpoint holds another optimizer, or other parameter groups.
        """
        binding = self.engine.bindings[number]
        self._refuse_another_optimizer(number, saved, source)
        described = self._described(number, saved, source)
        groups = saved["param_groups"] if self._opened is None else self._opened.param_groups(source)
        check_groups(groups, binding.groups(), str(self._path or _OPTIMIZERS))
        binding.load_groups(groups)  # first: flags such as fused say on which device a state belongs
        binding.prepare_states(described)
        states = self.engine.optimizer_pieces(number, described, to_load=True)
        parts = OptimizerParts(self.entries().states(states), binding.groups())
        if self._opened is not None:
            self._opened.load_optimizer(source, parts)
        else:
            full.load_optimizer_into(parts, saved, where=self._path or _OPTIMIZERS)

    def _refuse_another_optimizer(self, number: int, saved: Mapping[str, Any], source: int) -> None:
        """Check that the checkpoint has every number that the optimizer is steered by. Flags may be missing: torch has
        added some over time.
        """
        groups = saved.get("param_groups", []) if self._opened is None else self._opened.param_groups(source)
        optimizer = self.engine.bindings[number].optimizer
        wanted = {key for key, value in optimizer.defaults.items() if value is not None and not isinstance(value, bool)}
        missing = sorted(wanted.difference(*groups)) if groups else []
        if missing:
            raise CheckpointError(
                f"The checkpoint '{self._path}' is of another optimizer than {type(optimizer).__name__}: it lacks "
                f"{', '.join(missing)}. Use the optimizer that wrote the checkpoint, or load only its weights."
            )

    def _described(self, number: int, saved: Mapping[str, Any], source: int) -> dict[str, Any]:
        """Return ``{parameter: ({tensor key: dtype}, {scalar key: value})}`` of what a checkpoint holds."""
        if self._opened is not None:
            scalars, opened, sources = self._opened.scalars(source), self._opened, self.entries().sources
            return {
                sources.get(name, name): ({key: opened.state_dtype(source, name, key) for key in keys}, scalars[name])
                for name, keys in opened.optimizer_keys(source).items()
                if keys or scalars[name]
            }
        binding = self.engine.bindings[number]
        if "state" not in saved:
            raise CheckpointError(
                f"The checkpoint '{self._path}' holds no state of optimizer {number}; load only its weights."
            )
        names = dict(enumerate(name for group in binding.group_names for name in group))
        shapes = {piece.name: piece.shape for piece in self.engine.parameter_pieces()}
        described = {}
        for index, state in saved["state"].items():
            name = names.get(index)
            if name in shapes and state:
                tensors = {
                    key: value.dtype
                    for key, value in state.items()
                    if isinstance(value, torch.Tensor) and key != "step" and tuple(value.shape) == tuple(shapes[name])
                }
                described[name] = (tensors, {key: value for key, value in state.items() if key not in tensors})
        return described

    def parts(self, number: int) -> OptimizerParts:
        """Return this rank's part of optimizer ``number``. All ranks must call this."""
        described = self.engine.describe_states(number, World().all_gather_object)
        states = self.entries().states(self.engine.optimizer_pieces(number, described))
        return OptimizerParts(states, self.engine.bindings[number].groups())

    # ---- the module's own state_dict

    def entries(self) -> Entries:
        """Return the module's ``state_dict``, taken apart."""
        with self._unguarded():
            return entries_of(self._module, self.engine)

    def _check(self, doing: str) -> None:
        """Refuse what would see the parameters' memory while that is not their values."""
        engine = self._engine
        if not self._guarded or engine is None or Engine.of(self._module) is not engine:
            return
        if engine.absent:
            raise LitZeroError(f"{doing} would see the parameters of one stage of the pipeline only. {self._advice}")
        if engine.row.parameter is Placement.SHARD or any(lane.lowered for lane in engine.lanes):
            raise LitZeroError(f"{doing} would see released or 2-byte parameters under this strategy. {self._advice}")
        engine.wait_for_parameters()  # on their way since the last step: the other ranks need not be here

    @contextlib.contextmanager
    def _unguarded(self) -> Iterator[None]:
        self._guarded = False
        try:
            yield
        finally:
            self._guarded = True
