"""Compiled blocks are computed again, or their tensors moved, bit for bit as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_zero.activation.applied import check_fit
from lit_zero.activation.policy import Activation
from lit_zero.core.errors import UnsupportedError
from tests.activation.harness import VARIANTS, DropGPT, gradients, same
from tests.compile.test_compile import BLOCKS, FIT, fit_all
from tests.strategy.harness import Fit, Short, same_bits
from tests.zero.harness import tokens

pytestmark = pytest.mark.thorough


def compiled(way: str) -> Any:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = DropGPT()
    if way == "whole":
        return torch.compile(model, backend="aot_eager")
    for number, block in enumerate(model.blocks):
        model.blocks[number] = BLOCKS[way](block, backend="aot_eager")
    return model


@pytest.mark.parametrize(
    ("way", "variants"),
    [("whole", ["full"]), ("forward", ["offload"]), ("compile()", ["full"]), ("module", ["every_n"])],
)
def test_one_process(way: str, variants: list[str]) -> None:
    expected = gradients(compiled(way), None, tokens(0))
    for variant in variants:
        same(gradients(compiled(way), VARIANTS[variant], tokens(0)), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("way", BLOCKS)
def test_selective_refuses_what_it_cannot_look_into(way: str) -> None:
    with pytest.raises(
        UnsupportedError,
        match=r"Block 'blocks.0' is compiled, which makes one operator of it: activation='selective' cannot keep the "
        r"results of some inside. Use activation='full', which computes the compiled block again, or do not compile.",
    ):
        check_fit(compiled(way), Activation("selective"), "auto")
    torch._dynamo.reset()


def test_on_ranks(ranks: Any, tmp_path: Path) -> None:
    """One graph for a block, as without, and the same bits."""

    def fit(activation: str) -> Fit:
        return Short({"zero": "stage3", "activation": activation}, 2, epochs=1, module=FIT.module)

    fits = [(fit("none"), "compile()"), (fit("full"), "compile()")]
    (plain, graphs), *found = ranks(2).run(fit_all, fits, tmp_path, timeout=240)[0]
    for again, others in found:
        assert same_bits(plain.weights, again.weights)
        assert plain.rows == again.rows
        assert graphs and others == graphs
