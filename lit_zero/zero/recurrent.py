"""Recurrent layers on GPUs want their weights in one piece of memory of their own; here they have ours."""

from __future__ import annotations

from torch import nn


def _stay() -> None:
    """Take the place of ``flatten_parameters``."""


class KeptInPlace:
    """Keeps cuDNN from moving the weights of recurrent layers out of the engine's buffers.

    ``nn.RNNBase.flatten_parameters`` runs at every ``.to()``, and often at the start of a user's forward. Without it
    cuDNN copies the weights together at each call, and warns of it.

    Args:
        model: the whole module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
        for layer in self._layers:
            layer.flatten_parameters = _stay  # type: ignore[method-assign]

    def remove(self) -> None:
        """Let the weights move again."""
        for layer in self._layers:
            layer.__dict__.pop("flatten_parameters", None)
