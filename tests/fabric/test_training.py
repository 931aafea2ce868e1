"""Training with Fabric equals one process with stock Fabric, in every stage, and stages are equal bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch import nn

from lit_zero import Precision, Zero, ZeroStrategy
from lit_zero.core.errors import ConfigError, LitZeroError, UnsupportedError
from tests.fabric.harness import STAGES, Loop, Parted, loss_of, make_fabric, set_up, train, train_all, two, whole
from tests.pool import RankPool
from tests.strategy.harness import distance, same_bits
from tests.zero.harness import BATCH, GPT, tokens

Ranks = Callable[[int], RankPool]


def in_every_stage(loop: Loop, devices: int = 2, **zero: Any) -> list[Loop]:
    return [replace(loop, zero={"zero": stage, **zero}, devices=devices) for stage in STAGES]


LOOPS = {
    "plain": Loop(),
    "norm": Loop(clip={"max_norm": 0.3}),
    "largest element": Loop(clip={"max_norm": 0.05, "norm_type": "inf"}, optimizers=two),
    "value": Loop(clip={"clip_val": 0.01}),
    "accumulation": Loop(micro_batches=3, clip={"max_norm": 0.3}),
    "two optimizers": Loop(optimizers=two, clip={"max_norm": 0.3}),
    "apart": Loop(apart=True, clip={"max_norm": 0.3}),
    "two optimizers apart": Loop(optimizers=two, apart=True, micro_batches=2),
}


@pytest.mark.thorough("two optimizers apart")
@pytest.mark.parametrize("name", LOOPS)
def test_equal_to_one_process(ranks, name):
    alone = train(LOOPS[name])
    together = ranks(2).run(train_all, in_every_stage(LOOPS[name]))
    for each, other in zip(*together, strict=True):
        assert distance(each.weights, alone.weights) < 1e-9
        # Fabric turns what a module returns into fp32, whatever the module computes in.
        assert each.losses == other.losses == pytest.approx(alone.losses, rel=1e-6)
        assert each.norms == other.norms == pytest.approx(alone.norms, rel=1e-9)
        assert other.weights == {}
        if LOOPS[name].micro_batches == 1:  # else stages add up in different orders, see ``accumulate``
            assert same_bits(each.weights, together[0][0].weights)
    if LOOPS[name].clip:
        assert distance(alone.weights, train(replace(LOOPS[name], clip=None)).weights) > 1e-3


def test_set_up_apart_is_set_up_together(ranks):
    loops = [Loop({"zero": "stage3"}, 2, apart=apart) for apart in (False, True)]
    together, apart = ranks(2).run(train_all, loops)[0]
    assert same_bits(together.weights, apart.weights)


def kind(fabric: Fabric, model: Any, optimizers: list[Any]) -> tuple[str, str, int, int]:
    strategy = fabric.strategy
    return (
        type(strategy).__name__,
        strategy.zero.stage,
        strategy.data_parallel_size,
        strategy.engine(model).exchange.size,
    )


def test_by_name(ranks):
    alone = train(Loop(steps=2))
    found = ranks(2).run(train_all, [Loop(f"zero{number}", 2, steps=2, look=kind) for number in range(4)])[0]
    assert [each.notes for each in found] == [("FabricZeroStrategy", stage, 2, 2) for stage in STAGES]
    assert all(distance(each.weights, alone.weights) < 1e-9 for each in found)
    one = ranks(1).run(train, Loop("ZERO3", 1, steps=2))[0]
    assert distance(one.weights, alone.weights) < 1e-12


# ---- several modules


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)))

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        return self.blocks(noise)


class Discriminator(Generator):
    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.blocks(sample).mean(-1)


def gan(loop: Loop, steps: int = 4, named: bool = False, penalty: bool = False) -> tuple[list[dict[str, Any]], Any]:
    """Train a generator and a discriminator in turns; return both state dicts and what was sent in the last step."""
    fabric = make_fabric(loop)
    torch.manual_seed(0)
    models: list[Any] = []
    optimizers: list[Any] = []
    for model in (Generator(), Discriminator()):
        made, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.5, 0.9)))
        models.append(made)
        optimizers.append(optimizer)
    generator, discriminator = models
    share = BATCH // loop.devices
    rows = slice(fabric.global_rank * share, (fabric.global_rank + 1) * share)
    sent = []
    for step in range(steps):
        draw = torch.Generator().manual_seed(step)
        real, noise = (torch.randn(BATCH, 6, generator=draw, dtype=torch.float64)[rows] for _ in range(2))
        if loop.zero != "auto":
            counters = [fabric.strategy.engine(each).exchange.counters for each in models]
            for each in counters:
                each.reset()
        optimizers[1].zero_grad()
        fake = generator(noise).detach().requires_grad_(penalty)
        judged = discriminator(fake)
        loss = F.softplus(-discriminator(real)).mean() + F.softplus(judged).mean()
        if penalty:
            [slope] = torch.autograd.grad(judged.sum(), fake, create_graph=True)
            loss = loss + slope.square().sum(-1).mean()
        fabric.backward(loss, model=discriminator if named else None)
        optimizers[1].step()
        if loop.zero != "auto":
            sent = [each.reductions for each in counters]
        optimizers[0].zero_grad()
        fabric.backward(F.softplus(-discriminator(generator(noise))).mean(), model=generator if named else None)
        optimizers[0].step()
    return [whole(fabric, each) for each in models], sent


@pytest.mark.parametrize(("named", "penalty"), [(False, False), (True, False), (False, True)])
def test_a_generator_and_a_discriminator(ranks, named, penalty):
    alone, _ = gan(Loop(), 4, named, penalty)
    # A gradient of a gradient wants all of the discriminator's blocks at once.
    zeros = [{"zero": Zero("stage3", slots=3)} if penalty and s == "stage3" else {"zero": s} for s in STAGES]
    for zero in zeros:
        (found, sent), _ = ranks(2).run(gan, Loop(zero, 2), 4, named, penalty)
        assert all(distance(mine, theirs) < 1e-9 for mine, theirs in zip(found, alone, strict=True))
        assert sent[0] == 0 < sent[1], "the discriminator's loss does not reach the generator"


# ---- precision


@pytest.mark.thorough("bf16-true")
@pytest.mark.parametrize(
    ("mode", "close"), [("32-true", 1e-6), ("bf16-mixed", 2**-9), ("bf16-true", 2**-6), ("64-true", 1e-12)]
)
def test_precision(ranks, mode, close):
    loop = Loop(fabric={"precision": mode}, micro_batches=2)
    alone = train(loop)
    for each in ranks(2).run(train_all, in_every_stage(loop))[0]:
        assert distance(each.weights, alone.weights) < close
        assert {n: w.dtype for n, w in each.weights.items()} == {n: w.dtype for n, w in alone.weights.items()}
    if mode == "bf16-mixed":
        one = ranks(1).run(train, replace(loop, zero={"zero": "stage3"}))[0]
        assert same_bits(one.weights, alone.weights)
        assert distance(alone.weights, train(replace(loop, fabric={"precision": "32-true"})).weights) > 1e-4


class Overflowing(Parted):
    """Its gradient overflows in two batches, on the last rank only."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = super().forward(tokens)
        last = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 1
        if int(self.batches) in (2, 3) and last:
            logits.register_hook(lambda grad: grad * float("inf"))
        return logits


