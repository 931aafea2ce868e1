"""Where ranks meet: a job's ranks find one another, and nobody else's."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from lit_zero.comm.meeting import hold_port, let_go_of_port, open_store
from lit_zero.core.errors import ConfigError, LitZeroError

SOON = timedelta(seconds=30)
HOST = "127.0.0.1"
SLURM = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"}


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in ("LIT_ZERO_JOB", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "SLURM_HET_SIZE", *SLURM):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port():
    """A port that was free a moment ago."""
    return dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False).port


def as_job(monkeypatch, variables):
    for name in ("LIT_ZERO_JOB", "SLURM_HET_SIZE", "SLURM_HET_JOB_ID", *SLURM):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({"LIT_ZERO_JOB": "a"}, {"LIT_ZERO_JOB": "a"}),
        (SLURM, SLURM),
        (SLURM, {}),  # a rank that was started by hand
        # The parts of one job, each with a number of its own.
        ({**SLURM, "SLURM_HET_SIZE": "2", "SLURM_HET_JOB_ID": "4711"},
         {"SLURM_JOB_ID": "4712", "SLURM_STEP_ID": "1", "SLURM_HET_SIZE": "2", "SLURM_HET_JOB_ID": "4711"}),
    ],
)  # fmt: skip
def test_the_ranks_of_a_job_meet(monkeypatch, port, first, second):
    as_job(monkeypatch, first)
    zero = open_store(HOST, port, 0, SOON)
    as_job(monkeypatch, second)
    one = open_store(HOST, port, 1, SOON)
    zero.set("from", "zero")
    assert one.get("from") == b"zero"


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"LIT_ZERO_JOB": "a"}, {"LIT_ZERO_JOB": "b"}, "Rank 1 of job b has met another job at port .*: job a"),
        (SLURM, {**SLURM, "SLURM_JOB_ID": "14711"}, "of SLURM job 14711 step 0 has met .*: SLURM job 4711 step 0"),
        (SLURM, {**SLURM, "SLURM_STEP_ID": "1"}, "of SLURM job 4711 step 1 has met .*: SLURM job 4711 step 0"),
    ],
)
def test_the_ranks_of_another_job_keep_away(monkeypatch, port, first, second, words):
    as_job(monkeypatch, first)
    theirs = open_store(HOST, port, 0, SOON)
    keys = theirs.num_keys()
    as_job(monkeypatch, second)
    with pytest.raises(ConfigError, match=words + ".*set MASTER_PORT to a free one"):
        open_store(HOST, port, 1, SOON)
    assert theirs.num_keys() == keys


def test_a_port_in_use(monkeypatch):
    monkeypatch.setenv("LIT_ZERO_JOB", "a")
    theirs = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    keys = theirs.num_keys()
    words = f"Rank 0 cannot listen on port {theirs.port} of 127.0.0.1: another program does.*MASTER_PORT to a free one"
    with pytest.raises(ConfigError, match=words):
        open_store(HOST, theirs.port, 0, SOON)
    words = f"Rank 3 has waited 1 s at port {theirs.port} of 127.0.0.1 for rank 0"
    with pytest.raises(LitZeroError, match=words):
        open_store(HOST, theirs.port, 3, timedelta(seconds=1))
    assert theirs.num_keys() == keys


def test_torchrun_has_opened_the_store_already(monkeypatch):
    agent = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    for name, value in (("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_RUN_ID", "none"), *SLURM.items()):
        monkeypatch.setenv(name, value)
    zero, one = (open_store(HOST, agent.port, rank, SOON) for rank in range(2))
    zero.set("from", "zero")
    assert one.get("from") == b"zero"


def test_a_port_that_is_held_is_the_jobs_until_its_store_opens(port):
    listener = hold_port(port)
    assert listener is not None and hold_port(port) is None
    with pytest.raises(OSError, match="in use"):
        socket.create_server((HOST, port))
    with ThreadPoolExecutor() as pool:
        one = pool.submit(open_store, HOST, port, 1, SOON)  # before rank 0 has come
        with pytest.raises(TimeoutError):
            one.result(timeout=0.2)
        zero = open_store(HOST, port, 0, SOON)
        zero.set("from", "zero")
        assert one.result(timeout=30).get("from") == b"zero"
    assert listener.fileno() == -1, "the socket is the store's now"


def test_a_port_that_is_let_go_of_is_free_again(port):
    hold_port(port)
    let_go_of_port(port)
    let_go_of_port(port)
    socket.create_server((HOST, port)).close()
