"""Two hosts on one machine: network namespaces joined by a pair of virtual Ethernet devices.

Nothing of them has a name outside, so nothing is left behind: they vanish with the processes that run in them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "eth0"

# $1 and $2 are the commands of the two hosts.
_SCRIPT = f"""
set -e
ip link set lo up
unshare --net sleep 600 &
other=$!
trap 'kill $other' EXIT
inside() {{ nsenter --net=/proc/$other/ns/net "$@"; }}
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add {INTERFACE} type veth peer name {INTERFACE} netns $other
ip address add {ADDRESSES[0]}/24 dev {INTERFACE}
ip link set {INTERFACE} up
inside ip link set lo up
inside ip address add {ADDRESSES[1]}/24 dev {INTERFACE}
inside ip link set {INTERFACE} up
code=0
bash -c "$1" & first=$!
inside bash -c "$2" & second=$!
wait $first || code=$?
wait $second || code=$?
exit $code
"""
# Anybody may make a network namespace inside a user namespace of his own, where the system permits those; root may
# make one without.
_WAYS = (("unshare", "--user", "--map-root-user", "--net"), ("unshare", "--net"))


def run_on_two_hosts(
    commands: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout: float
) -> tuple[int, str]:
    """Run one shell command on each host at the same time.

    Args:
        commands: two.
        cwd: where both run.
        environment: of both.
        timeout: seconds; all processes are killed after it.

    Returns:
        0 if both succeeded, and what both have written.

    Raises:
        subprocess.TimeoutExpired: if they do not end.
    """
    return _run(_way()[0], commands, timeout, cwd=cwd, env=dict(environment))


def obstacle() -> str:
    """Return why this machine cannot have two hosts, ``""`` if it can."""
    return _way()[1]


@functools.cache
def _way() -> tuple[Sequence[str], str]:
    reasons = []
    for way in _WAYS:
        try:
            code, output = _run(way, ("true", "true"), 20.0)
        except (OSError, subprocess.TimeoutExpired) as error:
            code, output = 1, str(error)
        if code == 0:
            return way, ""
        reasons.append(f"{' '.join(way)}: {output.strip().splitlines()[-1] if output.strip() else f'code {code}'}")
    return _WAYS[0], "no network namespaces: " + "; ".join(reasons)


def _run(
    way: Sequence[str],
    commands: Sequence[str],
    timeout: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    process = subprocess.Popen(
        [*way, "bash", "-c", _SCRIPT, "hosts", *commands],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, output
