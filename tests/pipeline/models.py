"""Small models with one difficulty each. Their step takes tokens ``[rows, length]`` and returns the loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, DIM = 17, 8


def on_tokens(model: Any, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, -2), tokens.flatten())


def on_words(model: Any, tokens: Tensor) -> Tensor:
    """For models of Hugging Face."""
    return model(input_ids=tokens, labels=tokens).loss


class Layer(nn.Module):
    """A residual block with dropout."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(F.gelu(self.linear(self.norm(x))))


class Deep(nn.Module):
    """The blocks lie deep; the embedding is registered last; a parameter belongs to no module that is called."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(DIM, VOCAB)
        self.trunk = nn.Module()
        self.trunk.inner = nn.ModuleDict({"stack": nn.ModuleList(Layer() for _ in range(layers))})
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.position = nn.Parameter(torch.randn(16, DIM))
        self.unused = nn.Linear(2, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.position[: tokens.shape[1]]
        for layer in self.trunk.inner["stack"]:
            x = layer(x)
        return self.head(x)


class Encoder(nn.Module):
    """PyTorch's own encoder, with a mask of the batch and one of the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        layer = nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        padding = torch.zeros_like(tokens, dtype=torch.float).masked_fill(tokens == 0, -torch.inf)
        padding[:, 0] = 0
        return self.head(self.encoder(self.embedding(tokens), mask=causal, src_key_padding_mask=padding))


def sequential() -> nn.Module:
    """Embedding, blocks and head are entries of one list."""
    return nn.Sequential(
        nn.Embedding(VOCAB, DIM), *(Layer() for _ in range(4)), nn.LayerNorm(DIM), nn.Linear(DIM, VOCAB)
    )


class Pair(nn.Module):
    """Two streams go in as a tuple and come out as a dictionary, with a mask that goes through unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Layer(), Layer()

    def forward(self, streams: tuple[Tensor, Tensor], *, mask: Tensor) -> dict[str, Any]:
        a, b = streams
        return {"streams": (self.one(a) + b, self.two(b) * mask), "mask": mask, "none": None}


class Pairs(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 2 * DIM)
        self.blocks = nn.ModuleList(Pair() for _ in range(layers))
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        a, b = self.embedding(tokens).chunk(2, -1)
        out = {"streams": (a, b), "mask": (tokens != 3)[..., None]}
        for block in self.blocks:
            out = block(out["streams"], mask=out["mask"])
        a, b = out["streams"]
        return self.head(a + b * out["mask"])


class Conditioned(nn.Module):
    """Every block is given the first hidden state, which one list has made and another uses."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.encoder = nn.ModuleList(Layer() for _ in range(layers))
        self.decoder = nn.ModuleList(Crossed() for _ in range(layers + 1))
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.encoder:
            x = layer(x)
        memory, y = x * 2, self.embedding(tokens.flip(1))
        for layer in self.decoder:
            y = layer(y, memory=memory)
        return self.head(y)


class Crossed(Layer):
    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return super().forward(x) * torch.sigmoid(memory)


class InPlace(nn.Module):
    """Writes in place to what the embedding, a block and the step before a block have made."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList(Overwriting() for _ in range(4))
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x *= 1.5
        for block in self.blocks:
            x = block(x)
            x += 1
        return self.head(x)


class Overwriting(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x *= 0.5
        return super().forward(x)


class Skipping(Deep):
    """The head uses the embedding's output."""

    def forward(self, tokens: Tensor) -> Tensor:
        first = x = self.embedding(tokens)
        for layer in self.trunk.inner["stack"]:
            x = layer(x)
        return self.head(x + first)


class Untied(Deep):
    """The output uses the embedding's weight without being told: no module is shared."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.trunk.inner["stack"]:
            x = layer(x)
        return F.linear(x, self.embedding.weight)


class Noisy(Deep):
    """Draws a random mask from the batch: before the embedding's dropout, and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.frontend = Frontend()

    def forward(self, tokens: Tensor) -> Tensor:
        early = torch.rand(tokens.shape) > 0.2
        x = self.frontend(tokens)
        x = x * early[..., None]
        for layer in self.trunk.inner["stack"]:
            x = layer(x)
        return self.head(x) * early[..., None]


class Frontend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(VOCAB, DIM), nn.Dropout(0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.embedding(tokens))
