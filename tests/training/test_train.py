"""Training for real: the script under its launcher, in one process and in two, on real text."""

import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from training_runs import ARCHITECTURE, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise import MoEForCausalLM
from equipoise.configuration import parse_run_settings
from equipoise.training import prepare, train

ROOT = Path(__file__).parents[2]


def launch(processes: int, file: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, str(ROOT / "scripts" / "train.py"), str(file)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of processes -> a run; both see the same global batches in the same order."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}
    for processes in (1, 2):
        file = folder / f"{processes}.yaml"
        runs[processes] = folder / f"run{processes}"
        values = settings(corpus, runs[processes], global_batch_size=4)
        file.write_text(yaml.safe_dump(values))
        done = launch(processes, file)
        assert done.returncode == 0, done.stderr[-6000:]
    return runs


@pytest.mark.processes
def test_two_processes_train_as_one_with_twice_the_accumulation(runs: dict[int, Path]) -> None:
    one, two = runs[1], runs[2]
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    assert [line["step"] for line in lines[0]] == [1, 4, 8, 12]
    for first, second in zip(*lines, strict=True):
        assert second["lm_loss"] == pytest.approx(first["lm_loss"], abs=1e-4)
        assert second["tokens"] == first["tokens"]
    assert lines[1][-1]["lm_loss"] < lines[1][0]["lm_loss"] - 0.5

    loads = [
        [json.loads(line)["load"] for line in (run / "load.jsonl").read_text().splitlines()] for run in (one, two)
    ]
    assert loads[0][0] == loads[1][0]  # before any rounding could differ
    tokens_per_step, per_token = 2 * 2 * 64, 2
    assert torch.tensor(loads).sum(-1).eq(tokens_per_step * per_token).all()

    summary = json.loads((two / "training.json").read_text())
    assert (summary["world_size"], summary["steps"], summary["tokens"]) == (2, 12, 12 * tokens_per_step)
    assert summary["lm_loss_end"] == lines[1][-1]["lm_loss"]
    assert summary["domains"] == ["code", "prose"]

    model = AutoModelForCausalLM.from_pretrained(two / "model")
    tokenizer = AutoTokenizer.from_pretrained(two / "model")
    assert isinstance(model, MoEForCausalLM)
    assert model.selection_biases()[0].abs().max() > 0
    prompt = tokenizer("def ", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] == prompt["input_ids"].shape[1] + 4
    reference = AutoModelForCausalLM.from_pretrained(one / "model")
    for name, weight in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=1e-5, rtol=0, msg=name)
    assert [path.name for path in two.iterdir() if path.name.startswith(".")] == [".lock"]


