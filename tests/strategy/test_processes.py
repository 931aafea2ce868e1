"""``spawn``, ``fork`` and notebooks: other processes train, and this one knows afterwards what they have found."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.multiprocessing  # registers how tensors are sent
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lit_zero import ZeroStrategy
from lit_zero.core.errors import ConfigError, UnsupportedError
from lit_zero.strategy import processes
from lit_zero.strategy.processes import ProcessLauncher
from tests.strategy.harness import STAGES, LitGPT, distance, loaders, make_trainer, same_bits, train
from tests.strategy.herd import CASES, FIT
from tests.strategy.test_clusters import environment

pytestmark = pytest.mark.thorough

FAILING = {name: case for name, case in CASES.items() if "rank" in name}
LATE = "built late"
LIMIT = 30.0  # seconds in which a job must have ended once a rank has failed


ORPHANS = """
    import os, sys, time
    from pathlib import Path
    import lightning.pytorch as pl
    from lightning.pytorch.demos.boring_classes import BoringModel
    import lit_zero

    class Model(BoringModel):
        def training_step(self, batch, batch_idx):
            Path(f"{self.global_rank}.pid").write_text(str(os.getpid()))
            time.sleep(1000)

    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="zero2_fork", limit_val_batches=0, logger=False,
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Model())
"""


@pytest.fixture(scope="module")
def orphans(tmp_path_factory) -> tuple[list[int], float]:
    """The processes of ranks whose launching process was killed, and when; in time to be gone at the last test."""
    folder = tmp_path_factory.mktemp("orphans")
    command = [sys.executable, "-c", textwrap.dedent(ORPHANS)]
    with subprocess.Popen(command, cwd=folder, env=environment(), stdin=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 100.0
        while len(list(folder.glob("*.pid"))) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.1)  # the last one may still be writing
        process.kill()
    return [int(path.read_text()) for path in folder.glob("*.pid")], time.monotonic()


@pytest.fixture(scope="module")
def found(tmp_path_factory, orphans) -> dict[str, dict[str, Any]]:
    """What every case has left in the process that has launched it."""
    folder = tmp_path_factory.mktemp("herd")
    command = [sys.executable, "-m", "tests.strategy.herd", str(folder)]
    variables = environment()
    variables["CUDA_VISIBLE_DEVICES"] = ""  # where there is a GPU, no process may be forked after a backward
    del variables["OMP_NUM_THREADS"]  # forked ranks must do without being told
    done = subprocess.run(
        command, cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process gives with the same whole batches."""
    return train(replace(FIT, zero="auto", devices=1), tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("case", [name for name in CASES if name not in FAILING and name != LATE])
def test_this_process_has_what_the_ranks_have_found(found, alone, case):
    mine = found[case]
    assert mine["error"] == ""
    assert mine["finished"]
    assert distance(mine["weights"], alone.weights) < 1e-6
    assert same_bits(mine["weights"], found["zero0_fork"]["weights"])
    assert same_bits(mine["weights"], mine["from the strategy"])
    assert mine["metrics"] == pytest.approx({name: alone.metrics[name] for name in mine["metrics"]}, rel=1e-5)
    assert {"train_loss_epoch", "val_loss", "val_accuracy"} <= mine["metrics"].keys()
    assert mine["best"] == (True, pytest.approx(min(alone.column("val_loss")), rel=1e-5))
    assert mine["last"]


def test_a_module_that_the_ranks_have_built_is_built_here_too(found, alone):
    mine = found[LATE]
    assert set(mine["weights"]) == set(alone.weights)
    assert mine["called"]["validate"][0]["val_loss"] == pytest.approx(mine["metrics"]["val_loss"], rel=1e-6)


def test_further_runs_start_from_the_weights_that_came_back(found, alone):
    called = found["zero3_fork"]["called"]
    assert called["validate"][0]["val_loss"] == pytest.approx(alone.metrics["val_loss"], rel=1e-5)
    assert called["test"][0]["test_loss"] == pytest.approx(alone.metrics["val_loss"], rel=1e-5)
    assert called["best"][0]["test_loss"] == pytest.approx(min(alone.column("val_loss")), rel=1e-5)
    assert "UnsupportedError: trainer.fit() a second time on one Trainer" in called["a second fit"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("fork, rank 1 raises", "rank 1 of 2 failed with ValueError: rank 1 alone finds a mistake"),
        ("fork, rank 1 dies", "rank 1 of 2 ended with SIGKILL, as when memory runs out"),
        ("fork, rank 1 raises and rank 0 hangs", "rank 1 of 2 failed with ValueError: rank 1 alone finds a mistake"),
        ("forkserver, rank 0 raises", "rank 0 of 2 failed with ValueError: rank 0 alone finds a mistake"),
    ],
)
def test_a_rank_that_fails_ends_the_job_with_its_traceback(found, case, words):
    mine = found[case]
    assert mine["error"].startswith(f"RankError: {words}")
    if "raises" in case:
        assert "The traceback of rank" in mine["error"]
        assert "in training_step" in mine["error"]
    assert mine["seconds"] < LIMIT


def test_ranks_end_when_the_launching_process_is_killed(orphans):
    pids, killed = orphans
    assert len(pids) == 2
    while alive := [pid for pid in pids if runs(pid)]:
        assert time.monotonic() - killed < LIMIT, alive
        time.sleep(0.2)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_nothing_is_left_behind(found):
    for name, mine in found.items():
        assert (name, mine["children"], mine["variables"], mine["left behind"]) == (name, [], [], [])


