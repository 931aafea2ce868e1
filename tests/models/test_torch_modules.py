"""What torch itself offers and sharding engines stumble over: hooks, buffers, computed weights, sparse gradients,
recurrent layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lit_zero import Zero
from lit_zero.core.errors import UnsupportedError
from lit_zero.zero.recurrent import KeptInPlace
from tests.models.harness import Foreign, check_equal, defaults, in_all_stages, momentum
from tests.strategy.harness import STAGES, Fit, distance, train, train_all
from tests.strategy.test_model_checkpoint import refused

VOCAB, DIM = 31, 12


class Stack(nn.Module):
    """An embedding, four blocks, a head.

    Args:
        block: makes a block, which keeps the shape ``[rows, length, 12]``.
    """

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


# ---- weights that are computed


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in many models
        up, down = (nn.utils.weight_norm(nn.Linear(DIM, DIM)) for _ in range(2))
    return nn.Sequential(up, nn.Tanh(), down)


def new_weight_norm() -> nn.Module:
    up, down = (parametrizations.weight_norm(nn.Linear(DIM, DIM)) for _ in range(2))
    return nn.Sequential(up, nn.Tanh(), down)


def old_spectral_norm() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(DIM, DIM)), nn.Tanh())


def new_spectral_norm() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(DIM, DIM)), nn.Tanh())


def orthogonal() -> nn.Module:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(DIM, DIM)), nn.Tanh())


class Symmetric(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * (x.triu() + x.triu(1).transpose(-1, -2))


def stacked_parametrizations() -> nn.Module:
    layer = nn.Linear(DIM, DIM)
    for _ in range(2):
        parametrize.register_parametrization(layer, "weight", Symmetric())
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    return layer


# ---- hooks and buffers


class Hooked(nn.Module):
    """Hooks of every kind, and buffers that each forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.full((DIM,), 0.9), persistent=False)
        self.register_buffer("nothing", None)
        self.seen: list[torch.Size] = []
        self.register_forward_pre_hook(lambda module, args: (args[0] * 1.1,))
        self.register_forward_hook(lambda module, args, output: output * 0.9)
        self.first.register_forward_hook(lambda module, args, output: self.seen.append(output.shape))
        self.second.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 2.0,))
        self.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,))
        mask = torch.arange(DIM * DIM).view(DIM, DIM) % 3 > 0
        self.first.weight.register_hook(lambda grad: grad * mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
            self.scale = self.scale * 0.99  # another tensor under the same name
        return self.second(torch.tanh(self.first(x))) * self.scale


# ---- recurrent layers


class Recurrent(nn.Module):
    """Every recurrent layer of torch, told to flatten its weights as users' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(DIM, 5, num_layers=2, bidirectional=True, batch_first=True, proj_size=3)
        self.gru = nn.GRU(6, DIM, batch_first=True)
        self.cell = nn.RNNCell(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.lstm.flatten_parameters()
        self.gru.flatten_parameters()
        lengths = x.size(1) - 2 * (x[:, 0, 0] > 0).long()
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.size(1))
        y, _ = self.gru(y)
        state = torch.zeros_like(y[:, 0])
        return torch.stack([state := self.cell(y[:, step], state) for step in range(y.size(1))], 1)


class Moving(nn.GRU):
    """Does on the CPU what cuDNN does on a GPU: ``flatten_parameters`` moves the weights to memory of their own."""

    def flatten_parameters(self) -> None:
        weights = [w for w in self._flat_weights if isinstance(w, torch.Tensor) and not w.is_meta]
        flat = torch.cat([w.detach().flatten() for w in weights])
        start = 0
        for weight in weights:
            weight.data = flat[start : start + weight.numel()].view(weight.shape)
            start += weight.numel()


class MovingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = Moving(DIM, DIM, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.gru.flatten_parameters()
        return self.gru(x)[0]


BLOCKS = {
    "weight norm, old": old_weight_norm,
    "weight norm": new_weight_norm,
    "spectral norm, old": old_spectral_norm,
    "spectral norm": new_spectral_norm,
    "orthogonal": orthogonal,
    "stacked parametrizations": stacked_parametrizations,
    "hooks and buffers": Hooked,
    "recurrent": Recurrent,
    "weights that move": MovingBlock,
}


def stack(name: str) -> nn.Module:
    return Stack(BLOCKS[name])


class Stacked(Foreign):
    def __init__(self, name: str, **more: Any) -> None:
        super().__init__(build=lambda: stack(name), loss=loss, **more)


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_one_process(ranks, tmp_path, name):
    stages, alone = in_all_stages(ranks, tmp_path, module=Stacked, arguments={"name": name})
    check_equal(stages, alone)
    assert len(stages[-1].notes) == 5
    if name == "hooks and buffers":
        assert alone.weights["model.blocks.2.calls"] == 3


@pytest.mark.parametrize("name", ["weight norm, old", "spectral norm, old", "weight norm"])
def test_computed_weights_are_not_rounded_before_they_are_computed(ranks, tmp_path, name):
    """Lightning's bf16-mixed casts what comes out of the normalisation, not what goes in."""
    arguments, trainer = {"name": name, "optimizer": momentum}, {"precision": "bf16-mixed"}
    stages, alone = in_all_stages(ranks, tmp_path, module=Stacked, arguments=arguments, trainer=trainer)
    check_equal(stages, alone, 5e-4)


def test_weights_that_move_do_so_again_afterwards():
    layer = Moving(DIM, DIM)
    before = layer.weight_hh_l0.data_ptr()
    kept = KeptInPlace(layer)
    layer.flatten_parameters()
    layer.to(torch.float32)
    assert layer.weight_hh_l0.data_ptr() == before
    kept.remove()
    layer.flatten_parameters()
    assert layer.weight_hh_l0.data_ptr() != before


# ---- sparse gradients


class Sparse(nn.Module):
    """An embedding and a bag with sparse gradients, one of them looked up twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM, sparse=True)
        self.bag = nn.EmbeddingBag(VOCAB, DIM, sparse=True)
        self.blocks = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + 0.5 * self.embedding(tokens.roll(1, 1)) + self.bag(tokens)[:, None]
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)


def adagrad(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(module.parameters(), lr=0.1)


@pytest.mark.parametrize("optimizer", [sgd, adagrad])
def test_sparse_gradients(ranks, tmp_path, optimizer):
    stages, alone = in_all_stages(
        ranks, tmp_path, arguments={"build": Sparse, "loss": loss, "optimizer": optimizer}, rows=32
    )
    check_equal(stages, alone)


def test_sparse_gradients_accumulate(ranks, tmp_path):
    arguments = {"build": Sparse, "loss": loss, "optimizer": sgd}
    fit = defaults({"arguments": arguments, "rows": 32, "trainer": {"accumulate_grad_batches": 2}})
    alone = train(Fit(**fit), tmp_path / "alone")
    for each in ranks(2).run(train_all, [Fit({"zero": stage}, 2, **fit) for stage in STAGES], tmp_path / "ranks")[0]:
        assert each.steps == alone.steps == 2
        assert distance(each.weights, alone.weights) < 1e-9


def sparse_adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SparseAdam([module.get_parameter("model.embedding.weight")], lr=0.1)


def bounded() -> nn.Module:
    model = stack("weight norm")
    model.embedding.max_norm = 1.0
    return model


@pytest.mark.parametrize("stage", ["none", "stage3"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"build": Sparse, "optimizer": sparse_adam},
            "SparseAdam steps on sparse gradients only; lit_zero makes the gradients of nn.Embedding(sparse=True) "
            "dense, since they are exchanged in flat buffers. Use SGD or Adagrad, which give the same result on "
            "either, or AdamW.",
        ),
        (
            {"build": bounded},
            "'model.embedding' (Embedding) has max_norm=1.0: its forward writes to its weight, on every rank for the "
            "rows of its own batch, so ranks would train different weights. Leave max_norm out and normalise what it "
            "returns (torch.nn.functional.normalize, or a clamp of the norm).",
        ),
    ],
)
def test_refused(ranks, tmp_path, stage, arguments, words):
    fit = Fit({"zero": stage}, 2, **defaults({"arguments": {"loss": loss, **arguments}}))
    assert ranks(2).run(refused, fit, tmp_path, UnsupportedError) == [words, words]


# ---- the stock modules on top of one another


def encoder_decoder() -> nn.Module:
    return EncoderDecoder(frozen=False)


def frozen_encoder_decoder() -> nn.Module:
    return EncoderDecoder(frozen=True)


class EncoderDecoder(nn.Module):
    """torch's own Transformer: every block of the decoder is given the encoder's output.

    Args:
        frozen: only the norms are trained, so that no block is done when its last gradient has landed.
    """

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.transformer = nn.Transformer(DIM, 2, 3, 5, 20, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(DIM, VOCAB)
        if frozen:
            for name, param in self.named_parameters():
                param.requires_grad_("norm" in name)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        return self.head(self.transformer(x.flip(1), x))


class TwoTowers(nn.Module):
    """Two towers one after the other, mostly frozen: nothing asks for the gradient of the second one's input."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.left, self.right = (nn.ModuleList(self._block() for _ in range(3)) for _ in range(2))
        self.head = nn.Linear(DIM, VOCAB)
        self.embedding.requires_grad_(False)

    @staticmethod
    def _block() -> nn.Module:
        block = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, DIM))
        block[2].requires_grad_(False)
        return block

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, y = self.embedding(tokens), self.embedding(tokens.flip(1))
        for block in self.left:
            x = x + block(x)
        for block in self.right:
            y = y + block(y)
        return self.head(x * y)


