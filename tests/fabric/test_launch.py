"""Fabric scripts as users start them: alone, by torchrun, with a rank that fails, and with Lightning's other name.

Starting costs seconds: a script that fails does so in a second training, after one that goes well.
"""

from __future__ import annotations

import json
import os
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.warm import run_cold, run_python

pytestmark = pytest.mark.thorough

SCRIPT = """
    import json
    import sys
    import time
    from pathlib import Path

    import torch

    flavour, way, trouble, folder = sys.argv[1:]
    if flavour == "lightning":
        from lightning.fabric import Fabric
    else:
        from lightning_fabric import Fabric
    import lit_zero


    def main(fabric):
        train(fabric, "")
        if trouble:
            train(fabric, trouble)


    def train(fabric, trouble):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(4):
            torch.manual_seed(step)
            loss = model(torch.randn(4, 8)[fabric.global_rank :: 2]).square().mean()
            fabric.backward(loss)
            if step == 2 and trouble == f"rank {fabric.global_rank}":
                Path(folder, "raised").write_text(str(time.time()))
                raise ValueError(f"rank {fabric.global_rank} alone finds a mistake")
            optimizer.step()
            optimizer.zero_grad()
        weights = fabric.strategy.get_module_state_dict(model)
        seen = {
            "world": fabric.world_size,
            "weights": {name: value.tolist() for name, value in weights.items()},
            "strategy": next(k.__module__ for k in type(fabric.strategy).__mro__ if k.__name__ == "ParallelStrategy"),
        }
        Path(folder, f"rank{fabric.global_rank}.json").write_text(json.dumps(seen))


    if __name__ == "__main__":
        strategy = lit_zero.ZeroStrategy("stage3") if way == "function" else "zero3"
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        if way == "function":
            fabric.launch(main)
        else:
            fabric.launch()
            main(fabric)
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
CASES = {
    "torchrun": ("torchrun", "lightning", "script", ""),
    "lightning_fabric": ("", "lightning_fabric", "function", ""),
    "rank 1 raises": ("", "lightning", "function", "rank 1"),
    "rank 1 raises in a script": ("", "lightning", "script", "rank 1"),
}
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

    def rank(self, number: int) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.folder / f"rank{number}.json").read_text())
        return found


def start(name: str, folder: Path) -> Finished:
    launcher, *arguments = CASES[name]
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [*(TORCHRUN if launcher else ()), str(script), *arguments, str(folder)]
    environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    run = run_python if arguments[0] == "lightning" else run_cold  # what else is imported counts
    done = run(command, folder, {**environment, "OMP_NUM_THREADS": "1"}, 120)
    return Finished(done.code, done.output, folder, time.time())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """All scripts, run two at a time."""
    folder = tmp_path_factory.mktemp("scripts")
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda item: start(item[1], folder / str(item[0])), enumerate(CASES))
        return dict(zip(CASES, runs, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_train(finished, name):
    done = finished[name]
    assert (done.code == 0) == (not CASES[name][-1]), done.output
    first, second = done.rank(0), done.rank(1)
    assert first["world"] == second["world"] == 2
    assert second["weights"] == {} and first["weights"] == finished["torchrun"].rank(0)["weights"]
    flavour = "lightning_fabric" if name == "lightning_fabric" else "lightning.fabric"
    assert first["strategy"] == f"{flavour}.strategies.parallel"


@pytest.mark.parametrize("name", ["rank 1 raises", "rank 1 raises in a script"])
def test_a_rank_that_fails_ends_the_job(finished, name):
    done = finished[name]
    assert done.code != 0
    assert "rank 1 alone finds a mistake" in done.output
    assert done.ended - float((done.folder / "raised").read_text()) < LIMIT
    if name == "rank 1 raises":
        assert "rank 1 of 2 failed with ValueError" in done.output
