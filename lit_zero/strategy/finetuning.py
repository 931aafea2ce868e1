"""Lightning's ``BaseFinetuning`` beside an optimizer whose groups hold shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lit_zero.strategy.refusals import is_a
from lit_zero.zero.engine import Engine


def name_groups(trainer: Any, engine: Callable[[], Engine]) -> None:
    """Let finetuning callbacks, which note the parameters of every group, find the names of those in our groups.

    Args:
        trainer: its callbacks of that kind get a method as an attribute of their own.
        engine: returns the engine.
    """

    def apply_mapping(param_groups: list[dict[str, Any]], mapping: dict[Any, Any]) -> list[dict[str, Any]]:
        noted = []
        for group in param_groups:
            known = next((names for binding in engine().bindings for names in binding.names_in(group)), None)
            params = [mapping[param] for param in group["params"]] if known is None else known
            noted.append({**{key: value for key, value in group.items() if key != "params"}, "params": params})
        return noted

    for callback in trainer.callbacks:
        if is_a(callback, "BaseFinetuning"):
            callback._apply_mapping_to_param_groups = apply_mapping
