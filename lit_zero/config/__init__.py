"""The Hydra side of lit_zero: groups, types, checks before anything is launched, and sweeps of multi-process jobs.

Nothing here imports Hydra until it is used, so a script without Hydra does not pay for it. In a Hydra script, put
:func:`main` where ``hydra.main`` would stand, or call :func:`validate` first thing in a script that keeps
``hydra.main``.
"""

from lit_zero.config.entry import main
from lit_zero.config.validate import validate

__all__ = ["main", "validate"]
