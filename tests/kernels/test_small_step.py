"""The step straight on small forms does what decoding, stepping and encoding does."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lit_zero.kernels import table
from lit_zero.kernels.small import small_step
from torch import nn

from lit_zero import optim
from lit_zero.core.forms import Form, Formed, Origin
from lit_zero.core.keeping import Content, Kept
from lit_zero.optim import flat
from lit_zero.precision.forms import Encoded
from lit_zero.precision.policy import Precision
from lit_zero.precision.small import SmallKeeper
from tests.precision.harness import Job, autocast_loss, trained
from tests.zero.harness import GPT, Run

SIZES = (1, 63, 1000, 4096)
KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], dict[str, Content]]] = {
    "AdamW": (optim.AdamW, {"lr": 1e-2}, {"exp_avg": Content.SIGNED, "exp_avg_sq": Content.POSITIVE}),
    "Adam": (
        optim.Adam,
        {"lr": 1e-2, "weight_decay": 0.1, "maximize": True},
        {"exp_avg": Content.SIGNED, "exp_avg_sq": Content.POSITIVE},
    ),
    "Lion": (optim.Lion, {"lr": 1e-2, "weight_decay": 0.1}, {"exp_avg": Content.SIGNED}),
    "SGD": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"momentum_buffer": Content.SIGNED}),
    "Adagrad": (optim.Adagrad, {"lr": 0.1}, {"sum": Content.POSITIVE}),
}
FORMS = list(itertools.product(("float32", "split"), ("float32", "bfloat16", "int8")))


def filled(keeper: SmallKeeper, numel: int, master: str, contents: dict[str, Content], place: torch.device) -> Any:
    """Return a master and states that hold something, the same each time."""
    generator = torch.Generator().manual_seed(numel)
    copy = torch.zeros(numel, dtype=torch.bfloat16, device=place)
    param = keeper.beside(copy) if master == "split" else Kept(torch.zeros(numel, device=place))
    param.write(0, torch.randn(numel, generator=generator))
    states = {key: keeper.keep(numel, torch.float32, content) for key, content in contents.items()}
    for key, state in states.items():
        values = torch.randn(numel, generator=generator)
        state.write(0, values.abs() if contents[key] is Content.POSITIVE else values)
    return param, states


def form_of(kept: Kept) -> Form:
    form = kept.form()
    assert form is not None
    return form


def check(name: str, forms: tuple[str, str], gradient: torch.dtype, place: torch.device) -> None:
    kind, settings, contents = KINDS[name]
    keeper = SmallKeeper(Precision(master=forms[0], moments=forms[1]), place)
    masters = [filled(keeper, numel, forms[0], contents, place) for numel in SIZES]
    wanted = [filled(keeper, numel, forms[0], contents, place) for numel in SIZES]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(numel, generator=generator).to(place, gradient) for numel in SIZES]
    params = [nn.Parameter(master.stand_in()) for master, _ in masters]
    optimizer: Any = kind(
        [{"params": params[:2]}, {"params": params[2:], "lr": 0.03}],
        **settings,
    )
    parts = []
    for number, (param, grad, (master, states)) in enumerate(zip(params, grads, masters, strict=True)):
        optimizer.state[param] = {"step": torch.tensor(4.0)} if optimizer.counts else {}
        step: Any = torch.tensor(4.0, device=place) if optimizer.counts and place.type == "cuda" else 4
        origin = Origin(f"lane {number}", 256 * number, step)
        parts.append(
            Formed(param, grad, form_of(master), {key: form_of(state) for key, state in states.items()}, origin)
        )
    assert optimizer.step_forms(parts)
    for number, (param, part, (master, states)) in enumerate(zip(params, parts, wanted, strict=True)):
        whole, read = nn.Parameter(master.read().clone()), {key: state.read().clone() for key, state in states.items()}
        twin: Any = kind([whole], **settings)
        twin.param_groups[0]["lr"] = 0.03 if number > 1 else settings["lr"]
        twin.state[whole] = {**read, **({"step": torch.tensor(4.0)} if optimizer.counts else {})}
        whole.grad = part.grad.float()
        twin.step()
        draw = part.origin.first
        for key, kept, new in [("", master, whole.detach()), *((k, states[k], read[k]) for k in read)]:
            found = masters[number][0] if key == "" else masters[number][1][key]
            if isinstance(kept, Encoded):
                room = torch.zeros(kept.padded, device=place)
                room[: kept.numel] = new
                kept.encode(room, (part.origin.stream(key), part.origin.step, draw))
            else:
                kept.write(0, new)
            mine, theirs = found.read(), kept.read()
            # A last bit of fp32 may be another one, and with it one number that is rounded to fewer.
            bound = 0.02 if forms[1] == "int8" and key else 0.01 if forms[1] == "bfloat16" and key else 2e-6
            off = (mine - theirs).abs() > 2e-6 * theirs.abs() + 1e-7
            assert float(off.double().mean()) <= (0.01 if bound > 1e-3 else 0.0), (key, part.grad.numel())
            assert float((mine - theirs).abs().max()) <= bound * float(theirs.abs().max()) + 1e-7, key
        if optimizer.counts:
            assert float(optimizer.state[param]["step"]) == 5.0


@pytest.mark.parametrize("forms", FORMS, ids="-".join)
def test_adamw_steps_every_form(interpreted: torch.device, forms: tuple[str, str]) -> None:
    check("AdamW", forms, torch.bfloat16 if forms[0] == "split" else torch.float32, interpreted)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "AdamW"])
def test_others_step_bytes(interpreted: torch.device, name: str) -> None:
    check(name, ("split", "int8"), torch.float32, interpreted)


def test_many_small_launches_upload_their_tables_once(
    interpreted: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a launch for every lane, and an optimizer that does not count and draws nothing."""
    uploads: list[torch.Tensor] = []
    monkeypatch.setattr(table, "_upload", lambda values, device: uploads.append(values) or values)
    params = [nn.Parameter(torch.zeros(()).expand(256)) for _ in range(6)]
    optimizer, forms, grad = optim.Lion(params), [Form("plain", torch.zeros(256)) for _ in params], torch.ones(256)
    moments = [Form("rounded", torch.zeros(256, dtype=torch.bfloat16)) for _ in params]
    for step in range(3):
        for param, form, moment in zip(params, forms, moments, strict=True):
            origin = Origin("lane", 0, step)
            assert optimizer.step_forms([Formed(param, grad, form, {"exp_avg": moment}, origin)])
        if step == 0:
            uploads.clear()
    assert not uploads


