"""Modules to build models with: parameters, state dicts and results of torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_zero.core.errors import ConfigError
from lit_zero.layers import GEGLU, LayerNorm, LinearCrossEntropy, RMSNorm, SwiGLU


@pytest.mark.parametrize(
    ("ours", "stock"),
    [
        (LayerNorm((3, 8)), nn.LayerNorm((3, 8))),
        (LayerNorm(8, eps=1e-3, bias=False), nn.LayerNorm(8, eps=1e-3, bias=False)),
        (LayerNorm(8, elementwise_affine=False), nn.LayerNorm(8, elementwise_affine=False)),
        (RMSNorm(8), nn.RMSNorm(8)),
        (RMSNorm((3, 8), eps=1e-3), nn.RMSNorm((3, 8), eps=1e-3)),
        (RMSNorm(8, elementwise_affine=False), nn.RMSNorm(8, elementwise_affine=False)),
    ],
    ids=str,
)
def test_norms_are_torchs(ours: nn.Module, stock: nn.Module) -> None:
    for param in stock.parameters():
        nn.init.normal_(param)
    ours.load_state_dict(stock.state_dict())
    assert list(ours.state_dict()) == list(stock.state_dict())
    results = []
    for module in (ours, stock):
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("layer", "activation"),
    [
        (SwiGLU(4, 6), F.silu),
        (SwiGLU(4, 6, bias=True), F.silu),
        (GEGLU(4, 6), F.gelu),
        (GEGLU(4, 6, activation="gelu_tanh"), lambda x: F.gelu(x, approximate="tanh")),
    ],
)
def test_gated_layers(layer, activation) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(layer(x), layer.down_proj(activation(layer.gate_proj(x)) * layer.up_proj(x)))
    assert {name.split(".")[0] for name in layer.state_dict()} == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.thorough
def test_compiled() -> None:
    """Norms and gated layers without a break in the graph; the loss runs as it is."""
    x, targets = torch.randn(5, 8), torch.tensor([1, 2, 0, 3, 8])
    for layer in (LayerNorm(8), RMSNorm(8), SwiGLU(8, 12)):
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
    head = LinearCrossEntropy(8, 9)
    torch.testing.assert_close(torch.compile(head, backend="eager")(x, targets), head(x, targets))


def test_an_unknown_activation() -> None:
    with pytest.raises(ConfigError, match="activation='relu' is not known.*Choose one of: silu, gelu, gelu_tanh"):
        SwiGLU(4, 6, activation="relu")


def test_linear_cross_entropy_is_a_linear_layer_with_a_loss() -> None:
    layer, stock = LinearCrossEntropy(4, 9, bias=True, label_smoothing=0.1, ignore_index=2), nn.Linear(4, 9)
    layer.load_state_dict(stock.state_dict())
    x, targets = torch.randn(2, 3, 4), torch.tensor([[0, 8, 2], [3, 2, 5]])
    assert torch.equal(layer(x), stock(x))
    expected = F.cross_entropy(stock(x).flatten(0, 1), targets.flatten(), label_smoothing=0.1, ignore_index=2)
    torch.testing.assert_close(layer(x, targets), expected)
    assert LinearCrossEntropy(4, 9, reduction="none")(x, targets).shape == (2, 3)


def test_linear_cross_entropy_with_the_weight_of_an_embedding() -> None:
    embedding, layer = nn.Embedding(9, 4), LinearCrossEntropy(4, 9)
    layer.weight = embedding.weight
    tokens, targets = torch.tensor([1, 2]), torch.tensor([2, 3])
    layer(embedding(tokens), targets).backward()
    found, embedding.weight.grad = embedding.weight.grad, None
    F.cross_entropy(F.linear(embedding(tokens), embedding.weight), targets).backward()
    torch.testing.assert_close(found, embedding.weight.grad)
