"""What stands before a module's own ``state_dict``, ``load_state_dict`` and copies: they see the parameters' memory,
not the masters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Guard:
    """Calls ``check`` before anything reads or writes the parameters of ``module`` behind the engine's back.

    Args:
        module: every submodule that has parameters is guarded.
        check: called with the words for what is being done, such as ``"Block.state_dict()"``; raises to refuse it.
    """

    def __init__(self, module: nn.Module, check: Callable[[str], None]) -> None:
        self._check = check
        self._handles: list[RemovableHandle] = []
        previous = next((hook for hook in module._state_dict_pre_hooks.values() if isinstance(hook, Guard)), None)
        if previous is not None:  # of an earlier strategy: it would keep that one's engine alive
            previous.remove()
        for each in module.modules():
            if any(True for _ in each.parameters()):
                self._handles.append(each.register_state_dict_pre_hook(self))
                self._handles.append(each.register_load_state_dict_pre_hook(self))

    def __call__(self, module: nn.Module, *_: Any) -> None:
        """Called by torch, of which module is about to be read or written."""
        self._check(f"{type(module).__name__}.state_dict() and load_state_dict()")

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        """Called where a guarded module is copied; the copy is nobody's and needs no guard."""
        self._check("copy.deepcopy() of a module")
        return _nothing

    def remove(self) -> None:
        """Guard no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _nothing(*_: Any) -> None:
    """Guards nothing."""
