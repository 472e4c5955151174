"""The balancing on every MoE family of the installed Transformers, against formulas; and the table that says so."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import equipoise
from equipoise.integrations import find_routers

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


def with_image(model: Any) -> dict[str, torch.Tensor]:
    """Two sequences with an image of 16 patches in the first, and padding in the second."""
    ids = torch.randint(2, 80, (2, 21), generator=torch.Generator().manual_seed(0))
    model.config.image_token_id = 90
    ids[0, 2:18] = 90
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill((mask == 0) | (ids == 90), -100),
        "pixel_values": torch.randn(16, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 90).int(),
    }


def test_images_are_tokens_of_a_vision_language_model() -> None:
    """The routers of the nested language part see them as they see words."""
    model = tabulate["tiny_model"]("Qwen3VLMoeForConditionalGeneration")
    batch = with_image(model)
    routers = find_routers(model)
    balancer = equipoise.balance(model, "micro_batch", router_aux_loss_coef=1.0)
    watch = tabulate["Watch"](model, routers)
    outputs = model(**batch)
    outputs.loss.backward()
    assert balancer.synchronizer.running is not None
    mask = batch["attention_mask"].bool()
    assert balancer.synchronizer.running.load.tolist() == [watch.load(layer, mask) for layer in range(len(routers))]
    assert int(balancer.synchronizer.running.tokens) == 36
    formula = torch.zeros((), dtype=torch.float64)
    for layer in range(len(routers)):
        load = torch.tensor(watch.load(layer, mask), dtype=torch.float64)
        score = watch.logits[layer].softmax(-1)[mask.flatten()].mean(0)
        formula = formula + len(load) * (load / load.sum() * score).sum() / len(routers)
    torch.testing.assert_close(outputs.aux_loss.double(), formula, atol=1e-6, rtol=1e-6)
