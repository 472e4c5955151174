"""scripts/analyze.py on stock models: the whole report, of each by itself and of all beside one of ours."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from playwright.sync_api import sync_playwright
from stock_balancing import FAMILIES, Seen
from test_report_in_browser import CHROMIUM, drawn
from transformers import PreTrainedTokenizerBase

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.analysis.architecture import load_model
from equipoise.data import evaluation_windows

SCRIPT = Path(__file__).parents[2] / "scripts" / "analyze.py"


def analyze(*arguments: object) -> None:
    before = sys.argv
    sys.argv = [str(SCRIPT), *map(str, arguments), "--permutations", "20", "--block_size", "24"]
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def reports(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset,
    tiny_config: Callable[..., MoEConfig],
) -> Path:
    """`NAME/out` for each family, and `comparison`, of these and of one model of ours."""
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(0)
    models = {name: make(vocab_size=len(tokenizer)) for name, make in FAMILIES.items()}
    models["ours"] = MoEForCausalLM(tiny_config(vocab_size=len(tokenizer)))
    for name, model in models.items():
        model.save_pretrained(folder / name / "model")
        tokenizer.save_pretrained(folder / name / "model")
        documents.to_parquet(folder / name / "validation.parquet")
    for name in FAMILIES:
        data = folder / name / "validation.parquet"
        analyze("--model", folder / name / "model", "--data", data, "--output", folder / name / "out")
    runs = [flag for name in models for flag in ("--run", folder / name)]
    analyze(*runs, "--output", folder / "comparison")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_its_numbers_are_those_of_the_model(
    reports: Path, tokenizer: PreTrainedTokenizerBase, documents: Dataset, family: str
) -> None:
    numbers = json.loads((reports / family / "out" / "analysis.json").read_text())
    seen = Seen(load_model(reports / family / "model").eval())
    load: torch.Tensor | int = 0
    overruled = tokens = 0
    for window in evaluation_windows(documents, tokenizer, 24):
        output = seen(input_ids=torch.tensor([window["input_ids"]]))
        chosen = [experts.flatten().bincount(minlength=8) for experts in output.selected_experts]
        load = load + torch.stack(chosen)
        first, scores = output.selected_experts[0], output.router_logits[0]
        left_out = scores.scatter(-1, first, -torch.inf).amax(-1)
        overruled += int((scores.gather(-1, first).amin(-1) < left_out).sum())
        tokens += len(window["input_ids"])
    assert [layer["load"] for layer in numbers["layers"]] == load.tolist()
    assert numbers["tokens"] == tokens
    assert numbers["layers"][0]["overruled_share"] == pytest.approx(overruled / tokens)
    # Only the limit to groups overrules scores in a model that no training has touched.
    assert (overruled > 0) == (family == "deepseek_v3")
    assert numbers["mean_over_layers"]["untrained_bits"] > 0
    single = reports / "comparison" / family / "analysis.json"
    assert json.loads(single.read_text())["layers"] == numbers["layers"]


def test_the_page_says_which_models_they_are(reports: Path) -> None:
    page = (reports / "comparison" / "report.html").read_text(encoding="utf-8")
    for name in ("Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "OlmoeForCausalLM", "MoEForCausalLM"):
        assert f"<td>{name}</td>" in page
    assert "The number of MoE layers differs (qwen3_moe 3, deepseek_v3 2, olmoe 3, ours 2)" in page
    assert (
        "The routers score differently (qwen3_moe softmax, deepseek_v3 sigmoid, olmoe softmax, ours softmax)" in page
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
def test_the_pages_are_drawn(reports: Path) -> None:
    wrong: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        for folder in [reports / name / "out" for name in FAMILIES] + [reports / "comparison"]:
            page.goto((folder / "report.html").as_uri())
            drawn(page)
            assert page.locator("svg.marks").count() > 5
            page.screenshot(path=folder / "screenshot.png", full_page=True)
        browser.close()
    assert wrong == []
