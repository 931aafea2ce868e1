"""Each optimizer beside torch's class of that name, on plain parameters: on the CPU, and by the kernels."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import lit_zero
from lit_zero import optim
from lit_zero.core.errors import ConfigError, UnsupportedError
from tests.optim.beside import CASES, NAMES, PlainLion, build, flat, groups, lion, model, set_gradients, train

STEPS = range(12)
NEAR = {"rtol": 3e-6, "atol": 3e-6}  # of fp32, after all steps


def compare_states(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert mine["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        assert mine["state"][key].keys() == state.keys()
        for name, value in state.items():
            found = mine["state"][key][name]
            assert found.shape == value.shape
            torch.testing.assert_close(found.cpu(), value, **NEAR, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("name", "settings"), CASES, ids=NAMES)
def test_on_the_cpu_it_has_the_bits_of_torchs_fused_kernels(name, settings):
    module, optimizer = build(optim, name, settings)
    other, fused = build(torch.optim, name, {**settings, "fused": True})
    plain, slow = build(torch.optim, name, settings)
    found, expected = train(module, optimizer, STEPS), train(other, fused, STEPS)
    if settings.get("dampening"):  # stepped by the reference, see sgd.py
        torch.testing.assert_close(found, expected, **NEAR)
    else:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, train(plain, slow, STEPS), **NEAR)
    compare_states(optimizer.state_dict(), slow.state_dict())


def by_kernels(name: str, settings: dict[str, Any], device: torch.device) -> None:
    module, optimizer = build(optim, name, settings, device=device)
    other, plain = build(torch.optim, name, settings)
    before = flat(other)
    found, expected = train(module, optimizer, STEPS), train(other, plain, STEPS)
    torch.testing.assert_close(found, expected, **NEAR)
    assert not torch.allclose(found, before, rtol=1e-2)
    compare_states(optimizer.state_dict(), plain.state_dict())


@pytest.mark.parametrize(("name", "settings"), CASES, ids=NAMES)
def test_kernels_step_as_torch_does(interpreted, monkeypatch, name, settings):
    monkeypatch.setattr(getattr(torch.optim, name), "step", None)  # torch has no part in it
    module, optimizer = build(optim, name, settings)
    found = train(module, optimizer, STEPS)
    monkeypatch.undo()
    other, plain = build(torch.optim, name, settings)
    torch.testing.assert_close(found, train(other, plain, STEPS), **NEAR)
    compare_states(optimizer.state_dict(), plain.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "settings"), CASES, ids=NAMES)
def test_compiled_kernels_step_as_torch_does(compiled, name, settings):
    by_kernels(name, settings, compiled)


@pytest.mark.gpu
def test_nothing_is_read_back_from_the_device(compiled):
    for name, settings in CASES:
        module, optimizer = build(optim, name, settings, device=compiled)
        train(module, optimizer, range(2))
        set_gradients(module, 2)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_lion_is_that_of_the_paper(interpreted, monkeypatch):
    plain = model()
    expected = train(plain, lion(plain, PlainLion), STEPS)
    for fused in ("kernels", "auto", "none"):
        if fused == "auto":
            monkeypatch.delenv("TRITON_INTERPRET")
        module = model()
        optimizer = optim.Lion(groups(module), lr=1e-2, weight_decay=0.1, fused="none" if fused == "none" else "auto")
        torch.testing.assert_close(train(module, optimizer, STEPS), expected, **NEAR)
        assert [set(state) for state in optimizer.state.values()] == [{"exp_avg"}] * 3


@pytest.mark.parametrize(("name", "settings"), CASES, ids=NAMES)
def test_fused_none_is_torchs_class_as_it_is(name, settings):
    module, optimizer = build(optim, name, {**settings, "fused": "none"})
    other, plain = build(torch.optim, name, settings)
    assert torch.equal(train(module, optimizer, STEPS), train(other, plain, STEPS))
    assert optimizer.param_groups[0]["fused"] is None


@pytest.mark.parametrize("kind", [optim.AdamW, optim.Adagrad, optim.Lion])
def test_torchs_own_words_for_fused_are_known(kind):
    for said, meant in ((True, "auto"), (False, "none"), (None, "none"), ("auto", "auto"), ("none", "none")):
        optimizer = kind(model().parameters(), lr=0.1, fused=said)
        assert optimizer._fused == meant
        assert optimizer.param_groups[0].get("fused") == (True if meant == "auto" and kind is not optim.Lion else None)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=NAMES)
def test_states_pass_between_torchs_class_and_ours_both_ways(name, settings):
    plain = getattr(torch.optim, name)
    expected = train(*(pair := build(torch.optim, name, settings)), STEPS)
    assert type(pair[1]) is plain
    for first, second in ((torch.optim, optim), (optim, torch.optim)):
        module, optimizer = build(first, name, settings)
        train(module, optimizer, range(6))
        saved = pickle.loads(pickle.dumps((module.state_dict(), optimizer.state_dict())))
        module, optimizer = build(second, name, settings)
        module.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        torch.testing.assert_close(train(module, optimizer, range(6, 12)), expected, **NEAR)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=NAMES)
def test_copies_and_pickles_go_on(name, settings):
    module, optimizer = build(optim, name, settings)
    train(module, optimizer, range(3))
    for again in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        other, twin = again((module, optimizer))
        assert type(twin) is type(optimizer)
        assert torch.equal(train(other, twin, range(3, 6)), train(*copy.deepcopy((module, optimizer)), range(3, 6)))


# ---- loss scaling


@pytest.mark.parametrize("way", ["kernels", "torch"])
@pytest.mark.parametrize(("name", "settings"), [*CASES, ("Lion", {"lr": 1e-2})], ids=[*NAMES, "Lion"])
def test_a_loss_scaler_is_obeyed_without_a_host_in_between(interpreted, monkeypatch, name, settings, way):
    """Step 0 and step 3 overflow; the scaled gradients of the others must count as the true ones."""
    if way == "torch":
        monkeypatch.delenv("TRITON_INTERPRET")
    module, optimizer = build(optim, name, settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    values = []
    for number in range(6):
        scaler.scale(torch.zeros(()))  # makes the scale
        set_gradients(module, number, scaler.get_scale())
        if number in (0, 3):
            module[0].weight.grad[1, 2] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        values.append(flat(module))
    assert scaler.get_scale() == 2.0
    assert torch.equal(values[0], flat(model())) and torch.equal(values[3], values[2])
    other = model()
    expected = train(other, type(optimizer)(groups(other), **settings), (1, 2, 4, 5))
    torch.testing.assert_close(values[-1], expected, rtol=3e-6, atol=3e-6)
    steps = [state["step"].item() for state in optimizer.state.values() if "step" in state]
    assert set(steps) <= {4.0}, "skipped steps do not count"


# ---- parameters of all kinds


@pytest.mark.parametrize("way", ["kernels", "torch"])
def test_other_layouts_and_dtypes_are_stepped_too(interpreted, monkeypatch, way):
    """Memory that is not filled row by row, by a gradient that is; fp64, bf16."""
    if way == "torch":
        monkeypatch.delenv("TRITON_INTERPRET")
    torch.manual_seed(0)
    images = torch.randn(4, 3, 5, 5)
    values = [images.to(memory_format=torch.channels_last), torch.randn(5, 6).t(), torch.randn(3, 3).double()]
    for value in [*values, torch.randn(7).bfloat16()]:
        grad = torch.randn(value.shape, dtype=torch.float64).to(value.dtype)
        found = []
        for source in (torch.optim, optim):
            param = nn.Parameter(value.clone())
            assert param.stride() == value.stride()
            optimizer = source.AdamW([param], lr=0.1)
            for _ in range(3):
                param.grad = grad.contiguous()
                optimizer.step()
            found.append(param.detach())
        tolerance = 1e-2 if value.dtype == torch.bfloat16 else 3e-6
        torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)


def test_memory_with_gaps_is_left_to_torch_where_it_can():
    def stepped(kind: Any) -> torch.Tensor:
        param = nn.Parameter(torch.ones(4, 6)[:, :3])
        param.grad = torch.ones(4, 3)
        kind([param], lr=0.1).step()
        return param.detach()

    assert torch.allclose(stepped(optim.AdamW), stepped(torch.optim.AdamW))
    dampened = {"momentum": 0.9, "dampening": 0.5}
    assert torch.allclose(stepped(partial(optim.SGD, **dampened)), stepped(partial(torch.optim.SGD, **dampened)))
    with pytest.raises(UnsupportedError, match=r"shape \(4, 3\) and stride \(6, 1\) has gaps in its memory"):
        stepped(optim.Lion)


@pytest.mark.parametrize("way", ["kernels", "torch"])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=NAMES)
def test_gradients_of_another_dtype_are_taken(interpreted, monkeypatch, name, settings, way):
    if way == "torch":
        monkeypatch.delenv("TRITON_INTERPRET")
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        param = nn.Parameter(torch.linspace(-1, 1, 12))
        param.grad_dtype = dtype
        optimizer = getattr(optim, name)([param], **settings)
        for step in range(3):
            param.grad = torch.linspace(1, 2 + step, 12).bfloat16().to(dtype)
            optimizer.step()
        found.append(param.detach())
    torch.testing.assert_close(found[0], found[1], **NEAR)


@pytest.mark.parametrize("scale", [None, 4.0])
def test_sparse_gradients_are_left_to_torch(scale):
    def trained(kind: Any) -> torch.Tensor:
        torch.manual_seed(0)
        module = nn.Embedding(5, 3, sparse=True)
        optimizer = kind(module.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(4):
            optimizer.zero_grad()
            loss = module(torch.tensor([1, 3])).sum() * (torch.inf if scale and step == 2 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return module.weight.detach()

    assert torch.equal(trained(optim.SGD), trained(torch.optim.SGD))
    dampened = partial(optim.SGD, dampening=0.5), partial(torch.optim.SGD, dampening=0.5)
    assert torch.equal(*map(trained, dampened))
    with pytest.raises(UnsupportedError, match="A gradient is sparse, and this optimizer steps flat memory"):
        trained(lambda params, lr, momentum: optim.Lion(params, lr=lr))


def test_parameters_added_later_begin_anew(interpreted):
    for settings in ({"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}):
        found = []
        for source in (torch.optim, optim):
            params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
            optimizer = source.SGD(params[:1], lr=0.1, **settings)
            for step in range(4):
                if step == 2:
                    optimizer.add_param_group({"params": params[1:]})
                for p in params:
                    p.grad = torch.full((3,), float(step + 1))
                optimizer.step()
            found.append(torch.cat(params).detach())
        torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("fused", ["auto", "none"])
@pytest.mark.parametrize("kind", [optim.AdamW, optim.Lion])
def test_closures_and_hooks_run_once(kind, fused):
    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # torch puts its hooks around the step of this class too
    param, called = nn.Parameter(torch.ones(3)), []
    optimizer = kind([param], lr=0.1, fused=fused)
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))

    def closure():
        called.append("closure")
        assert torch.is_grad_enabled()
        param.square().sum().backward()
        return 7.0

    assert optimizer.step(closure) == 7.0
    assert called == ["before", "closure", "after"]
    assert not torch.equal(param, torch.ones(3))


# ---- what is refused


def test_it_is_in_the_shop_window():
    assert lit_zero.optim.AdamW is optim.AdamW


@pytest.mark.parametrize("setting", ["foreach", "capturable", "differentiable"])
def test_other_ways_to_step_are_refused(setting):
    with pytest.raises(ConfigError) as caught:
        optim.AdamW(model().parameters(), **{setting: True})
    assert str(caught.value) == (
        f"optimizer.{setting}=True of AdamW has no effect with optimizer.fused='auto', which steps by fused kernels. "
        "Remove it, or use optimizer.fused='none'."
    )
    optim.AdamW(model().parameters(), **{setting: True}, fused="none")


@pytest.mark.parametrize("kind", [optim.SGD, optim.Lion])
def test_unknown_choices_are_refused(kind):
    with pytest.raises(ConfigError, match=r"optimizer.fused='atuo' is not known. Did you mean 'auto'\? Choose one of"):
        kind(model().parameters(), lr=0.1, fused="atuo")


def test_lion_checks_its_numbers():
    with pytest.raises(ConfigError, match=r"Lion: lr=-1, weight_decay=0.0 are not valid: expected at least 0."):
        optim.Lion(model().parameters(), lr=-1)
    with pytest.raises(ConfigError, match=r"Lion: betas=\(0.9, 1.0\) are not valid: expected at least 0 and below 1."):
        optim.Lion(model().parameters(), betas=(0.9, 1.0))
