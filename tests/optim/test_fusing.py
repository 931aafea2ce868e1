"""Turning torch's optimizers into ours, in place."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from lit_zero import optim
from lit_zero.core.errors import ConfigError, UnsupportedError
from tests.optim.beside import CASES, NAMES, build, flat, model, set_gradients, train


@pytest.mark.parametrize(("name", "settings"), CASES, ids=NAMES)
def test_it_stays_the_same_object_and_goes_on(interpreted, name, settings):
    other, plain = build(torch.optim, name, settings)
    expected = train(other, plain, range(8))
    module, optimizer = build(torch.optim, name, settings)
    train(module, optimizer, range(4))
    states = list(optimizer.state.values())
    assert optim.fuse(optimizer) is optimizer
    assert type(optimizer) is getattr(optim, name)
    assert all(one is two for one, two in zip(optimizer.state.values(), states, strict=True))
    torch.testing.assert_close(train(module, optimizer, range(4, 8)), expected, rtol=3e-6, atol=3e-6)
    assert optim.fuse(optimizer) is optimizer, "and a second time nothing happens"


@pytest.mark.parametrize("late", [False, True])
def test_schedulers_and_hooks_from_before_go_on(interpreted, monkeypatch, recwarn, late):
    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    if not late:
        optim.fuse(optimizer)
    scheduler = LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    if late:
        optim.fuse(optimizer)
    monkeypatch.setattr(torch.optim.Adam, "step", None)  # it is not torch's step that is called
    before = flat(module)
    for number in range(3):
        set_gradients(module, number)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.025 and scheduler.optimizer is optimizer
    assert called == ["before"] * 3
    assert not torch.equal(before, flat(module))
    assert [str(each.message) for each in recwarn if "lr_scheduler" in str(each.message)] == []


class OwnAdamW(torch.optim.AdamW):
    """May step in any way."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.RMSprop(p), r"RMSprop has no fused step here. .*Choose one of: torch.optim.AdamW, "),
        (lambda p: OwnAdamW(p), r"OwnAdamW has no fused step here. Did you mean 'torch.optim.AdamW'\?"),
        (lambda p: torch.optim.SGD(p, foreach=True), r"optimizer.foreach=True of SGD has no effect with"),
        (
            lambda p: optim.SGD(p, fused="none"),
            r"optimizer.fused='none' of SGD contradicts fuse\(\). Remove one of them",
        ),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        optim.fuse(make(model().parameters()))


def test_a_step_that_others_have_replaced_is_not_lost_in_silence():
    optimizer = torch.optim.SGD(model().parameters())
    optimizer.step = lambda closure=None: None
    with pytest.raises(UnsupportedError, match=r"in the place of the step of this SGD. Call fuse\(\) before it is"):
        optim.fuse(optimizer)
    assert type(optimizer) is torch.optim.SGD
