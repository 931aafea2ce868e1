"""Pretrained weights as Hugging Face writes them, into its models built on the meta device, with and without LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lit_zero
from tests.models.harness import Foreign, check_equal, in_all_stages
from tests.models.test_transformers import bert, gentle, gpt2, llama, on_tokens, t5
from tests.strategy.harness import STAGES, Fit, same_bits, train_all

transformers = pytest.importorskip("transformers", reason="pip install lit-zero[models]")
peft = pytest.importorskip("peft", reason="pip install lit-zero[models]")


class Deferred(Foreign):
    """Builds its model when the Trainer asks for it, and gives it pretrained weights.

    Args:
        folder: of ``save_pretrained``.
        how: further arguments of ``load_pretrained``.
        part: attribute of the model that the weights belong to.
        wrap: what is done to the model afterwards.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        folder: Path,
        how: dict[str, Any] | None = None,
        part: str = "",
        wrap: Callable[[nn.Module], nn.Module] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(build=nn.Identity, loss=on_tokens, **{"optimizer": gentle, **arguments})
        self.build, self.folder, self.how, self.part, self.wrap = build, folder, how or {}, part, wrap

    def configure_model(self) -> None:
        if not isinstance(self.model, nn.Identity):
            return
        self.model = self.build()
        lit_zero.load_pretrained(self, self.folder, into=self.model.get_submodule(self.part), **self.how)
        if self.wrap is not None:
            with torch.device("cpu"):  # what LoRA adds is small and has values of its own
                self.model = self.wrap(self.model)


def saved(build: Callable[[], nn.Module], folder: Path, **how: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """Save a model of other weights than those that the seed of the tests gives; return the folder and the weights."""
    torch.manual_seed(41)
    model = build()
    model.save_pretrained(folder, **how)
    return folder, {f"model.{name}": value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("build", [gpt2, llama, bert, t5])
def test_several_files_into_a_model_without_memory(ranks, tmp_path, build):
    """Field: each rank loads the whole model, or gets parameters of size 0 (22, 24)."""
    folder, weights = saved(build, tmp_path / "saved", max_shard_size="6KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    fit = {"module": Deferred, "rows": 24, "epochs": 1}
    still = Fit(**fit, arguments={"build": build, "folder": folder, "optimizer": frozen_in_place})
    fits = [Fit(**{**vars(still), "zero": {"zero": stage}, "devices": 2}) for stage in STAGES]
    for each in ranks(2).run(train_all, fits, tmp_path / "still", timeout=120)[0]:
        assert same_bits(each.weights, {name: weights[name] for name in each.weights})
    arguments, trainer = {"build": build, "folder": folder}, {"precision": "32-true"}
    stages, alone = in_all_stages(ranks, tmp_path, module=Deferred, arguments=arguments, trainer=trainer)
    check_equal(stages, alone, 1e-6)


def frozen_in_place(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.0)


def gpt2_body() -> nn.Module:
    return transformers.GPT2Model(gpt2().config)


def mean_square(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens).last_hidden_state.square().mean()


@pytest.mark.parametrize("direction", ["a body into a language model", "the body of a language model"])
def test_a_body_and_a_language_model(ranks, tmp_path, direction):
    if direction == "a body into a language model":
        folder, _ = saved(gpt2_body, tmp_path / "saved")
        arguments: dict[str, Any] = {"build": gpt2, "part": "transformer"}
    else:
        folder, _ = saved(gpt2, tmp_path / "saved")
        arguments = {"build": gpt2_body, "how": {"prefix": "transformer."}}
    loss = on_tokens if direction == "a body into a language model" else mean_square
    fit = {"module": Body, "arguments": {**arguments, "folder": folder, "own_loss": loss}}
    stages, alone = in_all_stages(ranks, tmp_path, **fit, trainer={"precision": "32-true"})
    check_equal(stages, alone, 1e-6)


class Body(Deferred):
    """With a loss of its own."""

    def __init__(self, own_loss: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.loss = own_loss


def lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)  # the model itself may have drawn numbers, or may not have
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))


def lora_and_a_head(model: nn.Module) -> nn.Module:
    """The head is copied and the copy trained: it waits for the same values as the head."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return peft.get_peft_model(model, config)


def brisk(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=3e-2, eps=1e-3)


@pytest.mark.parametrize("wrap", [lora, lora_and_a_head])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lora_on_top(ranks, tmp_path, wrap, precision):
    folder, weights = saved(llama, tmp_path / "saved", max_shard_size="6KB")
    arguments = {"build": llama, "folder": folder, "wrap": wrap, "optimizer": brisk}
    trainer = {"precision": precision}
    stages, alone = in_all_stages(ranks, tmp_path, module=Deferred, arguments=arguments, trainer=trainer)
    check_equal(stages, alone, 1e-6 if precision == "32-true" else 2e-3)
    frozen = alone.weights["model.base_model.model.model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(frozen, weights["model.model.layers.1.mlp.up_proj.weight"])
    if wrap is lora_and_a_head:
        head = "model.base_model.model.lm_head"
        assert torch.equal(stages[-1].weights[f"{head}.original_module.weight"], weights["model.lm_head.weight"])
        assert not torch.equal(stages[-1].weights[f"{head}.modules_to_save.default.weight"], frozen)
