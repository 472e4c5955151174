"""The balancing on every MoE family of the installed Transformers, against formulas; and the table that says so."""

import re
import runpy
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[2]
tabulate = runpy.run_path(str(ROOT / "scripts/tabulate_stock_models.py"))
FAMILIES = tabulate["families"]()
PAGE = (ROOT / "docs/stock_models.md").read_text(encoding="utf-8")
TABLE = {
    line.split("`")[1]: line for line in tabulate["MARKED"].search(PAGE)[2].splitlines() if line.startswith("| `")
}

ENCODER_DECODERS = {"NllbMoeForConditionalGeneration", "SwitchTransformersForConditionalGeneration"}
NO_LABELS = {"DiffusionGemmaForBlockDiffusion", "Qwen3OmniMoeForConditionalGeneration"}
BEFORE_5_23 = {
    # What shows neither logits nor selection yet, or has no forward that runs.
    "AriaForConditionalGeneration",
    "AriaTextForCausalLM",
    "DogeForCausalLM",
    "LongcatFlashForCausalLM",
}
OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
DO_NOT_WORK = ENCODER_DECODERS | NO_LABELS | (BEFORE_5_23 if OLD else set())


@pytest.mark.parametrize("name", FAMILIES)
def test_balances_as_the_formulas_say(name: str) -> None:
    trial = tabulate["try_family"](name)
    if name in DO_NOT_WORK:
        assert isinstance(trial, str), "it works: take it off the list, and write the table anew"
        if name in ENCODER_DECODERS:
            assert "decoder alone" in trial
    else:
        assert not isinstance(trial, str), trial
        assert trial.works, tabulate["row"](name, FAMILIES[name], trial)
        if not OLD:
            # A figure in a page may differ between machines, what it says may not.
            assert shape(tabulate["row"](name, FAMILIES[name], trial)) == shape(TABLE[name])


def shape(row: str) -> str:
    return re.sub(r"\d+e[-+]\d+", "0e0", row)


def test_there_are_more_than_forty_model_types() -> None:
    assert len({each for name, types in FAMILIES.items() if name not in DO_NOT_WORK for each in types}) > 40


@pytest.mark.skipif(OLD, reason="the page is written with Transformers 5.23")
def test_the_page_lists_every_family() -> None:
    assert set(TABLE) == set(FAMILIES)


@pytest.mark.skipif(not OLD, reason="holds older versions against the page")
def test_nothing_of_the_page_is_missing_in_an_older_version() -> None:
    assert set(FAMILIES) - set(TABLE) == set()
