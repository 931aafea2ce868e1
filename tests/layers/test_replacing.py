"""What is known is replaced, proven, and taken off again."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_zero.core.errors import ConfigError, UnsupportedError
from lit_zero.layers import Layers, known, rotary
from lit_zero.layers.replacing import Replacement

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.RMSNorm(8)
        self.second = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.linear(self.first(x)))
        return y


def applied(module: nn.Module, policy: str | Layers = "fused") -> Replacement:
    replacement = Replacement(policy)
    replacement.apply(module, CPU)
    return replacement


def replaced(module: nn.Module) -> list[str]:
    return [name for name, each in module.named_modules() if "forward" in vars(each)]


def test_names_parameters_and_classes_stay_and_all_is_undone() -> None:
    model = Model()
    before = [(name, type(each), dict(vars(each))) for name, each in model.named_modules()]
    params = {name: id(param) for name, param in model.named_parameters()}
    x = torch.randn(3, 8)
    expected = model(x)
    replacement = applied(model)
    assert replaced(model) == ["first", "second"]
    assert {name: id(param) for name, param in model.named_parameters()} == params
    assert [type(each) for each in model.modules()] == [kind for _, kind, _ in before]
    torch.testing.assert_close(model(x), expected)
    replacement.restore()
    assert [(name, type(each), dict(vars(each))) for name, each in model.named_modules()] == before


def test_plain_does_nothing() -> None:
    model = Model()
    assert applied(model, "plain").check_fit(model) == {} and replaced(model) == []


def test_hooks_still_run() -> None:
    model, seen = Model(), []
    model.first.register_forward_hook(lambda *_: seen.append("hook"))
    applied(model)
    model(torch.randn(1, 8))
    assert seen == ["hook"]


def test_twice_is_once() -> None:
    model = Model()
    replacement = applied(model)
    replacement.apply(model, CPU)
    assert replaced(model) == ["first", "second"]
    replacement.restore()
    assert replaced(model) == []


def test_what_another_strategy_has_left_is_replaced_anew() -> None:
    model = Model()
    applied(model)
    applied(model, Layers("fused", ["norms"])).restore()
    assert replaced(model) == []


def test_copies_work_by_themselves() -> None:
    model = Model()
    applied(model)
    twin = copy.deepcopy(model)
    nn.init.constant_(twin.first.weight, 2.0)
    x = torch.randn(2, 8)
    torch.testing.assert_close(twin.first(x), 2 * model.first(x))
    loaded = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(loaded(x), model(x))
    applied(loaded)
    torch.testing.assert_close(loaded(x), model(x))


def test_a_model_on_the_meta_device_can_be_checked() -> None:
    with torch.device("meta"):
        model = Model()
    assert Replacement("fused").check_fit(model) == {"norms": ["first", "second"], "feed_forwards": [], "rotary": []}


def test_nothing_known_is_an_error() -> None:
    with pytest.raises(ConfigError) as error:
        applied(nn.Sequential(nn.Linear(2, 2)))
    for words in (
        "layers.variant='fused' has no effect on norms, feed_forwards, rotary",
        "Sequential has none of what",
    ):
        assert words in str(error.value)
    for words in ("torch.nn.RMSNorm", "gate_proj", "apply_rotary_pos_emb", "Remove layers=fused", "lit_zero.layers"):
        assert words in str(error.value)


def test_a_kind_that_is_named_must_be_there() -> None:
    applied(Model(), Layers("fused", ["norms"])).restore()
    with pytest.raises(ConfigError, match="has no effect on rotary: Model has none.*Remove them from layers.replace"):
        applied(Model(), Layers("fused", ["norms", "rotary"]))


def test_a_compiled_part_is_refused() -> None:
    model = Model()
    model.linear._compiled_call_impl = len  # as model.linear.compile() leaves it; the compiler takes long to import
    with pytest.raises(UnsupportedError, match="does not go with torch.compile: 'linear' is compiled"):
        applied(model)


def test_a_model_for_which_it_saves_nothing_is_told() -> None:
    with pytest.warns(UserWarning, match="layers=fused on a CPU: all that Sequential has of what is known is torch.nn"):
        applied(nn.Sequential(nn.LayerNorm(4)))


# ---- other people's classes, as this file writes them


class RMSNorm(nn.Module):
    """Of no library."""

    def __init__(self, width: int = 8, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.scaled(x)

    def scaled(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class ShiftedRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return (1.0 + self.weight) * self.scaled(x)


class ChoosingRMSNorm(RMSNorm):
    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if self.twice else 1)


class EpsOutsideRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class TwofoldRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class GatedRMSNorm(RMSNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate


class MLP(nn.Module):
    def __init__(self, act_fn: Any = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = act_fn or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class DroppingMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(F.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x), 0.5, self.training))
        return y


class SwappedMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))
        return y


class NewGELUActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class FastGELUActivation(nn.Module):
    """By its name; not by what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (RMSNorm(), True),
        (ShiftedRMSNorm(), True),
        (EpsOutsideRMSNorm(), False),
        (TwofoldRMSNorm(), False),
        (GatedRMSNorm(), False),
        (MLP(), True),
        (MLP(nn.GELU()), True),
        (MLP(nn.GELU("tanh")), True),
        (MLP(nn.ReLU()), False),
        (DroppingMLP(), False),
        (SwappedMLP(), False),
        (NewGELUActivation(), True),
        (FastGELUActivation(), False),
    ],
    ids=lambda value: str(value).split("(")[0],
)
def test_a_class_is_replaced_where_it_computes_the_same(module: nn.Module, known: bool) -> None:
    model = nn.Sequential(nn.RMSNorm(8), module)
    x = torch.randn(3, 8)
    state = torch.get_rng_state()
    expected = model(x) if known else None
    applied(model)
    assert torch.equal(torch.get_rng_state(), state) or not known
    assert ("1" in replaced(model)) == known
    if known:
        torch.testing.assert_close(model(x), expected)