def half() -> MixedPrecision:
    """fp16; on a CPU, Fabric turns precision="16-mixed" into bf16-mixed, so the plugin is given."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2))


def scale(fabric: Fabric, model: Any, optimizers: list[Any]) -> float:
    return fabric.strategy.precision.scaler.get_scale()


def fp16(zero: Any, devices: int) -> Any:
    """Train in fp16 with forced overflows."""
    clip = {"max_norm": 0.3, "error_if_nonfinite": False}
    return train(Loop(zero, devices, {"plugins": [half()]}, Overflowing, steps=6, clip=clip, look=scale))


def test_all_ranks_agree_on_the_loss_scale(ranks):
    alone = fp16("auto", 1)
    assert alone.notes == 2.0**9  # down twice, up once
    for stage in STAGES:
        first, second = ranks(2).run(fp16, {"zero": stage}, 2)
        assert first.notes == second.notes == alone.notes
        assert distance(first.weights, alone.weights) < 2e-3


def test_gradients_of_micro_batches_are_summed_in_fp32(ranks):
    loop = Loop(
        {"zero": "stage1", "precision": Precision(lower="all")}, 2, {"precision": "bf16-mixed"}, look=gradient_dtypes
    )
    two_bytes = replace(loop, zero={"zero": "stage1", "precision": Precision(lower="all", gradient_dtype="compute")})
    found = ranks(2).run(train_all, [loop, two_bytes])[0]
    assert [each.notes for each in found] == [{torch.float32}, {torch.bfloat16}]


def gradient_dtypes(fabric: Fabric, model: Any, optimizers: list[Any]) -> set[torch.dtype]:
    return {lane.gradient_dtype for lane in fabric.strategy.engine(model).lanes}


# ---- what else a loop does


def other_methods(loop: Loop) -> tuple[Any, ...]:
    fabric = make_fabric(loop)
    model, [optimizer] = set_up(fabric, loop)
    fabric.backward(model.loss(tokens(0)))
    optimizer.step()  # parameters are old everywhere now
    loss = model.loss(tokens(1)).item()
    model.eval()
    with torch.no_grad():
        logits = model(tokens(1)[:, :-1]).flatten(0, 1)
    with torch.inference_mode():
        again = model(tokens(1)[:, :-1]).flatten(0, 1)
    assert torch.equal(logits, again)
    model._forward_methods.discard("loss")
    with pytest.raises(RuntimeError, match=r"mark_forward_method\('loss'\)"):
        model.loss(tokens(1))
    return loss, F.cross_entropy(logits, tokens(1)[:, 1:].flatten()).item()


def test_marked_methods_and_evaluation(ranks):
    for stage in STAGES:
        for loss, evaluated in ranks(2).run(other_methods, Loop({"zero": stage}, 2)):
            assert loss == pytest.approx(evaluated, rel=1e-6)  # ``forward`` gives fp32 where ``loss`` computes in fp64


def collectives(loop: Loop) -> dict[str, Any]:
    fabric = make_fabric(loop)
    rank = fabric.global_rank
    fabric.barrier()
    with fabric.rank_zero_first():
        pass
    return {
        "mean": fabric.all_reduce(torch.tensor(float(rank))).item(),
        "sum": fabric.all_reduce({"a": torch.tensor(rank + 1.0)}, reduce_op="sum")["a"].item(),
        "gathered": fabric.all_gather(torch.tensor([rank])).tolist(),
        "broadcast": fabric.broadcast({"from": rank}, src=1),
        "sampler": fabric.strategy.distributed_sampler_kwargs,
        "decision": fabric.strategy.reduce_boolean_decision(rank == 0),
    }


def test_collectives(ranks):
    for rank, found in enumerate(ranks(2).run(collectives, Loop("zero2", 2))):
        assert found == {
            "mean": 0.5,
            "sum": 3.0,
            "gathered": [[0], [1]],
            "broadcast": {"from": 1},
            "sampler": {"num_replicas": 2, "rank": rank},
            "decision": False,
        }


@pytest.mark.parametrize("apart", [False, True])
def test_a_module_built_on_the_meta_device(ranks, apart):
    eager = Loop({"zero": "stage3"}, 2, fabric={"precision": "32-true"}, model=GPT, apart=apart)
    first, second = ranks(2).run(train_all, [eager, replace(eager, init=True, before=was_sharded)])[0]
    assert same_bits(first.weights, second.weights)


def was_sharded(fabric: Fabric, model: Any, optimizers: list[Any]) -> None:
    with fabric.init_module():
        assert all(param.is_meta for param in GPT().parameters())
    with fabric.init_module(empty_init=False):
        assert not any(param.is_meta for param in GPT().parameters())
    engine = fabric.strategy.engine(model)
    assert sum(lane.master.numel for lane in engine.lanes) < 0.6 * engine.parameter_count


def own_backward(loop: Loop) -> tuple[dict[str, torch.Tensor], str]:
    """Call ``backward`` without Fabric; return the weights, and what Fabric says where that would be wrong."""
    fabric = make_fabric(loop)
    model, [optimizer] = set_up(fabric, loop)
    rows = slice(fabric.global_rank * BATCH // loop.devices, (fabric.global_rank + 1) * BATCH // loop.devices)
    for step in range(2):
        loss_of(model, tokens(step, rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    half_fabric = make_fabric(replace(loop, fabric={"plugins": [half()]}))
    scaled, _ = set_up(half_fabric, loop)
    words = ""
    try:
        loss_of(scaled, tokens(0)).backward()
    except RuntimeError as error:
        words = str(error)
    return whole(fabric, model), words


def test_backward_without_fabric(ranks):
    alone = own_backward(replace(Loop(), fabric={"precision": "32-true"}))
    for stage in STAGES:
        mine = ranks(2).run(own_backward, Loop({"zero": stage}, 2, {"precision": "32-true"}))[0]
        assert distance(mine[0], alone[0]) < 1e-6
        assert "call `fabric.backward(loss)` instead" in mine[1], "the loss would not be scaled"


def closure(loop: Loop) -> Any:
    fabric = make_fabric(loop)
    model, [optimizer] = set_up(fabric, loop)
    for step in range(3):

        def run(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model.loss(tokens(step))
            fabric.backward(loss)
            return loss

        optimizer.step(run)
    return whole(fabric, model)


def test_a_step_with_a_closure(ranks):
    alone = closure(Loop())
    assert distance(ranks(2).run(closure, Loop("zero3", 2))[0], alone) < 1e-9


# ---- what is refused


def refusals(folder: Any) -> dict[str, tuple[str, str]]:
    """Try what does not work; return the type and the words of every error."""
    fabric = make_fabric(Loop("zero3", 2, {}))
    model, [optimizer] = set_up(fabric, Loop())
    other = nn.Linear(2, 2)
    stranger = torch.optim.SGD(other.parameters(), lr=1.0)
    found: dict[str, tuple[str, str]] = {}

    def note(name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            found[name] = type(error).__name__, str(error)

    note("nan", lambda: fabric.backward(model.loss(tokens(0)) * float("nan")))
    fabric.backward(model.loss(tokens(0)))
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].grad.fill_(float("inf"))
    note("nonfinite", lambda: fabric.clip_gradients(model, optimizer, max_norm=1.0))
    note("stranger", lambda: fabric.setup_optimizers(stranger))
    note("twice", lambda: fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=1.0)))
    note("not set up", lambda: fabric.strategy.engine(other))
    note("not set up, optimizer", lambda: fabric.clip_gradients(model, stranger, max_norm=1.0))
    note("state_dict", lambda: model.state_dict())
    note("storage", lambda: fabric.strategy.save_checkpoint(folder / "x", {}, storage_options={}))
    return found


def test_refusals(ranks, tmp_path):
    found = ranks(2).run(refusals, tmp_path)[0]
    assert {name: kind for name, (kind, _) in found.items()} == {
        "nan": "LitZeroError",
        "nonfinite": "NonfiniteNormError",
        "stranger": "LitZeroError",
        "twice": "UnsupportedError",
        "not set up": "LitZeroError",
        "not set up, optimizer": "LitZeroError",
        "state_dict": "LitZeroError",
        "storage": "ConfigError",
    }
    words = {
        "nan": "Set nonfinite_loss='ignore' in ZeroStrategy to train on",
        "nonfinite": "Set error_if_nonfinite=False to scale the gradients by it anyway",
        "stranger": "Call fabric.setup_module(model) first",
        "twice": "is in two optimizers or groups",
        "not set up": "Linear has not been set up with this strategy",
        "not set up, optimizer": "SGD has not been set up with this strategy",
        "state_dict": "Save with fabric.save(path, state)",
        "storage": "has no effect",
    }
    for name, part in words.items():
        assert part in found[name][1]


def test_plugins_without_effect_are_refused():
    from lightning.fabric.plugins import BitsandbytesPrecision, TorchCheckpointIO

    with pytest.raises(UnsupportedError, match="The plugin TorchCheckpointIO has no effect"):
        Fabric(accelerator="cpu", devices=1, strategy="zero2", plugins=[TorchCheckpointIO()])
    with pytest.raises(UnsupportedError, match="The plugin TorchCheckpointIO has no effect"):
        Fabric(accelerator="cpu", devices=1, strategy=ZeroStrategy(checkpoint_io=TorchCheckpointIO()))
    with pytest.raises(UnsupportedError, match="BitsandbytesPrecision does not work with ZeroStrategy"):
        ZeroStrategy().precision = object.__new__(BitsandbytesPrecision)


# ---- one word for Trainer and Fabric


def test_the_same_object_serves_trainer_or_fabric():
    import lightning.pytorch as pl

    from lit_zero.strategy.fabric import FabricZeroStrategy

    arguments: dict[str, Any] = {"zero": Zero("stage3", slots=3), "checkpoint": "sharded", "timeout": 60.0}
    strategy = ZeroStrategy(**arguments)
    fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy)
    assert fabric.strategy is strategy and type(strategy) is FabricZeroStrategy
    assert strategy.zero.slots == 3 and strategy.checkpoint_policy.format == "sharded"
    assert strategy.timeout.total_seconds() == 60.0
    assert strategy.accelerator is fabric.accelerator and strategy.parallel_devices == [torch.device("cpu")]
    other = ZeroStrategy(**arguments)
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=other, logger=False, enable_checkpointing=False)
    assert trainer.strategy is other and type(other) is ZeroStrategy

    class Mine(ZeroStrategy):
        pass

    with pytest.raises(UnsupportedError, match="Mine is a strategy for a Trainer. Derive it from"):
        Fabric(accelerator="cpu", devices=1, strategy=Mine())
    with pytest.raises(UnsupportedError, match="start_method='spawn' has no effect in Fabric: start several"):
        Fabric(accelerator="cpu", devices=1, strategy=ZeroStrategy(start_method="spawn"))
    with pytest.raises(ConfigError, match="slots"):
        Fabric(accelerator="cpu", strategy=ZeroStrategy(Zero("stage3", slots=0)))
    with pytest.raises(LitZeroError, match="outside a Trainer or Fabric"):
        _ = ZeroStrategy().root_device
