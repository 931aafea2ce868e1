"""What cannot run as a pipeline is refused: before ranks are started where it is known, else on every rank alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lit_zero import Pipeline, Zero, ZeroStrategy
from lit_zero.core.errors import ConfigError, LitZeroError, UnsupportedError
from tests.strategy.harness import Fit, LitGPT, Short, loaders, make_trainer, train
from tests.zero.harness import GPT


def piped(stages: int = 2, module: type[pl.LightningModule] = LitGPT, **given: Any) -> Fit:
    """Return a fit on as many ranks as a pipeline has, with the words of ``given`` among its own."""
    arguments = {"layers": given.pop("layers")} if "layers" in given else {}
    pipeline = Pipeline(**{"schedule": "1f1b", "stages": stages, "micro_batches": 4, **given})
    return Short({"pipeline": pipeline}, pipeline.ranks, module=module, arguments=arguments, epochs=1)


def refusals(fits: list[Fit], folder: Path) -> list[tuple[str, str]]:
    """Return the class and the words of what every fit raises on this rank."""
    found = []
    for number, fit in enumerate(fits):
        try:
            train(fit, folder / str(number))
        except LitZeroError as error:
            found.append((type(error).__name__, str(error)))
        else:
            found.append(("", "it was not refused"))
    return found


# ---- before anything starts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stages": 1}, "pipeline.stages=1 does not fit pipeline.schedule='1f1b', which runs 1 stage on every rank: "),
        ({"stages": 0}, "pipeline.stages=0 is not valid: expected an integer of at least 1."),
        ({"stages": "2"}, "pipeline.stages='2' is not valid: expected an integer of at least 1."),
        ({"schedule": "interleaved", "stages": 3}, "pipeline.stages=3 does not fit pipeline.schedule='interleaved', "),
        ({"schedule": "zbv", "stages": 3}, "pipeline.stages=3 does not fit pipeline.schedule='zbv', which runs 2 stag"),
        ({"schedule": "2f2b"}, "pipeline.schedule='2f2b' is not known. Did you mean '1f1b'? Choose one of: none, "),
        (
            {"schedule": "none"},
            "pipeline.stages=2 has no effect without a schedule. Remove it, or choose pipeline=1f1b",
        ),
        ({"stages_per_rank": 2}, "pipeline.stages_per_rank=2 has no effect with pipeline.schedule='1f1b', which runs "),
        ({"micro_batches": 0}, "pipeline.micro_batches=0 is not valid: expected an integer of at least 1."),
        ({"micro_batches": -3}, "pipeline.micro_batches=-3 is not valid: expected an integer of at least 1."),
        ({"micro_batches": 2.0}, "pipeline.micro_batches=2.0 is not valid: expected an integer of at least 1."),
        ({"boundaries": [1, 2]}, "pipeline.boundaries=[1, 2] makes 3 stages, but pipeline.stages=2."),
        ({"boundaries": [0]}, "pipeline.boundaries=[0] leaves a stage empty or is out of order: expected increasing"),
        ({"boundaries": ["1"]}, "pipeline.boundaries=['1'] is not valid: expected the number of the first block of "),
        ({"boundaries": 1}, "pipeline.boundaries=1 is not valid: expected the number of the first block of every sta"),
        ({"boundaries": [1], "balance": "flops"}, "pipeline.balance has no effect beside pipeline.boundaries. Remove "),
        ({"balance": "flop"}, "pipeline.balance='flop' is not known. Did you mean 'flops'? Choose one of: parameters,"),
        ({"balance": [1, "2"]}, "pipeline.balance=[1, '2'] is not valid: expected one of parameters, activations, fl"),
        ({"blocks": [1]}, "pipeline.blocks=[1] is not valid: expected 'auto', the path of a list of modules, or sever"),
        ({"split": "rows"}, "pipeline.split='rows' is not valid: expected a function (batch, count) -> micro-batches."),
    ],
)
def test_a_wrong_choice(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Pipeline(**{"schedule": "1f1b", "stages": 2, **given})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("devices", "nodes"), [(3, 1), (1, 1), (1, 3)])
def test_ranks_that_do_not_divide_are_refused_by_the_trainer(devices: int, nodes: int) -> None:
    strategy = ZeroStrategy(pipeline=Pipeline("1f1b", stages=2))
    with pytest.raises(ConfigError) as caught:
        pl.Trainer(accelerator="cpu", devices=devices, num_nodes=nodes, strategy=strategy, logger=False)
    ranks = devices * nodes
    fitting = "1 rank." if ranks == 1 else "1 or 3 ranks."
    assert str(caught.value) == (
        f"pipeline.stages makes pipelines of 2 ranks, into which the {ranks} rank{'s' * (ranks > 1)} of this run "
        "(trainer.devices times trainer.num_nodes) cannot be divided. Start a multiple of 2 ranks, or choose "
        f"pipeline.stages so that a pipeline takes {fitting}"
    )


@pytest.mark.parametrize("schedule", ["zero_bubble", "zbv"])
def test_slots_with_a_split_backward(schedule: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"^zero.slots=2 does not go with pipeline.schedule='{schedule}': the "):
        ZeroStrategy(Zero("stage3", slots=2), pipeline=Pipeline(schedule, stages=4))


# ---- at first use, on every rank


class Skipping(LitGPT):
    """What comes before the blocks is added to what comes out of them."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model = SkippingGPT()


