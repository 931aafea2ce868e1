"""In which order an optimizer's settings and state are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lit_zero.zero.binding import Binding, Segment
from tests.pool import RankPool
from tests.strategy.harness import Fit, train
from tests.strategy.test_checkpoints import save

Ranks = Callable[[int], RankPool]


def resume(fit: Fit, folder: Path) -> set[float]:
    """Return the values of eps that the optimizer had when room was made for its state."""
    seen: set[float] = set()
    make = Binding._empty_state

    def note(self: Binding, segment: Segment, *arguments: Any) -> dict[str, Any]:
        seen.update(group["eps"] for group in self.optimizer.param_groups)
        return make(self, segment, *arguments)

    with mock.patch.object(Binding, "_empty_state", note):
        train(replace(fit, before=other_eps), folder)
    return seen


def other_eps(trainer: Any, module: Any) -> None:
    configure = module.configure_optimizers

    def changed() -> Any:
        configured = configure()
        for group in configured["optimizer"].param_groups:
            group["eps"] = 0.5
        return configured

    module.configure_optimizers = changed


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_a_state_is_made_under_the_settings_of_the_checkpoint(ranks, tmp_path, form):
    """They say on which device a step counter belongs (fused, capturable), which a CPU cannot show."""
    arguments = {"optimizer": "adamw", "lr": 1e-2}
    first = Fit({"zero": "stage2", "checkpoint": form}, 2, arguments=arguments, epochs=1, look=save)
    ranks(2).run(train, first, tmp_path)
    second = replace(first, epochs=2, look=None, resume=tmp_path / "saved.ckpt")
    assert ranks(2).run(resume, second, tmp_path / "second") == [{1e-3}, {1e-3}]
