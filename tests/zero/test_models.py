"""Models that break sharding engines: shared, frozen, unused, empty parameters; repeated modules; odd outputs;
checkpointing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_zero.zero import Zero
from tests.pool import RankFailure
from tests.zero.harness import GPT, Block, Run, adamw, distance, momentum, one_process, tokens, with_engine

STAGES = ("none", "stage1", "stage2", "stage3")


class Checkpointed(GPT):
    """Every block is recomputed in the backward; dropout must repeat."""

    reentrant = False

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


class Reentrant(Checkpointed):
    reentrant = True


class CheckpointedInGroups(GPT):
    """One checkpoint spans three blocks: the recomputation passes through the slot of the unit that waits for it."""

    reentrant = False

    def __init__(self) -> None:
        super().__init__(layers=6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for start in (0, 3):
            x = checkpoint(self._run, start, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))

    def _run(self, start: int, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[start : start + 3]:
            x = block(x)
        return x


class ReentrantGroups(CheckpointedInGroups):
    reentrant = True


class CalledTwice(GPT):
    """The blocks run twice in one forward, as in a universal transformer."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for _ in range(2):
            for block in self.blocks:
                x = block(x)
        return self.head(self.norm(x))


class CheckpointedTwice(GPT):
    reentrant = False

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for _ in range(2):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


class ReentrantTwice(CheckpointedTwice):
    reentrant = True


class Frozen(GPT):
    """The first block and the embedding are frozen, and every block has frozen and trainable parts."""

    def __init__(self) -> None:
        super().__init__(layers=5, tied=False)
        self.embedding.requires_grad_(False)
        self.blocks[0].requires_grad_(False)
        for block in self.blocks:
            block.qkv.requires_grad_(False)
        self.blocks[3].requires_grad_(False)


class Unused(GPT):
    """Parameters that no loss reaches, in the root and in a block; in one process AdamW leaves them alone, decay
    included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pooler = nn.Linear(12, 12)
        self.blocks[1].extra = nn.Linear(12, 5)
        self.skipped = nn.ModuleList([])
        self.blocks.append(Block(12))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.head(self.norm(x))


class SometimesUsed(GPT):
    """A block that only some steps reach: its parameters stay put in the others."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Parameter(torch.ones(3))  # so that ranks compare what was reached
        self.calls = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        self.calls += 1
        for number, block in enumerate(self.blocks):
            if number != 1 or self.calls % 2:
                x = block(x)
        return self.head(self.norm(x))


class SharedBlock(nn.Module):
    """One block object stands in two places of the list, and a weight is shared between two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 12)
        shared = Block(12)
        self.blocks = nn.ModuleList([Block(12), shared, Block(12), shared, Block(12)])
        self.blocks[4].up.weight = self.blocks[0].up.weight
        self.head = nn.Linear(12, 31)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    loss = GPT.loss


class Empty(GPT):
    """Parameters without elements, of one element, of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0, 7))
        self.blocks[0].nothing = nn.Parameter(torch.empty(0))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * self.scale + self.shift


@dataclass
class Pair:
    hidden: torch.Tensor
    aside: dict[str, Any]


class Wrapped(nn.Module):
    """A block that takes and returns nested containers and a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(12)

    def forward(self, pair: Pair, *, options: dict[str, Any]) -> Pair:
        hidden = self.block(pair.hidden) * options["scale"]
        return Pair(hidden, {"list": [hidden.mean(), (pair.aside["list"][0] if pair.aside else None, 3)], "name": "x"})


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 12)
        self.blocks = nn.ModuleList(Wrapped() for _ in range(4))
        self.head = nn.Linear(12, 31)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        pair = Pair(self.embedding(tokens), {})
        for block in self.blocks:
            pair = block(pair, options={"scale": 0.9})
        return self.head(pair.hidden) + pair.aside["list"][0]

    loss = GPT.loss


class Sparse(nn.Module):
    """Matrix products that save a *view* of the weight: it must be found again where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(31, 12)
        self.blocks = nn.ModuleList(ByView() for _ in range(5))
        self.head = nn.Linear(12, 31)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)

    loss = GPT.loss


class ByView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 12) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half, other = self.weight.t().chunk(2, dim=1)
        return x @ half + (x * x) @ other


