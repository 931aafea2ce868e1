"""Layers, and optimizers for them, that ranks cannot train together, or not in the way the user has chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lit_zero.comm.batch_norm import SyncBatchNorm
from lit_zero.core.errors import UnsupportedError


def refuse_max_norm(module: nn.Module, ranks: int) -> None:
    """Check a module for embeddings that write to their own weight in the forward.

    Args:
        module: the whole module.
        ranks: over which batches are divided.

    Raises:
        UnsupportedError: naming the embedding.
    """
    for name, layer in module.named_modules():
        if ranks > 1 and isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.max_norm is not None:
            raise UnsupportedError(
                f"{name!r} ({type(layer).__name__}) has max_norm={layer.max_norm}: its forward writes to its weight, "
                "on every rank for the rows of its own batch, so ranks would train different weights. Leave max_norm "
                "out and normalise what it returns (torch.nn.functional.normalize, or a clamp of the norm)."
            )


def refuse_norms_that_do_more(module: nn.Module) -> None:
    """Check a module whose batch normalisation is about to be synchronised for layers that would lose something by it:
    torch puts its own ``SyncBatchNorm`` in the place of every class derived from its batch norms.

    Raises:
        UnsupportedError: naming the layer.
    """
    plain = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, SyncBatchNorm.forward)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and type(layer).forward not in plain:
            raise UnsupportedError(
                "sync_batchnorm=True would put torch's SyncBatchNorm in the place of "
                f"{name!r} ({type(layer).__name__}), and what its own forward does besides (an activation, for "
                "example) would be lost. Convert the model yourself, with what its library has for that "
                "(timm.layers.convert_sync_batchnorm), and leave sync_batchnorm out."
            )


def refuse_sparse_optimizers(optimizers: Sequence[Any]) -> None:
    """Check for an optimizer that steps on sparse gradients only.

    Raises:
        UnsupportedError: naming what to use instead.
    """
    if any(isinstance(optimizer, torch.optim.SparseAdam) for optimizer in optimizers):
        raise UnsupportedError(
            "SparseAdam steps on sparse gradients only; lit_zero makes the gradients of nn.Embedding(sparse=True) "
            "dense, since they are exchanged in flat buffers. Use SGD or Adagrad, which give the same result on "
            "either, or AdamW."
        )
