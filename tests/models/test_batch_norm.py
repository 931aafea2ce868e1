"""Batch statistics: each rank's own, where the result is that of DDP, and those of the whole batch, where it is that of
one process.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_zero.comm.batch_norm import SyncBatchNorm, serve_the_cpu
from lit_zero.core.errors import UnsupportedError
from tests.models.harness import CLASSES, Foreign, check_equal, defaults, images, in_all_stages, labels, momentum
from tests.strategy.harness import STAGES, Fit, distance, same_bits, train, train_all
from tests.strategy.test_model_checkpoint import refused


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels, momentum=None),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.body(x))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6, affine=False),
        nn.Sequential(*(Residual(6) for _ in range(3))),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 12),
        nn.BatchNorm1d(12),
        nn.Linear(12, CLASSES),
    )


def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(images(tokens)), labels(tokens))


ARGUMENTS = {"build": convolutional, "loss": loss, "optimizer": momentum}


def test_each_ranks_own_statistics_as_in_ddp(ranks, tmp_path):
    fit = defaults({"arguments": ARGUMENTS, "rows": 32})
    fits = [Fit(zero, 2, **fit) for zero in ("ddp", *({"zero": stage} for stage in STAGES))]
    ddp, *stages = ranks(2).run(train_all, fits, tmp_path / "ranks")[0]
    check_equal(stages, ddp)
    alone = train(Fit(**fit), tmp_path / "alone")
    assert distance(alone.weights, ddp.weights) > 1e-3, "or there is nothing to synchronise"


@pytest.mark.thorough("4")
@pytest.mark.parametrize("size", [2, 4])
def test_statistics_of_the_whole_batch(ranks, tmp_path, size):
    trainer = {"sync_batchnorm": True}
    stages, alone = in_all_stages(ranks, tmp_path, size, arguments=ARGUMENTS, trainer=trainer)
    check_equal(stages, alone)
    statistics = [name for name in alone.weights if "running_mean" in name or "num_batches" in name]
    assert len(statistics) == 16 and all(alone.weights[name].abs().sum() > 0 for name in statistics)


@pytest.mark.thorough
def test_bf16(ranks, tmp_path):
    trainer = {"sync_batchnorm": True, "precision": "bf16-mixed"}
    stages, alone = in_all_stages(ranks, tmp_path, arguments=ARGUMENTS, trainer=trainer)
    check_equal(stages, alone, 2e-2)


class Deferred(Foreign):
    """Builds in ``configure_model``: the layers are replaced before they have memory."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{**arguments, "build": nn.Identity})
        self.build = arguments["build"]

    def configure_model(self) -> None:
        if isinstance(self.model, nn.Identity):
            self.model = self.build()


@pytest.mark.thorough
def test_a_deferred_model(ranks, tmp_path):
    trainer = {"sync_batchnorm": True}
    stages, alone = in_all_stages(ranks, tmp_path, module=Deferred, arguments=ARGUMENTS, trainer=trainer)
    check_equal(stages, alone)


def test_one_rank(ranks, tmp_path):
    """A layer that synchronises with nobody is still the layer that it was."""
    fit = defaults({"arguments": ARGUMENTS, "trainer": {"sync_batchnorm": True}})
    alone = train(Fit(**fit), tmp_path / "alone")
    for stage in ("none", "stage3"):
        mine = ranks(1).run(train, Fit({"zero": stage}, 1, **fit), tmp_path / stage)[0]
        assert distance(mine.weights, alone.weights) < 1e-9


