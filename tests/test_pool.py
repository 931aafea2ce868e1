"""The pool of ranks itself: order, isolation, and every way in which a rank can fail."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.pool import RankFailure, RankHang, RankPool

Ranks = Callable[[int], RankPool]


def _rank_and_world() -> tuple[int, int, str]:
    return dist.get_rank(), dist.get_world_size(), dist.get_backend()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_in_rank_order(ranks: Ranks, world_size: int) -> None:
    assert ranks(world_size).run(_rank_and_world) == [(rank, world_size, "gloo") for rank in range(world_size)]


def _sum_of(value: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(value)
    return value


def test_ranks_communicate_and_the_callers_tensor_is_not_touched(ranks: Ranks) -> None:
    value = torch.ones(3)
    for result in ranks(2).run(_sum_of, value):
        assert torch.equal(result, torch.full((3,), 2.0))
    assert torch.equal(value, torch.ones(3))


def _large(elements: int) -> torch.Tensor:
    return torch.full((elements,), float(dist.get_rank()))


def test_large_results(ranks: Ranks) -> None:
    elements = 5_000_000  # 20 MB a rank: far more than a pipe holds
    for rank, result in enumerate(ranks(2).run(_large, elements)):
        assert result.shape == (elements,)
        assert result.min() == result.max() == rank


def _surroundings() -> dict[str, Any]:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "FROM_THE_CALLER"]
    return {
        "environment": {name: os.environ.get(name) for name in names},
        "port": int(os.environ["MASTER_PORT"]),
        "torchrun": dist.is_torchelastic_launched(),
        "threads": torch.get_num_threads(),
        "directory": os.getcwd(),
    }


def test_environment_looks_like_torchrun_and_follows_the_caller(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ranks(2).run(_surroundings)  # the processes exist before the caller changes
    monkeypatch.setenv("FROM_THE_CALLER", "yes")
    monkeypatch.chdir(tmp_path)
    for rank, seen in enumerate(ranks(2).run(_surroundings)):
        assert seen["environment"] == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "FROM_THE_CALLER": "yes",
        }
        assert 0 < seen["port"] < 65536
        assert seen["torchrun"]
        assert seen["threads"] == 1
        assert Path(seen["directory"]) == tmp_path


def _trainer_view() -> tuple[int, int, int]:
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities import rank_zero_only

    before = rank_zero_only.rank
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False, barebones=True
    )
    return before, trainer.global_rank, trainer.world_size


def test_a_lightning_trainer_inside_takes_the_ranks_as_given(ranks: Ranks) -> None:
    assert ranks(2).run(_trainer_view) == [(0, 0, 2), (1, 1, 2)]


def _leave_traces() -> float:
    draw = torch.rand(()).item()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    os.environ["LEFT_BEHIND"] = "1"
    dist.new_group()
    return draw


def _traces() -> tuple[float, torch.dtype, int, bool, bool]:
    return (
        torch.rand(()).item(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        "LEFT_BEHIND" in os.environ,
    )


def test_a_call_leaves_no_trace_for_the_next_one(ranks: Ranks) -> None:
    draws = ranks(2).run(_leave_traces)
    assert ranks(2).run(_traces) == [(draw, torch.float32, 1, True, False) for draw in draws]


def _leave_group_and_make_another() -> int:
    dist.destroy_process_group()
    dist.init_process_group("gloo")  # from the environment, as Lightning does it
    value = torch.ones(())
    dist.all_reduce(value)
    return int(value)


def test_a_call_may_make_its_own_group_from_the_environment(ranks: Ranks) -> None:
    assert ranks(2).run(_leave_group_and_make_another) == [2, 2]
    assert ranks(2).run(_leave_group_and_make_another) == [2, 2]


def test_processes_are_started_once(ranks: Ranks) -> None:
    first = ranks(2).run(os.getpid)
    start = time.monotonic()
    for _ in range(5):
        assert ranks(2).run(os.getpid) == first
    assert time.monotonic() - start < 5  # about 0.03 s a call; a start alone takes longer
    assert os.getpid() not in first


def _fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError(f"no luck on rank {rank}")
    dist.barrier()  # the others wait for a rank that never comes


def test_the_failing_ranks_traceback_is_raised(ranks: Ranks) -> None:
    pool = ranks(2)
    before = pool.run(os.getpid)
    start = time.monotonic()
    with pytest.raises(RankFailure, match="test_pool._fail_on: rank 1 of 2 failed") as caught:
        pool.run(_fail_on, 1)
    text = str(caught.value)
    assert "in _fail_on" in text
    assert 'raise KeyError(f"no luck on rank {rank}")' in text
    assert "After that rank 0 failed" in text
    assert caught.value.rank == 1
    assert isinstance(caught.value.exception, KeyError)
    assert time.monotonic() - start < 20  # the waiting rank ends with the failing one, not with its timeout
    # The process group of the failed call is in an unknown state: new processes serve the next one.
    after = pool.run(os.getpid)
    assert not set(before) & set(after)


def _fail_everywhere(first: int) -> None:
    if dist.get_rank() != first:
        time.sleep(1.0)
    raise RuntimeError(f"rank {dist.get_rank()} gives up")


def test_the_rank_that_failed_first_is_raised_and_the_others_are_listed(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="rank 1 of 2 failed") as caught:
        ranks(2).run(_fail_everywhere, 1)
    assert str(caught.value.exception) == "rank 1 gives up"
    assert "After that rank 0 failed: RuntimeError: rank 0 gives up" in str(caught.value)


def _bare_assert() -> None:
    found, expected = 3, 4
    assert found == expected


def test_a_bare_assertion_shows_its_variables(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="AssertionError") as caught:
        ranks(1).run(_bare_assert)
    assert "  found = 3\n  expected = 4\n" in str(caught.value)


def _pytest_fail() -> None:
    pytest.fail("not a subclass of Exception")


def test_pytest_fail_in_a_rank_is_a_failure(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="not a subclass of Exception"):
        ranks(1).run(_pytest_fail)


def _die(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "exit":
            os._exit(7)
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


@pytest.mark.parametrize(("how", "cause"), [("exit", "exit code 7"), ("segfault", "signal SIGSEGV")])
def test_a_rank_that_dies_is_named_before_those_it_takes_along(ranks: Ranks, how: str, cause: str) -> None:
    with pytest.raises(RankFailure, match=f"rank 1 of 2 failed.\n\nIt died \\({cause}\\)") as caught:
        ranks(2).run(_die, how)
    assert caught.value.rank == 1
    assert caught.value.exception is None
    assert ("in _die" in str(caught.value)) == (how == "segfault")  # faulthandler tells where


def _hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        _sleep_for_a_very_long_time()


def _sleep_for_a_very_long_time() -> None:
    threading.Event().wait(3600)


def test_a_hung_rank_is_an_error_with_its_stacks(ranks: Ranks) -> None:
    pool = ranks(2)
    pool.run(os.getpid)
    pids = pool.pids
    with pytest.raises(RankHang, match="no answer from rank 1 of 2 within 3 s") as caught:
        pool.run(_hang_on, 1, timeout=3.0)
    assert "Stacks of rank 1" in str(caught.value)
    assert "in _sleep_for_a_very_long_time" in str(caught.value)
    assert "Stacks of rank 0" not in str(caught.value)
    assert caught.value.rank == 1
    for pid in pids:  # no process is left behind
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert pool.run(_rank_and_world) == [(0, 2, "gloo"), (1, 2, "gloo")]


def _hang_in_a_collective() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


@pytest.mark.thorough
def test_a_rank_that_waits_for_one_that_returned_is_a_hang(ranks: Ranks) -> None:
    with pytest.raises(RankHang, match="no answer from rank 0 of 2") as caught:
        ranks(2).run(_hang_in_a_collective, timeout=3.0)
    assert "in barrier" in str(caught.value)


def _fail_while_another_hangs() -> None:
    if dist.get_rank() == 0:
        raise RuntimeError("rank 0 gives up")
    _sleep_for_a_very_long_time()


@pytest.mark.thorough
def test_a_failure_beside_a_hang_does_not_wait_for_the_timeout(ranks: Ranks) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match="rank 0 gives up") as caught:
        ranks(2).run(_fail_while_another_hangs, timeout=100.0)
    assert not isinstance(caught.value, RankHang)
    assert "no answer from rank 1" in str(caught.value)
    assert "in _sleep_for_a_very_long_time" in str(caught.value)
    assert time.monotonic() - start < 50


def _stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.thorough
def test_a_stopped_rank_is_a_hang_too(ranks: Ranks) -> None:
    with pytest.raises(RankHang, match="does not react to signals"):
        ranks(1).run(_stopped, timeout=3.0)


def _cannot_be_pickled() -> Any:
    return lambda: None


def test_a_result_that_cannot_be_pickled_is_a_failure(ranks: Ranks) -> None:
    with pytest.raises(RankFailure, match="pickle"):
        ranks(1).run(_cannot_be_pickled)


def test_an_inner_function_is_refused(ranks: Ranks) -> None:
    with pytest.raises(TypeError, match="Expected a function of a module's top level"):
        ranks(1).run(lambda: None)


def test_a_pool_needs_a_rank() -> None:
    with pytest.raises(ValueError, match="at least 1 rank, got world_size=0"):
        RankPool(0)


def test_close_ends_the_processes() -> None:
    pool = RankPool(1)
    (pid,) = pool.run(os.getpid)
    assert pool.pids == [pid]
    pool.close()
    assert pool.pids == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
