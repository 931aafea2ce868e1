"""The collectives whose names torch changes between releases, under one name.

torch 2.13 renames ``all_gather_into_tensor`` / ``reduce_scatter_tensor`` to ``all_gather_single`` /
``reduce_scatter_single`` and warns about the old names; torch 2.11 and 2.12 know only those.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def _first(*names: str) -> Any:
    for name in names:
        found = getattr(dist, name, None)
        if found is not None:
            return found
    raise ImportError(f"torch.distributed has none of {', '.join(names)}; lit_zero supports torch 2.11 to 2.13.")


all_gather_single = _first("all_gather_single", "all_gather_into_tensor")
reduce_scatter_single = _first("reduce_scatter_single", "reduce_scatter_tensor")
