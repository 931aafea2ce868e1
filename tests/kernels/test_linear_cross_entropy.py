"""Linear cross-entropy: equal to torch's over whole logits, with every gradient by name, and without the logits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmark_worker import TensorMemory
from lit_zero.kernels.cross_entropy import losses_
from lit_zero.kernels.linear_cross_entropy import linear_cross_entropy, plain
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.layer_checks import (
    DTYPES,
    TOLERANCE,
    compare,
    doubled,
    gradients,
    numbers,
    poisoned,
    used,
)

SETTINGS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "z_loss": 1e-2},
    {"ignore_index": 2, "label_smoothing": 1.0, "z_loss": 1e-2},
    {"reduction": "none", "label_smoothing": 0.3, "ignore_index": 0},
]


def problem(rows=7, dim=5, vocabulary=11, dtype=torch.float64, device="cpu", bias=True):
    """Return inputs by name, and targets of which some are to be ignored."""
    inputs = {
        "hidden": numbers(rows, dim, dtype=dtype, device=device),
        "weight": numbers(vocabulary, dim, dtype=dtype, device=device, seed=1),
    }
    if bias:
        inputs["bias"] = numbers(vocabulary, dtype=dtype, device=device, seed=2)
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(3))
    targets[1::3] = -100
    return inputs, targets.to(device)


def both(inputs, targets, tolerance, what="", rows=3, **settings):
    """Compare ours, in chunks of some rows, with torch's in float64."""
    settings = dict(settings)
    if settings.get("ignore_index", -100) != -100:
        targets = torch.where(targets == -100, settings["ignore_index"], targets)
    with poisoned():
        found = gradients(lambda **t: linear_cross_entropy(targets=targets, rows=rows, **t, **settings), **inputs)
    expected = gradients(lambda **t: plain(targets=targets, **t, **settings), **doubled(inputs))
    compare(found, expected, tolerance, what)
    return found


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_whole_logits_in_float64(settings):
    for size, bias in (({}, True), ({"rows": 1, "dim": 1, "vocabulary": 3}, False), ({"rows": 8}, False)):
        found = both(*problem(**size, bias=bias), 1e-12, str(size), **settings)
        assert found["result"].dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_whole_logits_in_small_dtypes(dtype):
    for settings in SETTINGS[:3]:
        found = both(*problem(63, 60, 1000, dtype), TOLERANCE[dtype], str(settings), rows=20, **settings)
        assert (found["result"].dtype, found["gradient of weight"].dtype) == (torch.float32, dtype)


def test_chunks_change_nothing_but_the_last_bits():
    inputs, targets = problem(60, 8, 50)
    one, *others = (both(inputs, targets, 1e-12, rows=rows) for rows in (None, 1, 7, 60, 1000))
    for other in others:
        compare(other, one, 1e-13)


def test_rows_of_several_dimensions():
    inputs, targets = problem(12)
    inputs["hidden"], targets = inputs["hidden"].unflatten(0, (3, 4)), targets.view(3, 4)
    for reduction in ("mean", "none"):
        found = both(inputs, targets, 1e-12, reduction=reduction)
        assert found["result"].shape == (targets.shape if reduction == "none" else ())
        assert found["gradient of hidden"].shape == (3, 4, 5)


@pytest.mark.parametrize(
    "settings", [{}, {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.1}], ids=str
)
def test_with_every_target_ignored_as_torch(settings):
    inputs, targets = problem()
    targets.fill_(-100)
    found = gradients(lambda **t: linear_cross_entropy(targets=targets, **t, **settings), **inputs)
    expected = gradients(lambda **t: plain(targets=targets, **t, **settings), **inputs)
    assert bool(found["result"].isnan().all()) == (settings.get("reduction", "mean") == "mean")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def test_no_rows_as_torch():
    weight, hidden = torch.randn(5, 3, requires_grad=True), torch.randn(0, 3, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.int64))
    assert loss.isnan()
    loss.backward()
    assert hidden.grad.shape == (0, 3) and torch.equal(weight.grad, torch.zeros(5, 3))


