"""scripts/evaluate_model.py, from run directories to evaluation.json and a comparison."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from equipoise import MoEForCausalLM
from equipoise.data import train_tokenizer
from equipoise.evaluation import evaluate_domains
from tests.evaluation.test_tasks import SUMS, write_rows, write_task

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_model.py"


def strict_json(file: Path) -> Any:
    """What a browser would read too: no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{file} holds {constant}, which is no JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


def run(*arguments: object, launcher: tuple[str, ...] = (), cwd: Path | None = None) -> str:
    # Without OMP_NUM_THREADS torch, Accelerate and its launcher choose threads, as they do for those who set nothing.
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, *launcher, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def two_runs(
    tmp_path_factory: pytest.TempPathFactory, model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> tuple[Path, Path]:
    """Two models, the second a little off the first, whose runs held out the same documents: two domains, and a third
    that is too small for continuations."""
    rows = [
        {"text": "".join(f"def f{n}{k}(x):\n    return x + {n * k}\n" for k in range(80)), "domain": "code"}
        for n in range(8)
    ]
    rows += [
        {"text": " ".join(f"Où est la loi numéro {n * k} ? Nul ne le sait." for k in range(60)), "domain": "law"}
        for n in range(8)
    ]
    rows.append({"text": "数は三である", "domain": "ja"})
    folder = tmp_path_factory.mktemp("runs")
    for name in ("first", "second"):
        if name == "second":
            torch.manual_seed(1)
            model = MoEForCausalLM(model.config)
        model.save_pretrained(folder / name / "model")
        tokenizer.save_pretrained(folder / name / "model")
        Dataset.from_list(rows).to_parquet(folder / name / "validation.parquet")
    return folder / "first", folder / "second"


def test_writes_what_evaluate_domains_returns(
    saved_run: Path, model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: Dataset, tmp_path: Path
) -> None:
    printed = run("--model", saved_run, "--block_size", "24", cwd=tmp_path)
    expected = evaluate_domains(model, tokenizer, documents, block_size=24)
    written = json.loads((saved_run / "evaluation.json").read_text())
    for domain, result in expected.items():
        found = written["domains"][domain]
        assert {name: found[name] for name in result} == pytest.approx(result, rel=1e-6)
        assert found["low"] < result["bits_per_byte"] < found["high"]
        assert f"{domain} " in printed
    assert f"{expected['all']['bits_per_byte']:.4f}" in printed
    # Too little text for continuations, and said so.
    assert set(written["left_out"]) == {"code", "ja", "law"}
    assert written["tasks"] == {}
    assert "continuation leaves out ja: 0 items could be made" in printed
    assert [path.name for path in saved_run.iterdir() if path.name.startswith(".")] == []


def test_two_models_are_compared_and_processes_change_no_digit(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = two_runs
    task = write_task(tmp_path, SUMS * 4, domain="mathematics")
    arguments = ("--model", first, "--model", second, "--tasks", "continuation", task, "--limit", "24",
                 "--num_threads", "1")  # fmt: skip
    printed = run(*arguments, cwd=tmp_path)
    comparison = strict_json(first / "comparison.json")
    evaluations = [strict_json(folder / "evaluation.json") for folder in two_runs]
    assert comparison["evaluations"] == {"first": evaluations[0], "second": evaluations[1]}
    (found,) = comparison["comparisons"]
    assert (found["first"], found["second"]) == ("first", "second")
    assert set(found["measures"]["bits_per_byte"]) == {"all", "code", "ja", "law"}
    assert set(found["measures"]["continuation"]) == {"all", "code", "law"}
    assert set(found["measures"]["tasks"]) == {"sums (mathematics)"}
    bits = [evaluation["domains"]["law"]["bits_per_byte"] for evaluation in evaluations]
    code = [evaluation["tasks"]["continuation"]["domains"]["code"]["score"] for evaluation in evaluations]
    sums = [evaluation["tasks"]["sums"]["domains"]["mathematics"]["score"] for evaluation in evaluations]
    for measure, domain, values in (
        ("bits_per_byte", "law", bits),
        ("continuation", "code", code),
        ("tasks", "sums (mathematics)", sums),
    ):
        entry = found["measures"][measure][domain]
        assert entry["difference"] == pytest.approx(values[1] - values[0], abs=1e-12)
        assert 0 < entry["p_value"] <= entry["p_value_holm"] <= 1
    assert found["measures"]["bits_per_byte"]["law"]["p_value_holm"] < 0.05  # other weights, on 8 documents
    assert found["measures"]["bits_per_byte"]["ja"]["low"] is None  # one document, of whose spread nothing is known
    assert evaluations[0]["settings"]["num_threads"] == 1
    of_task = evaluations[0]["tasks"]["continuation"]["domains"]["all"]
    assert (of_task["num_items"], of_task["clusters"], of_task["chance"]) == (48, 16, 0.25)
    for words in (
        "== first",
        "== second",
        "second less first",
        "95% interval",
        "sums (mathematics)",
        "continuation leaves",
    ):
        assert words in printed

    # One by itself and three of the launcher, which would compute with other numbers of threads; no digit is another.
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "3", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip
    again = run(*arguments, launcher=launcher, cwd=tmp_path)
    assert strict_json(first / "comparison.json") == comparison
    assert again == printed


def test_exports_without_a_model(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    data = two_runs[0] / "validation.parquet"
    printed = run("--export_lm_eval", folder, "--data", data, "--tasks", "continuation", cwd=tmp_path)
    assert f"lm_eval run --include_path {folder} --tasks equipoise_continuation" in printed
    assert {file.name for file in folder.glob("*.yaml")} == {
        "equipoise_continuation.yaml", "equipoise_continuation_code.yaml", "equipoise_continuation_law.yaml"
    }  # fmt: skip


@pytest.fixture
def refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs the script, which must end with an error of one line before any model is loaded, and returns that."""

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded: the input should have been refused before")

    def run_in_process(*arguments: object) -> str:
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        message = str(stopped.value.code)
        assert message.startswith("error: ")
        assert "\n" not in message
        return message

    return run_in_process


def test_says_what_is_missing(saved_run: Path, tmp_path: Path, refuses: Callable[..., str]) -> None:
    assert refuses() == "error: --model must be given; got none"
    missing = refuses("--model", tmp_path)
    assert (
        f"--model must be a folder with a config.json, or a run directory that holds model/; got {tmp_path}" in missing
    )
    alone = tmp_path / "elsewhere" / "weights"
    alone.parent.mkdir()
    alone.symlink_to(saved_run / "model")
    assert "--data must be given" in refuses("--model", alone)
    data = saved_run / "validation.parquet"
    assert "--output must be given" in refuses("--model", alone, "--data", data)
    assert "--model must hold a model and its tokenizer; got nobody/nothing: " in refuses(
        "--model", "nobody/nothing", "--data", data, "--output", tmp_path / "out.json"
    )


def test_refuses_tasks_before_a_model_is_loaded(saved_run: Path, tmp_path: Path, refuses: Callable[..., str]) -> None:
    def with_tasks(*arguments: object) -> str:
        return refuses("--model", saved_run, "--tasks", *arguments)

    assert "tasks must be among arc_challenge," in with_tasks("hellaswagg")
    assert "--task_data must be NAME=PATH; got humaneval" in with_tasks("humaneval", "--task_data", "humaneval")
    assert "task_data must name tasks that are asked; got mmlu" in with_tasks("continuation", "--task_data", "mmlu=x")
    assert "allow_code_execution must be given for the task humaneval" in with_tasks("humaneval")
    assert "arc_easy: source must be a data set that the Hub, or its cache here, has" in with_tasks("arc_easy")
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "1?", "answer": "#### 1"}] * 6)
    assert "gsm8k: max_new_tokens must be below max_length (128); got 256" in with_tasks(
        "gsm8k", "--task_data", f"gsm8k={rows}", "--block_size", "128"
    )
    task = write_task(tmp_path, [{**SUMS[0], "right": 5}])
    assert "sums: row 0: answer must be between 0 and 1, the index of a choice; got 5" in with_tasks(task)
    assert "sums: columns must be in every row" in with_tasks(write_task(tmp_path, [{"question": "1"}]))
    assert "limit must be at least 1; got 0" in with_tasks("continuation", "--limit", "0")
    assert "batch_size must be at least 1; got 0" in with_tasks("continuation", "--batch_size", "0")
    assert "num_threads must be at least 1; got 0" in with_tasks("continuation", "--num_threads", "0")


def test_refuses_what_does_not_fit(
    saved_run: Path, two_runs: tuple[Path, Path], tmp_path: Path, refuses: Callable[..., str]
) -> None:
    assert "--data must be given for models whose runs held out different documents; got" in refuses(
        "--model", two_runs[0], saved_run
    )
    other = tmp_path / "run"
    (other / "model").mkdir(parents=True)
    for file in (saved_run / "model").iterdir():
        (other / "model" / file.name).write_bytes(file.read_bytes())
    (other / "validation.parquet").write_bytes((saved_run / "validation.parquet").read_bytes())
    train_tokenizer(["a text with other words, of which there are many more " * 9], vocab_size=320).save_pretrained(
        other / "model"
    )
    config = json.loads((other / "model" / "config.json").read_text())
    (other / "model" / "config.json").write_text(json.dumps(config | {"vocab_size": 260}))
    message = refuses("--model", other)
    assert "the tokenizer must have at most the model's vocab_size (260) entries; got " in message
