"""scripts/analyze.py, from run directories to the report."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from equipoise import MoEForCausalLM
from equipoise.analysis import (
    MeasurementSettings,
    Measurer,
    RoutingTrace,
    RunInput,
    RunRecord,
    analyse,
    trace_routing,
)

SCRIPT = Path(__file__).parents[2] / "scripts" / "analyze.py"


@pytest.fixture(scope="module")
def run(saved_run: Path) -> Path:
    load, metrics = saved_run / "load.jsonl", saved_run / "metrics.jsonl"
    load.write_text("".join(f'{{"step": {n}, "load": {[[n, 9, 8, 7, 6, 5, 4, 0]] * 2}}}\n' for n in range(5)))
    metrics.write_text(
        "".join(f'{{"step": {n}, "tokens": {n}, "lm_loss": {9 - n}, "max_vio_micro": [1.0, {n}]}}\n' for n in range(5))
    )
    return saved_run


def test_analyses_a_run(
    run: Path, model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: Dataset, tmp_path: Path
) -> None:
    flags = ["--run", str(run), "--block_size", "24", "--permutations", "200", "--save_trace"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (run / "analysis").iterdir()) == [
        "analysis.json", "figures", "load.png", "load.svg", "report.html", "specialisation.png", "specialisation.svg",
        "trace.safetensors", "training.png", "training.svg",
    ]  # fmt: skip
    numbers = json.loads((run / "analysis" / "analysis.json").read_text())
    measurer = Measurer(MeasurementSettings(permutations=200), layers=[0, 1], num_tokens=8)
    data = run / "validation.parquet"
    found = measurer.measure(RunInput(run.name, run / "model", documents, 24, RunRecord.read(run), data))
    assert numbers == json.loads(json.dumps(analyse(found)))
    trace = trace_routing(model, tokenizer, documents, block_size=24)
    assert RoutingTrace.load_file(run / "analysis" / "trace.safetensors").load.equal(trace.load)
    for layer in numbers["layers"]:
        assert f"{layer['mutual_information_bits']:.3f}" in done.stdout
        assert sum(layer["load"]) == numbers["tokens"] * numbers["num_experts_per_tok"]
        assert all(sum(shares) == pytest.approx(1) for shares in layer["load_by_domain"].values())
    assert numbers["domains"]["code"]["documents"] == 6
    for name in ("report.html", "analysis.json", "figures"):
        assert str(run / "analysis" / name) in done.stdout
    page = (run / "analysis" / "report.html").read_text(encoding="utf-8")
    assert f"Routing report: {run.name}" in page


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_compares_runs_and_says_what_it_leaves_out(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The second run knows one domain more, and was told nothing else of its training.
    other = tmp_path / "other"
    shutil.copytree(run / "model", other / "model")
    documents = Dataset.from_parquet(str(run / "validation.parquet"))
    more = Dataset.from_list([{"text": "Chat and hat. " * 9, "domain": "rhymes"}])
    concatenate_datasets([documents, more]).to_parquet(other / "validation.parquet")
    output = tmp_path / "comparison"
    call(monkeypatch, "--run", run, "--run", other, "--output", output, "--permutations", 20, "--no_untrained")
    assert sorted(path.name for path in output.iterdir()) == sorted(["figures", "report.html", run.name, "other"])
    for name in (run.name, "other"):
        numbers = json.loads((output / name / "analysis.json").read_text())
        assert list(numbers["domains"]) == ["code", "ja", "law"]
        assert numbers["mean_over_layers"]["untrained_bits"] is None
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "Measured are the 3 that all of them have (code, ja, law); left out are rhymes." in page


def test_analyses_a_model_without_a_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = run / "validation.parquet"
    call(monkeypatch, "--model", run / "model", "--data", data, "--output", tmp_path / "new" / "out")
    written = sorted(path.name for path in (tmp_path / "new" / "out").iterdir())
    assert written == ["analysis.json", "figures", "report.html", "specialisation.png", "specialisation.svg"]


def test_says_what_is_missing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in [
        (["--model", run / "model"], "--run, or --model, --data and --output, must be given; got no data, output"),
        (["--run", tmp_path], f"the model must be a folder with a config.json; got {tmp_path / 'model'}"),
        (["--run", tmp_path, "--model", run / "model"], "--data must be given for a run without validation.parquet"),
        (["--run", run, run], "--output must be given for several runs; got none"),
        (
            ["--run", run, run, "--output", tmp_path, "--model", run / "model"],
            "--model must not be given for several runs",
        ),
        (["--run", run, run, "--output", tmp_path], "run must name folders of different names; got"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            call(monkeypatch, *arguments)
        assert str(stopped.value.code).startswith(f"error: {message}")
