"""What a step logs in a pipeline: kept on the rank of the last stage, and logged by all ranks as if it had run once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric

from lit_zero.core.errors import UnsupportedError
from lit_zero.pipeline.micro_batches import mean

Told = list[tuple[str, Any, dict[str, Any]]]  # name, value, further arguments of self.log


class _MetricValue:
    """A metric that was logged: its name in the module, and its value for the batch."""

    def __init__(self, name: str, latest: Any) -> None:
        self.name, self.latest = name, latest


class Logged:
    """What ``self.log`` was given in the micro-batches of one step.

    Args:
        module: the LightningModule.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._values: dict[str, tuple[list[Any], dict[str, Any]]] = {}

    def ignore(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Log nothing: the rank of the last stage does. Stands in for ``self.log``."""

    def keep(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Keep what is logged for one micro-batch. Stands in for ``self.log``."""
        if args:
            raise UnsupportedError(
                f"self.log({name!r}, value, ...) got further arguments by position; name them (prog_bar=True, ...)."
            )
        if isinstance(value, Metric):
            found = next((n for n, m in self._module.named_modules() if m is value), None)
            if found is None:
                raise UnsupportedError(
                    f"self.log({name!r}) got a metric that is not an attribute of {type(self._module).__name__}; the "
                    "other ranks of the pipeline cannot find it. Make it one in __init__."
                )
            value = _MetricValue(found, value._forward_cache)
        elif isinstance(value, torch.Tensor):
            value = value.detach().clone()
        values, arguments = self._values.setdefault(name, ([], dict(kwargs)))
        if values and kwargs.get("batch_size") is not None:
            arguments["batch_size"] += kwargs["batch_size"]
        values.append(value)

    def told(self, weights: Sequence[float]) -> Told:
        """Return what was kept as one call of ``self.log`` for each name, on the host.

        Args:
            weights: the share of each micro-batch in the batch.
        """
        host = torch.device("cpu")
        return [
            (name, _moved(_joined(values, weights, arguments), host), arguments)
            for name, (values, arguments) in self._values.items()
        ]


def log_again(module: Any, told: Told, device: torch.device) -> None:
    """Log what another rank has told.

    Args:
        module: the LightningModule.
        told: see :meth:`Logged.told`.
        device: where values are wanted.
    """
    for name, value, arguments in told:
        if isinstance(value, _MetricValue):
            metric: Any = module.get_submodule(value.name)
            metric._forward_cache = to_device(value.latest, device)
            module.log(name, metric, **arguments)
        else:
            module.log(name, to_device(value, device), **arguments)


def to_device(value: Any, device: torch.device) -> Any:
    """Return a value of any structure with its tensors detached and on ``device``."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to(device), value)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, _MetricValue):
        return _MetricValue(value.name, to_device(value.latest, device))
    return to_device(value, device)


def _joined(values: list[Any], weights: Sequence[float], arguments: dict[str, Any]) -> Any:
    """Return one value for those that were logged for each micro-batch."""
    if isinstance(values[0], _MetricValue):
        latest = [value.latest for value in values]
        if all(isinstance(value, torch.Tensor) and value.numel() == 1 for value in latest):
            joined: Any = mean([value.reshape(()) for value in latest], _even(latest, weights))
        else:
            joined = latest[-1]
        return _MetricValue(values[-1].name, joined)
    tensors = [torch.as_tensor(value).reshape(()) for value in values]
    how = str(arguments.get("reduce_fx", "mean"))
    for word, join in (("sum", torch.sum), ("min", torch.min), ("max", torch.max)):
        if word in how:
            return join(torch.stack(tensors))
    return mean(tensors, _even(tensors, weights))


def _even(values: Sequence[Any], weights: Sequence[float]) -> Sequence[float]:
    """Return the weights of micro-batches, or even ones for a value that was not logged for every one."""
    return weights if len(values) == len(weights) else [1 / len(values)] * len(values)
