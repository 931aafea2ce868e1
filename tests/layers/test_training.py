"""Fused layers in training: in every ZeRO stage, with recomputation, in a pipeline and in Fabric, as plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_zero.core.errors import ConfigError
from lit_zero.layers import Layers, LinearCrossEntropy
from lit_zero.layers.replacing import Replacement
from tests.activation.harness import VARIANTS, gradients, same
from tests.fabric.harness import Loop, go_on, make_fabric, set_up
from tests.models.harness import check_equal, defaults
from tests.pipeline.harness import check
from tests.pool import RankFailure
from tests.strategy.harness import STAGES, Fit, Short, distance, train, train_all
from tests.zero.harness import tokens

VOCAB, DIM = 31, 12
CPU = torch.device("cpu")


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(DIM, 20, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(20, DIM, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.dropout = nn.RMSNorm(DIM), MLP(), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.dropout(self.mlp(self.norm(x)))
        return y


class Modern(nn.Module):
    """Everything that is known but attention; the output layer has the weight of the embedding."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(DIM), LinearCrossEntropy(DIM, VOCAB)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, rows: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.embedding(rows)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.norm(x), targets)
        return y

    def loss(self, rows: Tensor) -> Tensor:
        return self(rows[:, :-1], rows[:, 1:])


def untied() -> Modern:
    return Modern(tied=False)


def replaced(model: nn.Module) -> int:
    return sum("forward" in vars(each) for each in model.modules())


def plain_loss(model: nn.Module, rows: Tensor) -> Tensor:
    assert replaced(model) == 0
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def fused_loss(model: nn.Module, rows: Tensor) -> Tensor:
    assert replaced(model) == 7, "three norms and feed-forward layers of blocks, and the last norm"
    loss: Tensor = model(rows[:, :-1], rows[:, 1:])
    return loss


def left(trainer: Any) -> int:
    return replaced(trainer.lightning_module)


@pytest.mark.parametrize("build", [Modern, untied])
def test_every_stage_equals_one_process_without(build: Any, ranks: Any, tmp_path: Path) -> None:
    plain = defaults({"arguments": {"build": build, "loss": plain_loss}, "look": left})
    fused = {**plain, "arguments": {"build": build, "loss": fused_loss}}
    alone = train(Fit(**plain), tmp_path / "alone")
    fits = [Fit({"zero": stage, "layers": "fused"}, 2, **fused) for stage in STAGES]
    outcomes = ranks(2).run(train_all, fits, tmp_path / "ranks", timeout=180)[0]
    check_equal(outcomes, alone)
    assert all(each.notes == 0 for each in outcomes), "all is undone after the fit"


def test_mixed_precision_follows_lightning(ranks: Any, tmp_path: Path) -> None:
    more: dict[str, Any] = {"look": left, "trainer": {"precision": "bf16-mixed"}}
    plain = defaults({"arguments": {"build": Modern, "loss": plain_loss}, **more})
    fused = {**plain, "arguments": {"build": Modern, "loss": fused_loss}}
    alone = train(Short(**plain), tmp_path / "alone")
    [found] = ranks(2).run(train_all, [Short({"zero": "stage3", "layers": "fused"}, 2, **fused)], tmp_path / "r")[0]
    assert found.column("train_loss") == pytest.approx(alone.column("train_loss"), rel=1e-2)
    assert distance(found.weights, alone.weights) < 2e-2


def test_nothing_known_ends_the_run_before_it_begins(ranks: Any, tmp_path: Path) -> None:
    fit = defaults({"arguments": {"build": Modern, "loss": plain_loss}})
    with pytest.raises(RankFailure, match="ConfigError: .*has no effect on rotary: Foreign has none of what is known"):
        ranks(2).run(train_all, [Short({"layers": Layers("fused", ["rotary"])}, 2, **fit)], tmp_path)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "partition"])
def test_recomputed_and_offloaded_bit_for_bit(variant: str) -> None:
    torch.manual_seed(0)
    model = Modern()
    Replacement("fused").apply(model, CPU)
    rows = tokens(0)
    expected = {name: value.clone() for name, value in gradients(model, None, rows, rows).items()}
    model.zero_grad()
    same(gradients(model, VARIANTS[variant], rows, rows), expected)


def test_in_a_pipeline() -> None:
    for loss in ("plain", "fused"):
        model = gpt.GPT(VOCAB, 9, DIM, layers=3, heads=2, dropout=0.1, loss=loss)
        Replacement("fused").apply(model, CPU)
        check(model, lambda model, rows: model(rows[:, :-1], rows[:, 1:]), [tokens(0), tokens(1)], 2)


def test_the_example_has_the_same_loss_both_ways() -> None:
    for tied in (True, False):
        found = []
        for loss in ("plain", "fused"):
            torch.manual_seed(0)
            model = gpt.GPT(VOCAB, 9, DIM, layers=1, heads=2, tied=tied, loss=loss)
            found.append(gradients(model, None, tokens(0), tokens(0)))
        for name, value in found[0].items():
            torch.testing.assert_close(found[1][name], value, msg=lambda m, n=name: f"{n}: {m}")
    with pytest.raises(ConfigError, match="model.loss='whole' is not known. Choose one of: plain, fused"):
        gpt.GPT(loss="whole")


def in_fabric() -> list[int]:
    """Set one module up with fused layers, then with plain ones; return how many are replaced."""
    model, found = Modern(), []
    for word in ("fused", "plain"):
        one = Loop({"zero": "stage3", "layers": word}, 2, {}, model=lambda: model, steps=1)
        fabric = make_fabric(one)
        prepared, optimizers = set_up(fabric, one)
        found.append(replaced(model))
        go_on(fabric, prepared, optimizers, one, range(1))
        if word == "fused":
            fabric.strategy.engine(prepared).detach()
            found.append(replaced(model))
    return found


def test_in_fabric(ranks: Any) -> None:
    assert ranks(2).run(in_fabric)[0] == [7, 0, 0], "a module that is given back has its own forwards"
