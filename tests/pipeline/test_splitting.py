"""Every stage runs the unmodified model; loss and gradients are those of the plain model, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpt import GPT
from torch import nn

from tests.pipeline import models
from tests.pipeline.harness import Step, check, memory
from tests.pipeline.models import on_tokens


def gpt(**options: Any) -> GPT:
    return GPT(models.VOCAB, 16, dim=8, layers=4, heads=2, dropout=0.1, **options)


def gpt_step(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, tokens)


PLAIN: dict[str, tuple[Callable[[], nn.Module], Step]] = {
    "gpt": (gpt, gpt_step),
    "gpt-untied": (lambda: gpt(tied=False), gpt_step),
    "encoder": (models.Encoder, on_tokens),
    "deep": (models.Deep, on_tokens),
    "sequential": (models.sequential, on_tokens),
    "tuples": (models.Pairs, on_tokens),
    "two-lists": (models.Conditioned, on_tokens),
    "in-place": (models.InPlace, on_tokens),
    "untied": (models.Untied, on_tokens),
    "noisy": (models.Noisy, on_tokens),
}


def batches() -> list[torch.Tensor]:
    """Return micro-batches of three shapes."""
    torch.manual_seed(3)
    return [torch.randint(0, models.VOCAB, shape) for shape in ((4, 6), (4, 6), (3, 9))]


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("name", PLAIN)
def test_stages_equal_the_plain_model(name, stages):
    build, step = PLAIN[name]
    torch.manual_seed(0)
    divided = check(build(), step, batches(), stages)
    numel = {name: p.numel() for name, p in divided.splits[0].model.named_parameters()}
    for split, piece in zip(divided.splits, divided.plan.stages, strict=True):
        own = sum(numel[name] * 4 for name in piece.parameters)
        assert own <= memory(split.model) <= own + 4, "a parameter of another stage takes memory"
        assert {name for name, p in split.model.named_parameters() if split.is_local(p)} == set(piece.parameters)
