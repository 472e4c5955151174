"""The guard: what it lets through, what it skips, when it gives up, and that it remembers."""

import json
import math
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_runs import lines, settings, weights, written

from equipoise.configuration import parse_run_settings
from equipoise.data import MicroBatches
from equipoise.training import loop, train
from equipoise.training.spike_guard import WINDOW, SpikeGuard


@given(values=st.lists(st.floats(0.1, 10), min_size=WINDOW + 1, max_size=WINDOW + 40), sigma=st.floats(0.5, 8))
def test_a_spike_is_what_exceeds_the_window(values: list[float], sigma: float) -> None:
    guard = SpikeGuard(sigma, patience=10**6)
    seen: list[float] = []
    for value in values:
        window = seen[-WINDOW:]
        spike = len(window) == WINDOW and value > fmean(window) + sigma * pstdev(window)
        assert (guard.objection(value, 1.0) is not None) == spike
        if not spike:
            seen.append(value)


@pytest.mark.parametrize("column", [0, 1])
def test_a_spike_of_loss_or_of_norm_is_skipped_and_does_not_move_the_limit(column: int) -> None:
    generator = torch.Generator().manual_seed(0)
    seen = (2 + torch.rand(WINDOW, generator=generator)).tolist()
    guard = SpikeGuard(6, patience=100)
    for value in seen:
        assert guard.objection(*((value, 1.0) if column == 0 else (1.0, value))) is None
    limit = fmean(seen) + 6 * pstdev(seen)
    pair = (limit * 1.001, 1.0) if column == 0 else (1.0, limit * 1.001)
    name = ("loss", "grad_norm")[column]
    for _ in range(3):  # again and again: skipped steps do not enter the mean
        assert str(guard.objection(*pair)).startswith(f"{name} must be at most {limit:.4g}, 6 sigma above the mean")
    pair = (limit * 0.999, 1.0) if column == 0 else (1.0, limit * 0.999)
    assert guard.objection(*pair) is None
    assert guard.skipped == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(value: float) -> None:
    guard = SpikeGuard(0, patience=3)
    assert guard.objection(1e30, 1e30) is None  # without sigma nothing finite is out of line
    for _ in range(2):
        assert "loss must be finite" in str(guard.objection(value, 1.0))
        assert not guard.exhausted
    assert "grad_norm must be finite" in str(guard.objection(1.0, value))
    assert guard.exhausted
    assert guard.objection(1.0, 1.0) is None
    assert not guard.exhausted


def test_it_goes_on_as_if_it_had_not_been_interrupted() -> None:
    generator = torch.Generator().manual_seed(1)
    values = [tuple(pair) for pair in (1 + torch.rand(300, 2, generator=generator)).double().tolist()]
    straight, first = SpikeGuard(1.5, 100), SpikeGuard(1.5, 100)
    expected = [straight.objection(*pair) for pair in values]
    got = [first.objection(*pair) for pair in values[:200]]
    resumed = SpikeGuard(1.5, 100)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    got += [resumed.objection(*pair) for pair in values[200:]]
    assert got == expected
    assert any(expected)
    assert resumed.skipped == straight.skipped


def test_a_batch_that_explodes_is_skipped_and_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step's gradient is not a number: the weights, the momenta and the biases do not see it."""
    bad_step = 5

    def poisoned(self: Any, *rest: Any) -> Any:
        for number, batches in enumerate(steps(self, *rest), start=1):
            if number == bad_step:
                hook[0] = model[0].lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
            elif hook[0] is not None:
                hook[0].remove()
            yield batches

    steps, hook, model = MicroBatches.steps, [None], []
    prepare = loop.prepare

    def spied(*arguments: Any) -> Any:
        prepared = prepare(*arguments)
        model.append(prepared.distribution.model)
        return prepared

    monkeypatch.setattr(MicroBatches, "steps", poisoned)
    monkeypatch.setattr(loop, "prepare", spied)
    values = settings(corpus, tmp_path / "run", max_steps=8, logging_steps=1, global_batch_size=4)
    train(parse_run_settings([written(tmp_path, values)]))

    (skipped,) = lines(tmp_path / "run" / "skipped.jsonl")
    assert skipped["step"] == bad_step
    assert skipped["why"] == "grad_norm must be finite; got nan"
    assert [len(batch["blocks"]) for batch in skipped["micro_batches"]] == [2, 2]
    assert {domain for batch in skipped["micro_batches"] for domain in batch["domains"]} <= {"code", "prose"}
    logged = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped_steps"] for line in logged] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert "lm_loss" not in logged[4]  # no step was made since the line before
    assert all(math.isfinite(line["lm_loss"]) for line in logged if line["step"] != bad_step)
    assert logged[4]["max_vio_batch"] == logged[3]["max_vio_batch"]  # no bias was moved by it
    for weight in weights(tmp_path / "run" / "model").values():
        assert torch.isfinite(weight).all()
    assert json.loads((tmp_path / "run" / "training.json").read_text())["skipped_steps"] == 1