# ---- under the engine


def flat_adamw(model: nn.Module) -> torch.optim.Optimizer:
    params = list(model.parameters())
    groups = [{"params": [p for p in params if p.ndim > 1]}, {"params": [p for p in params if p.ndim < 2], "lr": 3e-3}]
    return optim.AdamW(groups, lr=1e-2)


@pytest.mark.thorough("False-True", "True-False")
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_engine_hands_over_its_arrays(
    interpreted: torch.device, monkeypatch: pytest.MonkeyPatch, mixed: bool, early: bool
) -> None:
    """Steps after the first one, with two groups, of masters with and without a 2-byte copy."""
    small = {"moments": "int8", "step": "backward" if early else "after"} | ({"master": "split"} if mixed else {})
    run = Run(loss=autocast_loss if mixed else GPT.loss, optimizer=flat_adamw, steps=3, dtype=torch.float32)
    job, steps = Job("none", small, mixed, run), []

    def counted(*given: Any) -> None:
        steps.append(given[0])
        small_step(*given)

    monkeypatch.setattr(flat, "small_step", counted)
    mine = trained(job)
    assert len(steps) > 2 if early else len(steps) == 2
    monkeypatch.delenv("TRITON_INTERPRET")
    theirs = trained(job)
    # A last bit of fp32 that is another one may round a weight to the next bf16 number, and the next gradients with it.
    assert mine.losses == pytest.approx(theirs.losses, rel=1e-4 if mixed else 1e-6)
    for name, weight in theirs.weights.items():
        assert float((mine.weights[name] - weight).abs().max()) < (3e-3 if mixed else 1e-5), name
    assert mine.sizes == theirs.sizes


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("forms", FORMS, ids="-".join)
def test_compiled(compiled: torch.device, name: str, forms: tuple[str, str]) -> None:
    check(name, forms, torch.float32, compiled)


def test_what_no_kernel_knows_is_left_to_portions(interpreted: torch.device) -> None:
    param = nn.Parameter(torch.zeros(()).expand(8))
    plain = Form("plain", torch.zeros(8))
    amsgrad, origin = optim.AdamW([param], amsgrad=True), Origin()
    states = dict.fromkeys(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), plain)
    assert not amsgrad.step_forms([Formed(param, torch.ones(8), plain, states, origin)])
    odd = optim.AdamW([param])
    assert not odd.step_forms([Formed(param, torch.ones(8), plain, {"exp_avg": plain}, origin)])
    assert not odd.state


def test_without_kernels_portions_are_stepped() -> None:
    param = nn.Parameter(torch.zeros(()).expand(8))
    form = Form("plain", torch.zeros(8))
    states = {"exp_avg": form, "exp_avg_sq": form}
    assert not optim.AdamW([param]).step_forms([Formed(param, torch.ones(8), form, states, Origin())])
