"""Models of Hugging Face transformers, as they are: built from a config, no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from tests.models.harness import CLASSES, Foreign, check_equal, defaults, images, in_all_stages, labels
from tests.strategy.harness import STAGES, Fit, loaders, make_trainer, train

transformers = pytest.importorskip("transformers", reason="pip install lit-zero[models]")

VOCAB = 31


def gpt2() -> nn.Module:
    """Input and output embeddings are one parameter."""
    sizes = {"n_positions": 16, "n_embd": 12, "n_layer": 3, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **sizes, **dropout)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    """Grouped queries, rotary positions in a buffer that is not saved."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    """The decoder's weight is the embedding's, and its bias has two names."""
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config)


def bert_classifier() -> nn.Module:
    """With a pooler, and labels of another kind."""
    config = bert().config
    config.num_labels = CLASSES
    return transformers.BertForSequenceClassification(config)


def t5() -> nn.Module:
    """One parameter under four names; a bias of the first block that all others are given."""
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=12,
        d_kv=6,
        d_ff=20,
        num_layers=4,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        tie_word_embeddings=True,
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=20,
        image_size=9,
        patch_size=3,
        num_labels=CLASSES,
    )
    return transformers.ViTForImageClassification(config)


def on_tokens(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def on_classes(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=labels(tokens)).loss


def on_images(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=images(tokens), labels=labels(tokens)).loss


# Losses over tokens, and some norms, are computed in fp32 whatever the model's dtype is.
CASES = {
    "gpt2": (gpt2, on_tokens, 1e-7),
    "llama": (llama, on_tokens, 1e-7),
    "bert": (bert, on_tokens, 1e-7),
    "bert classifier": (bert_classifier, on_classes, 1e-9),
    "t5": (t5, on_tokens, 1e-7),
    "vit": (vit, on_images, 1e-9),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(ranks, tmp_path, name):
    build, loss, tolerance = CASES[name]
    stages, alone = in_all_stages(ranks, tmp_path, arguments={"build": build, "loss": loss})
    check_equal(stages, alone, tolerance)
    assert len(stages[-1].notes) == {"t5": 9}.get(name, 4), "every block is a unit of its own"


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_four_ranks_that_divide_nothing_evenly(ranks, tmp_path, name):
    """Field: a tied weight whose last rank was never updated (23)."""
    build, loss, tolerance = CASES[name]
    stages, alone = in_all_stages(ranks, tmp_path, 4, arguments={"build": build, "loss": loss})
    check_equal(stages, alone, tolerance)
    whole = stages[-1].weights
    first, *others = {"gpt2": ("lm_head", "transformer.wte"), "t5": ("shared", "lm_head", "encoder.embed_tokens")}[name]
    for other in others:
        assert torch.equal(whole[f"model.{first}.weight"], whole[f"model.{other}.weight"])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_other_precisions(ranks, tmp_path, precision):
    arguments = {"build": gpt2, "loss": on_tokens, "optimizer": gentle}
    stages, alone = in_all_stages(ranks, tmp_path, arguments=arguments, trainer={"precision": precision})
    check_equal(stages, alone, {"32-true": 1e-6, "bf16-mixed": 2e-3, "bf16-true": 2e-2}[precision])


def gentle(module: nn.Module) -> torch.optim.Optimizer:
    """An eps that keeps elements without a gradient (a key's bias) from moving by rounding alone."""
    return torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-3)