class SkippingGPT(GPT):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = before = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x + before))


class Halfway(SkippingGPT):
    """A skip connection over the second of three blocks."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = before = self.blocks[0](self.embedding(tokens))
        return self.head(self.norm(self.blocks[2](self.blocks[1](x) + before)))


class SkippingOne(LitGPT):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model = Halfway()


class Twice(LitGPT):
    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model.loss(batch[0]) + self.model.loss(batch[0])


class Flat(LitGPT):
    """No list of modules."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model = nn.Linear(9, 1)


class Manual(LitGPT):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False


class OwnBackward(LitGPT):
    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


class Synchronised(LitGPT):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.normalised = nn.SyncBatchNorm(3)


class Words:
    """A batch of a class of its own."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens


class OwnBatch(LitGPT):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return Words(batch[0])


class Uneven(LitGPT):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0], batch[0][:3]]


ADVICE = "Give pipeline.split a function (batch, count) -> micro-batches."
AT_FIRST_USE: list[tuple[Fit, str, str]] = [
    (
        piped(stages=2, layers=1),
        "UnsupportedError",
        "The model has no ModuleList or Sequential that repeats a class of module, so it is not known where to split "
        "it. Keep its layers in one and name that with pipeline.blocks.",
    ),
    (
        piped(stages=4, schedule="interleaved"),
        "ConfigError",
        "pipeline.stages=4 is more than the 3 blocks of the block list; every stage needs one. Use fewer stages, or "
        "name a longer list with pipeline.blocks.",
    ),
    (
        piped(blocks="model.block"),
        "ConfigError",
        "pipeline.blocks='model.block' is not the path of a ModuleList or Sequential of the model. Did you mean "
        "'model.blocks'? Choose one of: model.blocks.",
    ),
    (
        piped(boundaries=[3]),
        "ConfigError",
        "pipeline.boundaries=[3] leaves a stage empty or is out of order: expected increasing numbers of blocks from 1 "
        "to 2, the first block of every stage but the first.",
    ),
    (
        piped(balance=[1.0, 2.0]),
        "ConfigError",
        "pipeline.balance has 2 costs, but the block list has 3 blocks: expected one each.",
    ),
    (
        piped(module=Skipping),
        "UnsupportedError",
        "The model cannot be split there: pipeline.stages=2 needs 1 boundary, but a skip connection runs between "
        "model.blocks.0 and model.blocks.1: ",
    ),
    (
        piped(module=SkippingOne, boundaries=[1]),
        "UnsupportedError",
        "The model cannot be split there: a skip connection runs between model.blocks.0 and model.blocks.1: ",
    ),
    (piped(module=Twice), "UnsupportedError", "Block 'model.blocks.0' "),
    (piped(module=Flat), "UnsupportedError", "The model has no ModuleList or Sequential that repeats a class of mod"),
    (
        piped(module=Manual),
        "UnsupportedError",
        "Manual uses manual optimization: its backward is inside training_step, which a pipeline leaves at the end of "
        "each stage. Use automatic optimization, or pipeline=none.",
    ),
    (
        piped(module=OwnBackward),
        "UnsupportedError",
        "OwnBackward overrides backward, which a pipeline does not call: every stage has a backward of its own. ",
    ),
    (
        piped(module=Synchronised),
        "UnsupportedError",
        "Synchronised normalises over the batches of all ranks (sync_batchnorm=True or nn.SyncBatchNorm), but ",
    ),
    (piped(module=OwnBatch), "ConfigError", f"A batch of class Words cannot be cut into micro-batches. {ADVICE}"),
    (
        piped(module=Uneven),
        "ConfigError",
        "The tensors of the batch have 3, 8 rows: which dimension is that of the batch cannot be told. " + ADVICE,
    ),
]


def test_refused_at_first_use_on_every_rank(ranks: Any, tmp_path: Path) -> None:
    fits = [fit for fit, _, _ in AT_FIRST_USE]
    for found in ranks(2).run(refusals, fits, tmp_path, timeout=120):
        for (kind, words), (_, expected, message) in zip(found, AT_FIRST_USE, strict=True):
            assert (kind, words[: len(message)]) == (expected, message)


def test_a_skip_connection_says_where_it_runs_and_what_to_do(ranks: Any, tmp_path: Path) -> None:
    fits = [piped(module=Skipping), piped(module=SkippingOne, boundaries=[1])]
    for (_, everywhere), (_, halfway) in ranks(2).run(refusals, fits, tmp_path):
        assert "'add' in Skipping uses what 'embedding' in model.embedding has made, and that is not an" in everywhere
        assert "Choose other boundaries (pipeline.boundaries; possible: none) or another block list" in everywhere
        assert "Choose other boundaries (pipeline.boundaries; possible: 2) or another block list" in halfway


class Broken(LitGPT):
    """The user's own mistake."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        raise ZeroDivisionError("of the user")