def test_instances_of_a_class_may_differ() -> None:
    model = nn.Sequential(ChoosingRMSNorm(True), ChoosingRMSNorm(False))
    applied(model)
    assert replaced(model) == ["1"]


def test_the_default_dtype_does_not_matter() -> None:
    model = nn.Sequential(RMSNorm(), MLP(), NewGELUActivation())
    torch.set_default_dtype(torch.bfloat16)
    try:
        applied(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert replaced(model) == ["0", "1", "2"]


class FlaggedRMSNorm(RMSNorm):
    """One class of two kinds of weights."""

    def __init__(self, plus: bool) -> None:
        super().__init__()
        self.plus = plus

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight + self.plus) * self.scaled(x)


class RatedMLP(MLP):
    """Drops as many as its instance says."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), self.rate, self.training)


class LearnedSwish(nn.Module):
    """A SiLU until it has learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


@pytest.mark.parametrize(
    ("modules", "known"),
    [
        ([MLP(), MLP(nn.GELU()), MLP(nn.ReLU())], [True, True, False]),
        ([FlaggedRMSNorm(False), FlaggedRMSNorm(True)], [True, True]),
        ([RatedMLP(0.0), RatedMLP(0.9)], [True, False]),
        ([MLP(), MLP(LearnedSwish())], [True, False]),
    ],
)
def test_two_of_one_class_may_differ(modules: list[nn.Module], known: list[bool]) -> None:
    model, x = nn.ModuleList(modules), torch.randn(3, 8)
    expected = [each.eval()(x) for each in modules]
    applied(model.train())
    assert [name for name, each in model.named_children() if name in replaced(model)] == [
        str(number) for number, is_known in enumerate(known) if is_known
    ]
    for each, right in zip(model.eval(), expected, strict=True):
        torch.testing.assert_close(each(x), right)