class InPlace(GPT):
    """Blocks add to their input in place and return it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InPlaceBlock() for _ in range(5))


class InPlaceBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += self.down(F.gelu(self.up(x.clone())))
        return x


class Convolutional(nn.Module):
    """A Sequential of unequal layers with buffers that change, on a channels-last input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 5, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(5, 7, 3, padding=1),
            nn.GroupNorm(1, 7),
            nn.Flatten(),
            nn.Linear(63, 3),
        )

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        images = tokens[:, :9].reshape(-1, 1, 3, 3).to(self.net[0].weight.dtype) / 31
        out = self.net(images.to(memory_format=torch.channels_last))
        return F.cross_entropy(out, tokens[:, 0] % 3)


def several_forwards(model: GPT, batch: torch.Tensor) -> torch.Tensor:
    """Three forwards, one of them without gradient, before one backward."""
    loss = model.loss(batch)
    with torch.no_grad():
        target = model(batch.roll(1, 1))
    return loss + 0.3 * F.mse_loss(model(batch.flip(1)), target)


def gradient_penalty(model: GPT, batch: torch.Tensor) -> torch.Tensor:
    """``autograd.grad`` inside the step runs parts of the backward before the backward."""
    x = model.embedding(batch[:, :-1]).detach().requires_grad_()
    hidden = model.blocks[1](model.blocks[0](x))
    (slope,) = torch.autograd.grad(hidden.square().mean(), x)
    return model.loss(batch) + 0.0 * slope.square().sum()


RUNS = {
    "checkpoint": Run(model=Checkpointed),
    "reentrant": Run(model=Reentrant),
    "checkpoint over three blocks": Run(model=CheckpointedInGroups),
    "reentrant over three blocks": Run(model=ReentrantGroups),
    "called twice": Run(model=CalledTwice),
    "called twice, checkpoint": Run(model=CheckpointedTwice),
    "called twice, reentrant": Run(model=ReentrantTwice),
    "frozen": Run(model=Frozen),
    "unused": Run(model=Unused),
    "unused, accumulated": Run(model=Unused, micro_batches=2),
    "sometimes used": Run(model=SometimesUsed),
    "shared block": Run(model=SharedBlock, loss=SharedBlock.loss),
    "empty": Run(model=Empty),
    "nested": Run(model=Nested, loss=Nested.loss),
    "views": Run(model=Sparse, loss=Sparse.loss, optimizer=momentum),
    "in place": Run(model=InPlace),
    "convolutional": Run(model=Convolutional, loss=Convolutional.loss, optimizer=momentum),
    "several forwards": Run(loss=several_forwards),
    "gradient penalty": Run(loss=gradient_penalty),
}


# Models whose parameters decide what a rank's part is: on one rank and on four, too. How often and in which order
# modules run is the same on any number of ranks that exchange.
CUT = ("checkpoint", "frozen", "unused, accumulated", "sometimes used", "shared block", "empty")


def all_stages(name: str) -> list[Any]:
    run = RUNS[name]
    run.steps = 5
    outcomes = [with_engine(run, Zero(stage)) for stage in STAGES]
    return [*outcomes, *(with_engine(run, Zero("stage3", slots=slots, poison=True)) for slots in (1, 2))]


@pytest.mark.thorough(*(f"{name}-4" for name in CUT if name != "frozen"))
@pytest.mark.parametrize(("name", "size"), [*((name, 2) for name in RUNS), *itertools.product(CUT, (1, 4))])
def test_equals_one_process(ranks, size, name):
    RUNS[name].steps = 5
    expected = one_process(RUNS[name])
    for outcome in itertools.chain(*ranks(size).run(all_stages, name)):
        assert distance(outcome, expected) < 1e-9


def test_dropout_repeats_in_recomputation(ranks):
    for outcomes in ranks(2).run(with_dropout):
        for plain, checkpointed in outcomes:
            assert torch.equal(plain.flat(), checkpointed.flat())


class Dropped(GPT):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(Block(12), nn.Dropout(0.3)) for _ in range(3))


class DroppedAndCheckpointed(Dropped):
    forward = Checkpointed.forward
    reentrant = False


