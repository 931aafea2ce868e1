"""Lightning's own callbacks, on shards.

Some of Lightning's callbacks copy the module before it is sharded, or write to its parameters. The user's callback
stays the object that it is; when a run begins, a class of the same name is laid over its class, which does on shards
what touches tensors. What decides when to act, by which formula, and what goes into a checkpoint under which key is
still Lightning's code, or the user's subclass of it. The name matters: it is the key of the callback's state, so plain
Lightning and lit_zero read each other's checkpoints.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from lit_zero.core.errors import UnsupportedError
from lit_zero.strategy.flavour import TrainerFn


class OnShards:
    """What is laid over a callback.

    Attributes:
        stock: name of Lightning's class.
        replaced: its methods that are done differently here, without a call of the original.
    """

    stock: ClassVar[str]
    replaced: ClassVar[tuple[str, ...]]
    _home: Callable[[], Any]
    _fitting = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin a run: under this strategy without the original's ``setup``, which would copy the whole module."""
        if trainer.strategy is not self._home():  # the callback has gone to a Trainer with another strategy
            self.__class__ = type(self).__bases__[1]
            self.setup(trainer, pl_module, stage)
            return
        self._fitting = trainer.state.fn == TrainerFn.FITTING
        self.begin(trainer, pl_module)

    def begin(self, trainer: Any, pl_module: Any) -> None:
        """Forget the run before. There is no engine yet, and the module is whole."""


def lay_over(strategy: Any, callbacks: Iterable[Any], layers: Iterable[type[OnShards]]) -> None:
    """Let callbacks work on the shards of ``strategy``, from their ``setup`` on.

    Args:
        strategy: the ZeroStrategy of the run that begins.
        callbacks: all callbacks of its Trainer.
        layers: what there is to lay over them.

    Raises:
        UnsupportedError: for a subclass that overrides what is done differently here.
    """
    for callback in callbacks:
        for layer in layers:
            # By name: there are two Lightnings.
            stock = next((kind for kind in type(callback).__mro__ if kind.__name__ == layer.stock), None)
            if stock is None:
                continue
            if not isinstance(callback, layer):
                base = type(callback)
                _refuse_overridden(base, stock, layer)
                names = {"__qualname__": base.__qualname__, "__module__": base.__module__}
                callback.__class__ = type(base.__name__, (layer, base), names)
            callback._home = weakref.ref(strategy)


def _refuse_overridden(kind: type[Any], stock: type[Any], layer: type[OnShards]) -> None:
    own = [n for n in ("setup", *layer.replaced) if getattr(kind, n, None) is not getattr(stock, n, None)]
    if own:
        raise UnsupportedError(
            f"The callback {kind.__name__} overrides {', '.join(own)} of Lightning's {stock.__name__}. ZeroStrategy "
            "replaces those methods by ones that work on shards, so the override would never run. Move its code to "
            "another hook (on_fit_start comes right after the model is set up), or use strategy='ddp'."
        )
