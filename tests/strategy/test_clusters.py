"""Ranks that others start: torchrun on two hosts, and SLURM. ``test_launch.py`` has torchrun on one host."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hosts import ADDRESSES, INTERFACE, run_on_two_hosts
from tests.strategy.harness import distance, same_bits, train
from tests.strategy.job import FIT, STAGES

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
JOB = ("-m", "tests.strategy.job")
TIMEOUT = 300.0  # seconds; of a machine that is busy with other things
# What srun sets for the two tasks of a step on one node, as far as Lightning reads it.
SLURM = {
    "SLURM_JOB_NAME": "train",
    "SLURM_NODELIST": "127.0.0.1",
    "SLURM_NNODES": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_ID": "0",
}
FOREIGN = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    """Return the variables of a fresh shell."""
    mine = {
        name: value
        for name, value in os.environ.items()
        if name not in FOREIGN and not name.startswith(("LIT_ZERO_", "TORCHELASTIC_", "SLURM_", "PL_"))
    }
    return {**mine, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Python with some arguments and environment variables; what it writes goes to the file "log"."""
    started: list[subprocess.Popen[str]] = []
    with open(tmp_path / "log", "a") as log:

        def python(arguments: list[str], variables: Mapping[str, str]) -> subprocess.Popen[str]:
            command = [sys.executable, *arguments]
            started.append(subprocess.Popen(command, cwd=tmp_path, env=variables, stdout=log, stderr=log, text=True))
            return started[-1]

        yield python
        for process in started:
            process.kill()
            process.wait()


def seen(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process gives with the same whole batches."""
    return train(FIT, tmp_path_factory.mktemp("alone"))


def check_weights(folder: Path, alone: Any) -> None:
    stages = [torch.load(folder / f"{stage}.pt") for stage in STAGES]
    for each in stages:
        assert distance(each, alone.weights) < 1e-6
        assert same_bits(each, stages[0])


def test_slurm(start, alone, tmp_path):
    processes = []
    for rank in range(2):
        task = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        # Lightning makes the port from the job's number.
        number = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
        variables = environment(**SLURM, **task, **number)
        processes.append(start([*JOB, str(tmp_path), "1", "2"], variables))
    codes = [process.wait(TIMEOUT) for process in processes]
    assert codes == [0, 0], (tmp_path / "log").read_text()
    found = seen(tmp_path, 2)
    assert [(each["rank"], each["local"], each["node"], each["world"]) for each in found] == [
        (0, 0, 0, 2),
        (1, 1, 0, 2),
    ]
    assert {each["environment"] for each in found} == {"SLURMEnvironment"}
    assert [each["pid"] for each in found] == [process.pid for process in processes], "the tasks are the ranks"
    assert [line for each in found for line in each["started"] if sys.executable in line] == []
    assert found[0]["metrics"] == found[1]["metrics"] == pytest.approx(alone.metrics, rel=1e-5)
    check_weights(tmp_path, alone)


def test_a_port_that_another_job_has(start, tmp_path):
    """gpt-neox#849: rank 0 says so, and the other rank does not join that job."""
    other = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    other.set("key", "value")
    keys = other.num_keys()
    script = [*JOB, str(tmp_path), "1", "2"]
    process = start(script, environment(MASTER_PORT=str(other.port)))
    code = process.wait(TIMEOUT)
    log = (tmp_path / "log").read_text()
    assert code != 0
    words = f"ConfigError: Rank 0 cannot listen on port {other.port} of 127.0.0.1: another program does."
    assert words in log
    assert "Set MASTER_PORT to a free one for all ranks of this job" in log
    assert other.num_keys() == keys
    assert other.get("key") == b"value"


@pytest.mark.namespaces
def test_two_hosts_with_two_ranks_each(alone, tmp_path):
    # The elastic rendezvous: the hosts find one another at the first, and agree on who is who.
    commands = []
    for number, address in enumerate(ADDRESSES):
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--nnodes=2", "--rdzv-backend=c10d"]
        torchrun += [f"--rdzv-endpoint={ADDRESSES[0]}:29400", "--rdzv-id=two-hosts", f"--local-addr={address}"]
        torchrun += [f"--rdzv-conf=is_host={1 - number}"]  # else known by the machine's name, here the same one on both
        commands.append(shlex.join([sys.executable, *torchrun, *JOB, str(tmp_path), "2", "2"]))
    # gloo, too, would go by the machine's name.
    variables = environment(GLOO_SOCKET_IFNAME=INTERFACE)
    code, output = run_on_two_hosts(commands, tmp_path, variables, TIMEOUT)
    assert code == 0, output
    found = seen(tmp_path, 4)
    assert [(each["rank"], each["local"], each["world"]) for each in found] == [(n, n % 2, 4) for n in range(4)]
    assert [each["node"] for each in found] == [0, 0, 1, 1]
    assert all(each["metrics"] == pytest.approx(alone.metrics, rel=1e-5) for each in found)
    check_weights(tmp_path, alone)
