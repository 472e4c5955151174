"""Exported tasks give the harness's scores: lm-evaluation-harness runs them on a saved model, by remote code."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.evaluation import export_to_harness, measure_model, plan_evaluation, plan_tokens, report
from equipoise.evaluation.generation import Stopping, generate_texts
from equipoise.evaluation.items import Item
from equipoise.evaluation.likelihoods import choice_log_likelihoods
from equipoise.evaluation.requests import prompts
from equipoise.evaluation.runner import Plan
from tests.evaluation.test_tasks import write_rows

BLOCK_SIZE = 400


def choosing_task(folder: Path) -> Path:
    """40 items of two domains, with shots; choices differ in bytes and tokens."""
    words = ["loi", "def f(x)", "数", "return", "x + 1", "Nul ne le sait", "numéro", "三三"]
    rows = [
        {"question": f"{n} {words[n % 8]}", "options": [words[(n + k) % 8] for k in (1, 3, 4)], "right": n % 3,
         "kind": "law" if n % 4 else "code"}
        for n in range(40)
    ]  # fmt: skip
    write_rows(folder / "choosing.jsonl", rows)
    described = {
        "description": "words",
        "domain": "{{ kind }}",
        "source": {"files": "choosing.jsonl"},
        "columns": ["question", "options", "right", "kind"],
        "preamble": "Words of {{ kind }}\n\n",
        "prompt": "Q: {{ question }}\nA:",
        "choices": "options",
        "answer": "right",
        "metric": "multiple_choice",
        "score": "accuracy_per_byte",
        "shots": {"number": 2, "drawn": "random", "same": "kind"},
    }
    (folder / "choosing.yaml").write_text(yaml.safe_dump(described, allow_unicode=True), encoding="utf-8")
    return folder / "choosing.yaml"


def writing_task(folder: Path, model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Path:
    """12 items; for each second one the reference is what the model does write, so that some are right."""
    questions = [f"def f{n}(x):\n    return {n}" for n in range(12)]
    items = [Item(domain="d", cluster="0", context=f"{text} #", row={}) for text in questions]
    tokens = prompts(tokenizer, items, max_length=BLOCK_SIZE, max_new_tokens=8)
    texts = generate_texts(model, tokenizer, tokens, Stopping(("\n",), 8))
    assert len(set(texts)) > 3
    rows = [
        {"question": question, "right": text.strip() if n % 2 and text.strip() else "nothing"}
        for n, (question, text) in enumerate(zip(questions, texts, strict=True))
    ]
    write_rows(folder / "writing.jsonl", rows)
    described = {
        "description": "text",
        "domain": "code",
        "source": {"files": "writing.jsonl"},
        "columns": ["question", "right"],
        "prompt": "{{ question }} #",
        "answer": "right",
        "metric": "exact_match",
        "stop": ["\n"],
        "max_new_tokens": 8,
    }
    (folder / "writing.yaml").write_text(yaml.safe_dump(described), encoding="utf-8")
    return folder / "writing.yaml"


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase, tiny_config: Callable[..., MoEConfig]) -> MoEForCausalLM:
    """One that reads contexts of 384 bytes."""
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(vocab_size=len(tokenizer), max_position_embeddings=BLOCK_SIZE, eos_token_id=0))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Plan:
    folder = tmp_path_factory.mktemp("tasks")
    lines = [f"def f{n}(x): return x + {n * n} and {n} or la loi numéro {n}" for n in range(60)]
    documents = Dataset.from_list([{"text": " ".join(lines[n:]), "domain": "prose"} for n in range(12)])
    tasks = [str(choosing_task(folder)), str(writing_task(folder, model, tokenizer)), "continuation"]
    return plan_evaluation(tasks, documents, continuation_items_per_domain=30)


def harness_results(model: Path, tasks: Path, names: list[str], output: Path) -> tuple[dict[str, Any], Path]:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    arguments = f"pretrained={model},trust_remote_code=True,add_bos_token=True,max_length={BLOCK_SIZE},dtype=float32"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments),
            *("--include_path", str(tasks), "--tasks", ",".join(names), "--output_path", str(output)),
            *("--log_samples", "--device", "cpu", "--batch_size", "4"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tasks.parent,  # not the repository, of which nothing is imported
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = output.rglob("results_*.json")
    return json.loads(file.read_text())["results"], file.parent


def test_the_harness_gives_our_scores(
    plan: Plan, model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Choices by log-likelihood and by it per byte, with shots and in two domains; texts generated; continuations of
    documents. To the last digit that the harness prints, and each log-likelihood to fp32's rounding."""
    tokens = plan_tokens(plan, tokenizer, max_length=BLOCK_SIZE)
    assert not any(request.truncated for of_task in tokens for request in of_task)
    ours = report(plan, measure_model(model, tokenizer, plan, tokens, block_size=BLOCK_SIZE))["tasks"]

    names = export_to_harness(plan.tasks, tmp_path / "exported")
    assert names == ["equipoise_choosing", "equipoise_writing", "equipoise_continuation"]
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    # Where it was written to does not matter.
    moved = (tmp_path / "exported").rename(tmp_path / "moved")
    theirs, samples = harness_results(tmp_path / "model", moved, names, tmp_path / "results")

    for part, domain in (("", "all"), ("_law", "law"), ("_code", "code")):
        found = theirs[f"equipoise_choosing{part}"]
        assert found["acc,none"] == pytest.approx(ours["choosing"]["domains"][domain]["accuracy"], abs=1e-9)
        assert found["acc_bytes,none"] == pytest.approx(ours["choosing"]["domains"][domain]["score"], abs=1e-9)
    assert 0 < ours["choosing"]["domains"]["all"]["score"] != ours["choosing"]["domains"]["all"]["accuracy"]
    exact = ours["writing"]["domains"]["code"]["exact_match"]
    assert theirs["equipoise_writing"]["exact_match,none"] == pytest.approx(exact, abs=1e-9)
    assert 0 < exact < 1
    prose = ours["continuation"]["domains"]["prose"]
    assert theirs["equipoise_continuation"]["acc_bytes,none"] == pytest.approx(prose["score"], abs=1e-9)

    (logged,) = samples.glob("samples_equipoise_continuation*.jsonl")
    (requests,) = [
        of_task for (task, _), of_task in zip(plan.tasks, tokens, strict=True) if task.name == "continuation"
    ]
    of_ours = choice_log_likelihoods(model, requests)
    for line in logged.read_text().splitlines():
        sample = json.loads(line)
        of_theirs = [float(response[0][0]) for response in sample["resps"]]
        assert of_theirs == pytest.approx(of_ours[sample["doc_id"]], rel=1e-5)


def test_exports_programs_as_the_harness_runs_them(tmp_path: Path) -> None:
    """By the function that the harness calls, without the harness."""
    from tests.evaluation.task_rows import ROWS

    write_rows(tmp_path / "rows.jsonl", ROWS["humaneval"]["test"])
    plan = plan_evaluation(["humaneval"], None, data={"humaneval": tmp_path / "rows.jsonl"}, allow_code_execution=True)
    export_to_harness(plan.tasks, tmp_path / "exported")
    assert "unsafe_code: true" in (tmp_path / "exported" / "equipoise_humaneval.yaml").read_text()
    code = (
        "import harness_tasks, sys\n"
        "assert 'equipoise' not in sys.modules\n"
        "(item,) = harness_tasks.load('equipoise_humaneval.jsonl', version=1)['test']\n"
        "print([harness_tasks.pass_at_k(item, [text])['pass_at_1'] for text in ('    return a + b', '    return a')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "exported", capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[1.0, 0.0]", done.stderr[-2000:]


def test_writes_into_a_new_folder_only(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(ValueError, match="export_lm_eval must be a folder that does not exist or is empty; got"):
        export_to_harness(plan.tasks, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["letters.txt"]
