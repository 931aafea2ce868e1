"""On ranks: what is gathered and when, who chooses, what is shared out, and what is left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lit_zero import Activation, Comm, Pipeline, Zero, ZeroStrategy
from lit_zero.activation.applied import Applied
from lit_zero.comm.exchange import Exchange
from lit_zero.comm.open import open_exchange
from lit_zero.core.errors import ConfigError
from lit_zero.zero.engine import Engine
from tests.activation.harness import CPU, VARIANTS, DropBlock, DropGPT, LitDropGPT
from tests.pool import RankFailure
from tests.strategy.harness import Short, loaders, make_trainer, same_bits, train_all
from tests.zero.harness import momentum, tokens


class Pair(nn.Module):
    """Two blocks: a region larger than a unit."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.one, self.other = DropBlock(dim), DropBlock(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.one(x))


class Paired(DropGPT):
    def __init__(self) -> None:
        super().__init__(layers=0)
        self.blocks = nn.ModuleList(Pair(12) for _ in range(3))


def counted(kind: type[DropGPT], policy: Activation, slots: int, alone: bool = False) -> tuple[list[int], Any]:
    """Train three steps in stage 3; return the gathers of each and the weights."""
    torch.manual_seed(0)
    model = kind() if kind is Paired else kind(layers=6)
    optimizer = momentum(model)
    exchange = open_exchange(Comm(), CPU)
    group = exchange if policy.variant == "partition" else None
    applied = Applied(model, policy, "auto", CPU, group and open_exchange(Comm(), CPU, large=False))
    zero = Zero("stage3", units=["DropBlock"], slots=slots, poison=True)
    engine = Engine(model, [optimizer], zero=zero, exchange=exchange)
    gathers = []
    for step in range(3):
        exchange.counters.reset()
        torch.manual_seed(step)
        loss = model.loss(tokens(step))  # all ranks the same
        applied.step_is_over(exchange)
        engine.backward(loss)
        gathers.append(exchange.counters.gathers)
        engine.step()
    engine.detach()
    applied.remove()
    return gathers, {name: param.detach().clone() for name, param in model.named_parameters()}


def test_a_repetition_gathers_nothing_more(ranks: Any) -> None:
    """Every block is gathered for its forward and once for its backward, in which it is computed again."""
    pool = ranks(2)
    expected, weights = pool.run(counted, DropGPT, Activation(), 2)[0]
    # The root, and six blocks forward and backward: poisoned once they are released, none is there from the forward.
    assert expected == [1 + 6 + 6] * 3
    for policy in VARIANTS.values():
        gathers, found = pool.run(counted, DropGPT, policy, 2)[0]
        assert gathers == expected, policy.variant
        assert same_bits(found, weights), policy.variant


@pytest.mark.thorough
def test_regions_larger_than_a_unit(ranks: Any) -> None:
    """The repetition of a pair brings the first block for itself, and again for its backward."""
    pool = ranks(2)
    _, weights = pool.run(counted, Paired, Activation(), 2)[0]
    for variant in ("full", "every_n", "selective", "offload", "partition"):
        policy = replace(VARIANTS[variant], blocks=["Pair"])
        gathers, found = pool.run(counted, Paired, policy, 2)[0]
        assert same_bits(found, weights), variant
        assert max(gathers) <= 1 + 6 + 6 + 6, (variant, gathers)


class Replicated(LitDropGPT):
    """All ranks read the same."""

    def train_dataloader(self) -> Any:
        rows = torch.randint(0, 31, (16, 9), generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(rows), 4)


def fit_replicated(
    words: list[Activation], devices: int, pipeline: Pipeline | None = None
) -> list[dict[str, torch.Tensor]]:
    found = []
    for word in words:
        torch.manual_seed(0)
        module = Replicated(layers=4)
        zero = {"zero": "stage2", "activation": word, "pipeline": pipeline or Pipeline()}
        fit = Short(zero, devices, {"use_distributed_sampler": False}, epochs=1)
        trainer = make_trainer(fit, Path("unused"), logger=False, callbacks=[], limit_val_batches=0)
        trainer.fit(module)
        found.append({k: v.clone() for k, v in trainer.strategy.lightning_module_state_dict().items()})
    return found


