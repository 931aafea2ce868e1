"""torch.compile: of the whole LightningModule and of single blocks; same losses, and every block is one graph.

The backends used here need no C++ compiler; the one test of the default backend, which does, says so when it is
skipped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from lit_zero.zero.engine import Engine
from tests.fabric import harness as fabric_harness
from tests.pool import RankPool
from tests.strategy.harness import (
    Fit,
    LitGPT,
    Outcome,
    distance,
    loaders,
    make_trainer,
    outcome,
    same_bits,
    train,
)

Ranks = Callable[[int], RankPool]
ATTENTION = "scaled_dot_product_attention"  # one for every block


class Graphs:
    """A backend that keeps what it is given to compile."""

    def __init__(self) -> None:
        self.modules: list[torch.fx.GraphModule] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return self  # Fabric compiles a module once more with a copy of the arguments

    def __call__(self, module: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        self.modules.append(module)
        return aot_eager(module, inputs)

    def of_blocks(self) -> list[tuple[int, int]]:
        """For every graph with a part of a block in it: its attentions and its linear layers."""
        found = []
        for module in self.modules:
            calls = [str(node.target) for node in module.graph.nodes if node.op in ("call_function", "call_method")]
            counts = sum(ATTENTION in call for call in calls), sum("linear" in call for call in calls)
            if any(counts):
                found.append(counts)
        return found


def compiled_forward(block: Any, **how: Any) -> Any:
    block.forward = torch.compile(block.forward, fullgraph=True, **how)
    return block


def compiled_in_place(block: Any, **how: Any) -> Any:
    block.compile(fullgraph=True, **how)
    return block


def compiled_module(block: Any, **how: Any) -> Any:
    return torch.compile(block, fullgraph=True, **how)


BLOCKS = {"forward": compiled_forward, "compile()": compiled_in_place, "module": compiled_module}


class Quiet(LitGPT):
    """Logs outside its steps: in a compiled step, torch 2.13 fails at Lightning's ``self.log``, without us as well."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model.loss(batch[0])

    def on_train_batch_end(self, outputs: Any, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("train_loss_step", outputs["loss"], sync_dist=True)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model.loss(batch[0])

    def on_validation_batch_end(
        self, outputs: Any, batch: list[torch.Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.log("val_loss", outputs, sync_dist=True, batch_size=len(batch[0]))


def compiled(way: str, backend: Any) -> pl.LightningModule | Any:
    """Return a module that is compiled in the given way."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    module = Quiet(lr=0.1)
    if way == "whole":
        return torch.compile(module, backend=backend)
    for number, block in enumerate(module.model.blocks):
        module.model.blocks[number] = BLOCKS[way](block, backend=backend)
    return module


def fit_compiled(fit: Fit, folder: Path, way: str, backend: Any = None) -> tuple[Outcome, list[tuple[int, int]]]:
    """Train a compiled module; return also the graphs with parts of blocks."""
    graphs = backend or Graphs()
    module, trainer = compiled(way, graphs), make_trainer(fit, folder)
    trainer.fit(module, *loaders(fit))
    result = outcome(trainer, fit, folder)
    trainer.validate(module, loaders(fit)[1], verbose=False)
    torch._dynamo.reset()
    return result, graphs.of_blocks() if isinstance(graphs, Graphs) else []


def fit_all(fits: list[tuple[Fit, str]], folder: Path) -> list[tuple[Outcome, list[tuple[int, int]]]]:
    return [fit_compiled(fit, folder / str(number), way) for number, (fit, way) in enumerate(fits)]


def plain(fit: Fit, folder: Path) -> Outcome:
    """Train without compiling, in plain Lightning."""
    torch.manual_seed(0)
    module, trainer = Quiet(lr=0.1), make_trainer(replace(fit, zero="auto", devices=1), folder)
    trainer.fit(module, *loaders(replace(fit, zero="auto", devices=1)))
    return outcome(trainer, replace(fit, zero="auto"), folder)


FIT = Fit(epochs=1, module=Quiet)


@pytest.mark.thorough("whole", "compile()", "forward")
@pytest.mark.parametrize("way", ["whole", *BLOCKS])
def test_same_losses_and_one_graph_for_a_block(ranks, tmp_path, way):
    alone = plain(FIT, tmp_path / "plain")
    stages = ("stage2" if way == "compile()" else "none", "stage3")  # compiling takes seconds
    fits = [(replace(FIT, zero={"zero": stage}, devices=2), way) for stage in stages]
    results = ranks(2).run(fit_all, fits, tmp_path, timeout=240)[0]
    for result, graphs in results:
        weights = {name.replace("_orig_mod.", ""): value for name, value in result.weights.items()}
        assert distance(weights, alone.weights) < 1e-6
        for name in ("train_loss_step", "val_loss"):
            assert result.column(name) == pytest.approx(alone.column(name), rel=1e-6)
        assert graphs, "nothing of a block was compiled"
        # A graph with an attention has all four linear layers of the block, and no graph has linear layers without.
        assert {graph for graph in graphs if graph != (0, 1)} == {(1, 4)}
        assert all(same_bits(result.weights, results[0][0].weights) for result, _ in results)


def test_bf16_mixed(ranks, tmp_path):
    fit = replace(FIT, zero={"zero": "stage3"}, devices=2, trainer={"precision": "bf16-mixed"})
    eager = ranks(2).run(train, fit, tmp_path / "eager")[0]
    result, graphs = ranks(2).run(fit_compiled, fit, tmp_path / "compiled", "forward", timeout=120)[0]
    assert set(graphs) == {(1, 4)}
    weights = {name.replace("_orig_mod.", ""): value for name, value in result.weights.items()}
    assert distance(weights, eager.weights) < 1e-3
    assert result.column("train_loss_step") == pytest.approx(eager.column("train_loss_step"), rel=1e-3)


def detached(folder: Path) -> list[bool]:
    """Give a module with compiled blocks back; return whether the blocks run as before, in this order."""
    fit = replace(FIT, zero={"zero": "stage3"}, devices=2, trainer={"max_steps": 1})
    module, trainer = compiled("compile()", "eager"), make_trainer(fit, folder)
    calls = [block._compiled_call_impl for block in module.model.blocks]
    trainer.fit(module, *loaders(fit))
    during = [block._compiled_call_impl for block in module.model.blocks]
    engine = Engine.of(module)
    assert engine is not None
    engine.detach()
    after = [block._compiled_call_impl for block in module.model.blocks]
    logits = module.model(torch.zeros(1, 3, dtype=torch.int64))
    torch._dynamo.reset()
    return [
        calls == after,
        all(one is not other for one, other in zip(calls, during, strict=True)),
        logits.isfinite().all().item(),
    ]


def test_detaching_leaves_the_compiled_call(ranks, tmp_path):
    assert ranks(2).run(detached, tmp_path)[0] == [True, True, True]


def in_fabric(loop: fabric_harness.Loop, way: str) -> tuple[fabric_harness.Outcome, list[tuple[int, int]]]:
    """Train a compiled module in Fabric."""
    torch._dynamo.reset()
    graphs = Graphs()

    def build() -> Any:
        model = fabric_harness.Parted()
        if way == "whole":
            return torch.compile(model, backend=graphs)
        for block in model.blocks:
            BLOCKS[way](block, backend=graphs)
        return model

    result = fabric_harness.train(replace(loop, model=build))
    torch._dynamo.reset()
    return result, graphs.of_blocks()


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["whole", "compile()"])
def test_fabric(ranks, way):
    loop = fabric_harness.Loop(steps=2)
    alone = fabric_harness.train(loop)
    for stage in ("none", "stage3"):
        result, graphs = ranks(2).run(in_fabric, replace(loop, zero={"zero": stage}, devices=2), way, timeout=120)[0]
        assert distance(result.weights, alone.weights) < 1e-9
        assert set(graphs) == {(1, 4)}


@pytest.mark.thorough
@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="no C++ compiler for torch.compile's default",
)
def test_the_default_backend(ranks, tmp_path):
    alone = plain(FIT, tmp_path / "plain")
    fit = replace(FIT, zero={"zero": "stage3"}, devices=2)
    result, _ = ranks(2).run(fit_compiled, fit, tmp_path, "forward", "inductor", timeout=300)[0]
    assert distance(result.weights, alone.weights) < 1e-6
