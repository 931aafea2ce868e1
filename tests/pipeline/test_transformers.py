"""Models of Hugging Face transformers, as they are, as stages."""

from __future__ import annotations

import pytest
import torch

from tests.pipeline.harness import check
from tests.pipeline.models import on_words

pytest.importorskip("transformers", reason="pip install lit-zero[models]")

from tests.models import test_transformers as zoo

MODELS = {"gpt2": zoo.gpt2, "llama": zoo.llama, "bert": zoo.bert, "t5": zoo.t5}


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_stages_equal_the_plain_model(name, stages):
    torch.manual_seed(0)
    model = MODELS[name]().train()
    if stages == 4 and name != "t5":  # four blocks
        model = type(model)(type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 4})).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    batches = [torch.randint(0, zoo.VOCAB, shape) for shape in ((4, 6), (4, 6), (3, 9))]
    check(model, on_words, batches, stages)
