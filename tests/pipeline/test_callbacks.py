"""Lightning's callbacks that change or average weights, unmodified, where every rank has only some of the layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from tests.callbacks.harness import With, run, run_all
from tests.callbacks.test_pruning import GLOBAL, LOCAL, PrunesBlocks, Untied
from tests.pipeline.test_training import piped
from tests.strategy.harness import STAGES, LitGPT, Outcome, Short, distance

pytestmark = pytest.mark.thorough


class Epochly(LitGPT):
    """Its learning rate changes once per epoch, as SWA's does."""

    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        found["lr_scheduler"]["interval"] = "epoch"
        return found


EMA = (EMAWeightAveraging, {"decay": 0.8, "update_starting_at_step": 2})
SWA = (StochasticWeightAveraging, {"swa_lrs": 0.05, "swa_epoch_start": 2, "annealing_epochs": 2})
JOBS: dict[str, tuple[Any, Any, int]] = {
    "ema": (EMA, LitGPT, 2),
    "mean": ((WeightAveraging, {}), LitGPT, 2),
    "swa": (SWA, Epochly, 4),
    "global": ((ModelPruning, GLOBAL), Untied, 3),
    "structured": ((PrunesBlocks, LOCAL), Untied, 3),
}


@pytest.mark.parametrize("name", JOBS)
def test_equals_one_process(ranks: Any, tmp_path: Path, name: str) -> None:
    callback, module, epochs = JOBS[name]
    fit = Short(module=module, arguments={"layers": 4}, epochs=epochs)
    theirs = run(With(fit, [callback]), tmp_path / "alone")
    plain = run(With(fit), tmp_path / "plain")
    assert distance(in_order(theirs, plain), plain.weights) > 1e-3, "the callback must matter"
    jobs = [With(replace(piped(stage), module=module, epochs=epochs), [callback]) for stage in STAGES]
    for mine in ranks(2).run(run_all, jobs, tmp_path / "piped", timeout=180)[0]:
        assert set(mine.weights) == set(theirs.weights)
        assert distance(mine.weights, in_order(theirs, mine)) < 1e-6
        for column in ("train_loss_step", "val_loss"):
            assert mine.column(column) == pytest.approx(theirs.column(column), rel=1e-5)


def in_order(outcome: Outcome, like: Outcome) -> dict[str, torch.Tensor]:
    """Return the weights in the order of ``like``'s: torch's pruning takes a parameter out and back in."""
    return {name: outcome.weights[name] for name in like.weights}
