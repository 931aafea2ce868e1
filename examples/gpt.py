"""A small GPT in plain torch. Nothing here knows how it is trained."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_zero.core.errors import ConfigError, check_choice
from lit_zero.layers import linear_cross_entropy

# [Note: initial weights are drawn in one place]
# Every module below that owns a parameter draws its final values in its own ``reset_parameters`` and nowhere else. So a
# model that was built without memory (under ``torch.device("meta")``) gets exactly the weights of one built eagerly
# with the same seed, by calling ``reset_parameters`` module by module in the order of ``modules()``.


class Linear(nn.Linear):
    """``nn.Linear`` with a weight from a normal distribution of standard deviation ``std``, and a bias of zero."""

    def __init__(self, in_features: int, out_features: int, bias: bool, std: float) -> None:
        self.std = std  # before the base constructor, which calls reset_parameters
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """``nn.Embedding`` with a weight from a normal distribution of standard deviation ``std``."""

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float) -> None:
        self.std = std  # before the base constructor, which calls reset_parameters
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class TiedHead(nn.Module):
    """The output layer that shares its weight with the token embedding."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight  # [vocab_size, dim]

    def reset_parameters(self) -> None:
        """Draw nothing: the embedding, which owns the weight, has drawn it."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """See ``Head``."""
        return F.linear(x, self.weight) if targets is None else linear_cross_entropy(x, self.weight, targets)


class Head(Linear):
    """The output layer."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits [..., vocab_size] of ``x`` [..., dim], or with ``targets`` [...] the mean cross-entropy, for
        which the logits never stand whole.
        """
        return super().forward(x) if targets is None else linear_cross_entropy(x, self.weight, targets)


class Block(nn.Module):
    """One pre-norm transformer block: causal attention, then a feed-forward layer four times as wide.

    Args:
        dim: width of the residual stream.
        heads: attention heads; must divide ``dim``.
        layers: blocks in the whole model, for the initial scale of the two layers that write to the residual stream.
        dropout: probability of dropping an element of what the two halves add to the residual stream.
        bias: whether the linear layers and the norms have a bias.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3.
    """

    def __init__(self, dim: int, heads: int, layers: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        # 2 * layers terms add up in the residual stream; this keeps their sum at the scale of one.
        residual_std = 0.02 / math.sqrt(2 * layers)
        self.attention_norm = nn.LayerNorm(dim, bias=bias)
        self.attention_in = Linear(dim, 3 * dim, bias, std=0.02)
        self.attention_out = Linear(dim, dim, bias, std=residual_std)
        self.feed_norm = nn.LayerNorm(dim, bias=bias)
        self.feed_in = Linear(dim, 4 * dim, bias, std=0.02)
        self.feed_out = Linear(4 * dim, dim, bias, std=residual_std)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream [B, T, dim] to the next one, of the same shape."""
        x = x + self.dropout(self.attention_out(self._attend(self.attention_norm(x))))
        return x + self.dropout(self.feed_out(F.gelu(self.feed_in(self.feed_norm(x)))))

    def _attend(self, x: Tensor) -> Tensor:
        batch, time, dim = x.shape
        query, key, value = (
            part.view(batch, time, self.heads, dim // self.heads).transpose(1, 2)  # [B, heads, T, dim / heads]
            for part in self.attention_in(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).reshape(batch, time, dim)


class GPT(nn.Module):
    """A decoder-only transformer with learned positions.

    Args:
        vocab_size: number of different tokens.
        block_size: longest sequence, in tokens.
        dim: width of the residual stream.
        layers: number of blocks.
        heads: attention heads per block; must divide ``dim``.
        dropout: dropout probability.
        tied: the output layer shares the token embedding's weight.
        bias: whether linear layers and norms have a bias.
        loss: ``plain`` (of the logits) or ``fused`` (with the output layer: the logits never stand whole).

    Raises:
        ConfigError: for an unknown ``loss``, a size below one, a ``dim`` that ``heads`` does not divide, or a
            ``dropout`` outside [0, 1).
    """

    def __init__(
        self,
        vocab_size: int = 256,
        block_size: int = 128,
        dim: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        tied: bool = True,
        bias: bool = False,
        loss: str = "plain",
    ) -> None:
        super().__init__()
        check_choice("model.loss", loss, ("plain", "fused"))
        sizes = {"vocab_size": vocab_size, "block_size": block_size, "dim": dim, "layers": layers, "heads": heads}
        for key, size in sizes.items():
            if size < 1:
                raise ConfigError(f"model.{key}={size} is not possible: expected a whole number of at least 1.")
        if dim % heads:
            raise ConfigError(f"model.dim={dim} cannot be split over model.heads={heads}: heads must divide dim.")
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"model.dropout={dropout} is not a probability: expected 0 <= dropout < 1.")
        self.block_size, self.loss = block_size, loss
        self.token_embedding = Embedding(vocab_size, dim, std=0.02)
        self.position_embedding = Embedding(block_size, dim, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, layers, dropout, bias) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, bias=bias)
        self.head = TiedHead(self.token_embedding) if tied else Head(dim, vocab_size, bias=False, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits [B, T, vocab_size], or with ``targets`` [B, T] the mean cross-entropy in nats per token.

        Args:
            tokens: token numbers [B, T], with T at most ``block_size``.
            targets: the token that follows each one [B, T].
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))  # [B, T, dim]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if targets is not None and self.loss == "fused":
            return self.head(x, targets)
        logits = self.head(x)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def generate(self, prompt: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Continue ``prompt`` [T]; see the function ``generate``."""
        return generate(self, prompt, max_new_tokens, self.block_size, **options)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Tensor,
    max_new_tokens: int,
    block_size: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Continue ``prompt`` by sampling one token after the other.

    The samples come from a generator of their own, so the global random state is untouched. With sharded parameters
    every rank must call this with the same arguments: each new token is one forward, in which all ranks take part.

    Args:
        model: maps tokens [B, T] to logits [B, T, vocab_size].
        prompt: token numbers [T], with T at least 1.
        max_new_tokens: number of tokens to add.
        block_size: longest sequence that the model takes, in tokens; older ones are forgotten.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among the k most likely tokens only.
        seed: of the samples.

    Returns:
        ``prompt`` followed by the new tokens [T + max_new_tokens].
    """
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    tokens = prompt
    for _ in range(max_new_tokens):
        # Chosen on the CPU, so that one generator serves every device.
        logits = model(tokens[None, -block_size:])[0, -1].float().cpu()  # [vocab_size]
        if temperature == 0:
            chosen = logits.argmax(keepdim=True)
        else:
            if top_k is not None:
                smallest = logits.topk(min(top_k, len(logits))).values[-1]
                logits = logits.masked_fill(logits < smallest, -math.inf)
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, chosen.to(tokens.device)])
    model.train(was_training)
    return tokens
