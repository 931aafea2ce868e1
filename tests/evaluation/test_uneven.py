"""On uneven data, ranks measure what one process measures, in every stage, and none waits for another for ever.

Field complaints: Lightning 20561 (uneven evaluation data hangs), 20404 (no way to evaluate ranks' own shards exactly).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lit_zero import ZeroStrategy
from lit_zero.core.errors import ConfigError
from tests.evaluation.support import Case, Found, Measured, all_cases, alone, dataset, make, run
from tests.strategy.harness import STAGES

# Rows, and samples of a batch on each rank.
CASES = {
    "one rank has a sample less": Case([9]),
    "and so nothing left for the last step": Case([17]),
    "batches of one": Case([5], share=1),
    "a batch is what the dataset gives": Case([5], share=1, options={"batch_size": None}),
    "fewer samples than ranks": Case([1], share=2),
    "even": Case([16]),
    "two loaders": Case([9, 13], stages=STAGES),
    "shuffled": Case([11], share=2, options={"shuffle": True}),
    "incomplete batches left out": Case([15], share=2, options={"drop_last": True}),
    "stopped early": Case([17], trainer={"limit_val_batches": 2, "limit_test_batches": 0.5}),
    "divided by the user": Case(sizes=[[4, 2, 3], [1]], trainer={"use_distributed_sampler": False}),
    "divided by the user, rank 0 ends first": Case(sizes=[[2], [3, 1, 2]], trainer={"use_distributed_sampler": False}),
    "a list of batches": Case(sizes=[[4, 2], [1, 3, 2]], sized=True),
}


def agree(found: Found, expected: Found) -> None:
    """Check that a rank has found what one process has."""
    assert found.read == expected.read, "every sample is read once by some rank, in validate and in test"
    assert len(found.logged) == len(expected.logged)
    for mine, other in zip(found.logged, expected.logged, strict=True):
        assert mine == pytest.approx(other, rel=1e-6)


# Those in which every part of the evaluation has something to do.
FORCED = ("two loaders", "batches of one", "fewer samples than ranks", "divided by the user, rank 0 ends first")


@pytest.mark.thorough("no_grad")
@pytest.mark.parametrize("forced", [False, True], ids=["no_grad", "inference_mode"])
def test_two_ranks_measure_what_one_process_measures(ranks, tmp_path, forced):
    names = FORCED if forced else tuple(CASES)
    expected = [alone(CASES[name], tmp_path) for name in names]
    cases = [replace(CASES[name], forced=forced) for name in names]
    first, second = ranks(2).run(all_cases, cases, tmp_path, timeout=240)
    for name, one, *both in zip(names, expected, first, second, strict=True):
        assert len(one.read) == 2 and one.read[0], name
        for mine, other in zip(*both, strict=True):
            agree(mine, one)
            agree(other, one)
            assert sorted(mine.collected + other.collected) == sorted(one.read[0] + one.read[1]), name
        assert all(each.logged == both[0][0].logged for each in both[0]), f"{name}: all stages agree bit for bit"


@pytest.mark.thorough
def test_four_ranks(ranks, tmp_path):
    cases = [Case([rows], share, ranks=4) for rows, share in ((13, 2), (33, 2), (6, 1), (2, 3))]
    expected = [alone(case, tmp_path) for case in cases]
    for found in ranks(4).run(all_cases, cases, tmp_path, timeout=240):
        for one, stages in zip(expected, found, strict=True):
            for each in stages:
                agree(each, one)


def in_fit(case: Case, strategy: Any, folder: Path) -> dict[str, float]:
    """Train two steps and validate after each, with a sanity check before."""
    torch.manual_seed(0)
    plain, rows = strategy == "auto", dataset(16)
    model = Measured(optimizer="sgd", lr=0.1)
    trainer = make(case, strategy, folder, max_steps=2, val_check_interval=1)
    order = DistributedSampler(rows, 1, 0) if plain else None  # the one that Lightning gives to ranks
    trainer.fit(model, DataLoader(rows, 8 if plain else 8 // case.ranks, sampler=order), case.loaders(plain))
    assert len(model.read) == 3 and len(model.read[2]) == case.rows[0]
    return {name: float(value) for name, value in trainer.callback_metrics.items() if "train" not in name}


def all_in_fit(case: Case, folder: Path) -> list[dict[str, float]]:
    return [in_fit(case, ZeroStrategy(stage), folder) for stage in STAGES]


@pytest.mark.parametrize("rows", [9, 17])
def test_validation_within_fit(ranks, tmp_path, rows):
    expected = in_fit(Case([rows]), "auto", tmp_path)
    for stages in ranks(2).run(all_in_fit, Case([rows]), tmp_path, timeout=120):
        for found in stages:
            assert found == pytest.approx(expected, rel=1e-6)


def told(case: Case, folder: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(case, ZeroStrategy("stage3"), folder)
    said = [str(each.message) for each in caught]
    assert not any("replicates some samples" in each for each in said), "Lightning would say so, and it is not so"
    return [each for each in said if "has no data left" in each]


def test_a_rank_that_repeats_a_batch_says_so_once(ranks, tmp_path):
    first, second = ranks(2).run(told, Case([5], share=1), tmp_path)
    assert first == []
    assert len(second) == 1
    assert second[0].startswith(
        "Rank 1 has no data left for validation step 2 while other ranks have, and repeats a batch to keep step with "
        "them. Metrics, self.log and what predict returns do not count it; what validation_step collects by itself "
        "would: leave it out where trainer.strategy.repeats_batch is true."
    )
    assert ranks(2).run(told, Case([17]), tmp_path) == [[], []]


def as_lightning(folder: Path) -> list[Found]:
    case = Case([9])
    strategies = ["ddp", *(ZeroStrategy(stage, evaluation="lightning") for stage in STAGES)]
    return [run(case, strategy, folder) for strategy in strategies]


def test_lightnings_own_way_by_name(ranks, tmp_path):
    ddp, *stages = ranks(2).run(as_lightning, tmp_path, timeout=120)[0]
    assert ddp.read[0] == [0, *range(9)], "sample 0 is read twice"
    for each in stages:
        assert each.read == ddp.read
        for name in ("sum", "max", "mean", "micro", "f1"):
            assert each.logged[0][name] == pytest.approx(ddp.logged[0][name], rel=1e-6)


def test_an_unknown_way_is_refused():
    with pytest.raises(ConfigError, match="evaluation='twice' is not known. Choose one of: once, lightning."):
        ZeroStrategy(evaluation="twice")


def empty(sized: bool, folder: Path) -> str:
    case = Case(sizes=[[2, 2], []], sized=sized, trainer={"use_distributed_sampler": False})
    try:
        run(case, ZeroStrategy("stage3"), folder)
    except Exception as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("sized", [True, False])
def test_a_rank_without_data_ends_the_run_on_all_ranks(ranks, tmp_path, sized):
    for message in ranks(2).run(empty, sized, tmp_path, timeout=30):
        assert message.startswith("A rank has no batch of the evaluation data at all while others have")


class Exchanging(pl.LightningModule):
    """Exchanges something in every step, as users do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.rows: list[list[int]] = []

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.rows.append(self.all_gather(torch.tensor(len(batch[1]))).tolist())


def exchange_in_steps(folder: Path) -> list[list[int]]:
    model = Exchanging()
    make(Case(), ZeroStrategy("stage2"), folder).validate(model, DataLoader(dataset(13), 3), verbose=False)
    return model.rows


def test_an_exchange_of_the_users_own_in_every_step(ranks, tmp_path):
    assert ranks(2).run(exchange_in_steps, tmp_path, timeout=30) == [[[3, 3], [3, 2], [1, 1]]] * 2
