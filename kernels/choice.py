"""Where a Triton kernel runs, and where its plain-torch reference does."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


def runs_kernel(tensor: torch.Tensor) -> bool:
    """Return whether what works on ``tensor`` runs as a Triton kernel: on a GPU, or anywhere under Triton's interpreter
    (``TRITON_INTERPRET=1``); else the plain-torch reference does.
    """
    return _has_triton() and (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
