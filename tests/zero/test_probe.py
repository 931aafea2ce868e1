"""Which optimizers may see flat shards instead of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lit_zero.core.errors import UnsupportedError
from lit_zero.zero.probe import require_elementwise
from tests.zero.harness import Run, distance, one_process, with_engine

ELEMENTWISE = ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta", "Rprop", "ASGD")
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, {"fused": True}],
    "Adam": [{"amsgrad": True}, {"fused": True}, {"maximize": True, "weight_decay": 0.1}, {"capturable": True}],
    "AdamW": [{"amsgrad": True}, {"fused": True}, {"betas": (0.0, 0.5)}],
    "Adagrad": [{"fused": True, "lr_decay": 0.1}],
    "RMSprop": [{"centered": True, "momentum": 0.9}],
    "NAdam": [{"decoupled_weight_decay": True, "weight_decay": 0.1}],
}


def params() -> list[nn.Parameter]:
    return list(nn.Linear(4, 4).parameters())


def make(name: str, **settings: Any) -> torch.optim.Optimizer:
    return getattr(torch.optim, name)(params(), **settings)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_element_wise_optimizers_of_torch_are_taken(name, foreach):
    require_elementwise(make(name, foreach=foreach))


@pytest.mark.parametrize(("name", "settings"), [(name, each) for name, all_ in SETTINGS.items() for each in all_])
def test_so_are_their_variants(name, settings):
    require_elementwise(make(name, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": torch.tensor(0.1)},
        {"lr": torch.tensor(0.1), "foreach": True, "capturable": True},
        {"lr": 0.1, "betas": (torch.tensor(0.9), torch.tensor(0.99)), "capturable": True},
    ],
)
def test_so_are_hyper_parameters_in_tensors(settings):
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in settings.items()}
    optimizer = make("Adam", **settings)
    require_elementwise(optimizer)
    assert torch.equal(torch.as_tensor(optimizer.param_groups[0]["lr"]), torch.as_tensor(before["lr"]))


class Lamb(torch.optim.Optimizer):
    """Scales each parameter's update by the ratio of two norms, once it has warmed up."""

    def __init__(self, params: Any, lr: float = 0.1, warm_up: int = 0) -> None:
        super().__init__(params, {"lr": lr, "warm_up": warm_up})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                ratio = p.norm() / p.grad.norm() if state["step"] > group["warm_up"] else 1.0
                p.sub_(group["lr"] * ratio * p.grad)


class UpdateClipping(Lamb):
    """As Adafactor's and StableAdamW's: only updates that are large on the average are scaled."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad / p.grad.square().mean().sqrt().clamp(min=5.0))


class GlobalNorm(Lamb):
    """Clips by the norm over all of its parameters: on a rank it would see but a part of them."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            p.sub_(self.param_groups[0]["lr"] * p.grad / norm)


