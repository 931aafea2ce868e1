"""Models built in ``configure_model`` or on the meta device: no rank holds the whole, and the weights are the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchmetrics.classification import MulticlassAccuracy

from lit_zero.core.errors import LitZeroError
from tests.pool import RankPool
from tests.strategy.harness import STAGES, VOCAB, Fit, LitGPT, distance, same_bits, train, train_all
from tests.strategy.test_checkpoints import save
from tests.strategy.test_model_checkpoint import refused
from tests.zero.harness import GPT, Block

Ranks = Callable[[int], RankPool]
LAYERS, DIM = 8, 48  # blocks hold 99 % of the parameters


class Live(TorchDispatchMode):
    """Adds up the bytes of all tensor memory that was made inside and still lives; meta tensors have none."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return result


class Watch(Callback):
    """Watches memory from before ``configure_model`` until the model is sharded."""

    def __init__(self) -> None:
        self.live = Live()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.live.__enter__()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.live.__exit__(None, None, None)


class Deferred(LitGPT):
    """Builds its model when the Trainer asks for it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = GPT(VOCAB, DIM, LAYERS)


def peak(trainer: pl.Trainer) -> int:
    return next(callback.live.peak for callback in trainer.callbacks if isinstance(callback, Watch))


def watched(**fit: Any) -> Fit:
    trainer = {"callbacks": [Watch()], "max_steps": 1, "limit_val_batches": 0}
    return Fit(trainer=trainer, look=peak, arguments={"optimizer": "adamw"}, **fit)


@pytest.mark.parametrize("size", [2, 4])
def test_no_rank_ever_holds_the_whole_model(ranks, tmp_path, size):
    whole = 4 * sum(p.numel() for p in GPT(VOCAB, DIM, LAYERS).parameters())
    block = 4 * sum(p.numel() for p in Block(DIM).parameters())
    for each in ranks(size).run(train, watched(zero={"zero": "stage3"}, devices=size, module=Deferred), tmp_path):
        # the shard, two slots and the root in its own, and one parameter at a time
        assert each.notes < whole / size + 2.5 * block
        assert each.notes > whole / size + 2 * block
    for each in ranks(size).run(train, watched(zero={"zero": "stage2"}, devices=size, module=Deferred), tmp_path):
        assert each.notes > whole, "what the same count says of a stage that does not shard parameters"


@pytest.mark.thorough("bf16-true")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_weights_are_those_of_an_eager_build(ranks, tmp_path, precision):
    trainer = {"precision": precision, "max_steps": 1, "limit_val_batches": 0}
    alone = train(Fit(trainer=trainer, module=Deferred, arguments={"lr": 0.0}), tmp_path / "alone")
    fits = [Fit({"zero": stage}, 2, trainer, Deferred, {"lr": 0.0}) for stage in STAGES]
    for each in ranks(2).run(train_all, fits, tmp_path / "ranks")[0]:
        assert same_bits(each.weights, alone.weights)


class OnMeta(LitGPT):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        with torch.device("meta"):
            self.model = GPT(VOCAB, DIM, LAYERS)


@pytest.mark.parametrize("size", [1, 2])
def test_a_model_built_on_the_meta_device(ranks, tmp_path, size):
    arguments = {"optimizer": "adamw", "lr": 1e-2}
    alone = train(Fit(module=Deferred, arguments=arguments, epochs=1), tmp_path / "alone")
    fits = [Fit({"zero": stage}, size, module=OnMeta, arguments=arguments, epochs=1) for stage in STAGES]
    for each in ranks(size).run(train_all, fits, tmp_path / "ranks")[0]:
        assert distance(each.weights, alone.weights) < 1e-6


class WithMetric(Deferred):
    """Builds a metric along with the model."""

    def configure_model(self) -> None:
        super().configure_model()
        self.accuracy = MulticlassAccuracy(VOCAB, average="micro")


def test_a_metric_built_on_the_meta_device_is_named(ranks, tmp_path):
    for words in ranks(2).run(refused, Fit({"zero": "stage3"}, 2, module=WithMetric), tmp_path, LitZeroError):
        assert words == (
            "Module 'accuracy' (MulticlassAccuracy) was built on the meta device and keeps 'tp' there, which is "
            "neither a parameter nor a buffer, so its value is lost. Build the module (a metric, for example) in "
            "__init__ instead of configure_model, or under torch.device('cpu')."
        )
    assert ranks(2).run(train, Fit({"zero": "stage2"}, 2, module=WithMetric, epochs=1), tmp_path)[0].steps == 5


@pytest.mark.thorough("sharded")
@pytest.mark.parametrize("form", ["full", "sharded"])
def test_resuming_a_deferred_model(ranks, tmp_path, form):
    arguments = {"optimizer": "adamw", "lr": 1e-2}
    whole = Fit({"zero": "stage3", "checkpoint": form}, 2, module=Deferred, arguments=arguments)
    expected, _ = ranks(2).run(train_all, [whole, replace(whole, epochs=1, look=save)], tmp_path)[0]
    resumed = ranks(2).run(train, replace(whole, resume=tmp_path / "1" / "saved.ckpt"), tmp_path / "second")[0]
    assert same_bits(resumed.weights, expected.weights)


class Bare(nn.Module):
    """Sets its parameter in the constructor, and cannot do it again."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class Odd(Deferred):
    """Has one module that cannot be given memory, or one that is initialised in a way that leaves no memory.

    Args:
        oddity: ``bare`` or ``custom``.
    """

    def __init__(self, oddity: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.oddity = oddity

    def configure_model(self) -> None:
        super().configure_model()
        if self.oddity == "bare":
            self.model.blocks[1].extra = Bare()
        else:
            nn.init.normal_(self.model.blocks[2].up.weight, std=0.02)


@pytest.mark.parametrize(
    ("oddity", "words"),
    [
        (
            "bare",
            "Module 'model.blocks.1.extra' (Bare) is on the meta device and has no reset_parameters() "
            "to initialise it.",
        ),
        (
            "custom",
            "Module 'model.blocks.2.up' (Linear) is on the meta device, but 'weight' has been initialised again "
            "after it was constructed, and that value would be lost.",
        ),
    ],
)
def test_what_cannot_be_materialised_is_named(ranks, tmp_path, oddity, words):
    fit = Fit({"zero": "stage3"}, 2, module=Odd, arguments={"oddity": oddity})
    for found in ranks(2).run(refused, fit, tmp_path, LitZeroError):
        assert found.startswith(words)
        assert "build the module on a real device" in found
    # In the other stages configure_model builds real tensors, and everything is as the user left it.
    assert ranks(2).run(train, replace(fit, zero={"zero": "stage2"}, epochs=1), tmp_path)[0].steps == 5
