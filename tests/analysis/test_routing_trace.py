"""Routing traces against one window at a time."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM

from equipoise import MoEForCausalLM
from equipoise.analysis import RoutingTrace, trace_routing
from equipoise.data import evaluation_windows


@torch.no_grad()
def test_counts_what_each_window_alone_selects(
    model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: Dataset
) -> None:
    model.train()
    trace = trace_routing(model, tokenizer, documents, block_size=24, batch_size=7)
    assert model.training
    model.eval()
    assert trace.domains == ("code", "ja", "law")
    windows = list(evaluation_windows(documents, tokenizer, 24))
    assert trace.load.shape == (len(windows), 2, 8)  # the first of three layers is dense
    assert len({len(window["input_ids"]) for window in windows}) > 3  # so there was padding
    for index, window in enumerate(windows):
        output = model(input_ids=torch.tensor([window["input_ids"]]), output_router_logits=True)
        for layer, experts in enumerate(output.selected_experts):
            counts = [0] * 8
            for expert in experts.flatten().tolist():
                counts[expert] += 1
            assert trace.load[index, layer].tolist() == counts
        assert int(trace.num_tokens[index]) == len(window["input_ids"])
        assert trace.domains[int(trace.domain[index])] == window["domain"]
        assert int(trace.document[index]) == window["document"]
    assert trace.num_experts_per_tok == 2
    assert bool((trace.load.sum(-1) == 2 * trace.num_tokens[:, None]).all())


def test_batch_size_changes_nothing(
    model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: Dataset
) -> None:
    one, many = (trace_routing(model, tokenizer, documents, block_size=24, batch_size=size) for size in (1, 64))
    assert torch.equal(one.load, many.load)


def test_save_and_load(
    model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: Dataset, tmp_path: Path
) -> None:
    trace = trace_routing(model, tokenizer, documents.select(range(4)), block_size=24)
    trace.save(tmp_path / "trace.safetensors")
    again = RoutingTrace.load_file(tmp_path / "trace.safetensors")
    assert again.domains == trace.domains
    for name in ("load", "num_tokens", "domain", "document"):
        assert torch.equal(getattr(again, name), getattr(trace, name))
        assert getattr(again, name).dtype == getattr(trace, name).dtype


def test_refuses(model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: Dataset) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        trace_routing(model, tokenizer, documents, batch_size=0)
    with pytest.raises(ValueError, match="documents must hold at least one document with text; got none"):
        trace_routing(model, tokenizer, Dataset.from_list([{"text": "", "domain": "x"}]))
    stock = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="model must return selected_experts; got none from Qwen3MoeForCausalLM"):
        trace_routing(stock, tokenizer, documents.select(range(2)))
