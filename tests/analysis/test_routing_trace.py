"""Routing traces against one window at a time."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from stock_balancing import EXPERTS, FAMILIES, Seen, routers_of
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

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
    dense = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(ValueError, match=r"model must have routers: .* got LlamaForCausalLM"):
        trace_routing(dense, tokenizer, documents.select(range(2)))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_models_are_counted_as_they_select(
    tokenizer: PreTrainedTokenizerBase, documents: Dataset, family: str
) -> None:
    model = FAMILIES[family](vocab_size=len(tokenizer)).train()
    model.lm_head.eval()  # a mode of its own, which is kept
    trace = trace_routing(model, tokenizer, documents, block_size=24, batch_size=7)
    assert model.training
    assert not model.lm_head.training
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()
    seen = Seen(model)
    layers = len(routers_of(model))
    for index, window in enumerate(evaluation_windows(documents, tokenizer, 24)):
        output = seen(input_ids=torch.tensor([window["input_ids"]]))
        counts = torch.stack([experts.flatten().bincount(minlength=EXPERTS) for experts in output.selected_experts])
        assert counts.shape == (layers, EXPERTS)
        assert torch.equal(trace.load[index].long(), counts)
