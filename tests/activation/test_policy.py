"""What is chosen and what is refused, with the words of the refusals."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lit_zero import Activation, ZeroStrategy
from lit_zero.activation.applied import check_fit
from lit_zero.activation.operators import WORDS, overloads
from lit_zero.core.errors import ConfigError
from tests.activation.harness import DropGPT, apply


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "ful"}, "activation.variant='ful' is not known. Did you mean 'full'?"),
        (
            {"variant": "full", "n": 3},
            "activation.n=3 has no effect with activation.variant='full'. Remove it, or use "
            "activation.variant='every_n'.",
        ),
        (
            {"variant": "full", "threshold": 3},
            "activation.threshold=3 has no effect with activation.variant='full'. Remove it, or use "
            "activation.variant='offload' or 'budget'.",
        ),
        (
            {"blocks": ["Block"]},
            "activation.blocks=('Block',) has no effect with activation.variant='none'. Remove it, or use "
            "activation.variant='full'.",
        ),
        ({"variant": "every_n", "n": 1}, "activation.n=1 is not valid: expected an integer of at least 2."),
        ({"variant": "every_n", "n": True}, "activation.n=True is not valid: expected an integer of at least 2."),
        ({"variant": "offload", "in_flight": 0}, "activation.in_flight=0 is not valid: expected an integer of at"),
        ({"variant": "offload", "threshold": -1}, "activation.threshold=-1 is not valid: expected an integer of at"),
        ({"variant": "budget", "budget": 1.5}, "activation.budget=1.5 is not valid: expected an integer of at least 1"),
        (
            {"variant": "budget"},
            "activation.variant='budget' needs activation.budget: the bytes on each rank that the tensors saved by the "
            "blocks may take at any time.",
        ),
        (
            {"variant": "partition"},
            "activation.variant='partition' shares a block's inputs out over ranks that hold the same ones, and "
            "data-parallel ranks hold different ones. If your sampler gives neighbouring ranks the same batches, say "
            "how many with activation.ranks; else use activation.variant='full'.",
        ),
        (
            {"variant": "full", "blocks": "Block"},
            "activation.blocks='Block' is not valid: expected 'auto', a list such",
        ),
        ({"variant": "full", "blocks": 3}, "activation.blocks=3 is not valid: expected 'auto', a list of class names"),
        (
            {"variant": "selective", "operators": "matmul"},
            "activation.operators='matmul' is not valid: expected a list such as ['matmul', 'attention'].",
        ),
        (
            {"variant": "selective", "operators": []},
            "activation.operators=[] keeps nothing, as activation.variant='full' does. Use that.",
        ),
    ],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Activation(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            Activation("full", blocks=["DropBlok"]),
            "activation.blocks names 'DropBlok', but no module of that class or name exists. Did you mean 'DropBlock'?",
        ),
        (Activation("full", blocks=["blocks"]), "activation.blocks chooses 'blocks', but a ModuleList has no forward"),
        (
            Activation("selective", operators=["matmull"]),
            "activation.operators names 'matmull', which is no operator of torch. Did you mean 'aten.matmul'? Expected "
            "matmul, attention, convolution, or the name of an operator as a profile shows it, such as 'aten.gelu'.",
        ),
        (
            Activation("selective", operators=["aten.gelu.defalt"]),
            "activation.operators names 'aten.gelu.defalt', which is no operator of torch. Did you mean 'aten.gelu",
        ),
    ],
)
def test_refused_for_the_model(policy: Activation, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_fit(DropGPT(), policy, "auto")
    assert message in str(caught.value)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"activation.variant='full' has no effect: Linear repeats no class of module in a ModuleList or "
        r"Sequential, so it is not known what its blocks are. Name them with activation.blocks.",
    ):
        check_fit(nn.Linear(2, 2), Activation("full"), "auto")


def test_blocks_are_those_of_zero_or_named() -> None:
    model = DropGPT()
    every = ["blocks.0", "blocks.1", "blocks.2"]
    assert check_fit(model, Activation("full"), "auto") == every
    assert check_fit(model, Activation("full"), ["blocks.[02]"]) == ["blocks.0", "blocks.2"], "those of zero.units"
    assert check_fit(model, Activation("full", blocks=["DropBlock"]), ["head"]) == every
    assert check_fit(model, Activation("full", blocks=lambda name, _: name.endswith(".up")), "auto") == [
        f"{name}.up" for name in every
    ]
    assert check_fit(model, Activation(), "auto") == []


def test_every_nth_block() -> None:
    applied = apply(DropGPT(layers=5), Activation("every_n", n=3))
    assert [choice == "recompute" for choice in applied.choices.values()] == [True, False, False, True, False]


def test_operators_by_word_and_by_name() -> None:
    import torch

    assert torch.ops.aten.addmm.default in overloads(["matmul"])
    assert overloads(["aten.gelu"]) == {torch.ops.aten.gelu.default, torch.ops.aten.gelu.out}
    assert overloads(["aten.gelu.default"]) == {torch.ops.aten.gelu.default}
    assert all(overloads([word]) for word in WORDS)


def test_the_strategy_takes_a_word_or_a_choice() -> None:
    assert ZeroStrategy().activation == Activation()
    assert ZeroStrategy(activation="full").activation == Activation("full")
    chosen = Activation("every_n", n=3)
    assert ZeroStrategy(activation=chosen).activation is chosen
    with pytest.raises(ConfigError, match="activation=3 is not valid: expected a Activation, got a int"):
        ZeroStrategy(activation=3)  # type: ignore[arg-type]
