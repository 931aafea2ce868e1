"""Triton kernels in the two ways they can run: interpreted on the CPU, in every run of the tests, and compiled.

Whether a kernel is interpreted is decided when its module is imported, so both kinds of the modules are kept here, and
a fixture puts one of them in its place.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import lit_zero.kernels
import pytest
import torch

NAMES = [f"lit_zero.kernels.{path.stem}" for path in sorted(Path(lit_zero.kernels.__file__).parent.glob("triton_*.py"))]


@functools.cache
def modules(interpreted: bool) -> dict[str, ModuleType]:
    """Return the modules with Triton kernels, by name, imported with or without ``TRITON_INTERPRET=1``."""
    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    setting = os.environ.pop("TRITON_INTERPRET", None)
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        return {name: importlib.import_module(name) for name in NAMES}
    finally:
        for name in NAMES:
            sys.modules.pop(name, None)
        sys.modules.update(before)
        os.environ.pop("TRITON_INTERPRET", None)
        if setting is not None:
            os.environ["TRITON_INTERPRET"] = setting


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Let kernels be interpreted; return the device that they work on."""
    pytest.importorskip("triton", reason="triton has no build for this system")
    for name, module in modules(True).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return torch.device("cpu")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Let kernels be compiled; return the device that they work on."""
    pytest.importorskip("triton", reason="triton has no build for this system")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, module in modules(False).items():
        monkeypatch.setitem(sys.modules, name, module)
    return torch.device("cuda", 0)