class NamedRMSNorm(RMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        return self.weight * self.scaled(hidden_states)


class ResidualRMSNorm(RMSNorm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.weight * self.scaled(x if residual is None else x + residual)


class NamedMLP(MLP):
    def forward(self, hidden_state: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_state)


class NamedGELUTanh(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh")


NamedGELUTanh.__name__ = "GELUTanh"


@pytest.mark.parametrize(
    ("module", "name"),
    [(NamedRMSNorm(), "hidden_states"), (NamedMLP(), "hidden_state"), (NamedGELUTanh(), "input"), (MLP(), "x")],
)
def test_arguments_keep_their_names(module: nn.Module, name: str) -> None:
    model, x = nn.Sequential(module), torch.randn(3, 8)
    expected = module(x)
    applied(model)
    assert replaced(model) == ["0"]
    torch.testing.assert_close(module(**{name: x}), expected)
    torch.testing.assert_close(module(x), expected)
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        module(y=x)
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        module(x, x)


def test_a_class_that_takes_more_is_left_alone() -> None:
    model, x = nn.Sequential(nn.RMSNorm(8), ResidualRMSNorm()), torch.randn(3, 8)
    expected = model[1](x, residual=x)
    applied(model)
    assert replaced(model) == ["0"]
    torch.testing.assert_close(model[1](x, residual=x), expected)


class ForgetfulRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Any:
        return None


class PairedRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), super().forward(x)


class HalvedRMSNorm(RMSNorm):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x).half()


@pytest.mark.parametrize("kind", [ForgetfulRMSNorm, PairedRMSNorm, HalvedRMSNorm])
def test_a_class_of_strange_results_is_left_alone(kind: type[RMSNorm]) -> None:
    model = nn.Sequential(nn.RMSNorm(8), kind())
    applied(model)
    assert replaced(model) == ["0"]


@pytest.mark.parametrize("of_up", [torch.float32, torch.bfloat16])
def test_projections_of_two_dtypes(of_up: torch.dtype) -> None:
    """What the class makes of them is its own affair; projections are computed once."""
    model, x, calls = nn.Sequential(MLP()), torch.randn(3, 8), []

    class Casting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(self)
            return super().forward(x.to(self.weight.dtype))

    model[0].up_proj = Casting(8, 12).to(of_up)
    expected = model(x)
    expected.sum().backward()
    right = [param.grad.clone() for param in model.parameters()]
    applied(model.zero_grad() or model)
    calls.clear()
    found = model(x)
    found.sum().backward()
    assert replaced(model) == ["0"] and len(calls) == 1
    torch.testing.assert_close(found, expected)
    for param, grad in zip(model.parameters(), right, strict=True):
        torch.testing.assert_close(param.grad, grad)


# ---- attention, as this file writes it


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Turn as much of a head as there are angles."""
    cos, sin, width = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim), cos.shape[-1]

    def turned(x: Tensor) -> Tensor:
        x, rest = x[..., :width], x[..., width:]
        half = torch.cat((-x[..., width // 2 :], x[..., : width // 2]), -1)
        return torch.cat((x * cos + half * sin, rest), -1)

    return turned(q), turned(k)


class Attention(nn.Module):
    def forward(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = apply_rotary_pos_emb(q, q[:, :1], cos, sin)
        return (q * k).sum(-1)


class BrokenAttention(nn.Module):
    forward = types.FunctionType(
        Attention.forward.__code__,
        {"apply_rotary_pos_emb": lambda q, k, cos, sin, unsqueeze_dim=1: q.no_such_thing},
    )


@pytest.mark.parametrize(
    ("shape", "learns", "fused"),
    [((2, 5, 8), False, True), ((1, 5, 8), False, True), ((2, 5, 4), False, False), ((2, 5, 8), True, False)],
)
def test_heads_that_turn_in_part_and_angles_that_learn(
    shape: tuple[int, ...], learns: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, used = nn.Sequential(Attention()), []
    monkeypatch.setattr(known, "rotary", lambda *args: used.append(args) or rotary(*args))
    q = torch.randn(2, 3, 5, 8)
    cos, sin = (torch.randn(shape, requires_grad=learns) for _ in range(2))
    expected = model[0](q, cos, sin)
    applied(model)
    used.clear()
    assert replaced(model) == ["0"]
    torch.testing.assert_close(model[0](q, cos, sin), expected)
    assert bool(used) == fused
    if learns:
        model[0](q, cos, sin).sum().backward()
        assert cos.grad is not None and cos.grad.any()


def test_a_function_that_fails_on_numbers_is_left_alone() -> None:
    model = nn.Sequential(nn.RMSNorm(8), BrokenAttention())
    applied(model)
    assert replaced(model) == ["0"]


def test_random_states_are_left_alone() -> None:
    model = nn.Sequential(RMSNorm(), DroppingMLP())
    state = torch.get_rng_state()
    applied(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16])
def test_dtypes_are_those_of_the_original(of_x: torch.dtype, of_weight: torch.dtype) -> None:
    model = nn.Sequential(RMSNorm().to(of_weight), nn.Identity())
    x = torch.randn(2, 8).to(of_x)
    expected = model(x)
    applied(model)
    assert model(x).dtype == expected.dtype
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)


# ---- Hugging Face


def bytes_saved(model: Any, tokens: Tensor) -> tuple[int, Tensor]:
    """Return the bytes of distinct tensors that a forward saves, without parameters, and the loss."""
    params = {param.untyped_storage().data_ptr() for param in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in params:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=tokens, labels=tokens).loss
    return sum(saved.values()), loss


SIZES = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def family(name: str) -> Any:
    transformers = pytest.importorskip("transformers", reason="pip install lit-zero[models]")
    torch.manual_seed(0)
    if name == "GPT2LMHeadModel":
        config = transformers.GPT2Config(vocab_size=31, n_positions=32, n_embd=16, n_layer=2, n_head=4, use_cache=False)
    else:
        kind = getattr(transformers, name.replace("ForCausalLM", "Config"))
        config = kind(vocab_size=31, use_cache=False, **SIZES, **HEADS, pad_token_id=0, head_dim=4)
    model = getattr(transformers, name)(config).eval()
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    return model


def gradients(model: nn.Module, loss: Tensor) -> Iterator[tuple[str, Tensor | None]]:
    model.zero_grad()
    loss.backward()
    return ((name, param.grad) for name, param in model.named_parameters())


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("LlamaForCausalLM", (5, 2, 2)),
        ("MistralForCausalLM", (5, 2, 2)),
        ("Qwen2ForCausalLM", (5, 2, 2)),
        ("GemmaForCausalLM", (5, 4, 2)),  # its activation, and what contains it
        ("GPT2LMHeadModel", (5, 2, 0)),
    ],
)
def test_models_train_the_same_and_save_less(name: str, counts: tuple[int, int, int]) -> None:
    model = family(name)
    tokens = torch.randint(31, (2, 24), generator=torch.Generator().manual_seed(1))
    plain, loss = bytes_saved(model, tokens)
    expected = {key: None if g is None else g.clone() for key, g in gradients(model, loss)}
    replacement = applied(model)
    assert tuple(len(names) for names in replacement.check_fit(model).values()) == counts
    fused, again = bytes_saved(model, tokens)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-5)
    for key, grad in gradients(model, again):
        torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    assert fused < 0.8 * plain
    replacement.restore()
    torch.testing.assert_close(bytes_saved(model, tokens)[0], plain)