class DroppedAndReentrant(DroppedAndCheckpointed):
    reentrant = True


def with_dropout() -> list[Any]:
    found = []
    for stage, kind in itertools.product(STAGES, (DroppedAndCheckpointed, DroppedAndReentrant)):
        pair = []
        for model in (Dropped, kind):
            pair.append(with_engine(Run(model=model, steps=3), Zero(stage)))
        found.append(pair)
    return found


def diverging_branches() -> Any:
    """Rank 1 never runs the second block, and its loss reaches fewer parameters."""
    import torch.distributed as dist

    class Diverging(GPT):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embedding(tokens)
            for number, block in enumerate(self.blocks):
                if number != 1 or dist.get_rank() == 0:
                    x = block(x)
            return self.head(self.norm(x))

    return [with_engine(Run(model=Diverging, steps=4), Zero(stage)) for stage in STAGES[:3]]


def test_ranks_may_run_different_branches(ranks):
    """A rank that does not reach a parameter counts as zero in the mean; with replicated parameters nothing hangs."""
    run = Run(model=GPT, steps=4)
    torch.manual_seed(0)
    model = GPT().double()
    optimizer = adamw(model)
    for step in range(run.steps):
        for rank in range(2):
            blocks = model.blocks
            x = model.embedding(tokens(step, slice(rank * 4, rank * 4 + 4))[:, :-1])
            for number, block in enumerate(blocks):
                if number != 1 or rank == 0:
                    x = block(x)
            logits = model.head(model.norm(x))
            loss = F.cross_entropy(logits.flatten(0, 1), tokens(step, slice(rank * 4, rank * 4 + 4))[:, 1:].flatten())
            (loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    for outcome in itertools.chain(*ranks(2).run(diverging_branches)):
        assert ((outcome.flat() - expected).norm() / expected.norm()) < 1e-9


class Opaque:
    """Hides its tensor behind a closure."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.get = lambda: tensor


class Hiding(GPT):
    def __init__(self) -> None:
        super().__init__(layers=4)
        self.blocks = nn.ModuleList(HidingBlock() for _ in range(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x).get()
        return self.head(self.norm(x))


class HidingBlock(Block):
    def __init__(self) -> None:
        super().__init__(12)

    def forward(self, x: torch.Tensor) -> Opaque:  # type: ignore[override]
        return Opaque(super().forward(x))


def test_an_output_that_hides_its_tensor_is_refused(ranks):
    with pytest.raises(
        RankFailure, match="ran while its parameters were not there.*Return tensors, containers or dataclasses"
    ):
        ranks(2).run(with_engine, Run(model=Hiding, steps=2), Zero("stage3"))


def test_replaced_memory_is_noticed(ranks):
    with pytest.raises(RankFailure, match="memory of parameter 'blocks.0.out.weight' was replaced after setup"):
        ranks(2).run(replace_memory)


def replace_memory() -> None:
    def loss(model: GPT, batch: torch.Tensor) -> torch.Tensor:
        weight = model.blocks[0].out.weight
        weight.data = weight.data.clone()
        return model.loss(batch)

    with_engine(Run(loss=loss, steps=2), Zero("stage2"))


def test_units_that_need_one_slot_at_once_are_named(ranks):
    with pytest.raises(RankFailure, match="are needed at the same time but take turns in one slot. Raise zero.slots"):
        ranks(2).run(
            with_engine, Run(model=CrossCalling, loss=GPT.loss, steps=1), Zero("stage3", units=["CallingBlock"])
        )
    run = Run(model=CrossCalling, loss=GPT.loss, steps=3)
    expected = one_process(run)
    for outcome in ranks(2).run(with_engine, run, Zero("stage3", units=["CallingBlock"], slots=3)):
        assert distance(outcome, expected) < 1e-9


class CallingBlock(Block):
    def __init__(self, other: nn.Module | None = None) -> None:
        super().__init__(12)
        self.other = partial(_call, other) if other is not None else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x if self.other is None else self.other(x)


def _call(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)


class CrossCalling(GPT):
    """The third block calls the first from inside its own forward."""

    def __init__(self) -> None:
        super().__init__()
        first = CallingBlock()
        self.blocks = nn.ModuleList([first, CallingBlock(), CallingBlock(first)])
