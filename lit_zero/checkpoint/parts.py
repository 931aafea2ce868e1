"""What both formats share: one optimizer's part on one rank, and whether what was saved fits what is loaded into."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lit_zero.core.errors import CheckpointError
from lit_zero.core.piece import ParamState

SHOWN = 5  # names listed in a message before "..."


@dataclass
class OptimizerParts:
    """One optimizer as this rank sees it.

    Attributes:
        states: one per parameter of the optimizer, the same ones on every rank. A rank that holds no element of a
            parameter may leave its ``tensors`` and ``scalars`` out.
        param_groups: as in ``torch.optim.Optimizer.state_dict()["param_groups"]``: plain values, and ``params`` a
            list of positions.
    """

    states: list[ParamState]
    param_groups: list[dict[str, Any]]

    def own_scalars(self, rank: int) -> dict[int, dict[str, Any]]:
        """Return ``{position: scalars}`` of the parameters this rank speaks for, tensors moved to the host.

        The rank that holds a parameter's first element speaks for it: it surely has the state. Rank 0 speaks for
        those without tensors.
        """
        found = {}
        for state in self.states:
            first = any(p.start == 0 and p.numel for p in state.tensors.values())
            if state.scalars and (first or (rank == 0 and not any(p.numel for p in state.tensors.values()))):
                found[state.index] = {k: on_host(v) for k, v in state.scalars.items()}
        return found


def on_host(value: Any) -> Any:
    """Return a tensor's values in host memory of their own, and anything else as it is."""
    return value.detach().to("cpu", copy=True) if isinstance(value, torch.Tensor) else value


def check_tiling(name: str, shape: Sequence[int], ranges: Iterable[tuple[int, int]]) -> None:
    """Check that ranges ``(start, length)`` of a flattened tensor, in any order, cover it exactly once.

    Raises:
        CheckpointError: naming the tensor and the first gap or overlap.
    """
    end = 0
    for start, length in sorted(r for r in ranges if r[1]):
        if start != end:
            word = "twice" if start < end else "by no rank"
            raise CheckpointError(
                f"Cannot save {name!r}: elements from {min(start, end)} on are held {word}. This is a bug in lit_zero."
            )
        end = start + length
    if end != math.prod(shape):
        raise CheckpointError(
            f"Cannot save {name!r}: {math.prod(shape)} elements expected, {end} held. This is a bug in lit_zero."
        )


def match_names(
    shapes: Mapping[str, Sequence[int]],
    others: Iterable[str],
    aliases: Mapping[str, str],
    saved: Mapping[str, Sequence[int] | None],
    saved_aliases: Mapping[str, str],
    strict: bool,
    where: str,
) -> dict[str, str]:
    """Find for every parameter of the model the name under which the checkpoint holds it.

    Args:
        shapes: global shape of every parameter of the model, by its one name.
        others: the model's other entries (buffers, extra state).
        aliases: the model's further names of tied parameters: ``{alias: name in shapes}``.
        saved: what the checkpoint holds; shape, or ``None`` for what is not a tensor.
        saved_aliases: the checkpoint's further names: ``{alias: name in saved}``.
        strict: refuse names that only the model or only the checkpoint has.
        where: the checkpoint, for the message.

    Returns:
        ``{name in shapes: name in saved}``; a parameter that the checkpoint lacks is left out (only if not ``strict``).

    Raises:
        CheckpointError: naming what does not fit, with both shapes. Shapes must agree even if not ``strict``.
    """
    others = list(others)
    second_names: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        second_names.setdefault(name, []).append(alias)
    sources = {}
    for name in shapes:
        for candidate in [name, *second_names.get(name, [])]:
            source = candidate if candidate in saved else saved_aliases.get(candidate)
            if source is not None:
                sources[name] = source
                break
    known = {*shapes, *others, *aliases}
    missing = [n for n in [*shapes, *others] if n not in sources and n not in saved]
    unexpected = [n for n in [*saved, *saved_aliases] if n not in known]
    wrong = []
    for name, source in sources.items():
        shape = saved[source]
        if shape is None or tuple(shape) != tuple(shapes[name]):
            wrong.append(f"{name} is {_shape(shape)} in the checkpoint and {_shape(shapes[name])} in the model")
    problems = []
    if strict and missing:
        problems.append(f"not in the checkpoint ({len(missing)}): {listed(missing)}")
    if strict and unexpected:
        problems.append(f"only in the checkpoint ({len(unexpected)}): {listed(unexpected)}")
    if wrong:
        problems.append(f"different shapes ({len(wrong)}): {listed(wrong, '; ')}")
    if problems:
        advice = "Build the model with the settings that wrote the checkpoint"
        if not wrong:
            advice += ", or set strict_loading=False on the LightningModule to load what has the same name"
        raise CheckpointError(
            f"The checkpoint '{where}' is not one of this model. " + "; ".join(problems) + f". {advice}."
        )
    return sources


def check_groups(saved: Sequence[Mapping[str, Any]], current: Sequence[Mapping[str, Any]], where: str) -> None:
    """Check that two optimizers have as many parameter groups, each with as many parameters.

    Raises:
        CheckpointError: with the sizes of both.
    """
    sizes, wanted = [len(g["params"]) for g in saved], [len(g["params"]) for g in current]
    if sizes != wanted:
        raise CheckpointError(
            f"The optimizer in the checkpoint '{where}' has parameter groups of {sizes} parameters, this one of"
            f" {wanted}. Return the same groups from configure_optimizers, or load the weights alone."
        )


def check_states(state: ParamState, found: Mapping[str, Sequence[int]], where: str) -> None:
    """Check that the checkpoint holds the state tensors that the optimizer has of a parameter, in its shape.

    Args:
        state: where the state goes.
        found: shapes of the state tensors in the checkpoint, by key.
        where: the checkpoint, for the message.

    Raises:
        CheckpointError: naming the parameter and both sets of keys, or both shapes.
    """
    if set(found) != set(state.tensors):
        raise CheckpointError(
            f"The checkpoint '{where}' holds {listed(sorted(found)) or 'no tensors'} as the optimizer's state of"
            f" {state.name!r}, but this optimizer has {listed(sorted(state.tensors)) or 'no tensors'}. Use the"
            " optimizer that wrote the checkpoint, or load the weights alone."
        )
    for key, piece in state.tensors.items():
        if tuple(found[key]) != tuple(piece.shape):
            raise CheckpointError(
                f"The optimizer's {key!r} of {state.name!r} is {_shape(found[key])} in the checkpoint '{where}' and"
                f" {_shape(piece.shape)} in this optimizer. Build the model with the settings that wrote the"
                " checkpoint."
            )


def _shape(shape: Sequence[int] | None) -> str:
    return "not a tensor" if shape is None else str(tuple(shape))


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """Return the first few names for a message."""
    return separator.join(names[:SHOWN]) + (f"{separator}..." if len(names) > SHOWN else "")