def test_the_names_are_lightnings_own_with_zero_for_ddp():
    methods = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
    names = {f"zero{number}{ending}": (stage, method)
             for number, stage in enumerate(STAGES) for ending, method in methods.items()}  # fmt: skip
    for name, (stage, method) in names.items():
        assert name.replace("zero3", "ddp") in StrategyRegistry or not name.startswith("zero3")
        strategy = StrategyRegistry.get(name)
        assert (strategy.zero.stage, strategy._start_method) == (stage, method)
    assert sorted(name for name in StrategyRegistry if name.startswith("zero")) == sorted(names)


# ---- what is refused


def trainer_with(**more: Any) -> pl.Trainer:
    arguments = {"accelerator": "cpu", "devices": 2, "logger": False, "enable_checkpointing": False}
    return pl.Trainer(**{**arguments, "enable_progress_bar": False, "enable_model_summary": False, **more})


def test_an_unknown_start_method_is_refused():
    with pytest.raises(ConfigError, match="start_method='spwan' is not known. Did you mean 'spawn'"):
        ZeroStrategy(start_method="spwan")  # type: ignore[arg-type]


def test_ranks_start_no_ranks(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    words = r"start_method='fork' starts the ranks itself, but this process is one already \(LightningEnvironment, "
    with pytest.raises(UnsupportedError, match=words + "LOCAL_RANK=0.*Use start_method='popen'"):
        trainer_with(strategy="zero3_fork")


def test_several_machines_are_refused():
    with pytest.raises(UnsupportedError, match="starts the ranks of one machine, got num_nodes=2.*torchrun or SLURM"):
        trainer_with(strategy="zero3_spawn", num_nodes=2)


def test_what_cannot_be_sent_is_an_error_that_says_so(tmp_path):
    class Local(LitGPT):
        pass

    trainer = make_trainer(FIT, tmp_path, strategy="zero2_spawn")
    words = "start_method='spawn' sends .*something among them cannot be sent: .*Local.*start_method='popen'"
    with pytest.raises(UnsupportedError, match=words):
        trainer.fit(Local(), *loaders(FIT))


def test_a_module_that_is_sharded_here_is_refused(tmp_path):
    module = LitGPT()
    make_trainer(FIT, tmp_path, strategy="zero2", devices=1, max_steps=1).fit(module, *loaders(FIT))
    trainer = make_trainer(FIT, tmp_path, strategy="zero2_spawn")  # the job of one rank is over
    with pytest.raises(UnsupportedError, match="LitGPT is sharded in this process by an earlier Trainer"):
        trainer.fit(module, *loaders(FIT))


def test_a_process_group_is_not_forked(tmp_path):
    trainer = make_trainer(FIT, tmp_path, strategy="zero2_fork")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UnsupportedError, match="would copy this process's process group.*start_method='spawn'"):
            trainer.fit(LitGPT(), *loaders(FIT))
    finally:
        torch.distributed.destroy_process_group()


# ---- its parts


class Counting(nn.Module):
    """Has every kind of tensor that a rank writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("buffer", torch.ones(2))
        self.plain = torch.ones(2)
        self.metric = MulticlassAccuracy(3, average="micro")


def test_ranks_share_no_memory():
    module = ForkingPickler.loads(ForkingPickler.dumps(Counting()))
    states = [module.weight, module.buffer, module.plain, module.metric.tp]
    assert all(each.is_shared() for each in states), "so are modules sent"
    processes._unshare(module)
    states = [module.weight, module.buffer, module.plain, module.metric.tp]
    assert not any(each.is_shared() for each in states)
    assert [each.tolist() for each in states[:3]] == [[1.0, 1.0]] * 3


def test_weights_without_a_place_are_told(tmp_path):
    trainer = make_trainer(FIT, tmp_path, strategy="zero2_spawn")
    launcher = trainer.strategy.launcher
    assert isinstance(launcher, ProcessLauncher)
    launcher._folder = tmp_path
    module = LitGPT()
    torch.save({**module.state_dict(), "added.weight": torch.ones(2)}, tmp_path / "weights")
    with pytest.warns(UserWarning, match="1 trained tensors have no place in the LitGPT.*'added.weight' first"):
        launcher._take_weights(module)


# ---- notebooks

NOTEBOOK = """
    import sys
    sys.ps1 = ">>> "  # as in any interactive Python
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.demos.boring_classes import BoringModel
    import lit_zero

    class Model(BoringModel):  # no other process can import it from here
        pass

    def trainer(strategy, devices):
        return pl.Trainer(accelerator="cpu", devices=devices, strategy=strategy, max_steps=2, limit_val_batches=0,
                          logger=False, enable_checkpointing=False, enable_progress_bar=False,
                          enable_model_summary=False)

    for strategy in ("zero3", "zero3_spawn"):
        try:
            trainer(strategy, 2)
        except lit_zero.core.errors.UnsupportedError as error:
            print(strategy, "refused:", error)
    for strategy, devices in (("zero3_notebook", 2), ("zero3", 1), ("zero1_notebook", 2)):
        torch.manual_seed(0)
        model = Model()
        before = model.layer.weight.detach().clone()
        trainer(strategy, devices).fit(model)
        print(strategy, devices, "trained:", bool((model.layer.weight != before).any()))
"""


def test_a_notebook(tmp_path):
    done = subprocess.run(
        [sys.executable, "-"], input=textwrap.dedent(NOTEBOOK), cwd=tmp_path, env=environment(CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    for line in ("zero3 refused: start_method='popen' cannot start 2 ranks from a notebook",
                 "zero3_spawn refused: start_method='spawn' cannot start 2 ranks from a notebook",
                 "Use start_method='fork' (strategy='zero3_notebook')",
                 "zero3_notebook 2 trained: True", "zero3 1 trained: True",
                 "zero1_notebook 2 trained: True"):  # fmt: skip
        assert line in done.stdout, done.stdout