class NormAndAct(nn.BatchNorm2d):
    """As in timm."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(input))


class SyncNormAndAct(nn.SyncBatchNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.relu(super().forward(input))


def with_activations(norm: type[nn.Module] = NormAndAct) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), norm(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))


def test_a_layer_that_would_lose_its_activation(ranks, tmp_path):
    arguments = {**ARGUMENTS, "build": with_activations}
    fit = Fit({"zero": "stage2"}, 2, **defaults({"arguments": arguments, "trainer": {"sync_batchnorm": True}}))
    for words in ranks(2).run(refused, fit, tmp_path, UnsupportedError):
        assert words == (
            "sync_batchnorm=True would put torch's SyncBatchNorm in the place of 'model.1' (NormAndAct), and what its "
            "own forward does besides (an activation, for example) would be lost. Convert the model yourself, with "
            "what its library has for that (timm.layers.convert_sync_batchnorm), and leave sync_batchnorm out."
        )


def test_a_layer_of_somebody_elses_that_synchronises(ranks, tmp_path):
    arguments = {**ARGUMENTS, "build": partial(with_activations, SyncNormAndAct)}
    stages, alone = in_all_stages(ranks, tmp_path, arguments=arguments)
    check_equal(stages, alone)


# ---- the layer by itself


def layer(batch: torch.Tensor, rank: int = 0, parts: list[int] | None = None) -> dict[str, torch.Tensor]:
    """Normalise one rank's part of a batch, and return everything that comes of it.

    Args:
        batch: of all ranks.
        rank: this one.
        parts: rows of each rank; ``None``: plain torch on the whole batch.
    """
    torch.manual_seed(1)
    norm: nn.Module = nn.BatchNorm1d(3, dtype=batch.dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    if parts is not None:
        norm = nn.SyncBatchNorm.convert_sync_batchnorm(norm)
        serve_the_cpu(norm)
        assert type(norm) is SyncBatchNorm
        batch = batch.split(parts)[rank]
    x = batch.clone().requires_grad_()
    out = norm(x)
    out.pow(3).sum().backward()  # a sum, so that the gradients of the parts add up to that of the whole
    norm.eval()
    grads = {"weight grad": norm.weight.grad, "bias grad": norm.bias.grad}
    found = {"out": out.detach(), "x grad": x.grad, "evaluated": norm(batch).detach()}
    return {**found, **grads, **{name: value.clone() for name, value in norm.named_buffers()}}


def layer_on_ranks(batch: torch.Tensor, parts: list[int]) -> dict[str, torch.Tensor]:
    return layer(batch, torch.distributed.get_rank(), parts)


@pytest.mark.parametrize("parts", [[4, 4], [7, 1], [8, 0]])
@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 5)])
def test_every_output_and_every_gradient(ranks, shape, parts):
    batch = 100 + torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = layer(batch)
    found = ranks(2).run(layer_on_ranks, batch, parts)
    for name, value in expected.items():
        both = [each[name] for each in found]
        if name in ("out", "x grad", "evaluated"):
            torch.testing.assert_close(torch.cat(both), value, rtol=1e-9, atol=1e-9)
        elif name in ("weight grad", "bias grad"):
            torch.testing.assert_close(both[0] + both[1], value, rtol=1e-9, atol=1e-9)
        else:
            assert torch.equal(both[0], both[1])
            torch.testing.assert_close(both[0], value, rtol=1e-9, atol=1e-9)


def too_small() -> str:
    norm = nn.SyncBatchNorm(3)
    serve_the_cpu(norm)
    rank = torch.distributed.get_rank()
    with pytest.raises(ValueError) as caught:
        norm(torch.zeros(1 - rank, 3))
    return str(caught.value)


def test_a_batch_of_one_value(ranks):
    for words in ranks(2).run(too_small):
        assert words.startswith("Expected more than 1 value per channel when training")


def test_a_checkpoint_does_not_tell(ranks, tmp_path):
    """The synchronised layer has the names and the shapes of the plain one."""
    fit = defaults({"arguments": ARGUMENTS, "trainer": {"sync_batchnorm": True}})
    one = ranks(2).run(train, Fit({"zero": "stage3"}, 2, **fit), tmp_path)[0]
    model = convolutional().double()
    model.load_state_dict({name.removeprefix("model."): value for name, value in one.weights.items()})
    again = {f"model.{name}": value for name, value in model.state_dict().items()}
    assert same_bits(again, one.weights)
