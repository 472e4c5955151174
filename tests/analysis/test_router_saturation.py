"""Router saturation of models whose agreement is known."""

from pathlib import Path

import pytest
import torch
from planted import by_domain, evenly, planted_documents, planted_model, planted_tokenizer

from equipoise.analysis.router_saturation import _overlap, measure_saturation
from equipoise.data import evaluation_windows


def test_checkpoints_that_agree_in_part(tmp_path: Path) -> None:
    tokenizer = planted_tokenizer()
    windows = evaluation_windows(planted_documents(documents=4), tokenizer, 64)
    final = planted_model(tokenizer, [by_domain, evenly])
    # The first layer already routes as at the end; the second goes by domain, and so agrees where the two tables do.
    planted_model(tokenizer, [by_domain, by_domain]).save_pretrained(tmp_path / "early")
    final.save_pretrained(tmp_path / "late")
    found = measure_saturation(final, {20: tmp_path / "late", 10: tmp_path / "early"}, windows, batch_size=5)
    assert found.steps == (10, 20)
    assert found.tokens == sum(len(ids) for ids in windows["input_ids"])
    names = {tokenizer.encode(letter)[0]: letter for letter in "abcdefghijklmnopqrstuvwx"}
    tokens = [names.get(token) for ids in windows["input_ids"] for token in ids]
    agree = [letter is None or by_domain(letter) == evenly(letter) for letter in tokens]
    assert found.share[0].tolist() == pytest.approx([1, sum(agree) / len(agree)])
    assert found.share[1].tolist() == [1, 1]


def test_overlap_counts_experts_whatever_their_order() -> None:
    first = torch.tensor([[[0, 1, 2], [3, 4, 5]]])
    second = torch.tensor([[[2, 7, 0], [6, 7, 8]]])
    torch.testing.assert_close(_overlap(first, second), torch.tensor([[2 / 3, 0]]))
