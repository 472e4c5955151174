"""scripts/evaluate_model.py, from a run directory to evaluation.json."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from equipoise import MoEForCausalLM
from equipoise.evaluation import evaluate_domains

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_model.py"


def test_writes_what_evaluate_domains_returns(
    saved_run: Path, model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: Dataset, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--model", str(saved_run), "--block_size", "24"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = evaluate_domains(model, tokenizer, documents, block_size=24)
    written = json.loads((saved_run / "evaluation.json").read_text())
    for domain, result in expected.items():
        assert written["domains"][domain] == pytest.approx(result, rel=1e-6)
        assert f"{domain} " in done.stdout
    assert f"{expected['all']['bits_per_byte']:.4f}" in done.stdout
    assert [path.name for path in saved_run.iterdir() if path.name.startswith(".")] == []


def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return str(stopped.value.code) + capsys.readouterr().err


def test_says_what_is_missing(
    saved_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert "--model" in fails(monkeypatch, capsys)
    missing = fails(monkeypatch, capsys, "--model", tmp_path)
    assert (
        f"--model must be a folder with a config.json, or a run directory that holds model/; got {tmp_path}" in missing
    )
    alone = tmp_path / "elsewhere" / "weights"
    alone.parent.mkdir()
    alone.symlink_to(saved_run / "model")
    assert "--data must be given" in fails(monkeypatch, capsys, "--model", alone)
    data = saved_run / "validation.parquet"
    assert "--output must be given" in fails(monkeypatch, capsys, "--model", alone, "--data", data)