class Hybrid(Lamb):
    """Element-wise or not, as its groups say."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * (p.grad / p.grad.norm() if group.get("normalize") else p.grad))


class Centralized(Lamb):
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * (p.grad - p.grad.mean(dim=-1, keepdim=True) if p.ndim > 1 else p.grad))


REFUSED: dict[str, Callable[[], torch.optim.Optimizer]] = {
    "norm ratio": lambda: Lamb(params()),
    "norm ratio after a warm-up": lambda: Lamb(params(), warm_up=4),
    "update clipping": lambda: UpdateClipping(params()),
    "global norm": lambda: GlobalNorm(params()),
    "in the second group only": lambda: Hybrid([{"params": params()}, {"params": params(), "normalize": True}]),
    "centralized": lambda: Centralized(params()),
    "learning rate of zero": lambda: Lamb(params(), lr=0.0),
    "learning rate below rounding": lambda: Lamb(params(), lr=1e-12),
    "Adafactor": lambda: torch.optim.Adafactor(params()),
    "Muon": lambda: torch.optim.Muon([nn.Linear(4, 4).weight]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_others_are_refused(case):
    optimizer = REFUSED[case]()
    with pytest.raises(UnsupportedError) as caught:
        require_elementwise(optimizer)
    name = type(optimizer).__name__
    assert str(caught.value).startswith(f"{name} is not element-wise: ")
    assert str(caught.value).endswith(
        "so sharding would change the result. Use an element-wise optimizer (AdamW, SGD, Lion, ...), or "
        "zero.stage='none'."
    )


def test_the_element_wise_groups_of_a_hybrid_are_no_reason_to_refuse():
    require_elementwise(Hybrid([{"params": params()}, {"params": params()}]))


def test_an_optimizer_that_cannot_be_tried_is_refused_with_the_reason():
    with pytest.raises(UnsupportedError) as caught:
        require_elementwise(torch.optim.SparseAdam(params()))
    assert str(caught.value) == (
        "lit_zero could not find out whether SparseAdam is element-wise: a copy of it could not step on a 4x6 matrix "
        "(RuntimeError: SparseAdam does not support dense gradients, please consider Adam instead). "
        "Sharded stages need an element-wise optimizer (AdamW, SGD, Lion, ...); zero.stage='none' takes any."
    )


class Wrapper(torch.optim.Optimizer):
    """Steps another optimizer: a copy of it moves nothing of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self.inner.step()


def test_an_optimizer_that_moves_nothing_is_refused():
    with pytest.raises(UnsupportedError, match="could not find out whether Wrapper.*ValueError: nothing moved"):
        require_elementwise(Wrapper(make("SGD")))


def test_lbfgs_is_refused_in_every_stage():
    message = "LBFGS evaluates the loss several times per step .* cannot run it in any stage. Use another optimizer"
    with pytest.raises(UnsupportedError, match=message):
        require_elementwise(torch.optim.LBFGS(params()))


class Noting(Lamb):
    """Keeps a list of its own, and draws random numbers."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.notes: list[int] = []
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self.notes.append(len(self.notes))
        self.counts["steps"] = self.counts.get("steps", 0) + 1
        torch.rand(3)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)


def test_trying_leaves_the_optimizer_and_the_random_state_alone():
    optimizer = Noting(params())
    called: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: called.append(1))
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    values = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    state = torch.get_rng_state()
    require_elementwise(optimizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert (optimizer.notes, optimizer.counts, called, dict(optimizer.state)) == ([], {}, [], {})
    held = optimizer.param_groups[0]["params"]
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(held, values, strict=True))


def test_schedulers_and_their_learning_rate_stay(recwarn):
    optimizer = make("SGD", lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
    require_elementwise(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.0
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert not [each for each in recwarn if "lr_scheduler" in str(each.message)]


# ---- with the engine


def lamb(model: nn.Module) -> torch.optim.Optimizer:
    return Lamb(model.parameters(), lr=0.01)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.01)


def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(model.parameters())


def taken_or_refused(optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> dict[str, Any]:
    from lit_zero.zero import Zero

    run, found = Run(optimizer=optimizer, steps=3), {}
    for stage in ("none", "stage1", "stage2", "stage3"):
        try:
            found[stage] = with_engine(run, Zero(stage))
        except UnsupportedError as error:
            found[stage] = str(error)
    return found


@pytest.mark.parametrize("optimizer", [lamb, muon])
def test_without_sharding_any_optimizer_equals_one_process(ranks, optimizer):
    expected = one_process(Run(optimizer=optimizer, steps=3))
    for found in ranks(2).run(taken_or_refused, optimizer):
        assert distance(found["none"], expected) < (1e-9 if optimizer is lamb else 1e-6)  # Muon works in bf16
        for stage in ("stage1", "stage2", "stage3"):
            assert "is not element-wise" in found[stage]


def test_lbfgs_is_refused_by_the_engine(ranks):
    for found in ranks(1).run(taken_or_refused, lbfgs):
        assert all("cannot run it in any stage" in message for message in found.values())
