"""The benchmark of stock models measures what it says: its loads are `inspect`'s, its loss is the cross-entropy."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import set_seed

import equipoise

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import stock_fine_tuning as benchmark


@pytest.fixture(scope="module")
def arguments(corpus: Path) -> benchmark.Arguments:
    return benchmark.Arguments(
        data=str(corpus), output="", figure="", seeds=1, steps=3, evaluation_steps=2, micro_batch_size=2,
        block_size=32, held_out_windows=4, vocab_size=300, train_bytes_per_domain=100_000,
    )  # fmt: skip


def test_each_arm_is_measured_alike(arguments: benchmark.Arguments) -> None:
    windows, held_out, tokenizer = benchmark.read_windows(arguments)
    assert {len(ids) for ids in (*windows["input_ids"], *held_out["input_ids"])} == {32}
    assert held_out["domain"][:] == ["code"] * 4 + ["prose"] * 4
    results: dict = {benchmark.QWEN: {}, benchmark.DEEPSEEK: {}}
    for arm in benchmark.ARMS:
        run = benchmark.train(arm, 0, arguments, windows, held_out, len(tokenizer))
        results[arm[0]][arm[1]] = [run]
        assert [each["step"] for each in run["evaluations"]] == [0, 2, 3]
        assert len(run["max_vio_batch"]) == len(run["max_vio_micro"]) == 3
        assert all(
            micro >= batch - 1e-4 for micro, batch in zip(run["max_vio_micro"], run["max_vio_batch"], strict=True)
        )
    for family, arms in results.items():
        before = [run["before"] for [run] in arms.values()]
        assert all(each == before[0] for each in before)  # the arms begin alike
        set_seed(0)
        model = benchmark.build(family, len(tokenizer), stock_loss=family == benchmark.QWEN).eval()
        rows = held_out.select_columns(["input_ids", "labels"]).with_format("torch")
        found = equipoise.inspect(model, DataLoader(rows, 8))
        assert before[0]["max_vio_global"] == pytest.approx(
            sum(layer.max_vio for layer in found.layers) / len(found.layers), abs=1e-4
        )
        with torch.no_grad():
            logits = model(input_ids=rows[:]["input_ids"]).logits[:, :-1].flatten(0, 1)
        expected = cross_entropy(logits, rows[:]["labels"][:, 1:].flatten())
        assert before[0]["cross_entropy"] == pytest.approx(float(expected), abs=1e-3)
    assert len(benchmark.draw(results).axes) == 4
