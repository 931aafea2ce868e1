"""In Fabric: as in the Trainer, bit for bit as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_zero import Activation
from lit_zero.core.errors import ConfigError
from tests.activation.harness import VARIANTS, DropGPT
from tests.fabric.harness import Loop, go_on, loss_of, make_fabric, set_up, train_all, whole
from tests.strategy.harness import same_bits
from tests.zero.harness import tokens

ALONE = {name: policy for name, policy in VARIANTS.items() if name != "partition"}


def loop(activation: str | Activation, **more: Any) -> Loop:
    return Loop({"zero": "stage3", "activation": activation}, 2, {}, model=DropGPT, clip={"max_norm": 0.3}, **more)


def test_equals_none_bit_for_bit(ranks: Any) -> None:
    plain, *others = ranks(2).run(train_all, [loop(word) for word in ("none", *ALONE.values())])[0]
    for each in others:
        assert each.losses == plain.losses and each.norms == plain.norms
        assert same_bits(each.weights, plain.weights)


def one_after_the_other() -> list[int]:
    """Set one module up with ``full``, then with ``none``; return the forwards of a block in a step of each."""
    torch.manual_seed(0)
    model, found = DropGPT(), []
    for word in ("full", "none"):
        one = loop(word, steps=1)
        one.model = lambda: model
        fabric = make_fabric(one)
        prepared, optimizers = set_up(fabric, one)
        before = model.blocks[0].calls
        go_on(fabric, prepared, optimizers, one, range(1))
        found.append(model.blocks[0].calls - before)
        whole(fabric, prepared)
    return found


def test_setting_up_anew_takes_the_earlier_choice_off(ranks: Any) -> None:
    assert ranks(2).run(one_after_the_other)[0] == [2, 1]


def unannounced() -> list[set[str]]:
    """Run two steps with ``loss.backward()``, of which Fabric does not tell; return the choices after each part."""
    one, found = loop(Activation("budget", budget=1 << 20)), []
    fabric = make_fabric(one)
    prepared, (optimizer,) = set_up(fabric, one)
    [applied] = fabric.strategy.activations._alive()
    for step in range(2):
        loss_of(prepared, tokens(step)).backward()
        found.append(set(applied.choices.values()))
        optimizer.step()
        found.append(set(applied.choices.values()))
    return found


def test_a_budget_is_chosen_before_the_first_step_at_the_latest(ranks: Any) -> None:
    assert ranks(2).run(unannounced)[0] == [set(), {"keep"}, {"keep"}, {"keep"}]


def test_a_model_without_blocks_is_refused() -> None:
    one = loop("full")
    one.model, one.devices = lambda: torch.nn.Linear(2, 2), 1
    with pytest.raises(ConfigError, match="activation.variant='full' has no effect: Linear repeats no class of module"):
        refused(one)


def refused(one: Loop) -> None:
    from lit_zero import ZeroStrategy

    strategy = ZeroStrategy(**one.zero)  # type: ignore[arg-type]
    strategy.check_activation(one.model())
