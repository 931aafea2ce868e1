"""Where the ranks of a job meet: a store on the machine of rank 0, at an address and a port that all know.

[Note: two jobs at one port]
A port belongs to whoever takes it first. If that is another job, rank 0 fails, and torch's own rendezvous would let
the other ranks join that job: they would wait in it for half an hour, and could take the place of its ranks. So rank 0
leaves the job's name in the store, and the others compare it before they write anything.

[Note: listening early]
A launcher picks a free port, then starts the ranks, which takes seconds, and only then rank 0 listens: by that time any
program of the machine may hold the port, if only for a connection of its own. So the launcher listens at once
(:func:`hold_port`), and the store takes over its socket.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from lit_zero.core.errors import ConfigError, LitZeroError

JOB = "LIT_ZERO_JOB"  # the job's name, set by launchers that start all of its ranks; others have SLURM's
_KEY = "lit_zero/job"
_held: dict[int, socket.socket] = {}  # by port, until the store takes them over


def hold_port(port: int) -> socket.socket | None:
    """Listen on ``port`` of this machine for the store that this process, or one it starts, will open there.

    Returns:
        The socket, to be handed to another process and taken there by :func:`take_port`; ``None`` if ``port`` is taken,
        which may be by a process group of this process, and is otherwise found by :func:`open_store`.
    """
    both = socket.has_dualstack_ipv6()
    try:
        listener = socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        )
    except OSError:
        return None
    take_port(listener)
    return listener


def take_port(listener: socket.socket) -> None:
    """Hold what another process holds: ``listener``, from :func:`hold_port`."""
    _held[listener.getsockname()[1]] = listener


def let_go_of_port(port: int) -> None:
    """Listen no longer on ``port``, if no store has taken it over."""
    listener = _held.pop(port, None)
    if listener is not None:
        listener.close()


def open_store(address: str, port: int, rank: int, timeout: timedelta) -> dist.Store:
    """Return the store through which the ranks of a process group find one another.

    Args:
        address: machine of rank 0.
        port: where rank 0 listens, or the agent of torchrun.
        rank: global rank.
        timeout: how long to wait for rank 0.

    Raises:
        ConfigError: if the port belongs to another job.
        LitZeroError: if rank 0 does not come.
    """
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun listens, for all ranks
    listener = _held.pop(port, None) if rank == 0 and not agent else None
    try:
        store = dist.TCPStore(
            address,
            port,
            is_master=rank == 0 and not agent,
            timeout=timeout,
            wait_for_workers=False,  # their arrival would be counted by the job that listens, whichever it is
            multi_tenant=True,
            master_listen_fd=None if listener is None else listener.detach(),
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"Rank 0 cannot listen on port {port} of {address}: another program does. Every job on a machine needs a "
            "port of its own. Set MASTER_PORT to a free one for all ranks of this job, or unset it where one machine "
            "runs them all. (In SLURM, Lightning takes the port from the last four digits of the job's number.)"
        ) from error
    mine = _name_of_job()
    if rank == 0:
        store.set(_KEY, mine)
        return dist.PrefixStore("default_pg", store)
    try:
        store.wait([_KEY], timeout)
    except dist.DistStoreError as error:
        raise LitZeroError(
            f"Rank {rank} has waited {timeout.total_seconds():.0f} s at port {port} of {address} for rank 0. Either "
            "rank 0 did not start or failed, which its own output tells, or another program listens there: set "
            "MASTER_PORT to a free port for all ranks."
        ) from error
    found = store.get(_KEY).decode()
    if mine and found and mine != found:
        raise ConfigError(
            f"Rank {rank} of {mine} has met another job at port {port} of {address}: {found}. Every job on a machine "
            "needs a port of its own: set MASTER_PORT to a free one for all ranks."
        )
    return dist.PrefixStore("default_pg", store)


def _name_of_job() -> str:
    """Return what the ranks of this job have in common and those of other jobs do not, ``""`` if that is unknown."""
    if JOB in os.environ:
        return f"job {os.environ[JOB]}"
    if "TORCHELASTIC_RUN_ID" in os.environ:  # its agent has taken the port for this very job
        return ""
    several = "SLURM_HET_SIZE" in os.environ  # parts with numbers of their own make one job
    number = os.environ.get("SLURM_HET_JOB_ID" if several else "SLURM_JOB_ID")
    step = "" if several else f" step {os.environ.get('SLURM_STEP_ID', '?')}"
    return f"SLURM job {number}{step}" if number else ""
