"""Bytes per rank equal the arithmetic: what stays on the device, what is in host memory, what is in files."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_zero.offload import Offload
from lit_zero.precision import Lowering, Precision
from lit_zero.zero.twin import Twin
from lit_zero.zero.walking import Walking
from tests.offload.harness import disk, plain, trained
from tests.offload.test_equality import autocast_loss
from tests.zero.harness import GPT, Run

BF16 = Lowering(Precision(lower="all"), torch.bfloat16)


def model() -> GPT:
    return GPT(dim=48, layers=8)  # blocks hold 99 % of the parameters


# Bytes per parameter on each of N ranks, with Adam: (device, host, file). A gradient of 4 bytes waits in host memory
# for a step there; in stage1, on a machine without a GPU, it is a part of the whole gradient, which is on the device.
TABLE: dict[str, dict[tuple[str, str], Any]] = {
    "32-true": {
        ("stage1", "cpu"): lambda n: (4 + 4, (4 + 8) / n, 0),
        ("stage2", "cpu"): lambda n: (4, (4 + 8 + 4) / n, 0),
        ("stage3", "cpu"): lambda n: (4 / n, (4 + 8 + 4) / n, 0),
        ("stage3", "cpu params"): lambda n: (0, (4 + 8 + 4) / n, 0),  # the master is the shard
        ("stage1", "disk"): lambda n: (4 + 4, 0, (4 + 8) / n),
        ("stage2", "disk"): lambda n: (4, 4 / n, (4 + 8) / n),
        ("stage3", "disk"): lambda n: (4 / n, 4 / n, (4 + 8) / n),
        ("stage3", "disk params"): lambda n: (0, 4 / n, (4 + 8) / n),
    },
    "bf16-mixed": {
        ("stage1", "cpu"): lambda n: (2 + 4, (4 + 8) / n, 0),
        ("stage2", "cpu"): lambda n: (2, (4 + 8 + 4) / n, 0),
        ("stage3", "cpu"): lambda n: (2 / n, (4 + 8 + 4) / n, 0),
        ("stage3", "cpu params"): lambda n: (0, (2 + 4 + 8 + 4) / n, 0),
        ("stage2", "disk"): lambda n: (2, 4 / n, (4 + 8) / n),
        ("stage3", "disk params"): lambda n: (0, 4 / n, (2 + 4 + 8) / n),
    },
}


def choice(words: str, folder: Path, **more: Any) -> Offload:
    params = words.endswith("params")
    return disk(folder, params=params, **more) if words.startswith("disk") else Offload("cpu", params=params, **more)


def counted(cases: list[tuple[str, str]], mode: str, folder: Path, ratio: float = 1.0) -> list[tuple[float, ...]]:
    """Return ``(device, host, file)`` bytes per parameter of each case."""
    lowering, loss = (BF16, autocast_loss) if mode == "bf16-mixed" else (None, GPT.loss)
    run, found = Run(model=model, loss=loss, optimizer=plain, steps=1, dtype=torch.float32), []
    for stage, words in cases:
        outcome = trained(stage, choice(words, folder, ratio=ratio), run, lowering)
        sizes, count = outcome.notes["bytes"], sum(value.numel() for value in outcome.weights.values())
        device = sum(sizes[kind] for kind in ("parameter", "master", "gradient", "optimizer"))
        found.append((device / count, sizes["host"] / count, sizes["file"] / count))
    return found


@pytest.mark.thorough("-4")
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("mode", TABLE)
def test_bytes_equal_the_table(ranks: Any, size: int, mode: str, tmp_path: Path) -> None:
    cases = list(TABLE[mode])
    for found in ranks(size).run(counted, cases, mode, tmp_path):
        for case, bytes_here in zip(cases, found, strict=True):
            assert bytes_here == pytest.approx(TABLE[mode][case](size), rel=0.02, abs=0.02), case


def test_a_ratio_divides_the_table(tmp_path: Path) -> None:
    [(device, host, file)] = counted([("stage2", "disk")], "32-true", tmp_path, ratio=0.5)
    assert device == pytest.approx(4 + 0.5 * (8 + 4), rel=0.1)  # what stays needs no master beside the parameters
    assert (host, file) == (pytest.approx(0.5 * 4, rel=0.1), pytest.approx(0.5 * (4 + 8), rel=0.1))


def test_a_gpu_has_a_copy_of_the_gradients_on_its_host() -> None:
    run = Run(model=model, optimizer=plain, steps=1, dtype=torch.float32)
    outcome = trained("stage1", Offload("cpu"), run, streams=True)
    sizes, count = outcome.notes["bytes"], sum(value.numel() for value in outcome.weights.values())
    assert sizes["host"] / count == pytest.approx(4 + 8 + 4, rel=0.02)


@pytest.mark.thorough
def test_two_portions_are_all_that_a_step_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live bytes while the optimizer steps on files: the portions, which do not grow with the model."""
    before, inside, chunk = list[int](), list[int](), 1 << 18
    step, twin = Walking._step, Twin.step

    def whole(self: Any, *args: Any) -> None:
        before.append(live())
        step(self, *args)

    def portion(self: Any, *args: Any) -> Any:
        found = twin(self, *args)
        if before:  # else it is tried out, before training starts
            inside.append(live() - before[-1])
        return found

    monkeypatch.setattr(Walking, "_step", whole)
    monkeypatch.setattr(Twin, "step", portion)
    run = Run(model=large, optimizer=plain, steps=2, dtype=torch.float32)
    trained("stage2", disk(tmp_path, chunk=chunk), run, overlap=False)
    assert chunk < max(inside) <= 2 * chunk + 1024


def large() -> GPT:
    return GPT(dim=96, layers=2)  # a block has 450 kB, and 1.3 MB with its state


def live() -> int:
    """Return the bytes of all tensors of this process."""
    found = (each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}.values())
