"""Models of timm, as they are; its small ones for tests.

timm imports torchvision, for its data pipelines. torchvision's build on the registry is for CUDA and cannot be imported
beside torch's CPU build (nor then can torchmetrics, which looks for it), so where it is not installed a stand-in is
imported for as long as timm's own import takes: ``pip install --no-deps timm`` is enough for these tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.models.harness import CLASSES, check_equal, images, in_all_stages, labels, momentum

NEEDED = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".datasets.folder")


class Constants(type):
    """A class with every constant that is asked of it."""

    def __getattr__(cls, name: str) -> str:
        if not name.isupper():
            raise AttributeError(name)
        return name


class StandIn(ModuleType):
    """A module with every class that is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or Constants(name, (nn.Module,), {})


def import_timm() -> Any:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install --no-deps timm", allow_module_level=True)
    names = [] if importlib.util.find_spec("torchvision") else [f"torchvision{name}" for name in NEEDED]
    for name in names:
        sys.modules[name] = StandIn(name)
        sys.modules[name].__path__ = []  # type: ignore[attr-defined]
    try:
        return importlib.import_module("timm")
    finally:
        for name in names:
            del sys.modules[name]


timm = import_timm()


def build(name: str) -> nn.Module:
    size = {"img_size": 64} if name == "test_vit" else {}
    return timm.create_model(name, num_classes=CLASSES, **size)


def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(images(tokens, 64)), labels(tokens))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_equals_one_process(ranks, tmp_path, name):
    arguments = {"build": partial(build, name), "loss": loss, "optimizer": momentum}
    stages, alone = in_all_stages(ranks, tmp_path, arguments=arguments)
    check_equal(stages, alone)
    assert len(stages[-1].notes) > 1


def test_with_synchronised_batch_statistics(ranks, tmp_path):
    arguments = {"build": partial(build, "test_resnet"), "loss": loss, "optimizer": momentum}
    stages, alone = in_all_stages(ranks, tmp_path, arguments=arguments, trainer={"sync_batchnorm": True})
    check_equal(stages, alone)


def converted() -> nn.Module:
    """Its batch norms have activations in them, which only timm's own conversion keeps."""
    return timm.layers.convert_sync_batchnorm(build("test_efficientnet"))


def test_with_layers_that_timm_has_converted(ranks, tmp_path):
    arguments = {"build": converted, "loss": loss, "optimizer": momentum}
    stages, alone = in_all_stages(ranks, tmp_path, arguments=arguments)
    check_equal(stages, alone)
