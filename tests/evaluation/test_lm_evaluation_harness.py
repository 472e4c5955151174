"""The evaluation harness scores a saved model by its usual command, with the code that came with the weights.

The oracle is each continuation's log-likelihood, and each greedy generation, computed here without batches or caches.
"""

import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from equipoise import MoEConfig, MoEForCausalLM

pytest.importorskip("lm_eval")

QUESTIONS = [
    {"question": "def f(x):", "choices": ["return x", "la loi", "数"], "answer": 0},
    {"question": "Où est la loi", "choices": ["numéro", "def f"], "answer": 0},
    {"question": "x + 1", "choices": ["return", "三", "x", "é"], "answer": 2},
    {"question": "数は三", "choices": ["である", "nul ne"], "answer": 1},
]
NEW_TOKENS = 8
TASKS: dict[str, dict[str, Any]] = {
    "which_follows": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "what_follows": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "all_of_it": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def scored(
    model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> MoEForCausalLM:
    """A saved model whose texts end where its tokenizer's do: `name_or_path` says where it is."""
    folder = tmp_path_factory.mktemp("model")
    ends = {name: tokenizer.eos_token_id for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    saved = MoEForCausalLM(MoEConfig(**model.config.to_dict() | ends))
    saved.load_state_dict(model.state_dict())
    saved.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return MoEForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def answers(scored: MoEForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the harness wrote: the results, and each task's samples in the order of the questions."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "questions.json").write_text("\n".join(json.dumps(row) for row in QUESTIONS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.json")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "3"]
    command += ["--model_args", f"pretrained={scored.name_or_path},trust_remote_code=True,dtype=float32"]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(folder)]
    command += ["--output_path", str(folder / "out"), "--log_samples"]
    caches = {"HF_DATASETS_CACHE": str(folder / "datasets"), "HF_MODULES_CACHE": str(folder / "modules")}
    # Not in the repository's folder, where the package would be importable.
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **caches}, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((folder / "modules").rglob("modeling_moe.py"))  # the code that came with the weights is what ran
    (results,) = (folder / "out").rglob("results_*.json")
    read: dict[str, Any] = {"results": json.loads(results.read_text())["results"]}
    for name in TASKS:
        (samples,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        read[name] = sorted(rows, key=lambda row: row["doc_id"])
    return read


@torch.no_grad()
def log_likelihood(model: MoEForCausalLM, context: list[int], continuation: list[int]) -> float:
    ids = torch.tensor([context + continuation])
    scores = model(ids).logits[0].double().log_softmax(-1)
    return sum(scores[at - 1, ids[0, at]].item() for at in range(len(context), ids.shape[1]))


def test_choices_are_scored_as_the_model_scores_them(
    answers: dict[str, Any], scored: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    right = 0
    for row, sample in zip(QUESTIONS, answers["which_follows"], strict=True):
        context = tokenizer.encode(row["question"])
        scores = []
        for choice, response in zip(row["choices"], sample["filtered_resps"], strict=True):
            whole = tokenizer.encode(f"{row['question']} {choice}")
            assert whole[: len(context)] == context
            scores.append(log_likelihood(scored, context, whole[len(context) :]))
            assert float(response[0]) == pytest.approx(scores[-1], abs=1e-4)
        right += max(range(len(scores)), key=scores.__getitem__) == row["answer"]
    assert answers["results"]["which_follows"]["acc,none"] == right / len(QUESTIONS)


def test_generation_is_greedy_decoding(
    answers: dict[str, Any], scored: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    for row, sample in zip(QUESTIONS, answers["what_follows"], strict=True):
        ids = torch.tensor([tokenizer.encode(row["question"])])
        prompt = ids.shape[1]
        while ids.shape[1] < prompt + NEW_TOKENS and ids[0, -1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids = torch.cat([ids, scored(ids).logits[:, -1:].argmax(-1)], dim=1)
        expected = tokenizer.decode(ids[0, prompt:], skip_special_tokens=True).split("\n\n")[0]
        assert sample["filtered_resps"] == [expected]


def test_a_text_has_the_bits_that_the_model_gives_it(
    answers: dict[str, Any], scored: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    total, length = 0.0, 0
    for row in QUESTIONS:
        # The harness begins a text with the token that ends one.
        total += log_likelihood(scored, [tokenizer.eos_token_id], tokenizer.encode(row["question"]))
        length += len(row["question"].encode())
    bits = answers["results"]["all_of_it"]["bits_per_byte,none"]
    assert bits == pytest.approx(-total / length / math.log(2), rel=1e-5)
