"""Manual optimization: what a GAN, CycleGAN or actor-critic does, equal to plain Lightning on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.pool import RankFailure, RankPool
from tests.strategy.harness import LENGTH, STAGES, VOCAB, Fit, Outcome, distance, same_bits, train, train_all

Ranks = Callable[[int], RankPool]
WIDTH = 12


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """A few units between an input and an output layer that belong to the root."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(inside, WIDTH), nn.Linear(WIDTH, outside)
        self.blocks = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


class GAN(pl.LightningModule):
    """Two networks, two optimizers of different kinds, two schedules.

    Args:
        how: ``toggled``: as Lightning's example does it; ``dangling``: the generator's loss leaves gradients in the
            critic, which are cleared before its own backward; ``summed``: they are not cleared; ``skipped``: the
            generator steps every other batch; ``twice``: the critic steps after two backwards; ``clipped``: each
            optimizer's gradients by a norm of their own; ``frozen``: the user freezes the critic's parameters.
    """

    def __init__(self, how: str = "toggled") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.how = how
        self.generator, self.critic = Net(4, LENGTH), Net(LENGTH, 1)

    def training_step(self, batch: list[torch.Tensor], number: int) -> None:
        real = batch[0].float() / VOCAB
        noise = torch.stack([real.sum(1), real[:, 0], real.std(1), real[:, -1]], 1).sin()
        first, second = self.optimizers()
        toggled = self.how in ("toggled", "skipped", "twice", "clipped")
        if toggled:
            self.toggle_optimizer(first)
        if self.how == "frozen":
            self.critic.requires_grad_(False)
        loss = F.softplus(-self.critic(self.generator(noise))).mean()
        self.manual_backward(loss)
        if self.how == "clipped":
            self.clip_gradients(first, 0.05, "norm")
        if self.how != "skipped" or number % 2 == 0:
            first.step()
            first.zero_grad()
        if toggled:
            self.untoggle_optimizer(first)
            self.toggle_optimizer(second)
        if self.how == "frozen":
            self.critic.requires_grad_(True)
        if self.how == "dangling":
            second.zero_grad()
        losses = [F.softplus(-self.critic(real)).mean(), F.softplus(self.critic(self.generator(noise).detach())).mean()]
        for each in losses if self.how == "twice" else [sum(losses)]:
            self.manual_backward(each)
        if self.how == "clipped":
            self.clip_gradients(second, 0.01, "value")
        second.step()
        second.zero_grad(set_to_none=number % 2 == 0)
        if toggled:
            self.untoggle_optimizer(second)
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log_dict({"generator": loss.detach(), "critic": sum(losses).detach()}, sync_dist=True)

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.generator.parameters(), lr=0.1, momentum=0.9)
        second = torch.optim.AdamW(self.critic.parameters(), lr=1e-2, eps=1e-3)
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(each, 0.97) for each in (first, second)]
        return [first, second], schedulers


def in_stages(
    ranks: Ranks, size: int, folder: Path, stages: Sequence[str] = STAGES, **fit: Any
) -> tuple[list[Outcome], Outcome]:
    alone = train(Fit(**fit), folder / "alone")
    fits = [Fit({"zero": stage}, size, **fit) for stage in stages]
    return ranks(size).run(train_all, fits, folder / "ranks", timeout=120)[0], alone


@pytest.mark.thorough("twice", "skipped", "dangling", "frozen")
@pytest.mark.parametrize("how", ["toggled", "dangling", "summed", "skipped", "twice", "clipped", "frozen"])
def test_two_optimizers_equal_one_device(ranks, tmp_path, how):
    # All stages where gradients of one optimizer meet those of the other, or wait; else one that shards nothing but the
    # optimizer, and one that shards all.
    some = STAGES if how in ("toggled", "summed", "twice") else ("stage1", "stage3")
    stages, alone = in_stages(ranks, 2, tmp_path, some, module=GAN, arguments={"how": how})
    for each in stages:
        assert distance(each.weights, alone.weights) < 1e-6
        assert each.steps == alone.steps
        for name in ("generator", "critic", "lr-SGD", "lr-AdamW"):
            assert each.column(name) == pytest.approx(alone.column(name), rel=1e-5)
        assert same_bits(each.weights, stages[0].weights)