def test_every_step_is_one_optimizer_step(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate, left alone, ends the accumulation wherever the data loader ends: in every micro-step of the last."""
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *rest: (steps.append(1), step(self, *rest))[1])
    values = settings(corpus, tmp_path / "run", max_steps=3, global_batch_size=8)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    train(parse_run_settings([str(tmp_path / "settings.yaml")]))
    assert len(steps) == 3


def test_a_loss_that_is_not_finite_stops_the_run(corpus: Path, tmp_path: Path) -> None:
    values = settings(corpus, tmp_path / "run", learning_rate=1e30, max_grad_norm=0, logging_steps=1, max_steps=20)
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(
        FloatingPointError,
        match=r"10 steps in a row were skipped, the last, 1\d, .* (loss|grad_norm) must be finite; got (nan|inf)",
    ):
        train(parse_run_settings([str(tmp_path / "settings.yaml")]))
    assert not (tmp_path / "run" / "model").exists()


def test_a_model_that_cannot_be_spread_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    values = settings(corpus, tmp_path / "run", sharding="fsdp")
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="sharding must be none in a single process"):
        train(parse_run_settings([str(tmp_path / "settings.yaml")]))
    assert not list(tmp_path.glob("*run*"))


def test_an_activation_that_does_not_exist_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    values = settings(corpus, tmp_path / "run")
    values["config_overrides"] |= {"hidden_act": "silou"}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match="hidden_act must be an activation that Transformers knows; got silou"):
        train(parse_run_settings([str(tmp_path / "settings.yaml")]))
    assert not list(tmp_path.glob("*run*"))


def test_bf16_and_gradient_checkpointing(corpus: Path, tmp_path: Path) -> None:
    values = settings(
        corpus,
        tmp_path / "run",
        mixed_precision="bf16",
        gradient_checkpointing=True,
        config_overrides=ARCHITECTURE | {"balancing_mode": "global_batch", "complementary_balancing_mode": "sequence"},
    )
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    done = launch(1, tmp_path / "settings.yaml")
    assert done.returncode == 0, done.stderr[-6000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["lm_loss"] < lines[0]["lm_loss"] - 0.2
    for line in lines:
        # Every term apart, and together what was added to the loss: 0.01 and 0.0001 are the coefficients' defaults.
        by_hand = 0.01 * line["load_balancing_loss"] + 0.0001 * line["complementary_loss"]
        assert line["aux_loss"] == pytest.approx(by_hand, rel=0.05)
        assert line["load_balancing_loss"] >= 0.9
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.processes
def test_a_run_is_evaluated_analysed_and_summarised_from_its_files(runs: dict[int, Path]) -> None:
    run = runs[2]
    for script, flags in (
        ("evaluate_model", ["--model", str(run)]),
        ("analyze", ["--run", str(run), "--permutations", "50"]),
        ("summarize_run", [str(run)]),
    ):
        command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert str(run / "analysis" / "specialisation.png") in done.stdout

    summary = json.loads((run / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"], summary["tokens"]) == (2, 12, 12 * 2 * 2 * 64)
    assert summary["lm_loss_start"] > summary["lm_loss_end"] > 0
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"])
    assert set(summary["bits_per_byte"]) == {"code", "prose", "all"}
    # log2(512) bits a token at chance, some 2 bytes a token: better than chance, and no better than a good model.
    assert all(1 < bits < 6 for bits in summary["bits_per_byte"].values())
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (summary["max_vio_batch"], summary["max_vio_micro"]) == (last["max_vio_batch"], last["max_vio_micro"])
    by_layer = ["max_vio_global", "dead_experts", "mutual_information_bits", "mutual_information_null_bits"]
    assert {len(summary[name]) for name in by_layer} == {2}
    for name in ("evaluation.json", "analysis/analysis.json"):  # measured at the context it was trained at
        assert json.loads((run / name).read_text())["settings"]["block_size"] == 64
    assert set(summary["versions"]) == {"equipoise", "torch", "transformers", "accelerate"}


@pytest.mark.parametrize(
    ("changes", "overrides", "words"),
    [
        ({}, {"balancing_mode": "global"}, "balancing_mode"),
        ({}, {"num_experts_per_tok": 9}, "num_experts_per_tok must be between 1 and num_experts (8); got 9"),
        ({}, {"n_group": 3}, "n_group must divide num_experts (8); got 3"),
        ({}, {"num_expert": 4}, "config_overrides must name fields of MoEConfig; got num_expert"),
        ({"preset": "hub_configs/none"}, {}, "preset must be a folder with a config.json; got hub_configs/none"),
        ({"block_size": 2048}, {}, "block_size must be at most max_position_embeddings (1024); got 2048"),
        ({"data": "no/such/folder"}, {}, "no/such/folder"),
        ({"text_column": "body"}, {}, "body"),
        ({"tokenizer": "no/such/tokenizer"}, {}, "tokenizer must be the name or folder of a tokenizer"),
        ({}, {"rope_parameters": {"rope_type": "yarn"}}, "factor"),
    ],
)
def test_bad_input_is_refused_before_training(
    changes: dict, overrides: dict, words: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((ValueError, StrictDataclassError)) as refused:
        try_to_train(settings(corpus, tmp_path / "run", **changes), overrides, tmp_path, monkeypatch)
    assert words in str(refused.value)
    assert not list(tmp_path.glob("run*")), "a refused run leaves nothing behind"
    assert not list(tmp_path.glob(".run*"))


def try_to_train(values: dict, overrides: dict, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def training_has_started(*_: object) -> None:
        raise AssertionError("a model was built: the input should have been refused before")

    monkeypatch.setattr(prepare, "MoEForCausalLM", training_has_started)
    values["config_overrides"] = values["config_overrides"] | overrides
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(values))
    train(parse_run_settings([str(file)]))


def test_an_empty_domain_is_refused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus" / "poetry").mkdir(parents=True)
    (tmp_path / "corpus" / "code").symlink_to(corpus / "code")
    for split in ("train", "validation"):
        (tmp_path / "corpus" / "poetry" / f"{split}.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="poetry"):
        try_to_train(settings(tmp_path / "corpus", tmp_path / "run"), {}, tmp_path, monkeypatch)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for domain in ("latin", "prose"):
        (tmp_path / "corpus" / domain).mkdir(parents=True)
        (tmp_path / "corpus" / domain / "train.txt").write_bytes("café ".encode("latin-1") * 50)
        (tmp_path / "corpus" / domain / "validation.txt").write_text("text " * 50)
    with pytest.raises(ValueError, match=r"train\.txt.*UTF-8|UTF-8.*train\.txt"):
        try_to_train(settings(tmp_path / "corpus", tmp_path / "run"), {}, tmp_path, monkeypatch)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from equipoise.data import train_tokenizer

    tokenizer = train_tokenizer([" ".join(topics.values())], 600)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    values = settings(corpus, tmp_path / "run", tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match=r"vocab_size must hold the tokenizer's 600 tokens .*; got 512"):
        try_to_train(values, {}, tmp_path, monkeypatch)
    assert not list(tmp_path.glob("run*"))


def test_a_run_directory_that_holds_a_run_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="output_dir must be new or empty"):
        try_to_train(settings(corpus, tmp_path / "run"), {}, tmp_path, monkeypatch)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_the_script_says_one_line_and_fails(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "train.py"), "--data=none", f"--output_dir={tmp_path / 'run'}"]
    done = subprocess.run([*script, "--preset=none"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "error: preset must be a folder with a config.json; got none"


def test_a_schedule_and_the_costs_of_imbalance_in_a_run(corpus: Path, tmp_path: Path) -> None:
    overrides = ARCHITECTURE | {
        "balancing_mode": "micro_batch",
        "balancing_schedule": [{"step": 2, "balancing_mode": "loss_free"}],
        "bias_update_rule": "quantile",
    }
    values = settings(corpus, tmp_path / "run", max_steps=4, logging_steps=1, config_overrides=overrides)
    values |= {"expert_parallel_sizes": [2, 4], "log_expert_gradients": True}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    run = train(parse_run_settings([str(tmp_path / "settings.yaml")]))
    metrics, loads = (
        [json.loads(line) for line in (run.path / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "load.jsonl")
    )
    assert ["load_balancing_loss" in line for line in metrics] == [True, True, False, False]
    for line in metrics:
        for size in (2, 4):
            assert 1 <= line[f"expert_parallel_slowdown_{size}"] <= size
    biases = AutoModelForCausalLM.from_pretrained(run.path / "model").selection_biases()
    assert all(bias.abs().max() > 0 for bias in biases)
    for line in loads:
        norms, load = torch.tensor(line["expert_grad_norm"]), torch.tensor(line["load"])
        assert norms.shape == (2, 8)
        assert torch.equal(norms > 0, load > 0)
    # What was run is what is written: the settings file repeats it.
    again = parse_run_settings([str(run.path / "settings.yaml"), "--output_dir", "elsewhere"])
    assert again[2].expert_parallel_sizes == [2, 4]


def test_a_simulated_group_must_divide_the_experts(corpus: Path, tmp_path: Path) -> None:
    values = settings(corpus, tmp_path / "run", expert_parallel_sizes=[3])
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=r"expert_parallel_sizes must divide num_experts \(8\); got 3"):
        train(parse_run_settings([str(tmp_path / "settings.yaml")]))
    assert not (tmp_path / "run").exists()


def test_the_exact_load_is_counted_by_a_prepass_of_the_loop(corpus: Path, tmp_path: Path) -> None:
    overrides = ARCHITECTURE | {"balancing_mode": "global_batch", "load_estimate": "exact"}
    values = settings(corpus, tmp_path / "run", max_steps=3, logging_steps=1, config_overrides=overrides)
    values |= {"global_batch_size": 4}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    run = train(parse_run_settings([str(tmp_path / "settings.yaml")]))
    for name in ("metrics.jsonl", "load.jsonl"):
        lines = [json.loads(line) for line in (run.path / name).read_text().splitlines()]
        assert len(lines) == 3
    assert all(sum(layer) == 2 * 2 * 64 * 2 for line in lines for layer in line["load"])