def test_partition_in_the_trainer(ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, parted = ranks(2).run(fit_replicated, [Activation(), VARIANTS["partition"]], 2, Pipeline())[0]
    assert plain and same_bits(parted, plain)


@pytest.mark.thorough
def test_partition_in_pipelines(ranks: Any) -> None:
    """Two of them: the two ranks of each stage keep a part each."""
    words = [Activation(), VARIANTS["partition"]]
    plain, parted = ranks(4).run(fit_replicated, words, 4, Pipeline("zero_bubble", stages=2, micro_batches=2))[0]
    assert plain and same_bits(parted, plain)


def test_ranks_that_hold_different_activations_are_told(ranks: Any, tmp_path: Path) -> None:
    fit = Short({"zero": "stage2", "activation": VARIANTS["partition"]}, 2, module=LitDropGPT, epochs=1)
    with pytest.raises(
        RankFailure,
        match="The ranks that activation.ranks=2 puts together hold different arguments of block 'model.blocks.0'. "
        "Give them the same batches and seeds",
    ):
        ranks(2).run(train_all, [fit], tmp_path)


def test_parts_are_half_as_large(ranks: Any) -> None:
    for kept in ranks(2).run(kept_bytes):
        size = 256 * 64 * 4
        assert kept == {"full": 7 * size, "partition": 8 * size // 2}, "the first argument was there before"


def kept_bytes() -> dict[str, int]:
    """Return the bytes that a forward leaves, of blocks whose inputs are large."""
    from benchmark_worker import TensorMemory

    found = {}
    for variant in ("full", "partition"):
        torch.manual_seed(0)
        blocks = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)))
        group = open_exchange(Comm(), CPU, large=False)
        applied = Applied(blocks, VARIANTS[variant], "auto", CPU, group)
        x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with TensorMemory() as memory:
            memory.follow([x, *blocks.parameters()])
            before = memory.living()
            y = blocks(x)
            found[variant] = memory.living() - before - y.nbytes
        y.sum().backward()
        applied.remove()
        group.close()
    return found


def test_ranks_that_do_not_divide_are_refused_before_they_start() -> None:
    strategy = ZeroStrategy(activation=Activation("partition", ranks=3))
    with pytest.raises(ConfigError, match="activation.ranks=3 does not divide the 2 data-parallel ranks of this run."):
        strategy.activations.groups([[0, 1], [2, 3]])
    assert ZeroStrategy(activation=Activation("partition", ranks=2)).activations.groups([[0, 1, 2, 3]]) == [
        [0, 1],
        [2, 3],
    ]


# ---- in the Trainer


def calls(trainer: Any) -> tuple[int, int]:
    module = trainer.lightning_module
    return sum(block.calls for block in module.model.blocks), len(module.noted)


class Noted(LitDropGPT):
    """Counts the forwards of its blocks in training, and notes what they are to do."""

    def on_train_start(self) -> None:
        self.noted: list[dict[str, str]] = []
        for block in self.model.blocks:
            block.calls = 0

    def on_train_batch_end(self, *_: Any) -> None:
        applied = self.trainer.strategy.activations.of(self)
        self.noted.append({} if applied is None else dict(applied.choices))


def test_blocks_do_what_is_said(ranks: Any, tmp_path: Path) -> None:
    """Two steps of four blocks, and once more what is computed again."""
    budget = Activation("budget", budget=70_000)
    words = [Activation(), *(VARIANTS[v] for v in ("full", "every_n", "selective", "offload")), budget]
    fits = [
        Short(
            {"zero": "stage2", "activation": word}, 2, {"limit_val_batches": 0}, Noted, {"layers": 4}, 16, 1, look=calls
        )
        for word in words
    ]
    found = [outcome.notes for outcome in ranks(2).run(train_all, fits, tmp_path)[0]]
    assert found[:5] == [(8, 2), (16, 2), (12, 2), (16, 2), (8, 2)]
    assert 8 + 8 > found[5][0] > 8 + 4, "all in the first step, and then some"


