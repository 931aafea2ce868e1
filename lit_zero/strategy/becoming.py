"""[Note: one word for Trainer and Fabric] A Trainer and Fabric want strategies of two different classes, and neither
knows which of them a ``ZeroStrategy(...)`` is made for. It is made for a Trainer; when Fabric hands it its precision
plugin, which no Trainer does, it becomes a ``FabricZeroStrategy`` with the arguments it was made with. Names
(``"zero3"``) stand for the right class from the start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from lit_zero.core.errors import UnsupportedError
from lit_zero.strategy.fabric import FabricZeroStrategy

if TYPE_CHECKING:
    from typing import Any as _Base
else:
    _Base = object


class BecomesFabric(_Base):
    """What a Trainer's strategy does if it is given to Fabric."""

    _given: dict[str, Any]  # all arguments, as they came

    def _remember(self, arguments: dict[str, Any]) -> None:
        """Take ``locals()`` of the constructor, where nothing else has been set yet."""
        self._given = {k: v for k, v in arguments.items() if k not in ("self", "kwargs", "__class__")}
        self._given.update(arguments["kwargs"])

    def _become_fabric(self, plugin: Any) -> None:
        if type(self).__name__ != "ZeroStrategy":  # a class derived from it would lose what it adds
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
