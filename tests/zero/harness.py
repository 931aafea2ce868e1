"""Train the same model under the engine on several ranks, and in one process on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lit_zero.comm import Comm
from lit_zero.comm.open import open_exchange
from lit_zero.core.keeping import Keeping
from lit_zero.precision import Lowering
from lit_zero.zero import Zero
from lit_zero.zero.engine import Engine

BATCH = 8  # sequences of a whole batch; divisible by 1, 2 and 4 ranks


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, dim)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A small GPT whose sizes divide nothing evenly; embedding and head share one weight."""

    def __init__(self, vocab: int = 31, dim: int = 12, layers: int = 3, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def tokens(number: int, rows: slice = slice(None), vocab: int = 31, length: int = 9) -> torch.Tensor:
    """Return rows of whole batch ``number``, shape ``[rows, length]``."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, vocab, (BATCH, length), generator=generator)[rows]


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    """AdamW with two groups: matrices decay, vectors do not."""
    return torch.optim.AdamW(_groups(model), lr=lr)


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum and two groups."""
    return torch.optim.SGD(_groups(model), lr=0.1, momentum=0.9)


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]


@dataclass
class Run:
    """How to train.

    Attributes:
        model: builds the module.
        loss: ``loss(model, tokens)``; a mean over rows, so that ranks' means average to the whole batch's.
        optimizer: builds the optimizer.
        steps: optimizer steps.
        micro_batches: whole batches per step.
        clip: maximum gradient norm, 0 for none.
        clip_value: maximum gradient element, 0 for none.
        dtype: of the model.
    """

    model: Callable[[], nn.Module] = GPT
    loss: Callable[[Any, torch.Tensor], torch.Tensor] = GPT.loss
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw
    steps: int = 10
    micro_batches: int = 1
    clip: float = 0.0
    clip_value: float = 0.0
    dtype: torch.dtype = torch.float64


@dataclass
class Outcome:
    """What training gave.

    Attributes:
        losses: of the whole batch, one per step.
        weights: full parameters by name.
        notes: whatever a test asks for besides.
    """

    losses: list[float]
    weights: dict[str, torch.Tensor]
    notes: dict[str, Any] = field(default_factory=dict)

    def flat(self) -> torch.Tensor:
        """All weights end to end, fp64."""
        return torch.cat([w.flatten().double() for w in self.weights.values()])


def one_process(run: Run) -> Outcome:
    """Train on whole batches, with nothing but torch."""
    torch.manual_seed(0)
    model = run.model().to(run.dtype)
    optimizer, losses = run.optimizer(model), []
    for step in range(run.steps):
        total = 0.0
        for micro in range(run.micro_batches):
            loss = run.loss(model, tokens(step * run.micro_batches + micro)) / run.micro_batches
            loss.backward()
            total += loss.item()
        if run.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        if run.clip_value:
            torch.nn.utils.clip_grad_value_(model.parameters(), run.clip_value)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return Outcome(losses, {name: p.detach().clone() for name, p in model.named_parameters()})


def with_engine(
    run: Run,
    zero: Zero,
    comm: Comm | None = None,
    lowering: Lowering | None = None,
    look: Callable[[Engine], Any] | None = None,
    keeping: Keeping | None = None,
) -> Outcome:
    """Train on this rank's rows under the engine; call it on every rank.

    Args:
        run: how to train.
        zero: the stage.
        comm: how bytes travel.
        lowering: dtypes of a mixed mode.
        look: called with the engine after the last step; its result becomes ``notes["look"]``.
        keeping: where shards live between uses.
    """
    torch.manual_seed(0)
    model = run.model().to(run.dtype)
    optimizer, losses = run.optimizer(model), []
    exchange = open_exchange(comm or Comm(), torch.device("cpu"))
    engine = Engine(model, [optimizer], zero=zero, exchange=exchange, lowering=lowering, keeping=keeping)
    share = BATCH // exchange.size
    rows = slice(exchange.rank * share, (exchange.rank + 1) * share)
    norms = []
    for step in range(run.steps):
        total = torch.zeros((), dtype=torch.float64)
        for micro in range(run.micro_batches):
            loss = run.loss(model, tokens(step * run.micro_batches + micro, rows)) / run.micro_batches
            if micro < run.micro_batches - 1:
                with engine.no_reduce():
                    engine.backward(loss)
            else:
                engine.backward(loss)
            total += loss.detach().double()
        if run.clip:
            norms.append(engine.clip_grad_norm(run.clip).item())
        if run.clip_value:
            engine.clip_grad_value(run.clip_value)
        engine.step()
        losses.append(exchange.sum_in_rank_order(total).item() / exchange.size)
    notes = {"norms": norms, "bytes": engine.model_state_bytes()}
    if look is not None:
        notes["look"] = look(engine)
    engine.detach()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Outcome(losses, weights, notes)


def distance(one: Outcome, other: Outcome) -> float:
    """Return the relative distance of all weights and all losses, whichever is larger."""
    a, b = one.flat(), other.flat()
    weights = ((a - b).norm() / b.norm()).item()
    losses = max(abs(x - y) / abs(y) for x, y in zip(one.losses, other.losses, strict=True))
    return max(weights, losses)