def test_the_ways_to_train_differ(tmp_path):
    outcomes = {
        how: train(Fit(module=GAN, arguments={"how": how}), tmp_path / how)
        for how in ("toggled", "summed", "skipped", "clipped")
    }
    for how in ("summed", "skipped", "clipped"):
        assert distance(outcomes[how].weights, outcomes["toggled"].weights) > 1e-3


@pytest.mark.thorough
def test_in_bf16_mixed_two_optimizers_follow_one_device(ranks, tmp_path):
    stages, alone = in_stages(ranks, 2, tmp_path, module=GAN, trainer={"precision": "bf16-mixed"})
    for each in stages:
        assert distance(each.weights, alone.weights) < 1e-2
        assert same_bits(each.weights, stages[0].weights)


def save_and_go_on(stage: str, size: int, folder: Path) -> tuple[Outcome, Outcome]:
    """Train four epochs at once, and two and two with a checkpoint in between."""
    whole = train(Fit({"zero": stage}, size, module=GAN, epochs=4), folder / "whole")
    path = folder / "half.ckpt"

    def save(trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(path)

    train(Fit({"zero": stage}, size, module=GAN, epochs=2, look=save), folder / "first")
    return whole, train(Fit({"zero": stage}, size, module=GAN, epochs=4, resume=path), folder / "second")


@pytest.mark.thorough("none")
@pytest.mark.parametrize("stage", ["none", "stage3"])
def test_both_optimizers_go_on_from_a_checkpoint(ranks, tmp_path, stage):
    whole, resumed = ranks(2).run(save_and_go_on, stage, 2, tmp_path, timeout=120)[0]
    assert same_bits(whole.weights, resumed.weights)
    plain = train(Fit(module=GAN, epochs=4, resume=tmp_path / "half.ckpt"), tmp_path / "plain")
    assert distance(plain.weights, whole.weights) < 1e-6


class Careless(GAN):
    """Steps without ever clearing gradients: they add up, as in plain torch."""

    def training_step(self, batch: list[torch.Tensor], number: int) -> None:
        _, second = self.optimizers()
        loss = self.critic(batch[0].float() / VOCAB).square().mean()
        self.manual_backward(loss)
        second.step()


def test_gradients_stay_until_they_are_cleared(ranks, tmp_path):
    stages, alone = in_stages(ranks, 2, tmp_path, module=Careless)
    for each in stages:
        assert distance(each.weights, alone.weights) < 1e-6


class StepsTooEarly(GAN):
    """Steps between the forward and the backward of a loss."""

    def training_step(self, batch: list[torch.Tensor], number: int) -> None:
        real = batch[0].float() / VOCAB
        _, second = self.optimizers()
        early, late = self.critic(real).mean(), self.critic(real).square().mean()
        self.manual_backward(early)
        second.step()
        self.manual_backward(late)


@pytest.mark.parametrize("stage", STAGES)
def test_a_graph_of_older_weights_is_refused_as_in_torch(ranks, tmp_path, stage):
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train(Fit(module=StepsTooEarly), tmp_path / "alone")
    with pytest.raises(RankFailure, match="modified by an inplace operation"):
        ranks(2).run(train, Fit({"zero": stage}, 2, module=StepsTooEarly), tmp_path)


class Shared(GAN):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.generator.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]


def test_a_parameter_of_two_optimizers_is_refused(ranks, tmp_path):
    with pytest.raises(RankFailure, match=r"'generator.enter.weight' is in two optimizers or groups; lit_zero trains"):
        ranks(2).run(train, Fit({"zero": "stage2"}, 2, module=Shared), tmp_path)
