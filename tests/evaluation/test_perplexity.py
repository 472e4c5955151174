"""Evaluation by domain against one forward pass per window, in double precision, without batches."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from equipoise import MoEForCausalLM
from equipoise.evaluation import evaluate_domains
from equipoise.evaluation.perplexity import measure_documents, sequence_nll

BLOCK_SIZE = 24


def windows_of(ids: list[int], block_size: int) -> list[list[int]]:
    """Each window begins with the token that the one before ends with: every token but the first is predicted once."""
    cut, start = [], 0
    while start < len(ids) - 1:
        cut.append(ids[start : start + block_size])
        start += block_size - 1
    return cut


@torch.no_grad()
def nats_of(model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[float, int]:
    """Negative log-likelihood of one document and its tokens, one window at a time."""
    nats, tokens = 0.0, 0
    for window in windows_of([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]], BLOCK_SIZE):
        log_probabilities = model(input_ids=torch.tensor([window])).logits[0].double().log_softmax(-1)
        for position in range(1, len(window)):
            nats -= float(log_probabilities[position - 1, window[position]])
            tokens += 1
    return nats, tokens


def test_matches_one_document_at_a_time(
    model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: Dataset
) -> None:
    results = evaluate_domains(model, tokenizer, documents, block_size=BLOCK_SIZE, batch_size=5)
    assert list(results) == ["code", "ja", "law", "all"]
    model.eval()
    for domain, result in results.items():
        texts = [row["text"] for row in documents if domain in (row["domain"], "all")]
        pairs = [nats_of(model, tokenizer, text) for text in texts]
        nats, tokens = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        size = sum(len(text.encode()) for text in texts)
        assert (result["num_tokens"], result["num_bytes"]) == (tokens, size)
        assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_batch_size_changes_nothing(
    model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: Dataset
) -> None:
    results = [
        evaluate_domains(model, tokenizer, documents, block_size=BLOCK_SIZE, batch_size=size) for size in (1, 3, 64)
    ]
    for other in results[1:]:
        for domain in results[0]:
            assert other[domain] == pytest.approx(results[0][domain], rel=1e-6)


def test_documents_are_what_intervals_rest_on(
    model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: Dataset
) -> None:
    """Windows of one document are not independent: there are as many clusters as documents, and no more."""
    measures = measure_documents(model, tokenizer, documents, block_size=BLOCK_SIZE, batch_size=5)
    results, scores = measures.by_domain(), measures.scores()
    assert list(scores) == list(results)
    for domain, found in scores.items():
        assert found.score == pytest.approx(results[domain]["bits_per_byte"], rel=1e-12)
        of_domain = [row for row in documents if domain in (row["domain"], "all")]
        assert len(set(found.clusters)) == len(of_domain)
        _, sizes = found.by_cluster()
        assert sorted(sizes) == sorted(len(row["text"].encode()) for row in of_domain)
    assert len(scores["all"].values) > len(documents)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_model_as_it_was(
    model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: Dataset, training: bool
) -> None:
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate_domains(model, tokenizer, documents.select(range(3)), block_size=BLOCK_SIZE)
    assert model.training is training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_likelihood_of_bf16_logits_is_taken_in_fp32() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 40, 300).bfloat16()
    labels = torch.randint(0, 300, (2, 40))
    labels[0, 7:9] = -100
    for row, nll in enumerate(sequence_nll(logits, labels).tolist()):
        log_probabilities = logits[row].double().log_softmax(-1)
        expected = -sum(
            float(log_probabilities[position - 1, label])
            for position, label in enumerate(labels[row].tolist())
            if position > 0 and label != -100
        )
        assert nll == pytest.approx(expected, rel=1e-6)  # in bf16 it would have three digits


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a", "domain": "x"}], {"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ([{"text": "a", "domain": "x"}], {"block_size": 1}, "block_size must be at least 2.* got 1"),
        ([{"text": "", "domain": "x"}], {}, "documents must hold at least one document with text; got none"),
        ([{"text": "a", "domain": "all"}], {}, "domain must not be 'all'"),
    ],
)
def test_refuses(
    model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[dict], options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_domains(model, tokenizer, Dataset.from_list(rows), **options)
