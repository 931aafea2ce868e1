"""Scripts as users start them: alone, by torchrun, with a rank that fails, and with the other name of Lightning.

Starting costs seconds: one script trains in several ways, and what fails does so after something that does not.
``tests/config/test_launch.py`` has more ranks that fail.
"""

from __future__ import annotations

import importlib.util
import json
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.strategy.test_clusters import SLURM, environment, free_port
from tests.warm import run_cold, run_python

SCRIPT = """
    import json
    import os
    import sys
    import time
    from pathlib import Path

    import torch

    flavour, strategies, trouble, folder = sys.argv[1:]
    if flavour == "lightning":
        import lightning.pytorch as pl
        from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
    else:
        import pytorch_lightning as pl
        from pytorch_lightning.demos.boring_classes import BoringModel, RandomDataset
    import lit_zero


    class Model(BoringModel):
        trouble = ""

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)["loss"]
            if batch_idx == 2 and self.trouble == f"rank {self.global_rank} raises":
                Path(folder, "raised").write_text(str(time.time()))
                raise ValueError(f"rank {self.global_rank} alone finds a mistake")
            if batch_idx == 2 and self.trouble == f"rank {self.global_rank} diverges":
                Path(folder, "raised").write_text(str(time.time()))
                return loss * float("nan")
            return loss

        def train_dataloader(self):
            return torch.utils.data.DataLoader(RandomDataset(32, 16), batch_size=2)


    def train(strategy):
        pl.seed_everything(1)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            max_epochs=1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = Model()
        trainer.fit(model)
        weights = trainer.strategy.lightning_module_state_dict()
        seen = {
            "pid": os.getpid(),
            "place": [trainer.global_rank, trainer.local_rank, trainer.node_rank],
            "environment": type(trainer.strategy.cluster_environment).__name__,
            "world": trainer.world_size,
            "steps": trainer.global_step,
            "weights": {name: value.tolist() for name, value in weights.items()},
            "strategy": next(k.__module__ for k in type(trainer.strategy).__mro__ if k.__name__ == "ParallelStrategy"),
            "names": sorted(name for name in pl.strategies.StrategyRegistry if name.startswith("zero")),
        }
        if trainer.is_global_zero and strategy != "zero3":
            time.sleep(1.0)  # the other rank has left, or waits in the next fit
            seen["forward"] = model(torch.ones(1, 32)).tolist()
        Path(folder, f"{strategy}-rank{trainer.global_rank}.json").write_text(json.dumps(seen))


    if __name__ == "__main__":
        for strategy in strategies.split(","):
            train(strategy)
        if trouble:
            Model.trouble = trouble
            train(strategy)
"""
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2")
CASES = {
    "alone": ("", "lightning", "zero3,zero2", ""),
    "rank 0 raises": ("", "lightning", "zero3", "rank 0 raises"),
    "torchrun, rank 0 raises": ("torchrun", "lightning", "zero1", "rank 0 raises"),
    "torchrun in SLURM, rank 1 diverges": ("torchrun in SLURM", "lightning", "zero3", "rank 1 diverges"),
    "pytorch_lightning": ("", "pytorch_lightning", "zero2", ""),
    "pytorch_lightning, spawn": ("", "pytorch_lightning", "zero3_spawn", ""),
}
THOROUGH = ("torchrun, rank 0 raises", "torchrun in SLURM, rank 1 diverges")  # only they have what they show
LIMIT = 30.0  # seconds in which all ranks must have ended once one has failed


@dataclass
class Finished:
    """A script that has ended.

    Attributes:
        code: its exit code.
        output: of all its ranks, both streams.
        folder: where its ranks left word.
        ended: seconds since the epoch.
    """

    code: int
    output: str
    folder: Path
    ended: float

    def seen(self, strategy: str, rank: int) -> dict:
        return json.loads((self.folder / f"{strategy}-rank{rank}.json").read_text())


def started_by(launcher: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the arguments before the script's name, and variables."""
    if launcher == "torchrun":  # the elastic rendezvous: the ranks' address and port are negotiated
        return (*TORCHRUN, "--standalone"), {}
    if launcher == "torchrun in SLURM":  # the static one: they are given
        where = ("--nnodes=1", "--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={free_port()}")
        one_task = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        return (*TORCHRUN, *where), {**SLURM, **one_task}
    return (), {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, Finished]:
    """Every case that is asked for, two at a time."""

    def run(case: str) -> Finished:
        launcher, *arguments = CASES[case]
        folder = tmp_path_factory.mktemp(case.replace(" ", "_").replace(",", ""))
        (folder / "train.py").write_text(textwrap.dedent(SCRIPT))
        start, variables = started_by(launcher)
        command = [*start, str(folder / "train.py"), *arguments, str(folder)]
        python = run_python if arguments[0] == "lightning" else run_cold  # what else is imported counts
        done = python(command, folder, environment(**variables), 200)
        return Finished(done.code, done.output, folder, time.time())

    cases = [case for case in CASES if CASES[case][1] == "lightning" or importlib.util.find_spec(CASES[case][1])]
    cases = [case for case in cases if case not in THOROUGH or pytestconfig.getoption("--thorough")]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(run, cases), strict=True))