def test_a_second_backward_of_a_kept_graph():
    inputs, targets = problem()
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    loss = linear_cross_entropy(targets=targets, **leaves)
    first = torch.autograd.grad(3 * loss, list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(3 * loss, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_gradient_of_a_gradient_is_refused():
    inputs, targets = problem()
    hidden = inputs["hidden"].detach().requires_grad_()
    for reduction in ("sum", "none"):
        loss = linear_cross_entropy(hidden, inputs["weight"], targets, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="fused layers and losses have no second derivative"):
            torch.autograd.grad(loss, hidden, create_graph=True)


def test_a_loss_scale_that_float16_cannot_hold():
    """A mean over many rows times 2 ** 17: small gradients survive, and the factor does not overflow."""
    inputs, targets = problem(300, 16, 40, torch.float16)
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    (linear_cross_entropy(targets=targets, **leaves) * 2**17).backward()
    right = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    (plain(targets=targets, **right) * 2**17).backward()
    for name, leaf in leaves.items():
        difference = (leaf.grad.double() - right[name].grad).norm() / right[name].grad.norm()
        assert difference < 4e-3, name


def test_sums_that_float16_cannot_hold():
    """Rows of one target, whose gradients for the weight all point the same way."""
    check_long_sums("cpu")


def check_long_sums(device):
    hidden, weight = torch.full((4096, 4), 32.0), torch.zeros(9, 4)
    weight[0] = 64.0
    leaves = [t.to(device, torch.float16).requires_grad_() for t in (hidden, weight)]
    targets = torch.ones(4096, dtype=torch.int64, device=device)
    linear_cross_entropy(*leaves, targets, rows=4096).backward()
    right = [t.detach().double().requires_grad_() for t in leaves]
    plain(*right, targets).backward()
    for leaf, expected in zip(leaves, right, strict=True):
        torch.testing.assert_close(leaf.grad.double(), expected.grad, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inside_a_checkpoint(reentrant, reduction):
    inputs, targets = problem()

    def loss(hidden, weight, bias):
        run = lambda h, w, b: linear_cross_entropy(h, w, targets, b, reduction=reduction, rows=3)  # noqa: E731
        return checkpoint(run, hidden, weight, bias, use_reentrant=reentrant)

    expected = gradients(lambda **t: plain(targets=targets, reduction=reduction, **t), **inputs)
    compare(gradients(loss, **inputs), expected, 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_follows_torchs(reduction):
    inputs, targets = problem(63, 60, 200, torch.float32)
    found, stock, right = {}, {}, {}
    for into, function in ((found, linear_cross_entropy), (stock, plain)):
        with torch.autocast("cpu", torch.bfloat16):
            into |= gradients(lambda f=function, **t: f(targets=targets, reduction=reduction, **t), **inputs)
    right = gradients(lambda **t: plain(targets=targets, reduction=reduction, **t), **doubled(inputs))
    for name, value in found.items():
        assert value.dtype == stock[name].dtype == torch.float32
        error, torchs = ((each[name].double() - right[name]).norm() for each in (found, stock))
        assert error < 1.1 * torchs + 1e-6, name


def test_a_weight_that_is_used_twice():
    """An embedding's, as in a model with tied weights."""
    inputs, targets = problem(vocabulary=11, bias=False)
    tokens = torch.arange(7)

    def run(function, hidden, weight):
        return function(hidden + F.embedding(tokens, weight), weight, targets) + function(hidden, weight, targets)

    found, expected = (gradients(lambda f=f, **t: run(f, **t), **inputs) for f in (linear_cross_entropy, plain))
    compare(found, expected, 1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_costs_nothing(frozen, reduction):
    """Counted by matrix products: the logits, and one for each gradient that is wanted."""
    inputs, targets = problem()
    leaves = {name: value.detach().requires_grad_(name != frozen) for name, value in inputs.items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        linear_cross_entropy(targets=targets, reduction=reduction, **leaves).sum().backward()
    again = reduction == "none"  # the logits are computed once more
    products = sum(
        event.count for event in profile.key_averages() if event.key in ("aten::addmm", "aten::addmm_", "aten::mm")
    )
    assert products == 1 + again + sum(name != frozen for name in ("hidden", "weight"))
    assert leaves[frozen].grad is None and all(leaf.grad is not None for n, leaf in leaves.items() if n != frozen)


def test_an_evaluation_computes_no_gradient():
    inputs, targets = problem()
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = linear_cross_entropy(targets=targets, **leaves)
    assert not loss.requires_grad
    names = {event.key for event in profile.key_averages()}
    assert "aten::addmm" in names and not names & {"aten::addmm_", "aten::mm", "aten::scatter_add_"}


def peaks(function, count: int, dim: int, vocabulary: int, **options: Any) -> tuple[int, int]:
    """Return the peak of live tensor bytes of a forward and backward beyond what stood before, and the gradients'."""
    with TensorMemory() as memory:
        hidden, weight = (torch.randn(size, dim, requires_grad=True) for size in (count, vocabulary))
        targets = torch.randint(vocabulary, (count,))
        before = memory.peak = memory.living()
        function(hidden, weight, targets, **options).backward()
    return memory.peak - before, hidden.nbytes + weight.nbytes


def test_logits_never_stand_whole():
    rows, dim, vocabulary, chunk = 512, 16, 1000, 64
    logits = rows * vocabulary * 4
    whole, results = peaks(plain, rows, dim, vocabulary)
    assert whole > 3 * logits
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 1e-3}):
        peak, _ = peaks(linear_cross_entropy, rows, dim, vocabulary, rows=chunk, **options)
        # the two gradients, one chunk of logits, and some numbers for each row
        assert peak < results + chunk * vocabulary * 4 + 20 * rows * 8


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"weight": torch.ones(3, 4)},
            ValueError,
            r"hidden is \[7, 5\] and weight \[3, 4\]: expected \[..., dim\] and",
        ),
        (
            {"targets": torch.zeros(6, dtype=torch.int64)},
            ValueError,
            r"targets are torch.int64 \[6\]: expected one class",
        ),
        ({"targets": torch.zeros(7)}, ValueError, r"targets are torch.float32 \[7\]: expected one class, torch.int64"),
        ({"bias": torch.ones(3)}, ValueError, r"bias is \[3\]: expected one number for each of 11 classes"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing=2.0 is not valid: expected a number from 0 to 1"),
        ({"reduction": "avg"}, ValueError, "reduction='avg' is not known. Choose one of: mean, sum, none"),
        ({"rows": 0}, ValueError, "rows=0 is not valid: expected a whole number of at least 1"),
        (
            {"weight": torch.ones(11, 5)},
            ValueError,
            "hidden is torch.float64 and weight is torch.float32: expected one",
        ),
        ({"targets": torch.full((7,), 11)}, IndexError, "Targets reach from 11 to 11: expected 0 to 10"),
        ({"targets": torch.full((7,), -1)}, IndexError, "Targets reach from -1 to -1: expected 0 to 10"),
    ],
)
def test_what_does_not_fit(change, error, words):
    inputs, targets = problem()
    with pytest.raises(error, match=words):
        linear_cross_entropy(**{**inputs, "targets": targets, **change})


# ---- the kernel


def check_rows(device, sizes, dtypes):
    for (rows, width), dtype, scaled in itertools.product(sizes, dtypes, (False, True)):
        logits = 3 * numbers(rows, width, dtype=dtype, device=device)
        targets = torch.arange(rows, device=device) % width
        targets[rows // 2] = -100
        scale = torch.linspace(0.5, 2, rows, device=device) if scaled else torch.ones(1, device=device)
        for settings in ((-100, 0.0, 0.0), (-100, 0.1, 1e-2)):
            given = logits.clone() if scaled else logits.new_zeros(rows, width + 5)[:, :width].copy_(logits)
            losses = losses_(given, targets, *settings, scale)
            leaf = logits.double().requires_grad_()
            right = losses_of(leaf, targets, settings)
            (right * scale.double()).sum().backward()
            what = f"{rows} x {width}, {dtype}, {settings}"
            compare(
                {"losses": losses, "gradient": given},
                {"losses": right.detach(), "gradient": leaf.grad},
                TOLERANCE[dtype],
                what,
            )
            given = logits.clone()
            assert torch.equal(losses_(given, targets, *settings, None), losses), what
    assert used("triton_cross_entropy")


def losses_of(logits: Tensor, targets: Tensor, settings: tuple[int, float, float]) -> Tensor:
    ignore_index, smoothing, z_loss = settings
    losses = F.cross_entropy(logits, targets, ignore_index=ignore_index, label_smoothing=smoothing, reduction="none")
    return losses + torch.where(targets != ignore_index, z_loss * logits.logsumexp(1).square(), 0.0)


def check_infinite_logits(device):
    logits = torch.full((2, 5000), -math.inf, device=device)
    logits[:, -1] = 2.0
    losses = losses_(logits, torch.tensor([4999, 3], device=device), -100, 0.0, 0.0, torch.ones(1, device=device))
    assert losses.tolist() == [0.0, math.inf]
    assert logits[0].tolist() == [0.0] * 5000
    logits = torch.tensor([[0.0, math.nan]], device=device)
    assert losses_(logits, torch.tensor([0], device=device), -100, 0.0, 0.0, None).isnan().all()


def check_whole(device, dtypes):
    for dtype, settings in itertools.product(dtypes, SETTINGS[:3]):
        both(*problem(10, 9, 63, dtype, device), TOLERANCE[dtype], f"{dtype}, {settings}", rows=4, **settings)
    assert used("triton_cross_entropy")


def test_kernels(interpreted):
    check_rows("cpu", [(3, 63)], DTYPES)
    check_rows("cpu", [(1, 1), (2, 4099)], [torch.float32])
    check_infinite_logits("cpu")
    check_whole("cpu", [torch.float32])


def test_the_reference_on_infinite_logits():
    check_infinite_logits("cpu")


@pytest.mark.thorough
def test_kernels_at_all_sizes(interpreted):
    check_rows("cpu", [(1, 1), (5, 1000), (2, 4099)], DTYPES)
    check_whole("cpu", DTYPES)


@pytest.mark.gpu
def test_kernels_on_a_gpu():
    check_rows("cuda", [(1, 1), (5, 1000), (63, 50257)], DTYPES)
    check_infinite_logits("cuda")
    check_whole("cuda", DTYPES)
    check_long_sums("cuda")


@pytest.mark.gpu
def test_past_two_to_the_31_elements():
    logits = torch.zeros(2**16 + 1, 2**15, dtype=torch.bfloat16, device="cuda")
    targets = torch.zeros(len(logits), dtype=torch.int64, device="cuda")
    losses = losses_(logits, targets, -100, 0.0, 0.0, torch.ones(1, device="cuda"))
    torch.testing.assert_close(losses[-1].item(), math.log(2**15), rtol=1e-4, atol=0)
    torch.testing.assert_close(logits[-1, 0].item(), 2.0**-15 - 1, rtol=1e-2, atol=0)


@pytest.mark.gpu
def test_less_memory_than_whole_logits_on_a_gpu():
    peaks_found = []
    for function in (linear_cross_entropy, plain):
        hidden, weight = (torch.randn(n, 512, device="cuda", requires_grad=True) for n in (8192, 32768))
        targets = torch.randint(32768, (8192,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(hidden, weight, targets, **({"rows": 512} if function is linear_cross_entropy else {})).backward()
        peaks_found.append(torch.cuda.max_memory_allocated() - before)
    assert peaks_found[0] < peaks_found[1] / 4