@pytest.mark.thorough("zero_bubble")
@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_in_a_pipeline_a_block_is_computed_again_once(ranks: Any, schedule: str, tmp_path: Path) -> None:
    """Two steps of four micro-batches; where the backward is in two halves too, and on the stage that splits it."""
    pipeline = Pipeline(schedule, stages=2, micro_batches=4)
    fits = [
        Short(
            {"zero": "stage2", "activation": word, "pipeline": pipeline},
            2,
            {"limit_val_batches": 0},
            Noted,
            {"layers": 4},
            16,
            1,
            look=calls,
        )
        for word in ("none", "full", "selective")
    ]
    for rank in ranks(2).run(train_all, fits, tmp_path):
        assert [outcome.notes for outcome in rank] == [(16, 2), (32, 2), (32, 2)]


def test_a_budget_that_nothing_fits_ends_the_run_before_a_weight_changes(ranks: Any, tmp_path: Path) -> None:
    for pipeline in (Pipeline(), Pipeline("1f1b", stages=2, micro_batches=4)):
        zero = {"zero": "stage2", "activation": Activation("budget", budget=1000), "pipeline": pipeline}
        fit = Short(zero, 2, module=Unstepped, arguments={"layers": 4}, epochs=1)
        with pytest.raises(RankFailure) as caught:
            ranks(2).run(train_all, [fit], tmp_path)
        assert "activation.budget=1000 is below the least possible" in str(caught.value)
        assert "a weight would be changed" not in str(caught.value)


class Unstepped(LitDropGPT):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        raise AssertionError("a weight would be changed")


def fit_twice(folder: Path) -> None:
    fit = Short({"zero": "stage3", "activation": "full"}, 2, module=LitDropGPT, epochs=1)
    module, trainer = LitDropGPT(), make_trainer(fit, folder, callbacks=[During()])
    keys = list(module.state_dict())
    assert not any("forward" in vars(block) for block in module.model.blocks)
    for _ in range(2):
        trainer.fit(module, *loaders(fit))
        assert not any("forward" in vars(block) for block in module.model.blocks)
        assert list(trainer.strategy.full_state_dict()) == (keys if trainer.is_global_zero else [])
        assert trainer.fit_loop.max_epochs is not None
        trainer.fit_loop.max_epochs += 1
    trainer.validate(module, loaders(fit)[1], verbose=False)


def test_the_module_is_as_before_the_run(ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(fit_twice, tmp_path)


class During(Callback):
    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        assert all("forward" in vars(block) for block in module.model.blocks)


def skipped() -> list[str]:
    """In the first step a rank leaves a block out, and every rank another one; the last runs on no rank."""
    torch.manual_seed(0)
    model, exchange = DropGPT(layers=4), open_exchange(Comm(), CPU)
    applied = Applied(model, Activation("budget", budget=70_000), "auto", CPU)
    x = torch.randn(8, 9, 12, requires_grad=True)
    applied.step_is_over(exchange)
    assert not applied.choices, "nothing has run on any rank"
    if exchange.rank:
        x.sum().backward()
    else:
        model.blocks[exchange.rank](x).sum().backward()
    applied.step_is_over(exchange)
    return list(applied.choices.values())


def test_ranks_on_which_other_blocks_ran_choose_alike(ranks: Any) -> None:
    one, other = ranks(2).run(skipped)
    assert one == other == ["keep", *["recompute"] * 3]


def test_peers_choose_alike() -> None:
    """The slowest rank's link and the largest bytes count."""

    class Peers(Exchange):
        def maximum(self, value: torch.Tensor) -> torch.Tensor:
            return torch.maximum(value, torch.tensor(100_000).where(value > 0, value))

    torch.manual_seed(0)
    model = DropGPT(layers=4)
    applied = Applied(model, Activation("budget", budget=10_000_000), "auto", CPU)
    model.loss(tokens(0)).backward()
    applied.step_is_over(Peers())
    assert set(applied.choices.values()) == {"keep"}
    applied.remove()
    applied = Applied(model, Activation("budget", budget=390_000), "auto", CPU)
    model.loss(tokens(0)).backward()
    with pytest.raises(ConfigError, match="below the least possible, 400000 bytes"):
        applied.step_is_over(Peers())
