"""What a run says of itself: losses by domain, operations, times, trackers."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from training_runs import ARCHITECTURE, lines, settings, train_in_process, written

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.configuration import DataSettings, parse_run_settings
from equipoise.data import load_tokenizer, open_corpus
from equipoise.training import train
from equipoise.training.flops import peak_flops, training_flops_per_token
from equipoise.training.panels import TENSORBOARD_LAYOUT, panels
from equipoise.training.phases import PHASES, PhaseTimes

Make = Callable[..., MoEConfig]


@pytest.mark.parametrize("micro_batch_domains", ["mixed", "single"])
def test_losses_by_domain_add_up_to_the_loss(
    micro_batch_domains: str, corpus: Path, tmp_path: Path, run_processes: Callable
) -> None:
    values = settings(
        corpus, tmp_path / "run", micro_batch_domains=micro_batch_domains, global_batch_size=8, max_steps=6
    )
    run_processes(2, train_in_process, [written(tmp_path, values | {"logging_steps": 3})])
    for line in lines(tmp_path / "run" / "metrics.jsonl"):
        assert set(line["domain_loss"]) <= {"code", "prose"}
        low, high = min(line["domain_loss"].values()), max(line["domain_loss"].values())
        assert low - 1e-3 <= line["lm_loss"] <= high + 1e-3
    # Before the first step every token costs log V, nearly.
    first = lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert all(loss == pytest.approx(math.log(512), abs=0.3) for loss in first["domain_loss"].values())


@pytest.mark.parametrize("shared", [0, 1])
def test_operations_are_those_that_torch_counts(shared: int, tiny_config: Make) -> None:
    config = tiny_config(num_shared_experts=shared, attention_bias=True)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = MoEForCausalLM(config)
    ids = torch.randint(2, 64, (2, 32))
    # The counter knows torch's own products, not oneDNN's.
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    counted = counter.get_total_flops() / ids.numel()
    # The first layer's inputs are embeddings, whose gradient needs no matrix product: all else is counted.
    assert training_flops_per_token(model, config, 32) == pytest.approx(counted, rel=0.02)


def test_the_peak_is_what_is_given_or_known() -> None:
    assert peak_flops(torch.device("cpu"), None, "bf16") is None
    assert peak_flops(torch.device("cpu"), 0.5, "no") == 5e11


def test_phases_add_up_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    times = PhaseTimes(measuring=True)
    for phase in ("data", "forward", "backward", "forward", "backward", "synchronisation", "optimizer"):
        with times(phase):
            pass
    assert times.seconds == {"data": 1, "forward": 2, "backward": 2, "synchronisation": 1, "optimizer": 1}


def test_a_run_logs_times_utilisation_and_trackers(corpus: Path, tmp_path: Path) -> None:
    flags = ["--trackers", "tensorboard", "--peak_teraflops", "0.1"]
    run = train(parse_run_settings([written(tmp_path, settings(corpus, tmp_path / "run")), *flags]))
    logged = lines(run.path / "metrics.jsonl")
    for line in logged:
        assert set(line["step_seconds"]) == set(PHASES)
        assert min(line["step_seconds"].values()) >= 0
        assert line["model_flops_utilisation"] == pytest.approx(line["teraflops_per_device"] / 0.1)
        per_token = line["teraflops_per_device"] * 1e12 / line["tokens_per_second"]
        assert per_token == pytest.approx(logged[0]["teraflops_per_device"] * 1e12 / logged[0]["tokens_per_second"])
    assert len(list((run.path / "equipoise").rglob("events.out.tfevents.*"))) >= 1


def test_panels_group_by_domain_layer_and_kind() -> None:
    """Trackers make one panel of what stands before the first slash."""
    record = {
        "lm_loss": 2.5,
        "domain_loss": {"code": 2.0, "law/fr": 3.0},
        "max_vio_batch": [0.5, 1.5],
        "load_entropy": [0.9, 0.7],
        "dead_experts": [0, 2],
        "grad_norm": None,
        "tokens_per_second": 100,
        "step_seconds": {"data": 0.1},
    }
    assert panels(record) == {
        "loss/lm_loss": 2.5,
        "loss_by_domain/code": 2.0,
        "loss_by_domain/law/fr": 3.0,
        "max_vio_batch_by_layer/0": 0.5,
        "max_vio_batch_by_layer/1": 1.5,
        "balance/max_vio_batch_mean": 1.0,
        "balance/max_vio_batch_worst": 1.5,
        "load_entropy_by_layer/0": 0.9,
        "load_entropy_by_layer/1": 0.7,
        "balance/load_entropy_mean": pytest.approx(0.8),
        "balance/load_entropy_worst": 0.7,
        "dead_experts_by_layer/0": 0,
        "dead_experts_by_layer/1": 2,
        "balance/dead_experts_mean": 1,
        "balance/dead_experts_worst": 2,
        "pace/tokens_per_second": 100,
        "step_seconds/data": 0.1,
    }


def test_every_line_that_is_logged_has_a_panel(corpus: Path, tmp_path: Path) -> None:
    """A measure that is added without one would be found under `pace`."""
    overrides = ARCHITECTURE | {"balancing_mode": "loss_free", "scoring_func": "sigmoid", "router_z_loss_coef": 0.1}
    values = settings(corpus, tmp_path / "run", max_steps=2, logging_steps=1, config_overrides=overrides)
    run = train(parse_run_settings([written(tmp_path, values)]))
    groups: dict[str, set[str]] = {}
    for line in lines(run.path / "metrics.jsonl"):
        for name in panels(line):
            groups.setdefault(name.split("/")[0], set()).add(name.split("/")[1])
    assert groups["loss"] == {"lm_loss", "aux_loss", "router_z_loss"}
    assert groups["loss_by_domain"] == {"code", "prose"}
    assert groups["optimization"] == {"learning_rate", "grad_norm", "skipped_steps"}
    assert groups["pace"] == {"step", "tokens", "tokens_per_second", "teraflops_per_device", "seconds"}
    assert groups["bias_range_by_layer"] == {"0", "1"}
    charts = [chart[1] for category in TENSORBOARD_LAYOUT.values() for chart in category.values()]
    tags = [f"{group}/{name}" for group, names in groups.items() for name in names]
    for patterns in charts:
        assert all(any(re.fullmatch(pattern, tag) for tag in tags) for pattern in patterns), patterns


def test_what_the_run_was_trained_on_is_written_beside_it(corpus: Path, tmp_path: Path) -> None:
    run = train(parse_run_settings([written(tmp_path, settings(corpus, tmp_path / "run", max_steps=2))]))
    described = json.loads((run.path / "data.json").read_text())
    assert set(described) == {"code", "prose"}
    expected = open_corpus(DataSettings(data=str(corpus), max_train_bytes_per_domain=300_000), seed=0)
    assert described["code"]["key"] == expected.description()["code"]["key"]
    epochs = json.loads((run.path / "training.json").read_text())["epochs"]
    assert all(0 <= value < 1 for value in epochs.values())
    assert len(load_tokenizer(run.path / "tokenizer")) == 512


def test_compiled_layers_train_as_uncompiled_ones(corpus: Path, tmp_path: Path) -> None:
    overrides = ARCHITECTURE | {"balancing_mode": "global_batch", "num_hidden_layers": 1}
    runs = {}
    for compiled in (False, True):
        values = settings(corpus, tmp_path / f"{compiled}", max_steps=3, logging_steps=1, config_overrides=overrides)
        runs[compiled] = train(parse_run_settings([written(tmp_path, values | {"compile": compiled})]))
    for first, second in zip(*(lines(run.path / "metrics.jsonl") for run in runs.values()), strict=True):
        assert second["lm_loss"] == pytest.approx(first["lm_loss"], abs=1e-4)
        assert second["max_vio_batch"] == pytest.approx(first["max_vio_batch"], abs=0.1)
