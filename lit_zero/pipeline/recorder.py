"""Watch one dry run of the user's step.

The step runs once without the values of parameters (see :mod:`lit_zero.pipeline.dry`) and without a trace. Every tensor
that depends on parameters remembers the region that has made it; an operator of a later region that uses it is noted as
a skip. At the entry of a block such tensors are its *slots*: inside they are aliases that the block's region has made,
because there they could be received.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from lit_zero.core.errors import UnsupportedError
from lit_zero.pipeline.dry import SHAPE_ONLY, Dry, storage_key, written_inputs
from lit_zero.pipeline.facts import Skip
from lit_zero.pipeline.isolation import isolated, take_logs
from lit_zero.pipeline.leaves import call_leaves, leaves, map_leaves


class SeenSlot:
    def __init__(self, number: int, path: str, leaf: torch.Tensor, made: int) -> None:
        self.number, self.paths, self.leaf, self.made = number, [path], leaf, made
        self.written = False


class SeenCall:
    """A module outside the blocks that has parameters, while recording."""

    def __init__(self, region: int) -> None:
        self.first = self.last = region
        self.whole = True
        self.written = False


class Recorder(Dry):
    def __init__(self, root: nn.Module, names: Sequence[str], device: torch.device, ordered: bool = True) -> None:
        super().__init__(device)
        self.root, self.names, self.ordered = root, list(names), ordered
        self.ran: list[str] = []
        self.region = 0
        self._inside: int | None = None  # the block that is running
        self._quiet = False
        self._made: dict[int, tuple[int, str]] = {}  # by storage: the region and the operator
        self._held: list[Any] = []  # keeps numbers and addresses from being given to others
        self._numbers: dict[int, int] = {}  # of tensors that stood in slots, by id
        self.slots: list[list[SeenSlot]] = [[] for _ in names]
        self._aliases: dict[int, SeenSlot] = {}  # by storage
        self.signatures = ["" for _ in names]
        self.written_blocks: set[int] = set()
        self._outputs: dict[int, list[Any]] = {}  # by storage: the blocks and calls that have answered with it
        self.flops, self.saved = [0 for _ in names], [0 for _ in names]
        self._saved_keys: set[int] = set()
        self.skips: dict[tuple[int, int], Skip] = {}
        self.returned: list[tuple[str, int]] = []
        self.logged: list[tuple[str, int]] = []
        self._disturbed = False  # a random number was drawn where another stage would draw none
        self._stack: list[str] = []  # called modules with parameters outside the blocks, outermost first
        self._views: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # made by a block, of what is no block's
        self._homes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor made from the batch: the stack
        self.calls: dict[str, SeenCall] = {}
        self._survey()

    def _survey(self) -> None:
        """Name the parameters, buffers and modules."""
        root = self.root
        self.parameter_names: dict[int, list[str]] = {}
        self.buffer_names: dict[int, list[str]] = {}
        self.parameters = dict(root.named_parameters())
        self.buffers = dict(root.named_buffers())
        for table, found in (
            (self.parameter_names, root.named_parameters(remove_duplicate=False)),
            (self.buffer_names, root.named_buffers(remove_duplicate=False)),
        ):
            for name, tensor in found:
                table.setdefault(id(tensor), []).append(name)
        self.uses: dict[str, set[int]] = {}
        self.writes: dict[str, set[int]] = {}
        self._parameter_of: dict[int, str] = {}  # by id, of the stand-in and the parameter itself
        self._parameter_memory: dict[int, str] = {}  # by storage of the stand-in
        self._buffer_of: dict[int, str] = {}  # by storage of the copy
        self._block_of = {id(root.get_submodule(name)): index for index, name in enumerate(self.names)}
        self._outside: dict[int, str] = {}  # modules that can be called as a whole on another stage, or not at all
        for name, module in root.named_modules():
            within = any(name == block or name.startswith(f"{block}.") for block in self.names)
            around = name == "" or any(block.startswith(f"{name}.") for block in self.names)
            if not within and not around and any(True for _ in module.parameters()):
                self._outside[id(module)] = name

    # ---- the run

    def run(self, call: Callable[[], Any]) -> Recorder:
        gradients = torch.is_grad_enabled()
        handles = [
            torch.nn.modules.module.register_module_forward_pre_hook(self._enter),
            torch.nn.modules.module.register_module_forward_hook(self._leave, always_call=True),
        ]
        save = weakref.WeakMethod(self._save)  # the graph keeps its hooks, out of the garbage collector's sight

        def saved(tensor: torch.Tensor) -> torch.Tensor:
            note = save()
            if note is not None:
                note(tensor)
            return tensor.detach()  # a graph that kept its own output through a hook would never go

        try:
            with (
                torch.inference_mode(False),
                torch.set_grad_enabled(gradients),
                isolated(self.root, self._other_parameter, self._other_buffer),
                torch.compiler.set_stance("force_eager"),
                torch.autograd.graph.saved_tensors_hooks(saved, torch.Tensor.detach),
            ):
                for name in self.names:
                    block = self.root.get_submodule(name)
                    vars(block)["forward"] = self._entry(self._block_of[id(block)], block.forward)
                take_logs(self.root, self._log, self._log_all)
                with self:
                    result = call()
        finally:
            for handle in handles:
                handle.remove()
        if self.ordered:
            missing = [name for name in self.names if name not in self.ran]
            if missing:
                raise UnsupportedError(
                    f"Block {missing[0]!r} did not run in the step; a pipeline needs every block to run once. Name "
                    "another block list with pipeline.blocks."
                )
        for path, leaf in leaves(result):
            if isinstance(leaf, torch.Tensor) and (made := self._use(leaf)) is not None:
                self.returned.append((path or "its result", made))
        return self

    def _other_parameter(self, param: nn.Parameter) -> nn.Parameter:
        other = self.replace(param)
        name = self.parameter_names.get(id(param), [None])[0]
        if name is not None:
            self._parameter_of[id(param)] = self._parameter_of[id(other)] = name
            if param.numel():
                self._parameter_memory[storage_key(other)] = name
        return other

    def _other_buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == "meta":  # a value nobody has yet
            copy = torch.zeros(tensor.shape, dtype=tensor.dtype, device=self.device)
        else:
            copy = tensor.detach().to(self.device, copy=True)
        name = self.buffer_names.get(id(tensor), [None])[0]
        if name is not None and copy.numel():
            self._buffer_of[storage_key(copy)] = name
            self._held.append(copy)
        return copy

    def _log(self, name: Any = None, value: Any = None, *args: Any, **kwargs: Any) -> None:
        if isinstance(value, torch.Tensor) and (made := self._use(value)) is not None:
            self.logged.append((str(name), made))

    def _log_all(self, values: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in values.items():
            self._log(name, value)

    # ---- blocks and modules

    def _entry(self, index: int, real: Callable[..., Any]) -> Callable[..., Any]:
        name = self.names[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._check_turn(index)
            self.ran.append(name)
            self.region = index if self.ordered else 0
            outer, self._inside = self._inside, index
            inputs = list(call_leaves(args, kwargs))
            args = map_leaves(args, lambda path, leaf: self._receive(index, f"args{path}", leaf))
            kwargs = map_leaves(kwargs, lambda path, leaf: self._receive(index, f"kwargs{path}", leaf))
            output = real(*args, **kwargs)
            self._inside = outer
            self._answered(index, (leaf for _, leaf in leaves(output)))
            self.signatures[index] = f"{_describe(inputs)} -> {_describe(leaves(output))}"
            return output

        return forward

    def _check_turn(self, index: int) -> None:
        name = self.names[index]
        if not self.ordered:
            return
        if name in self.ran:
            raise UnsupportedError(
                f"Block {name!r} is called twice in one step; a pipeline runs every block once. Call the model once in "
                "the step, or name another block list with pipeline.blocks."
            )
        if index != len(self.ran):
            raise UnsupportedError(
                f"Block {name!r} runs out of order: {self.names[len(self.ran)]!r} was expected, the order of the block "
                "list. Put the blocks in the list in the order in which they run, or name the lists in that order with "
                "pipeline.blocks."
            )
        if _in_reentrant_checkpoint():
            raise UnsupportedError(
                f"Block {name!r} is called inside a reentrant checkpoint, which a pipeline cannot recompute from what "
                "it receives. Use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )

    def _receive(self, index: int, path: str, leaf: Any) -> Any:
        """Return what the block sees of an argument: an alias of a tensor that could have been received."""
        if not isinstance(leaf, torch.Tensor) or self._name_of(leaf):
            return leaf
        made = self._use(leaf)
        if made is None:
            return leaf
        for slot in self.slots[index]:
            if slot.leaf is leaf:
                slot.paths.append(path)
                return slot.alias  # type: ignore[attr-defined]
        number = self._numbers.setdefault(id(leaf), len(self._numbers))
        slot = SeenSlot(number, path, leaf, made)
        self._held.append(leaf)
        self._quiet = True
        slot.alias = alias = leaf.clone()  # type: ignore[attr-defined]
        self._quiet = False
        self._born(alias, index if self.ordered else 0, self.names[index])
        self.slots[index].append(slot)
        self._aliases[storage_key(alias)] = slot
        return alias

    def _answered(self, who: Any, outputs: Any) -> None:
        for leaf in outputs:
            if isinstance(leaf, torch.Tensor):
                self._outputs.setdefault(storage_key(leaf), []).append(who)
                self._held.append(leaf.untyped_storage())

    def _enter(self, module: nn.Module, args: Any) -> None:
        name = self._outside.get(id(module))
        if name is not None:
            call = self.calls.setdefault(name, SeenCall(self.region))
            call.last = self.region
            self._stack.append(name)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._outside.get(id(module))
        if name is not None and name in self._stack:
            del self._stack[len(self._stack) - 1 - self._stack[::-1].index(name) :]
            self._answered(self.calls[name], (leaf for _, leaf in leaves(output)))

    # ---- operators

    def before(self, func: Any, inputs: Sequence[torch.Tensor]) -> None:
        if self._quiet or func.overloadpacket in SHAPE_ONLY:
            return
        for tensor in inputs:
            name = self._name_of(tensor)
            if name is not None:
                self.uses.setdefault(name, set()).add(self.region)
                continue
            buffer = self._buffer_of.get(storage_key(tensor))
            if buffer is not None:
                self.uses.setdefault(buffer, set()).add(self.region)
            made = self._use(tensor)
            if made is not None and made < self.region and (made, self.region) not in self.skips:
                maker = (self._made.get(storage_key(tensor)) or self._views[tensor])[1]
                self.skips[made, self.region] = Skip(made, self.region, maker, self._where(func))

    def after(self, func: Any, call: Any, inputs: Sequence[torch.Tensor], output: Any) -> None:
        if self._quiet:
            return
        if func.overloadpacket in flop_registry:
            with suppress(Exception):  # an estimate: a formula that does not know this call must not end the run
                self.flops[self.region] += flop_registry[func.overloadpacket](*call[0], **call[1], out_val=output)
        outputs, known = _tensors(output), func.overloadpacket in SHAPE_ONLY
        depends = not known and any(self._name_of(t) or self._birth(t) is not None for t in inputs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            # A random number that another stage would draw after fewer or more others is not what it draws here.
            depends = depends or self._disturbed
            self._disturbed = self._disturbed or self._inside is not None or bool(self._stack)
        where = self._where(func)
        written = written_inputs(func, *call)
        memory = {storage_key(tensor) for tensor in inputs}
        inside = depends or self._inside is not None  # only the stages that run this region have what it gives
        for tensor in written if inside or self._stack else []:
            self._write(tensor)
        for tensor in written if inside else []:
            self._born(tensor, self.region, where)
        for tensor in outputs:
            if not inside:
                if self._stack:
                    self._homes[tensor] = tuple(self._stack)
            elif storage_key(tensor) in memory and storage_key(tensor) not in self._made:
                self._views[tensor] = self.region, where  # of memory that every stage has; others do not have the view
            else:
                self._born(tensor, self.region, where)

    def _write(self, tensor: torch.Tensor) -> None:
        key = storage_key(tensor)
        if key in self._buffer_of:
            self.writes.setdefault(self._buffer_of[key], set()).add(self.region)
        if key in self._aliases:
            self._aliases[key].written = True
        for who in self._outputs.get(key, []):
            if isinstance(who, SeenCall):
                who.written = True
            else:
                self.written_blocks.add(who)

    def _born(self, tensor: torch.Tensor, region: int, where: str) -> None:
        if not self._name_of(tensor):
            self._made[storage_key(tensor)] = region, where
            self._held.append(tensor.untyped_storage())

    def _birth(self, tensor: torch.Tensor) -> int | None:
        found = self._made.get(storage_key(tensor)) or self._views.get(tensor)
        return None if found is None else found[0]

    def _name_of(self, tensor: torch.Tensor) -> str | None:
        """Return the name of the parameter that ``tensor`` is, or is a view of."""
        return self._parameter_of.get(id(tensor)) or self._parameter_memory.get(storage_key(tensor))

    def _use(self, tensor: torch.Tensor) -> int | None:
        """Return the region that has made a tensor. If a module has made it from the batch alone, note that it is used
        outside of that module, for which no stand-in can answer then.
        """
        made = self._birth(tensor)
        for name in self._homes.get(tensor, ()) if made is None else ():
            if name not in self._stack:
                self.calls[name].whole = False
        return made

    def _where(self, func: Any) -> str:
        inside = self.names[self._inside] if self._inside is not None else (self._stack or [""])[-1]
        operator = str(func.overloadpacket).removeprefix("aten.")
        return f"{operator!r} in {inside or type(self.root).__name__}"

    def _save(self, tensor: torch.Tensor) -> None:
        key = storage_key(tensor)
        if key in self._made and not self._name_of(tensor) and key not in self._saved_keys:
            self._saved_keys.add(key)
            self.saved[self.region] += tensor.untyped_storage().nbytes()


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for _, leaf in leaves(output) if isinstance(leaf, torch.Tensor)]


def _describe(found: Any) -> str:
    """Return paths, shapes and dtypes of leaves: what a block is given or gives."""
    return " ".join(
        f"{path}:{tuple(leaf.shape)}{leaf.dtype}" if isinstance(leaf, torch.Tensor) else f"{path}:{type(leaf).__name__}"
        for path, leaf in found
    )


def _in_reentrant_checkpoint() -> bool:
    code = torch.utils.checkpoint.CheckpointFunction.forward.__code__
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False
