"""The benchmark: its arithmetic, its memory meter, and one small turn of real processes."""

from __future__ import annotations

import argparse
import threading

import benchmark
import pytest
import torch
from benchmark import Measured, choose, parse, table, take_turn
from benchmark_worker import CONTENDERS, TensorMemory, Turn

MB = 1_000_000


def found(steps: list[float], peak: int | None = None) -> Measured:
    return Measured(rounds=[steps[0]], seconds=steps, peak_bytes=peak, losses=[2.0, 1.5])


def test_table_gives_multiples_of_the_time_above_the_floor() -> None:
    text = table(
        {
            "floor": found([0.010, 0.030, 0.020], 40 * MB),
            "ddp": found([0.025], 80 * MB),
            "fsdp2-reshard": found([0.040], 50 * MB),
            "lit-zero-stage3": found([0.030], 60 * MB),
            "deepspeed3": Measured(failure="rank 0: no"),
        }
    )
    assert text.splitlines()[2:] == [
        "| floor | 20.0 (10.0) | 0.80 | 0.0 |  |  | 40.0 | 0.50 | 1.5000000 |",
        "| ddp | 25.0 (25.0) | 1.00 | 5.0 | 1.00 | 0.25 | 80.0 | 1.00 | 1.5000000 |",
        "| fsdp2-reshard | 40.0 (40.0) | 1.60 | 20.0 | 4.00 | 1.00 | 50.0 | 0.62 | 1.5000000 |",
        "| lit-zero-stage3 | 30.0 (30.0) | 1.20 | 10.0 | 2.00 | 0.50 | 60.0 | 0.75 | 1.5000000 |",
        "| deepspeed3 | failed: rank 0: no | | | | | | | |",
    ]


def test_turns_interleave(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def fake(turn: Turn, timeout: float) -> list[dict]:
        taken.append((turn.contender, turn.memory))
        if turn.contender == "ddp":
            raise RuntimeError("rank 1: no")
        result = {"turn": {"memory": turn.memory, "device": "cpu"}, "losses": [1.0]}
        return [
            {**result, "seconds": [1.0, 3.0], "peak_bytes": 5 if turn.memory else None},
            {**result, "seconds": [3.0, 5.0], "peak_bytes": 7 if turn.memory else None},
        ]

    monkeypatch.setattr(benchmark, "take_turn", fake)
    options = parse(["--rounds", "2"])
    measured = benchmark.measure(["floor", "ddp", "fsdp2-keep"], "tiny", 2, options)
    rounds = [("floor", False), ("ddp", False), ("fsdp2-keep", False), ("floor", False), ("fsdp2-keep", False)]
    assert taken == [*rounds, ("floor", True), ("fsdp2-keep", True)]
    assert measured["floor"].seconds == [2.0, 4.0, 2.0, 4.0]  # means over ranks
    assert measured["floor"].step == 3.0
    assert measured["floor"].peak_bytes == 7
    assert measured["ddp"].failure == "rank 1: no"


def test_the_floor_always_runs_and_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    names, remarks = choose(["ddp", "deepspeed2"])
    assert names == ["floor", "ddp"]
    assert remarks == ["DeepSpeed is not installed, so deepspeed2 did not run."]
    assert choose(None)[0] == [name for name in CONTENDERS if not name.startswith("deepspeed")]


def test_more_ranks_than_gpus_are_refused(capsys: pytest.CaptureFixture) -> None:
    many = torch.cuda.device_count() + 1
    with pytest.raises(SystemExit):
        parse(["--device", "cuda", "--ranks", str(many)])
    assert f"--ranks {many} needs as many GPUs, but {many - 1} are visible" in capsys.readouterr().err


def live(memory: TensorMemory) -> int:
    """The bytes that are alive now."""
    memory.peak = 0
    torch.zeros(0)  # any operation
    return memory.peak


def test_tensor_memory_counts_live_storages() -> None:
    with TensorMemory() as memory:
        kept = torch.zeros(250_000)  # 1 MB
        assert live(memory) == MB
        view = kept.view(500, 500)[:10]
        assert live(memory) == MB  # the same storage
        other = kept + 1
        assert live(memory) == 2 * MB
        other.untyped_storage().resize_(0)
        assert live(memory) == MB
        del kept
        assert live(memory) == MB  # the view holds it
        del view
        assert live(memory) == 0


def test_tensor_memory_sees_the_peak_inside_a_backward() -> None:
    with TensorMemory() as memory:
        weight = torch.zeros(250_000, requires_grad=True)  # 1 MB
        loss = weight.exp().sum()  # the result of exp is kept for the backward: 1 MB
        memory.peak = 0
        loss.backward()  # and the gradient: 1 MB
        assert 3 * MB <= memory.peak < 3.01 * MB


def test_tensor_memory_counts_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "run", threading.Thread.run)  # put back what start() replaces
    kept = []
    memory = TensorMemory()
    memory.start()
    try:
        thread = threading.Thread(target=lambda: kept.append(torch.zeros(250_000)))
        thread.start()
        thread.join()
        assert live(memory) == MB
    finally:
        memory.__exit__(None, None, None)


@pytest.mark.thorough("True-1")
@pytest.mark.parametrize(("memory", "ranks"), [(False, 2), (True, 1)])
def test_a_real_turn(memory: bool, ranks: int) -> None:
    model, batch_size = benchmark.SIZES["tiny"]
    results = take_turn(Turn("ddp", ranks, model, batch_size, 1, 2, "cpu", memory), timeout=120)
    assert [len(result["seconds"]) for result in results] == [2] * ranks
    assert [len(result["losses"]) for result in results] == [3] * ranks
    assert len({tuple(result["losses"]) for result in results}) == ranks  # each rank has tokens of its own
    assert (results[0]["peak_bytes"] is not None) == memory


@pytest.mark.thorough
def test_a_turn_that_fails_says_why() -> None:
    model, batch_size = benchmark.SIZES["tiny"]
    with pytest.raises(RuntimeError, match="rank 0: .*KeyError: 'nobody'"):
        take_turn(Turn("nobody", 1, model, batch_size, 1, 1, "cpu", False), timeout=120)


def test_a_turn_that_hangs_is_given_up() -> None:
    model, batch_size = benchmark.SIZES["tiny"]
    with pytest.raises(RuntimeError, match="rank 0: "):
        take_turn(Turn("ddp", 2, model, batch_size, 1, 10**9, "cpu", False), timeout=1.0)


def test_size_names_are_true() -> None:
    from gpt import GPT

    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in GPT(**benchmark.SIZES[name][0]).parameters()) for name in ("2M", "30M")}
    assert counts["2M"] == pytest.approx(2e6, rel=0.05)
    assert counts["30M"] == pytest.approx(30e6, rel=0.05)


def test_help_names_every_contender() -> None:
    assert isinstance(parse(["--only", *CONTENDERS]), argparse.Namespace)
