"""scripts/analyze.py, from a run directory to the report."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from equipoise import MoEForCausalLM
from equipoise.analysis import RoutingTrace, analyse, trace_routing

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
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPT),
            "--run",
            str(run),
            "--block_size",
            "24",
            "--permutations",
            "200",
            "--save_trace",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (run / "analysis").iterdir()) == [
        "analysis.json", "load.png", "specialisation.png", "trace.safetensors", "training.png"
    ]  # fmt: skip
    numbers = json.loads((run / "analysis" / "analysis.json").read_text())
    trace = trace_routing(model, tokenizer, documents, block_size=24)
    assert numbers == json.loads(json.dumps(analyse(trace, block_size=24, permutations=200)))
    assert RoutingTrace.load_file(run / "analysis" / "trace.safetensors").load.equal(trace.load)
    for layer in numbers["layers"]:
        assert f"{layer['mutual_information_bits']:.3f}" in done.stdout
        assert sum(layer["load"]) == numbers["tokens"] * numbers["num_experts_per_tok"]
        assert all(sum(shares) == pytest.approx(1) for shares in layer["load_by_domain"].values())
    assert numbers["domains"]["code"]["documents"] == 6
    for picture in ("specialisation.png", "load.png", "training.png"):
        assert str(run / "analysis" / picture) in done.stdout


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_analyses_a_model_without_a_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = run / "validation.parquet"
    call(monkeypatch, "--model", run / "model", "--data", data, "--output", tmp_path / "new" / "out")
    written = sorted(path.name for path in (tmp_path / "new" / "out").iterdir())
    assert written == ["analysis.json", "specialisation.png"]


def test_says_what_is_missing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in [
        (["--model", run / "model"], "--run, or --model, --data and --output, must be given; got no data, output"),
        (["--run", tmp_path], f"the model must be a folder with a config.json; got {tmp_path / 'model'}"),
        (["--run", tmp_path, "--model", run / "model"], "--data must be given for a run without validation.parquet"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            call(monkeypatch, *arguments)
        assert str(stopped.value.code).startswith(f"error: {message}")
