"""Make the groups in ``lit_zero.conf`` known to Hydra, without importing Hydra for users who do not use it."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_HYDRA = "hydra.core.plugins"


def register() -> None:
    """Let every Hydra app of this process find lit_zero's groups; called when lit_zero is imported.

    If Hydra is not imported yet, the registration waits until it is: importing Hydra takes longer than importing
    lit_zero, and it need not be installed.
    """
    if _HYDRA in sys.modules:
        _register_now()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(_HYDRA, _register_now))


def _register_now() -> None:
    # Hydra 1.3 looks for plugins in packages named hydra_plugins, which an editable install hides from it (Hydra issue
    # 2359): so it is told.
    from hydra.core.plugins import Plugins

    from lit_zero.config import schema
    from lit_zero.config.plugin import LitZeroSearchPath

    Plugins.instance().register(LitZeroSearchPath)
    schema.store()


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Call ``action`` once, right after module ``name`` has been imported."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self._name = name
        self._action = action
        self._loader: importlib.abc.Loader | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self._loader = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec) if self._loader is not None else None

    def exec_module(self, module: ModuleType) -> None:
        if self._loader is not None:
            # The module keeps its own loader: importlib.resources and inspect ask it for sources.
            module.__loader__ = self._loader
            if module.__spec__ is not None:
                module.__spec__.loader = self._loader
            self._loader.exec_module(module)
        self._action()
