"""LoRA by peft: most parameters are frozen, and the model is wrapped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from tests.models.harness import Foreign, check_equal, defaults, in_all_stages
from tests.models.test_transformers import gpt2, llama, on_tokens, t5
from tests.strategy.harness import STAGES, Fit, distance, same_bits, train, train_all

peft = pytest.importorskip("peft", reason="pip install lit-zero[models]")


def lora(model: nn.Module, *targets: str, **more: Any) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), **more))


def lora_gpt2() -> nn.Module:
    return lora(gpt2(), "c_attn", fan_in_fan_out=True)


def lora_llama() -> nn.Module:
    """With a head that is trained whole."""
    return lora(llama(), "q_proj", "v_proj", modules_to_save=["lm_head"])


def lora_t5() -> nn.Module:
    """Every block of the decoder has frozen weights and is given the encoder's output, whose gradient comes last."""
    return lora(t5(), "q", "v")


def all_parameters(module: nn.Module) -> torch.optim.Optimizer:
    """Frozen ones included."""
    return torch.optim.AdamW(module.parameters(), lr=3e-2)


def trainable(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-2)


def with_an_empty_group(module: nn.Module) -> dict[str, Any]:
    """What the usual division into decayed and undecayed parameters gives: LoRA has no biases, so one group is empty.
    The frozen ones make a third. The scheduler counts them all.
    """
    params = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in module.parameters() if not p.requires_grad], "lr": 1.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-2)
    rates = [lambda step: 1.0 / (1 + step), lambda step: 0.5**step, lambda step: 1.0]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("build", [lora_gpt2, lora_llama, lora_t5])
@pytest.mark.parametrize("optimizer", [all_parameters, trainable])
def test_equals_one_process(ranks, tmp_path, build, optimizer):
    arguments = {"build": build, "loss": on_tokens, "optimizer": optimizer}
    stages, alone = in_all_stages(ranks, tmp_path, arguments=arguments)
    check_equal(stages, alone, 1e-7)
    torch.manual_seed(0)
    start = {f"model.{name}": value.double() for name, value in build().state_dict().items()}
    for name, value in alone.weights.items():
        moved = not torch.equal(value, start[name])
        assert moved == ("lora_" in name or "modules_to_save" in name), "what is frozen stays what it was"


def test_an_empty_parameter_group(ranks, tmp_path):
    """Field: LoRA and an empty group crash the scheduler (11)."""
    arguments = {"build": lora_gpt2, "loss": on_tokens, "optimizer": with_an_empty_group}
    stages, alone = in_all_stages(ranks, tmp_path, arguments=arguments)
    check_equal(stages, alone, 1e-7)
    rates = [alone.column(f"lr-AdamW/pg{number}") for number in (1, 2, 3)]
    assert [each[-1] for each in rates] == pytest.approx([3e-2 / 3, 3e-2 / 4, 1.0])


@pytest.mark.parametrize("optimizer", [all_parameters, with_an_empty_group])
@pytest.mark.parametrize("form", ["full", "sharded"])
def test_resuming(ranks, tmp_path, form, optimizer):
    """Field: frozen weights lost on resume (10), from one stage to another."""
    arguments = {"build": lora_gpt2, "loss": on_tokens, "optimizer": optimizer}
    fit = defaults({"arguments": arguments, "epochs": 2, "look": save})
    alone = train(Fit(**{**fit, "look": None}), tmp_path / "alone")
    first = Fit({"zero": "stage3", "checkpoint": form}, 2, **{**fit, "epochs": 1})
    ranks(2).run(train, first, tmp_path / "first")
    saved = tmp_path / "first" / "saved.ckpt"
    again = [replace(first, zero={"zero": stage}, epochs=2, resume=saved, look=None) for stage in STAGES]
    for each in ranks(2).run(train_all, again, tmp_path / "second")[0]:
        assert each.steps == alone.steps
        assert distance(each.weights, alone.weights) < 1e-7


def save(trainer: pl.Trainer) -> None:
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt")


class Adapter(Foreign):
    """Keeps only its adapter in checkpoints, as is usual, and takes them without the rest."""

    strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in weights.items() if "lora_" in name}


def test_checkpoints_with_the_adapter_alone(ranks, tmp_path):
    """Field: 50 GB of frozen weights in every checkpoint (10)."""
    arguments = {"build": lora_gpt2, "loss": on_tokens, "optimizer": trainable}
    fit = Fit({"zero": "stage3"}, 2, **defaults({"module": Adapter, "arguments": arguments, "epochs": 2}))
    whole, _ = ranks(2).run(train_all, [fit, replace(fit, epochs=1, look=save)], tmp_path)[0]
    saved = tmp_path / "1" / "saved.ckpt"
    names = torch.load(saved, weights_only=True)["state_dict"].keys()
    assert names and all("lora_" in name for name in names)
    again = replace(fit, zero={"zero": "stage2"}, resume=saved)
    assert same_bits(ranks(2).run(train, again, tmp_path / "second")[0].weights, whole.weights)


def test_the_adapter_is_whole(ranks, tmp_path):
    """Field: adapters saved with empty weights (10)."""
    arguments = {"build": lora_gpt2, "loss": on_tokens, "optimizer": trainable}
    fit = Fit({"zero": "stage3"}, 2, **defaults({"arguments": arguments}))
    trained = ranks(2).run(train, fit, tmp_path)[0]
    model = lora_gpt2()
    weights = {name.removeprefix("model."): value for name, value in trained.weights.items()}
    adapter = peft.get_peft_model_state_dict(model, state_dict=weights)
    assert len(adapter) == 6 and all(value.numel() and value.abs().sum() > 0 for value in adapter.values())
    result = peft.set_peft_model_state_dict(model, adapter)
    assert not result.unexpected_keys


def one_group(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": list(module.parameters())}], lr=1e-2, weight_decay=0.1)


def a_group_for_each(module: nn.Module) -> torch.optim.Optimizer:
    groups = [{"params": [p]} for p in reversed(list(module.parameters()))]
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def rates_of_their_own(module: nn.Module) -> torch.optim.Optimizer:
    groups = [{"params": [p], "lr": 1e-3 * number} for number, p in enumerate(module.parameters())]
    return torch.optim.AdamW(groups)


def test_splitting_groups_changes_nothing(ranks, tmp_path):
    """Field: the gradients change with the groups (11)."""
    fits = [
        Fit({"zero": stage}, 2, **defaults({"arguments": {"build": gpt2, "loss": on_tokens, "optimizer": optimizer}}))
        for stage in STAGES
        for optimizer in (one_group, a_group_for_each)
    ]
    first, *others = ranks(2).run(train_all, fits, tmp_path)[0]
    assert all(same_bits(each.weights, first.weights) for each in others)


def test_a_learning_rate_for_each_group(ranks, tmp_path):
    """Field: the rates of groups are ignored (11)."""
    arguments = {"build": gpt2, "loss": on_tokens, "optimizer": rates_of_their_own}
    stages, alone = in_all_stages(ranks, tmp_path, arguments=arguments)
    check_equal(stages, alone, 1e-7)
    torch.manual_seed(0)
    assert torch.equal(alone.weights["model.transformer.wte.weight"], gpt2().double().transformer.wte.weight)