@pytest.mark.thorough("2-")
@pytest.mark.parametrize("build", [encoder_decoder, frozen_encoder_decoder, TwoTowers])
@pytest.mark.parametrize("slots", [1, 2])
def test_blocks_that_share_an_input(ranks, tmp_path, build, slots):
    fit = defaults({"arguments": {"build": build, "loss": loss}})
    alone = train(Fit(**fit), tmp_path / "alone")
    zero = {"zero": "stage2"}, {"zero": Zero("stage3", slots=slots, poison=True)}
    stage2, stage3 = ranks(2).run(train_all, [Fit(each, 2, **fit) for each in zero], tmp_path / "ranks")[0]
    check_equal([stage2, stage3], alone)


class Tower(nn.Module):
    """Hands on what every block has made, so that its outputs are outputs of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoTowers._block() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(DIM))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        hidden = [x]
        for block in self.blocks:
            hidden.append(hidden[-1] + block(self.scale * hidden[-1]))
        return hidden


class HiddenStates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.towers = nn.ModuleList(Tower() for _ in range(2))
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        first = self.towers[0](self.embedding(tokens))
        second = self.towers[1](first[-1])
        return self.head(torch.stack([*first, *second]).tanh().sum(0))


@pytest.mark.parametrize("slots", [1, 2])
def test_units_inside_units(ranks, tmp_path, slots):
    """The outputs of a unit are those of the units inside it, whose backward has hardly begun when they are reached."""
    fit = defaults({"arguments": {"build": HiddenStates, "loss": loss}})
    alone = train(Fit(**fit), tmp_path / "alone")
    zero = Zero("stage3", units=["Tower", "Sequential"], slots=slots, poison=True)
    mine = ranks(2).run(train, Fit({"zero": zero}, 2, **fit), tmp_path / "ranks")[0]
    check_equal([mine], alone)
    assert len(mine.notes) == 9
