"""The classification heads: they compute what the stock heads compute, train, save and load."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeForQuestionAnswering,
    Qwen3MoeForSequenceClassification,
    Qwen3MoeForTokenClassification,
)

from equipoise import MoEConfig, MoEForCausalLM
from tests.modeling.stock_twins import qwen3_moe

Make = Callable[..., MoEConfig]
IDS = torch.randint(2, 64, (3, 9), generator=torch.Generator().manual_seed(0))
IDS[1, 6:] = 0
BATCH = {"input_ids": IDS, "attention_mask": IDS.ne(0).long()}
HEADS = {
    "sequence": (
        AutoModelForSequenceClassification,
        Qwen3MoeForSequenceClassification,
        {"labels": torch.tensor([0, 2, 1])},
    ),
    "token": (AutoModelForTokenClassification, Qwen3MoeForTokenClassification, {"labels": IDS % 3}),
    "span": (
        AutoModelForQuestionAnswering,
        Qwen3MoeForQuestionAnswering,
        {"start_positions": torch.tensor([1, 0, 2]), "end_positions": torch.tensor([3, 4, 5])},
    ),
}


def made(tiny_config: Make, head: str) -> nn.Module:
    torch.manual_seed(0)
    config = tiny_config(num_shared_experts=0, first_k_dense_replace=0, num_labels=3)
    return HEADS[head][0].from_config(config).eval()


@pytest.mark.parametrize("head", HEADS)
def test_a_head_computes_what_the_stock_head_computes(tiny_config: Make, head: str) -> None:
    _, stock_class, labels = HEADS[head]
    ours = made(tiny_config, head)
    stock = qwen3_moe(ours, stock_class)
    got, expected = ours(**BATCH, **labels), stock(**BATCH, **labels)
    assert got.keys() == expected.keys()
    for name in {"loss", "logits", "start_logits", "end_logits"} & set(expected):
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_starts_from_a_language_model_and_is_saved(tiny_config: Make, head: str, tmp_path: Path) -> None:
    auto, _, labels = HEADS[head]
    torch.manual_seed(0)
    base = MoEForCausalLM(tiny_config(num_labels=3))
    for bias in base.selection_biases():
        bias.normal_()
    base.save_pretrained(tmp_path / "base")
    model = auto.from_pretrained(tmp_path / "base", num_labels=3)
    for name, value in base.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], value), name
    loss = model.train()(**BATCH, **labels).loss
    loss.backward()
    assert all(block.mlp.gate.weight.grad.norm() > 0 for block in model.model.layers[1:])
    model.eval().save_pretrained(tmp_path / "head")
    again = auto.from_pretrained(tmp_path / "head")
    assert type(again) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
