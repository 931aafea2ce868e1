"""Which modules' parameters travel together.

A *unit* is a module whose parameters are gathered before it runs and reduced after its backward. The *root* unit holds
what belongs to no other: parameters outside the units, parameters shared between units (tied weights), and it stays
whole from forward to step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from lit_zero.core.blocks import choose_modules
from lit_zero.core.errors import UnsupportedError
from lit_zero.precision.policy import Lowering
from lit_zero.zero.info import ParamInfo
from lit_zero.zero.policy import Units


@dataclass
class UnitPlan:
    """One unit before it has memory.

    Attributes:
        name: module name, ``""`` for the root.
        module: the module whose forward the parameters serve.
        infos: its parameters.
        outer: it contains other units, so it is in use while they are.
    """

    name: str
    module: nn.Module
    infos: list[ParamInfo] = field(default_factory=list)
    outer: bool = False


def plan_units(model: nn.Module, units: Units, lowering: Lowering) -> list[UnitPlan]:
    """Divide the parameters of ``model`` into units: the root first, then the others in order of registration.

    Args:
        model: the whole module.
        units: the user's choice, see :class:`~lit_zero.zero.policy.Zero`.
        lowering: decides each parameter's compute dtype.

    Raises:
        ConfigError: if ``units`` names a module or class that does not exist.
        UnsupportedError: if a parameter cannot be managed; it is named.
    """
    for name, param in model.named_parameters():
        _refuse_lazy(name, param)  # nothing else can be asked of such a parameter
    modules = dict(model.named_modules())
    chosen = choose_modules(model, units, "zero.units")
    plans = {name: UnitPlan(name, module) for name, module in modules.items() if name == "" or name in chosen}
    for name, plan in plans.items():
        prefix = f"{name}." if name else ""
        plan.outer = name == "" or any(other != name and other.startswith(prefix) for other in plans)

    canonical = {module: name for name, module in modules.items()}  # a module reached by several names has one home
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    homes: dict[nn.Parameter, set[str]] = defaultdict(set)
    owners: dict[nn.Parameter, list[nn.Module]] = defaultdict(list)
    for full_name, param in model.named_parameters(remove_duplicate=False):
        owner = model.get_submodule(full_name.rpartition(".")[0])
        names[param].append(full_name)
        homes[param].add(_home(canonical[owner], plans))
        owners[param].append(owner)
    for param, found in names.items():
        if param.numel() == 0:
            continue
        _check(found[0], param)
        home = homes[param].pop() if len(homes[param]) == 1 else ""
        compute = lowering.compute_dtype(param, owners[param])
        plans[home].infos.append(
            ParamInfo(found[0], param, compute, param.dtype, aliases=found[1:], trainable=param.requires_grad)
        )
    return [plan for plan in plans.values() if plan.infos or plan.name == ""]


def _home(owner: str, plans: dict[str, UnitPlan]) -> str:
    """Return the innermost unit that contains module ``owner``."""
    while owner not in plans:
        owner = owner.rpartition(".")[0]
    return owner


def cut_evenly(infos: Sequence[ParamInfo], parts: int = 3, smallest: int = 1 << 18) -> list[list[ParamInfo]]:
    """Cut the parameters of a unit into at most ``parts`` runs, the largest as small as possible.

    Args:
        infos: the parameters in order of registration, at least one.
        parts: most runs.
        smallest: a unit is cut only where this many elements are left to each run.
    """
    sizes = [info.param.numel() for info in infos]
    parts = max(1, min(parts, len(sizes), sum(sizes) // smallest))

    def runs_below(limit: int) -> list[list[ParamInfo]]:
        runs: list[list[ParamInfo]] = [[]]
        filled = 0
        for info, size in zip(infos, sizes, strict=True):
            if runs[-1] and filled + size > limit:
                runs.append([])
                filled = 0
            runs[-1].append(info)
            filled += size
        return runs

    low, high = max(sizes), sum(sizes)
    while low < high:  # the smallest limit that needs no more runs than allowed
        middle = (low + high) // 2
        low, high = (low, middle) if len(runs_below(middle)) <= parts else (middle + 1, high)
    return runs_below(low)


def _refuse_lazy(name: str, param: nn.Parameter) -> None:
    if isinstance(param, nn.parameter.UninitializedParameter):
        raise UnsupportedError(
            f"Parameter {name!r} of a lazy module has no shape yet. Run one forward before training, or give the "
            "module its sizes."
        )


def _check(name: str, param: nn.Parameter) -> None:
    if type(param.data) is not torch.Tensor or param.layout is not torch.strided:
        raise UnsupportedError(
            f"Parameter {name!r} is a {type(param.data).__name__} of layout {param.layout}; lit_zero shards plain "
            "dense tensors. "
            "Convert it before the strategy's setup."
        )
    if param.is_complex() and param.requires_grad:
        raise UnsupportedError(
            f"Parameter {name!r} is complex; lit_zero trains real parameters. Keep its real and imaginary parts in one "
            "real parameter (torch.view_as_real) and view it as complex in the forward."
        )
