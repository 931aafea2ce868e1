"""The states of random generators: those that everybody draws from, and those that somebody holds."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Iterable
from typing import Any

import torch

_MT19937_BYTES = 4 * 625  # of its state: 624 numbers and a position


def random_states() -> dict[str, Any]:
    """Return the states of the generators that everybody draws from, in a form that can be compared and sent.

    They are torch's, on the CPU and on the present CUDA device, Python's, and numpy's if it is in use.
    """
    found, numpy = _states_beside_numpys(), _numpy()
    if numpy:
        kind, keys, *rest = numpy.random.get_state()
        found["numpy"] = (kind, keys.tobytes(), *rest)
    return found


def random_marks() -> dict[str, Any]:
    """Return what tells whether somebody draws from the generators from now on, see :func:`drawn_since`. It takes a
    third of the time of :func:`random_states`.
    """
    found, numpy = _states_beside_numpys(), _numpy()
    if numpy:
        found["numpy"] = _numpys_mark(numpy)
    return found


def drawn_since(marks: dict[str, Any]) -> dict[str, Any]:
    """Return the states of the generators from which somebody has drawn.

    Args:
        marks: what :func:`random_marks` has returned right after the generators were seeded.
    """
    now = random_marks()
    drawn = {name for name, mark in now.items() if mark != marks.get(name)}
    return {name: state for name, state in random_states().items() if name in drawn} if drawn else {}


def set_random_states(states: dict[str, Any]) -> None:
    """Go on from what :func:`random_states` gave; a generator that is left out goes on as it is."""
    if "torch" in states:
        torch.set_rng_state(_tensor(states["torch"]))
    if "cuda" in states:
        torch.cuda.set_rng_state(_tensor(states["cuda"]))
    if "random" in states:
        random.setstate(states["random"])
    if "numpy" in states:
        numpy = _numpy()
        kind, keys, *rest = states["numpy"]
        numpy.random.set_state((kind, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))


def seed_everything(seed: int) -> None:
    """Seed the generators that everybody draws from.

    Args:
        seed: below ``1 << 63``.
    """
    # Not torch.manual_seed: for kinds of devices that are not in use yet, it notes where it was called from, and that
    # takes milliseconds.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    random.seed(seed)
    numpy = _numpy()
    if numpy:
        numpy.random.seed(seed % (1 << 32))


def generators_in(values: Iterable[Any]) -> list[Any]:
    """Return the generators among some values: torch's, Python's and numpy's kinds."""
    numpy = _numpy()
    kinds = {torch.Generator, random.Random}
    if numpy:
        kinds |= {numpy.random.Generator, numpy.random.RandomState}
    return [value for value in values if type(value) in kinds]


def generator_state(generator: Any) -> Any:
    """Return the state of what :func:`generators_in` has found."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    bits = getattr(generator, "bit_generator", None)
    return generator.get_state() if bits is None else bits.state


def set_generator_state(generator: Any, state: Any) -> None:
    """Let a generator go on from what :func:`generator_state` gave."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _numpy() -> Any:
    return sys.modules.get("numpy")


def _states_beside_numpys() -> dict[str, Any]:
    found: dict[str, Any] = {"torch": _bytes(torch.get_rng_state()), "random": random.getstate()}
    if torch.cuda.is_initialized():
        found["cuda"] = _bytes(torch.cuda.get_rng_state())
    return found


def _numpys_mark(numpy: Any) -> Any:
    """Return what changes with every number drawn after a seeding.

    numpy takes its state apart number by number, 624 of them; here its memory is looked at as it is.
    """
    bits: Any = getattr(numpy.random, "get_bit_generator", lambda: None)()  # numpy 1.24 and later
    if type(bits) is not numpy.random.MT19937:
        return repr(numpy.random.get_state())
    return ctypes.string_at(bits.ctypes.state_address, _MT19937_BYTES)


def _bytes(state: torch.Tensor) -> bytes:
    found: bytes = state.numpy().tobytes()
    return found


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
