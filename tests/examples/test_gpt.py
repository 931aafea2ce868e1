"""The model: its size, its initial weights with and without memory, and what it generates."""

from __future__ import annotations

import math

import pytest
import torch
from gpt import GPT
from torch import nn

from lit_zero.core.errors import ConfigError

SMALL = {"vocab_size": 19, "block_size": 8, "dim": 12, "layers": 2, "heads": 3}


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_parameter_count(bias: bool) -> None:
    vocab, block, dim, layers = 19, 8, 12, 2
    norms = (2 * layers + 1) * dim
    matrices = layers * 12 * dim * dim
    biases = layers * 9 * dim + norms if bias else 0  # 3 + 1 + 4 + 1 times dim per block, and one per norm element
    tied = vocab * dim + block * dim + norms + matrices + biases
    assert count(GPT(**SMALL, tied=True, bias=bias)) == tied
    assert count(GPT(**SMALL, tied=False, bias=bias)) == tied + vocab * dim


def test_tied_weight_is_one_tensor_under_two_names() -> None:
    model = GPT(**SMALL, tied=True)
    assert model.head.weight is model.token_embedding.weight
    assert {"head.weight", "token_embedding.weight"} <= model.state_dict().keys()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_deferred_initialisation_gives_the_eager_weights(tied: bool, bias: bool) -> None:
    torch.manual_seed(5)
    eager = GPT(**SMALL, tied=tied, bias=bias)
    after_eager = torch.rand(1)

    with torch.device("meta"):
        deferred = GPT(**SMALL, tied=tied, bias=bias)
    places: dict[nn.Parameter, nn.Parameter] = {}
    torch.manual_seed(5)
    for module in deferred.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            places.setdefault(parameter, nn.Parameter(torch.empty(parameter.shape)))
            setattr(module, name, places[parameter])
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    assert torch.equal(after_eager, torch.rand(1))  # as many random numbers were drawn
    for name, value in eager.state_dict().items():
        assert torch.equal(value, deferred.state_dict()[name]), name


def test_every_parameter_belongs_to_a_module_that_can_initialise_it() -> None:
    for module in GPT(**SMALL, bias=True).modules():
        if list(module.parameters(recurse=False)):
            assert callable(getattr(module, "reset_parameters", None)), module


def test_initial_scale() -> None:
    model = GPT(vocab_size=64, block_size=8, dim=128, layers=8, heads=4).requires_grad_(False)
    block = model.blocks[0]
    assert float(block.feed_in.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(block.feed_out.weight.std()) == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
    tokens = torch.randint(64, (4, 9))
    assert float(model(tokens[:, :-1], tokens[:, 1:])) == pytest.approx(math.log(64), rel=0.05)


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model = GPT(**SMALL)
    tokens, targets = torch.randint(19, (2, 8)), torch.randint(19, (2, 8))
    expected = -model(tokens).log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(model(tokens, targets), expected)


def test_no_token_sees_a_later_one() -> None:
    model = GPT(**SMALL)
    tokens = torch.randint(19, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 19
    before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:5], after[:5])
    assert not torch.allclose(before[5:], after[5:])


def test_generate_is_deterministic_and_leaves_the_random_state_alone() -> None:
    model = GPT(**SMALL, dropout=0.5)
    prompt = torch.tensor([3, 4])
    state = torch.get_rng_state()
    first = model.generate(prompt, 12, temperature=0.9, top_k=7, seed=1)
    assert torch.equal(first, model.generate(prompt, 12, temperature=0.9, top_k=7, seed=1))
    assert not torch.equal(first, model.generate(prompt, 12, temperature=0.9, top_k=7, seed=2))
    assert first.shape == (14,)  # longer than block_size = 8
    assert torch.equal(first[:2], prompt)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training


def test_generate_without_temperature_and_with_one_candidate_take_the_most_likely() -> None:
    model = GPT(**SMALL)
    prompt = torch.tensor([3])
    greedy = model.generate(prompt, 5, temperature=0)
    assert int(greedy[1]) == int(model(prompt[None])[0, -1].argmax())
    assert torch.equal(greedy, model.generate(prompt, 5, temperature=1.0, top_k=1))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"heads": 5}, "model.dim=12 cannot be split over model.heads=5: heads must divide dim."),
        ({"layers": 0}, "model.layers=0 is not possible: expected a whole number of at least 1."),
        ({"dropout": 1.0}, "model.dropout=1.0 is not a probability: expected 0 <= dropout < 1."),
    ],
)
def test_impossible_sizes_are_refused(changed: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GPT(**{**SMALL, **changed})
    assert str(caught.value) == words
