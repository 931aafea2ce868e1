"""Find the block list: the modules between which the model can be cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn
from torch.nn.utils import parametrize

from lit_zero.core.errors import ConfigError, UnsupportedError, did_you_mean
from lit_zero.pipeline.plan import check_boundaries, check_costs, check_count
from lit_zero.pipeline.policy import Pipeline

_LISTS = (nn.ModuleList, nn.Sequential)
_LARGE_LIST = 0.1  # a list of blocks counts as large from this share of the largest list's parameters

AUTO = "auto"


def block_lists(model: nn.Module, blocks: str | Sequence[str] = AUTO) -> dict[str, list[str]]:
    """Return the candidates for the block list: name of each list and the names of its entries, largest list first.

    Args:
        model: the whole module.
        blocks: ``"auto"``, or the dotted path of one list, or the paths of several in the order in which they run.

    Raises:
        ConfigError: if a path is not that of a ``ModuleList`` or ``Sequential``; the nearest ones are named.
        UnsupportedError: if nothing is repeated in the model.
    """
    if blocks == AUTO:
        return _repeated(model)
    paths = [blocks] if isinstance(blocks, str) else list(blocks)
    valid = [name for name, module in model.named_modules() if isinstance(module, _LISTS) and len(module)]
    for path in paths:
        if path not in valid:
            raise ConfigError(
                f"pipeline.blocks={path!r} is not the path of a ModuleList or Sequential of the model. "
                f"{did_you_mean(path, valid) if valid else 'It has none.'}"
            )
    return {path: [_join(path, child) for child, _ in model.get_submodule(path).named_children()] for path in paths}


def check_fit(model: nn.Module, policy: Pipeline) -> None:
    """Check, before anything has run, that a pipeline fits a model.

    Args:
        model: the whole module; it may be on the meta device.
        policy: the user's choice.

    Raises:
        ConfigError: if the block list is not there, or shorter than ``policy`` needs.
        UnsupportedError: if nothing is repeated in the model.
    """
    lists = block_lists(model, policy.blocks)
    count = sum(map(len, lists.values()))
    check_count(policy.stages, count)
    if policy.blocks == AUTO and len(lists) > 1:
        return  # only a run shows which of them form one sequence
    if policy.boundaries is not None:
        check_boundaries(policy.boundaries, count)
    if not isinstance(policy.balance, str):
        check_costs(policy.balance, count)


def _repeated(model: nn.Module) -> dict[str, list[str]]:
    """Return the large outermost lists that repeat one class of module with parameters."""
    sizes: dict[str, int] = {}
    entries: dict[str, list[str]] = {}
    inside: set[str] = set()
    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if name and (parent in inside or name in entries.get(parent, ())):
            inside.add(name)  # only outermost lists: blocks are not cut into their own repeated parts
            continue
        if not isinstance(module, _LISTS) or isinstance(module, parametrize.ParametrizationList):
            continue
        children = list(module.named_children())
        kinds = Counter(_kind(child) for _, child in children if any(p.numel() for p in child.parameters()))
        kind, repeated = kinds.most_common(1)[0] if kinds else (None, 0)
        if repeated < 2:
            continue
        if isinstance(module, nn.Sequential):  # an embedding in front and a head behind are no blocks
            places = [place for place, (_, child) in enumerate(children) if _kind(child) is kind]
            children = children[places[0] : places[-1] + 1]
        entries[name] = [_join(name, child) for child, _ in children]
        sizes[name] = sum(p.numel() for _, child in children for p in child.parameters())
    if not entries:
        raise UnsupportedError(
            "The model has no ModuleList or Sequential that repeats a class of module, so it is not known where to "
            "split it. Keep its layers in one and name that with pipeline.blocks."
        )
    largest = max(sizes.values())
    names = sorted((n for n in entries if sizes[n] >= _LARGE_LIST * largest), key=lambda n: -sizes[n])
    return {name: entries[name] for name in names}


def in_order(lists: dict[str, list[str]], ran: Sequence[str]) -> list[str]:
    """Return the entries of the lists that form one sequence: all of the first run before any of the second.

    Args:
        lists: candidates, the largest first.
        ran: the names of the entries, in the order in which they ran.
    """
    chosen: list[list[str]] = []
    spans: list[tuple[int, int]] = []
    for entries in lists.values():
        places = [place for place, name in enumerate(ran) if name in entries]
        if not places:
            continue
        first, last = places[0], places[-1]
        if all(last < low or high < first for low, high in spans):
            spans.append((first, last))
            chosen.append(entries)
    order = sorted(range(len(chosen)), key=lambda index: spans[index])
    return [name for index in order for name in chosen[index]]


def _join(path: str, child: str) -> str:
    return f"{path}.{child}" if path else child


def _kind(module: nn.Module) -> type:
    """Return the class that a module was made of: a parametrized one has a class of its own."""
    return parametrize.type_before_parametrizations(module)