def break_down(fit: Fit, folder: Path) -> str:
    try:
        train(fit, folder)
    except (ZeroDivisionError, LitZeroError) as error:
        return f"{type(error).__name__}: {error}"
    return "it did not fail"


def test_a_mistake_in_the_step_reaches_every_rank(ranks: Any, tmp_path: Path) -> None:
    first, second = ranks(2).run(break_down, piped(module=Broken), tmp_path)
    assert first == "ZeroDivisionError: of the user"
    assert second == (
        "LitZeroError: Broken failed on rank 0 in the dry run of its step: ZeroDivisionError('of the user')"
    )


# ---- what is right, though it looks odd


def test_any_number_of_micro_batches(ranks: Any, tmp_path: Path) -> None:
    """One, more than there are rows, and a number that divides nothing."""
    alone = train(Short(epochs=1), tmp_path / "alone")
    fits = [piped(micro_batches=number) for number in (1, 3, 100)]
    fits += [piped(schedule=name, micro_batches=1) for name in ("gpipe", "zero_bubble")]
    for found in ranks(2).run(losses, fits, tmp_path, timeout=120)[0]:
        assert found == pytest.approx(alone.column("train_loss_step"), rel=1e-5)


def losses(fits: list[Fit], folder: Path) -> list[list[float]]:
    return [train(fit, folder / str(number)).column("train_loss_step") for number, fit in enumerate(fits)]


# ---- outside of a step


def call_outside(fit: Fit, folder: Path) -> tuple[Any, str, bool]:
    """Train, and then call the module itself."""
    torch.manual_seed(0)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    trainer.fit(module, *loaders(fit))
    module.eval()
    tokens, before, words = torch.arange(12).view(2, 6) % 31, torch.get_rng_state(), ""
    with torch.no_grad():
        answer = module(tokens), module(tokens=tokens[:1])
    try:
        module(tokens)
    except UnsupportedError as error:
        words = str(error)
    return [each.clone() for each in answer], words, torch.equal(before, torch.get_rng_state())


class Called(LitGPT):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens)


def test_the_module_is_called_outside_of_a_step(ranks: Any, tmp_path: Path) -> None:
    alone, _, _ = call_outside(Short(module=Called, epochs=1), tmp_path / "alone")
    for answers, words, untouched in ranks(2).run(call_outside, piped(module=Called), tmp_path / "piped"):
        for mine, theirs in zip(answers, alone, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert words.startswith("Called is in several pieces (pipeline.stages) and was called with gradients outside")
        assert untouched, "the user's random state"


def in_turn(folder: Path) -> list[str]:
    """Return what is said when a divided module comes back: to other Trainers, and to its own after another module."""
    fit, found = piped(layers=3), []
    one, other = LitGPT(layers=3), LitGPT(layers=3)
    fits = [fit, fit, Fit({}, 2)]
    trainers = [make_trainer(each, folder / str(number)) for number, each in enumerate(fits)]
    order = [(0, one), (1, one), (2, one), (0, one), (0, other), (0, one)]
    for number, module in order:
        try:
            trainers[number].validate(module, loaders(fit)[1], verbose=False)
        except UnsupportedError as error:
            found.append(str(error))
        else:
            found.append("")
    return found


def test_a_module_that_is_divided_already(ranks: Any, tmp_path: Path) -> None:
    refused = (
        "This rank holds a part of LitGPT only: another Trainer has divided it into pipeline stages, or this one "
        "before it ran another module. Go on with the Trainer that has divided it (fit, validate, test, predict) and "
        "give each module one of its own, or start from a checkpoint."
    )
    assert ranks(2).run(in_turn, tmp_path) == [["", refused, refused, "", "", refused]] * 2
