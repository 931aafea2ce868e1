"""A gradient norm that is to be clipped and is no number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.pool import RankFailure
from tests.strategy.harness import STAGES, Fit, LitGPT, train, train_all


class OneBadGradient(LitGPT):
    """One element of the gradient is no number in the second step; the loss is."""

    def on_after_backward(self) -> None:
        if self.global_step == 1 and self.trainer.world_size > 1:
            strategy: Any = self.trainer.strategy
            gradient = strategy.full.gradient("model.norm.weight")
            gradient[3] = float("nan")
            strategy.full.set_gradient("model.norm.weight", gradient)


CLIPPED = Fit({"zero": "stage2"}, 2, {"gradient_clip_val": 0.5, "max_steps": 3}, OneBadGradient)


@pytest.mark.parametrize("stage", STAGES)
def test_ends_the_run_before_a_weight_is_changed(ranks, tmp_path, stage):
    with pytest.raises(RankFailure) as failure:
        ranks(2).run(train, replace(CLIPPED, zero={"zero": stage}), tmp_path)
    assert (
        "The gradient norm is nan and cannot be clipped to 0.5. No weight has been changed by it. Set "
        "nonfinite_norm='ignore' in ZeroStrategy to train on." in str(failure.value)
    )


def test_ignored_it_does_what_torch_does(ranks, tmp_path):
    fits = [
        replace(CLIPPED, zero={"zero": stage, "nonfinite_norm": "ignore", "nonfinite_loss": "ignore"})
        for stage in STAGES
    ]
    for result in ranks(2).run(train_all, fits, tmp_path)[0]:
        assert result.steps == 3
        assert result.weights["model.norm.weight"].isnan().all()
