"""Kernels under Triton's interpreter on every machine, and compiled where there is a GPU.

Triton reads ``TRITON_INTERPRET`` when it is imported (its own library is made of kernels) and whenever a kernel is
defined. So the interpreted triton and our kernels on it are modules of their own, which take the places of the others
while a test wants them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from types import ModuleType

import lit_zero.kernels
import pytest
import torch

_INTERPRETED: dict[str, ModuleType] = {}


def _taken_out() -> dict[str, ModuleType]:
    """Take triton and the kernels on it out of ``sys.modules``; the part written in C++ cannot be there twice."""
    names = [
        name
        for name in sys.modules
        if (name.split(".")[0] == "triton" and not name.startswith("triton._C"))
        or name.startswith("lit_zero.kernels.triton_")
    ]
    for name in names:  # ``from package import module`` looks there first
        vars(lit_zero.kernels).pop(name.removeprefix("lit_zero.kernels."), None)
    return {name: sys.modules.pop(name) for name in names}


@contextlib.contextmanager
def interpreting() -> Iterator[torch.device]:
    """Inside, kernels run under the interpreter; give the device that they work on."""
    before, said = _taken_out(), os.environ.get("TRITON_INTERPRET")
    sys.modules.update(_INTERPRETED)
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield torch.device("cpu")
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if said is not None:
            os.environ["TRITON_INTERPRET"] = said
        _INTERPRETED.update(_taken_out())
        sys.modules.update(before)
        # Names of their own for the end: Python takes apart what is in ``sys.modules``, and for what is elsewhere
        # nanobind tells of leaks.
        sys.modules.update({f"interpreted {name}": module for name, module in _INTERPRETED.items()})


@pytest.fixture
def interpreted() -> Iterator[torch.device]:
    """Let kernels run under the interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton on this platform")
    with interpreting() as device:
        yield device


@pytest.fixture
def compiled() -> torch.device:
    """Let kernels be compiled, as they are without the fixture above; give the device that they work on."""
    return torch.device("cuda", 0)


@pytest.fixture(params=["interpreted", pytest.param("compiled", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run: on the CPU, interpreted, and on a GPU."""
    if request.param == "interpreted":
        interpreted: torch.device = request.getfixturevalue("interpreted")
        return interpreted
    return torch.device("cuda", 0)
