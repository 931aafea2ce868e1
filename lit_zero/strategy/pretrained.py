"""Weights from ``.safetensors`` files for a model that is about to be sharded.

[Note: values come at setup] ``load_pretrained`` compares names and shapes at once, but reads no value: there is no
engine yet that could say which part of it this rank holds, and in ``stage3`` the model lies on the meta device. Until
the setup every parameter that will get a value is an ``Awaited``: on the host, of its full shape, and without memory.
It is known by its identity and not by its name, so the model may be wrapped in between (as ``peft`` does), and a copy
of it waits for the same value. At setup each rank reads its ranges straight into its masters.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lit_zero.checkpoint.pretrained import Pretrained, match_pretrained
from lit_zero.checkpoint.together import on_all
from lit_zero.comm.world import World
from lit_zero.core.errors import ConfigError, LitZeroError
from lit_zero.core.parameters import exchange
from lit_zero.zero.engine import Engine
from lit_zero.zero.materialize import empty_like


def load_pretrained(
    module: nn.Module,
    path: str | os.PathLike[str],
    *,
    into: nn.Module | None = None,
    prefix: str = "",
    ignore: Sequence[str] = (),
) -> None:
    """Give a model the weights of local ``.safetensors`` files; call it in ``configure_model``.

    Under ``ZeroStrategy`` every rank reads no more than the part that it holds, and the values arrive at the strategy's
    setup: until then the parameters have their shapes, no memory, and read as zeros. With other strategies, and outside
    a Trainer, they are read at once and whole.

    Args:
        module: the LightningModule.
        path: a ``.safetensors`` file, or a folder as ``save_pretrained`` writes it: one such file, or several with
            their ``*.safetensors.index.json``.
        into: the part of the model that the names in the files start from, for example ``self.model``; by default the
            whole module.
        prefix: only entries of the files that begin with this are read, and it is cut off: ``"transformer."`` takes
            the body out of a language model.
        ignore: patterns of names in the model that keep their own initialisation (a new head), and of names in the
            files that are not wanted: ``["classifier.*"]``.

    Raises:
        CheckpointError: if there are no such files, or if names or shapes differ from the model's; they are listed.
        ConfigError: if a pattern of ``ignore`` matches nothing, or if the package safetensors is missing.
        LitZeroError: if the model has been set up already.
    """
    if Engine.of(module) is not None:
        raise LitZeroError(
            f"load_pretrained({os.fspath(path)!r}) was called for a model that has been set up already, and would "
            "throw away what it has learned. Let configure_model do its work once: if self.model is None: ..."
        )
    target = module if into is None else into
    source = Pretrained(path)
    wanted = {name: (_tensor(*holder), _tensor(*holder).shape) for name, holder in _holders(target)}
    found = match_pretrained(source, wanted, type(target).__name__, prefix, ignore)
    names = {tensor: name for name, (tensor, _) in reversed(wanted.items())}
    pending = getattr(_strategy_of(module), "pretrained", None)
    if isinstance(pending, Pending):
        pending.append(Weights(source, target, found, names))
        return
    without = next((names[tensor] for tensor in found if tensor.is_meta), None)
    if without is not None:
        raise ConfigError(
            f"{without!r} is on the meta device, where it cannot take a value from '{path}'. Call load_pretrained in "
            "configure_model under ZeroStrategy, which reads the weights once it has given the model memory; or build "
            "the model on a real device."
        )
    for tensor, name in found.items():
        value = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        source.read(name, 0, value.view(-1))
        with torch.no_grad():
            tensor.copy_(value)
    source.close()


class Awaited(nn.Parameter):
    """A parameter that will get a value [Note: values come at setup].

    Attributes:
        weights: what it waits for.
    """

    weights: Weights

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = self.weights.copy(self)
        return memo[id(self)]


class Weights:
    """What one call of ``load_pretrained`` has found.

    Args:
        source: the open files.
        model: what is to get the values; its parameters become ``Awaited``.
        found: for every tensor of the model that gets a value, its name in the files.
        names: the tensors' names in the model, for messages.
    """

    def __init__(
        self, source: Pretrained, model: nn.Module, found: dict[torch.Tensor, str], names: dict[torch.Tensor, str]
    ) -> None:
        self._source, self._names = source, names
        self._parameters = {tensor: name for tensor, name in found.items() if isinstance(tensor, nn.Parameter)}
        self._buffers = {tensor: name for tensor, name in found.items() if not isinstance(tensor, nn.Parameter)}
        self._copies: set[nn.Parameter] = set()
        self._places: list[tuple[nn.Module, str, str]] = []  # of the buffers: holder, key, name in the files
        exchange(model, self._parameters, self._await)

    def _await(self, param: nn.Parameter) -> nn.Parameter:
        other = Awaited(empty_like(param), requires_grad=param.requires_grad)
        vars(param)["weights"] = self  # an attribute, which stays with the object
        return other

    def copy(self, param: Awaited) -> nn.Parameter:
        """Return another parameter that waits for the same value."""
        twin = self._await(param)
        vars(twin).update(vars(param))
        self._parameters[twin], self._names[twin] = self._parameters[param], self._names[param]
        self._copies.add(twin)
        return twin

    def locate(self, model: nn.Module) -> None:
        """Find the tensors in ``model``, and give them the form in which it costs nothing to convert them.

        Raises:
            LitZeroError: naming a tensor that is no longer the model's.
        """
        holders: dict[torch.Tensor, list[tuple[nn.Module, str]]] = {}
        for _, holder in _holders(model):
            holders.setdefault(_tensor(*holder), []).append(holder)
        for param in self._copies.difference(holders):  # made, and thrown away
            del self._parameters[param]
        for tensor in (*self._parameters, *self._buffers):
            if tensor not in holders:
                raise LitZeroError(
                    f"{self._names[tensor]!r} was replaced after load_pretrained had found its value in "
                    f"'{self._source.path}', which would be lost. Call load_pretrained after what replaces it."
                )
        # Buffers may be replaced on their way to the device: from here on they are found by their holder.
        self._places = [(owner, key, name) for each, name in self._buffers.items() for owner, key in holders[each]]

        def on_meta(param: nn.Parameter) -> nn.Parameter:
            del vars(param)["weights"]
            return nn.Parameter(torch.empty(param.shape, dtype=param.dtype, device="meta"), param.requires_grad)

        exchange(model, self._parameters, on_meta)

    def leave_empty(self, model: nn.Module) -> None:
        """Keep what gets a value from being initialised."""
        exchange(model, self._parameters, lambda param: nn.Parameter(empty_like(param), param.requires_grad))
        for owner, key, _ in self._places:
            buffer = _tensor(owner, key)
            if buffer.is_meta:
                owner._buffers[key] = torch.zeros_like(buffer, device="cpu")

    def read(self, engine: Engine) -> None:
        """Read this rank's part into the masters. All ranks together."""
        on_all(World(), f"Reading '{self._source.path}'", lambda: self._read(engine))
        engine.refresh()

    def _read(self, engine: Engine) -> None:
        stored = {info.name: self._parameters.get(info.param) for lane in engine.lanes for info in lane.infos}
        for piece in engine.parameter_pieces(to_load=True):
            name = stored.get(piece.name)
            if name is not None:  # else it keeps its value, or another stage of a pipeline holds it
                values = piece.read()
                self._source.read(name, piece.start, values)
                if not piece.live:
                    piece.write(values)
        for owner, key, name in self._places:
            self._source.read(name, 0, _tensor(owner, key).view(-1))
        self._source.close()


class Pending(list[Weights]):
    """All that ``load_pretrained`` has found for one strategy and that no engine holds yet."""

    def locate(self, model: nn.Module) -> None:
        """See :meth:`Weights.locate`."""
        for weights in self:
            weights.locate(model)

    def leave_empty(self, model: nn.Module) -> None:
        """See :meth:`Weights.leave_empty`."""
        for weights in self:
            weights.leave_empty(model)

    def read(self, engine: Engine) -> None:
        """See :meth:`Weights.read`; nothing is pending afterwards."""
        while self:
            self.pop(0).read(engine)


def _strategy_of(module: nn.Module) -> Any:
    try:
        return getattr(getattr(module, "trainer", None), "strategy", None)
    except RuntimeError:  # Lightning's way to say that there is no Trainer
        return None


def _holders(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str]]]:
    """Yield every name of every parameter and persistent buffer, with the module that holds it and its key there."""
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        for key, param in module._parameters.items():
            if param is not None:
                yield prefix + key, (module, key)
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                yield prefix + key, (module, key)


def _tensor(module: nn.Module, key: str) -> torch.Tensor:
    found: torch.Tensor | None = module._parameters.get(key)
    found = module._buffers.get(key) if found is None else found
    assert found is not None
    return found