class Checkpointed(Foreign):
    """Recomputes its blocks with the model's own switch."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.model.gradient_checkpointing_enable()


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_gradient_checkpointing(ranks, tmp_path, name):
    build, loss, tolerance = CASES[name]
    stages, alone = in_all_stages(ranks, tmp_path, module=Checkpointed, arguments={"build": build, "loss": loss})
    check_equal(stages, alone, tolerance)


class Generating(Foreign):
    def predict_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.model.generate(batch[0][:, :3], max_new_tokens=4, min_new_tokens=4, do_sample=False)


def fit_and_generate(fit: Fit, folder: Path) -> list[list[int]]:
    torch.manual_seed(0)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    trainer.fit(module, loaders(fit)[0])
    return [row for batch in trainer.predict(module, loaders(fit)[1]) for row in batch.tolist()]


def in_these_stages(fits: list[Fit], folder: Path) -> list[Any]:
    return [fit_and_generate(fit, folder / str(number)) for number, fit in enumerate(fits)]


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_generate(ranks, tmp_path, name):
    """Field: generation with parameters of size 0 (24)."""
    build, loss, _ = CASES[name]
    fit = defaults({"module": Generating, "arguments": {"build": build, "loss": loss}})
    alone = fit_and_generate(Fit(**fit), tmp_path / "alone")
    fits = [Fit({"zero": stage}, 2, **fit) for stage in STAGES]
    for mine, theirs in zip(*ranks(2).run(in_these_stages, fits, tmp_path / "ranks", timeout=180), strict=True):
        # Lightning's sampler gives every second row to a rank.
        assert [row for pair in zip(mine, theirs, strict=True) for row in pair] == alone
    assert len({tuple(row) for row in alone}) > 1


class FromFolder(pl.LightningModule):
    """Reads a pretrained model by itself, where the comments say it may.

    Args:
        folder: of ``save_pretrained``.
        late: in ``configure_model``.
    """

    def __init__(self, folder: Path, late: bool) -> None:
        super().__init__()
        self.folder = folder
        self.model: Any = None if late else transformers.GPT2LMHeadModel.from_pretrained(folder)

    def configure_model(self) -> None:
        if self.model is None:
            with torch.device("cpu"):  # in stage3 configure_model builds on the meta device
                self.model = transformers.GPT2LMHeadModel.from_pretrained(self.folder)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = on_tokens(self.model, batch[0])
        self.log("train_loss", loss, sync_dist=True)
        return loss

    validation_step = Foreign.validation_step
    loss = staticmethod(on_tokens)

    def configure_optimizers(self) -> Any:
        return gentle(self)


@pytest.mark.parametrize("late", [False, True], ids=["in __init__", "in configure_model"])
def test_from_pretrained(ranks, tmp_path, late):
    """Field: from_pretrained gives parameters of size 0 (24)."""
    torch.manual_seed(5)
    gpt2().save_pretrained(tmp_path / "saved")
    arguments = {"folder": tmp_path / "saved", "late": late}
    trainer = {"precision": "32-true"}
    stages, alone = in_all_stages(ranks, tmp_path, module=FromFolder, arguments=arguments, trainer=trainer)
    check_equal(stages, alone, 1e-6)


class Evaluated(Foreign):
    """Needs no optimizer to be validated."""

    def configure_optimizers(self) -> Any:
        raise AssertionError("evaluation must not ask for an optimizer")


def evaluate(fit: Fit, folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    module, trainer = fit.module(**fit.arguments), make_trainer(fit, folder)
    return trainer.validate(module, loaders(fit)[1], verbose=False)[0]


def test_validation_needs_no_optimizer(ranks, tmp_path):
    """Field: an optimizer wanted to load a model for inference (24)."""
    fit = defaults({"module": Evaluated, "arguments": {"build": gpt2, "loss": on_tokens}})
    alone = evaluate(Fit(**fit), tmp_path)
    for stage in ("none", "stage3"):
        for found in ranks(2).run(evaluate, Fit({"zero": stage}, 2, **fit), tmp_path):
            assert found == pytest.approx(alone, rel=1e-6)


def opened(trainer: pl.Trainer) -> Any:
    """Save and return nothing: the file is looked at outside."""
    trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt")


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_checkpoint_opens_in_plain_transformers(ranks, tmp_path, name):
    """Field: a tied head that the conversion drops (8)."""
    build, loss, _ = CASES[name]
    fit = Fit({"zero": "stage3"}, 2, **{**defaults({"arguments": {"build": build, "loss": loss}}), "look": opened})
    trained = ranks(2).run(train, fit, tmp_path)[0]
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)["state_dict"]
    model = build().double()
    missing, unexpected = model.load_state_dict({k.removeprefix("model."): v for k, v in saved.items()})
    assert not missing and not unexpected
    for key, value in model.state_dict().items():
        assert torch.equal(value, trained.weights[f"model.{key}"])
