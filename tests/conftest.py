"""Fixtures for all tests: ranks, the guard that a test leaves no trace, and the count of tests that need more of a
machine than every machine has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import hosts
from tests.pool import RankPool

# As many as a rank of the pool has: a sum over two threads adds in another order, and bits are compared.
torch.set_num_threads(1)

# Environment variables that pytest, torch and Lightning set themselves in the course of normal work (launching,
# seeding, determinism, compiling), as lit_zero does with LIT_ZERO_*. A test is not to blame for them: they are put
# back without a word.
NOT_OURS = {
    "PYTEST_CURRENT_TEST",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_ORDER",
    "TRITON_CACHE_DIR",
    "TRITON_PTXAS_PATH",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "MASTER_ADDR",
    "MASTER_PORT",
    "WORLD_SIZE",
    "NODE_RANK",
    "LOCAL_RANK",
    "OMP_NUM_THREADS",
}

# Markers of what not every run has, and the function that says why this one does not, "" if it does.
NEEDS: dict[str, Callable[[pytest.Config], str]] = {
    "gpu": lambda _: "" if torch.cuda.is_available() else "no GPU visible",
    "namespaces": lambda _: hosts.obstacle(),
    "thorough": lambda config: "" if config.getoption("--thorough") else "ask for them with --thorough",
}
ITEMS = pytest.StashKey[dict[str, set[str]]]()
RUN = pytest.StashKey[set[str]]()
OBSTACLES = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="run the tests that are marked thorough too")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """``ranks(2).run(fn, *args)`` calls ``fn`` on 2 gloo ranks; see ``tests/pool.py``."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool
    for each in pools.values():
        each.close()


@pytest.fixture(autouse=True)
def leaves_no_trace() -> Iterator[None]:
    """Fail the test that changes the process for the tests after it, and put the process right for them."""
    environment = dict(os.environ)
    directory = os.getcwd()
    dtype = torch.get_default_dtype()
    threads = torch.get_num_threads()
    grad = torch.is_grad_enabled()
    yield
    leaks = []
    if dist.is_initialized():
        leaks.append("a process group (call torch.distributed.destroy_process_group)")
        dist.destroy_process_group()
    if torch.get_default_dtype() != dtype:
        leaks.append(f"default dtype {torch.get_default_dtype()}, was {dtype}")
        torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        leaks.append(f"{torch.get_num_threads()} torch threads, were {threads}")
        torch.set_num_threads(threads)
    if torch.is_grad_enabled() != grad:
        leaks.append(f"gradients {'enabled' if torch.is_grad_enabled() else 'disabled'}")
        torch.set_grad_enabled(grad)
    if os.getcwd() != directory:
        leaks.append(f"working directory {os.getcwd()}, was {directory} (use monkeypatch.chdir)")
        os.chdir(directory)
    changed = sorted(
        name for name in environment.keys() | os.environ.keys() if environment.get(name) != os.environ.get(name)
    )
    ours = [name for name in changed if name not in NOT_OURS and not name.startswith("LIT_ZERO_")]
    if ours:
        leaks.append(f"environment variables {', '.join(ours)} (use monkeypatch.setenv)")
    for name in changed:
        if name in environment:
            os.environ[name] = environment[name]
        else:
            del os.environ[name]
    if leaks:
        pytest.fail("The test left behind: " + "; ".join(leaks) + ".", pytrace=False)


@pytest.hookimpl(tryfirst=True)  # before -m and -k deselect, so that those tests are counted too
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        _narrow(item, "thorough")
    found = {name: [item for item in items if item.get_closest_marker(name)] for name in NEEDS}
    config.stash[ITEMS] = {name: {item.nodeid for item in marked} for name, marked in found.items()}
    config.stash[RUN] = set()
    config.stash[OBSTACLES] = {name: NEEDS[name](config) for name, marked in found.items() if marked}
    for name, reason in config.stash[OBSTACLES].items():
        if reason:
            for item in found[name]:
                item.add_marker(pytest.mark.skip(reason=reason))


def _narrow(item: pytest.Item, name: str) -> None:
    """Take a marker off a test unless it holds for it: without arguments it does for all cases, else for those whose
    identifier has one of them in it, as ``@pytest.mark.thorough("zbv", "-4")``.
    """
    case = item.name.removeprefix(getattr(item, "originalname", item.name))
    item.own_markers = [
        mark
        for mark in item.own_markers
        if mark.name != name or not mark.args or any(part in case for part in mark.args)
    ]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and not report.skipped:
        item.config.stash[RUN].add(item.nodeid)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker of pytest-xdist: tell the process that prints the summary what has run here."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        stash = session.config.stash
        output["needs"] = [
            {name: sorted(items) for name, items in stash.get(ITEMS, {}).items()},
            sorted(stash.get(RUN, set())),
            stash.get(OBSTACLES, {}),
        ]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Where the summary is printed: take in what a worker has run."""
    found, run, obstacles = getattr(node, "workeroutput", {}).get("needs", ({}, [], {}))
    stash = node.config.stash
    for name, items in found.items():
        stash.setdefault(ITEMS, {}).setdefault(name, set()).update(items)
    stash.setdefault(RUN, set()).update(run)
    stash.setdefault(OBSTACLES, {}).update(obstacles)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many of those tests ran: a green run without a GPU must not look like one with it."""
    for name in NEEDS:
        items = config.stash.get(ITEMS, {}).get(name, set())
        run = items & config.stash.get(RUN, set())
        parts = [f"{len(run)} run"] if run or not items else []
        if items - run:
            reason = config.stash[OBSTACLES][name] or "skipped, deselected or not reached"
            parts.append(f"{len(items - run)} not run ({reason})")
        terminalreporter.write_line(f"{name} tests: {', '.join(parts)}")