@pytest.mark.thorough(*THOROUGH)
@pytest.mark.parametrize(
    ("case", "strategy"),
    [
        ("alone", "zero2"),
        ("alone", "zero3"),
        ("torchrun, rank 0 raises", "zero1"),
        ("torchrun in SLURM, rank 1 diverges", "zero3"),
    ],
)
def test_two_processes_train_together(finished, case, strategy):
    done = finished[case]
    first, second = done.seen(strategy, 0), done.seen(strategy, 1)
    assert first["world"] == second["world"] == 2
    assert first["steps"] == second["steps"] == 4
    assert first["strategy"] == "lightning.pytorch.strategies.parallel"
    assert first["weights"] == finished["alone"].seen("zero2", 0)["weights"], "it does not matter who starts the ranks"
    assert second["weights"] == {}


@pytest.mark.thorough
def test_torchrun_inside_slurm(finished):
    """PL#18466: in an allocation, torchrun says who the ranks are, and SLURM's variables, which know one task a node,
    do not.
    """
    found = [finished["torchrun in SLURM, rank 1 diverges"].seen("zero3", rank) for rank in (0, 1)]
    assert [each["place"] for each in found] == [[0, 0, 0], [1, 1, 0]]
    assert {each["environment"] for each in found} == {"TorchElasticEnvironment"}


def test_two_trainers_of_one_script_share_their_processes(finished):
    done = finished["alone"]
    assert done.code == 0, done.output
    for rank in (0, 1):
        assert done.seen("zero3", rank)["pid"] == done.seen("zero2", rank)["pid"]


def test_rank_0_goes_on_alone_after_fit(finished):
    first = finished["alone"].seen("zero2", 0)
    weight, bias = first["weights"]["layer.weight"], first["weights"]["layer.bias"]
    assert first["forward"][0] == pytest.approx([sum(row) + b for row, b in zip(weight, bias, strict=True)], rel=1e-4)


def test_the_other_name_of_lightning(finished):
    if "pytorch_lightning" not in finished:
        pytest.skip("pytorch_lightning is not installed")
    done = finished["pytorch_lightning"]
    assert done.code == 0, done.output
    first = done.seen("zero2", 0)
    assert first["strategy"] == "pytorch_lightning.strategies.parallel"
    assert first["steps"] == 4
    assert first["weights"] == finished["alone"].seen("zero2", 0)["weights"]


def test_spawn_under_the_other_name_of_lightning(finished):
    if "pytorch_lightning, spawn" not in finished:
        pytest.skip("pytorch_lightning is not installed")
    done = finished["pytorch_lightning, spawn"]
    assert done.code == 0, done.output
    mine, alone = done.seen("zero3_spawn", 0), finished["alone"].seen("zero2", 0)
    assert mine["strategy"] == "pytorch_lightning.strategies.parallel"
    assert mine["names"] == alone["names"]
    assert len(mine["names"]) == 16
    assert mine["weights"] == alone["weights"], "whole, in the process that has launched the ranks"
    assert mine["forward"] == alone["forward"]


@pytest.mark.thorough(*THOROUGH)
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("rank 0 raises", ["in training_step", "ValueError: rank 0 alone finds a mistake"]),
        ("torchrun, rank 0 raises", ["in training_step", "ValueError: rank 0 alone finds a mistake"]),
        (
            "torchrun in SLURM, rank 1 diverges",
            ["in pre_backward", "LitZeroError: The loss is nan on rank 1 at step 2. No weight has been changed by it"],
        ),
    ],
)
def test_a_rank_that_fails_ends_all_with_its_traceback(finished, case, words):
    done = finished[case]
    assert done.code != 0
    at = 0
    for word in words:
        at = done.output.find(word, at)
        assert at >= 0, f"{word!r} is not in its place in:\n{done.output}"
    assert done.ended - float((done.folder / "raised").read_text()) < LIMIT
    assert len(list(done.folder.glob("*.json"))) == 2, "of what went well before"
