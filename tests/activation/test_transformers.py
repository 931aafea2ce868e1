"""Models of Hugging Face transformers, as they are, with dropout: bit for bit as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_zero.activation.policy import Activation
from lit_zero.core.errors import LitZeroError
from tests.activation.harness import VARIANTS, gradients, same
from tests.models.harness import Foreign, defaults
from tests.strategy.harness import Short, same_bits, train_all
from tests.zero.harness import tokens

transformers = pytest.importorskip("transformers", reason="pip install lit-zero[models]")

ALONE = {name: policy for name, policy in VARIANTS.items() if name != "partition"}


def gpt2(attention: str = "sdpa", use_cache: bool = False) -> Any:
    sizes = {"n_positions": 16, "n_embd": 12, "n_layer": 3, "n_head": 2}
    config = transformers.GPT2Config(vocab_size=31, bos_token_id=0, eos_token_id=0, use_cache=use_cache, **sizes)
    config._attn_implementation = attention
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    """Its rotary positions are handed to every block."""
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "max_position_embeddings": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_dropout": 0.1}
    config = transformers.LlamaConfig(vocab_size=31, use_cache=False, **sizes, **heads)
    return transformers.LlamaForCausalLM(config)


def t5() -> Any:
    """The first block makes the bias that all others are given; both stacks have blocks."""
    sizes = {"d_model": 12, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(vocab_size=31, decoder_start_token_id=0, use_cache=False, **sizes)
    return transformers.T5ForConditionalGeneration(config)


MODELS = {"gpt2, sdpa": gpt2, "gpt2, eager": lambda: gpt2("eager"), "llama": llama, "t5": t5}


class Loss(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.train()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=rows, labels=rows).loss
        return loss


def found(name: str, policy: Activation | None) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return gradients(Loss(MODELS[name]()), policy, tokens(0))


@pytest.mark.parametrize("name", MODELS)
def test_one_process(name: str) -> None:
    expected = found(name, None)
    for policy in ALONE.values():
        same(found(name, policy), expected)


def on_rows(model: Any, rows: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=rows, labels=rows).loss
    return loss


def test_on_ranks(ranks: Any, tmp_path: Path) -> None:
    fit = defaults({"arguments": {"build": gpt2, "loss": on_rows}, "trainer": {"precision": "32-true"}})
    words = [Activation(), *(VARIANTS[word] for word in ("full", "selective", "offload"))]
    fits = [Short({"zero": "stage3", "activation": word}, 2, **fit) for word in words]
    assert fit["module"] is Foreign
    plain, *others = ranks(2).run(train_all, fits, tmp_path, timeout=120)[0]
    for each in others:
        assert each.rows == plain.rows and same_bits(each.weights, plain.weights)


@pytest.mark.parametrize("variant", ["full", "offload"])
def test_a_cache_that_is_not_read_does_no_harm(variant: str) -> None:
    """GPT2Config(use_cache=True), the default, fills one in training too, and sdpa looks at as much as its mask has."""
    results = []
    for policy in (None, VARIANTS[variant]):
        torch.manual_seed(0)
        results.append(gradients(Loss(gpt2(use_cache=True)), policy, tokens(0)))
    same(*results)


def test_a_cache_that_is_read_is_named() -> None:
    with pytest.raises(LitZeroError, match=r"Block 'model.transformer.h.2' does something else.*use_cache=False"):
        gradients(Loss(gpt2("eager", use_cache=True)), VARIANTS["full"], tokens(0))
