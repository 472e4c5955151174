"""Exact resume: a run that was interrupted and gone on with is the run that was not, to the bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_runs import ARCHITECTURE, forget_after, lines, settings, train_in_process, weights, written
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.configuration import MoEConfig, parse_run_settings
from equipoise.training import Checkpoints, train

Run = Callable[..., list[Any]]
# Everything that has a state: momenta of the bias, dropout, accumulation, steps between two lines of the log.
BALANCING = {
    "balancing_mode": "loss_free",
    "scoring_func": "sigmoid",
    "bias_update_rule": "tanh_momentum",
    "complementary_balancing_mode": "global_batch",
    "attention_dropout": 0.1,
    "balancing_schedule": [{"step": 8, "bias_update_rate": 0.02}],
}
CHANGES: dict[str, Any] = {
    "config_overrides": ARCHITECTURE | BALANCING,
    "global_batch_size": 8,
    "checkpoint_steps": 3,
    "keep_checkpoints": 9,
}


def assert_same_run(got: Path, expected: Path) -> None:
    for name, weight in weights(expected / "model").items():
        assert torch.equal(weights(got / "model")[name], weight), name
    for first, second in zip(lines(got / "metrics.jsonl"), lines(expected / "metrics.jsonl"), strict=True):
        for name in (
            "step",
            "tokens",
            "lm_loss",
            "aux_loss",
            "domain_loss",
            "grad_norm",
            "learning_rate",
            "bias_range",
        ):
            assert first.get(name) == second.get(name), (first["step"], name)
    assert (got / "load.jsonl").read_bytes() == (expected / "load.jsonl").read_bytes()


def assert_close_run(got: Path, expected: Path, tolerance: float) -> None:
    # The first steps are alike to the token; later, sums in another order round otherwise.
    assert lines(got / "load.jsonl")[0] == lines(expected / "load.jsonl")[0]
    for first, second in zip(lines(got / "metrics.jsonl"), lines(expected / "metrics.jsonl"), strict=True):
        assert first["lm_loss"] == pytest.approx(second["lm_loss"], abs=tolerance)
    for name, weight in weights(expected / "model").items():
        torch.testing.assert_close(weights(got / "model")[name], weight, atol=tolerance, rtol=0, msg=name)


def copied(run: Path, folder: Path, step: int) -> Path:
    """A copy of a run, as a kill after `step` would have left it."""
    shutil.copytree(run, folder)
    forget_after(folder, step)
    return folder


@pytest.fixture(scope="module")
def one_process(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train(parse_run_settings([written(folder, settings(corpus, folder / "run", **CHANGES))]))
    return folder / "run"


@pytest.fixture(scope="module")
def two_processes(corpus: Path, tmp_path_factory: pytest.TempPathFactory, run_processes: Run) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_processes(2, train_in_process, [written(folder, settings(corpus, folder / "run", **CHANGES))])
    return folder / "run"


@pytest.mark.parametrize("step", [3, 9])
def test_one_process_resumes_to_the_bit(step: int, one_process: Path, tmp_path: Path) -> None:
    # Step 9 lies between two lines of the log: sums of losses must come back too.
    run = copied(one_process, tmp_path / "run", step)
    train(parse_run_settings([str(run / "settings.yaml"), "--output_dir", str(run), "--resume"]))
    assert_same_run(run, one_process)


def test_a_run_can_be_stopped_after_every_checkpoint(one_process: Path, tmp_path: Path) -> None:
    run = copied(one_process, tmp_path / "run", 0)
    shutil.rmtree(run / "checkpoints")  # killed before the first
    for max_steps in ("4", "9", "10", "12"):
        flags = [str(run / "settings.yaml"), "--output_dir", str(run), "--resume", "--max_steps", max_steps]
        # Of a constant rate, which does not depend on where the run will end.
        train(parse_run_settings([*flags, "--learning_rate_schedule", "constant", "--logging_steps", "1"]))
    straight = tmp_path / "straight"
    flags = [str(one_process / "settings.yaml"), "--output_dir", str(straight), "--learning_rate_schedule", "constant"]
    train(parse_run_settings([*flags, "--logging_steps", "1"]))
    assert_same_run(run, straight)


def test_two_processes_resume_to_the_bit(two_processes: Path, tmp_path: Path, run_processes: Run) -> None:
    run = copied(two_processes, tmp_path / "run", 6)
    run_processes(2, train_in_process, [str(run / "settings.yaml"), "--output_dir", str(run), "--resume"])
    assert_same_run(run, two_processes)


# Under these the number of processes changes roundings only (an estimated load changes with it).
PLAIN = CHANGES | {"config_overrides": ARCHITECTURE | {"balancing_mode": "loss_free", "scoring_func": "sigmoid"}}


@pytest.fixture(scope="module")
def plain(corpus: Path, tmp_path_factory: pytest.TempPathFactory, run_processes: Run) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    run_processes(2, train_in_process, [written(folder, settings(corpus, folder / "run", **PLAIN))])
    return folder / "run"


@pytest.mark.parametrize("processes", [1, 4])
def test_resumed_by_other_numbers_of_processes(
    processes: int, plain: Path, tmp_path: Path, run_processes: Run
) -> None:
    run = copied(plain, tmp_path / "run", 6)
    flags = [str(run / "settings.yaml"), "--output_dir", str(run), "--resume"]
    if processes == 1:
        train(parse_run_settings(flags))
    else:
        run_processes(processes, train_in_process, flags)
    assert_close_run(run, plain, 2e-4)
    assert yaml.safe_load((run / "settings.yaml").read_text())["global_batch_size"] == 8


EXPERT_PARALLEL = "ep_dispatch_experts" in MoEConfig.base_model_ep_plan.values()
EXPERTS = pytest.param(
    "experts", marks=pytest.mark.skipif(not EXPERT_PARALLEL, reason="Transformers before 5.23 cannot send tokens")
)


@pytest.fixture(scope="module")
def sharded(plain: Path, tmp_path_factory: pytest.TempPathFactory, run_processes: Run) -> dict[str, Path]:
    """FSDP over two processes, and HSDP over two groups of two, with the settings of the plain run."""
    folder = tmp_path_factory.mktemp("sharded")
    flags = [str(plain / "settings.yaml"), "--output_dir"]
    run_processes(2, train_in_process, [*flags, str(folder / "fsdp"), "--sharding", "fsdp"])
    run_processes(4, train_in_process, [*flags, str(folder / "hsdp"), "--sharding", "hsdp", "--shard_size", "2"])
    if EXPERT_PARALLEL:
        run_processes(2, train_in_process, [*flags, str(folder / "experts"), "--expert_parallel_size", "2"])
    return {name: folder / name for name in ("fsdp", "hsdp", "experts")}


@pytest.mark.parametrize("sharding", ["fsdp", "hsdp", EXPERTS])
def test_shards_train_as_copies_do(sharding: str, sharded: dict[str, Path], plain: Path) -> None:
    assert_close_run(sharded[sharding], plain, 2e-4)
    written = [load_file(file) for file in (sharded[sharding] / "checkpoints/step-00000006/optimizer").iterdir()]
    name = "state.model.embed_tokens.weight.exp_avg"
    assert [shard[name].shape for shard in written if name in shard] == [(256, 32), (256, 32)]  # each half once


@pytest.mark.parametrize("sharding", ["fsdp", "hsdp", EXPERTS])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_shards_are_read_by_other_numbers_of_processes(
    processes: int, sharding: str, sharded: dict[str, Path], tmp_path: Path, run_processes: Run
) -> None:
    run = copied(sharded[sharding], tmp_path / "run", 6)
    flags = [str(run / "settings.yaml"), "--output_dir", str(run), "--resume"]
    if processes == 1:  # not sharded at all
        Path(flags[0]).write_text(Path(flags[0]).read_text().replace("shard_size: 2", "shard_size: null"))
        train(parse_run_settings([*flags, "--sharding", "none", "--expert_parallel_size", "1"]))
    else:
        run_processes(processes, train_in_process, flags)
    if processes == 2 and sharding != "hsdp":
        assert_same_run(run, sharded[sharding])
    else:
        assert_close_run(run, sharded[sharding], 2e-4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--seed", "1"], r"seed must stay as it was when a run is resumed \(0\); got 1"),
        (["--global_batch_size", "16"], r"global_batch_size must stay as it was .* \(8\); got 16"),
        (["--block_size", "32"], r"block_size must stay as it was .* \(64\); got 32"),
        (["--config_overrides", "{num_experts: 4}"], r"vocab_size must stay as it was .* \(512, in .*\); got 4096"),
        (["--micro_batch_size", "4"], r"micro_batch_size must stay as it was"),
        (["--max_steps", "4"], r"max_steps must be at least the steps that have been made \(6\); got 4"),
    ],
)
def test_what_would_be_another_run_is_refused(flags: list[str], words: str, one_process: Path, tmp_path: Path) -> None:
    run = copied(one_process, tmp_path / "run", 6)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"}
    with pytest.raises(ValueError, match=words):
        train(parse_run_settings([str(run / "settings.yaml"), "--output_dir", str(run), "--resume", *flags]))
    after = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"}
    assert after == before


def test_other_text_is_refused(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    flags = [written(tmp_path, settings(tmp_path / "corpus", tmp_path / "run", max_steps=2)), "--resume"]
    train(parse_run_settings(flags))
    file = tmp_path / "corpus" / "prose" / "train.jsonl"
    file.write_text(file.read_text().replace("the", "teh", 1))
    with pytest.raises(ValueError, match=r"data must be .* with, .*data\.json; the text of prose"):
        train(parse_run_settings([*flags, "--max_steps", "4"]))


def test_a_domain_that_vanished_is_named(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    flags = [written(tmp_path, settings(tmp_path / "corpus", tmp_path / "run", max_steps=2)), "--resume"]
    train(parse_run_settings(flags))
    shutil.rmtree(tmp_path / "corpus" / "prose")
    with pytest.raises(ValueError, match=r"data must be .* with, .*; the domain prose is gone"):
        train(parse_run_settings([*flags, "--max_steps", "4"]))


def test_a_tokenizer_changed_since_does_not_reach_the_run(corpus: Path, tmp_path: Path) -> None:
    """The run goes on with its own tokenizer, whatever has become of the one it was begun with."""
    from equipoise.data import train_tokenizer

    train_tokenizer(["one two three " * 50], 300).save_pretrained(tmp_path / "tokenizer")
    values = settings(corpus, tmp_path / "run", tokenizer=str(tmp_path / "tokenizer"), max_steps=6, checkpoint_steps=3)
    flags = [written(tmp_path, values | {"logging_steps": 1}), "--resume"]
    train(parse_run_settings(flags))
    resumed = copied(tmp_path / "run", tmp_path / "resumed", 3)
    train_tokenizer(["quite other words " * 50], 300).save_pretrained(tmp_path / "tokenizer")
    train(parse_run_settings([*flags, "--output_dir", str(resumed)]))
    assert_same_run(resumed, tmp_path / "run")
    # A new run takes the new one, not blocks cached from the old one.
    train(parse_run_settings([*flags, "--output_dir", str(tmp_path / "new")]))
    assert lines(tmp_path / "new" / "metrics.jsonl")[0]["lm_loss"] != lines(resumed / "metrics.jsonl")[0]["lm_loss"]


@pytest.mark.parametrize("processes", [1, 2])
def test_streams_go_on_where_they_were(processes: int, corpus: Path, tmp_path: Path, run_processes: Run) -> None:
    """One domain streams and one lies on disk; the run is resumed on the other number of processes."""
    recipe = tmp_path / "recipe.yaml"
    domains = {
        "code": {
            "files": str(corpus / "code" / "train.jsonl"),
            "streaming": True,
            "weight": 2,
            "validation_fraction": 0.2,
        },
        "prose": {"files": str(corpus / "prose"), "weight": 1},
    }
    recipe.write_text(yaml.safe_dump({"domains": domains}))
    values = settings(recipe, tmp_path / "straight", **PLAIN, max_validation_bytes_per_domain=200_000)
    flags = [written(tmp_path, values | {"micro_batch_domains": "mixed"})]
    train(parse_run_settings(flags))
    run = copied(tmp_path / "straight", tmp_path / "run", 6)
    flags += ["--output_dir", str(run), "--resume"]
    if processes == 1:
        train(parse_run_settings(flags))
        assert_same_run(run, tmp_path / "straight")
    else:
        run_processes(2, train_in_process, flags)
        assert_close_run(run, tmp_path / "straight", 2e-4)


def test_the_exact_load_is_counted_under_the_same_dropout(corpus: Path, tmp_path: Path) -> None:
    overrides = ARCHITECTURE | {"balancing_mode": "global_batch", "load_estimate": "exact", "attention_dropout": 0.2}
    values = settings(corpus, tmp_path / "straight", **CHANGES | {"config_overrides": overrides})
    train(parse_run_settings([written(tmp_path, values)]))
    run = copied(tmp_path / "straight", tmp_path / "run", 6)
    train(parse_run_settings([str(run / "settings.yaml"), "--output_dir", str(run), "--resume"]))
    assert_same_run(run, tmp_path / "straight")


def test_a_batch_of_one_micro_batch_a_process_stays_as_large_on_other_processes(
    corpus: Path, tmp_path: Path, run_processes: Run
) -> None:
    changes = {name: value for name, value in PLAIN.items() if name != "global_batch_size"}
    file = written(tmp_path, settings(corpus, tmp_path / "straight", **changes))
    run_processes(2, train_in_process, [file])
    run = copied(tmp_path / "straight", tmp_path / "run", 6)
    train(parse_run_settings([file, "--output_dir", str(run), "--resume"]))
    assert_close_run(run, tmp_path / "straight", 2e-4)
    tokens = [line["tokens"] for line in lines(run / "metrics.jsonl")]
    assert tokens == [line["tokens"] for line in lines(tmp_path / "straight" / "metrics.jsonl")]


def test_a_corpus_may_lie_elsewhere(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    values = settings(tmp_path / "corpus", tmp_path / "straight", **CHANGES)
    train(parse_run_settings([written(tmp_path, values)]))
    run = copied(tmp_path / "straight", tmp_path / "run", 6)
    (tmp_path / "corpus").rename(tmp_path / "moved")
    flags = [str(run / "settings.yaml"), "--output_dir", str(run), "--data", str(tmp_path / "moved"), "--resume"]
    train(parse_run_settings(flags))
    assert_same_run(run, tmp_path / "straight")


def test_half_lines_and_half_files_of_a_killed_run_are_cleared(one_process: Path, tmp_path: Path) -> None:
    run = copied(one_process, tmp_path / "run", 6)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\0\0\0\n{"step": 11, "lm_l')  # as a power cut leaves it, and a kill
    (run / ".training.json.1234").write_text('{"half')
    (run / "checkpoints" / ".step-00000009.saving" / "model").mkdir(parents=True)
    train(parse_run_settings([str(run / "settings.yaml"), "--output_dir", str(run), "--resume"]))
    assert_same_run(run, one_process)
    hidden = [path.name for folder in (run, run / "checkpoints") for path in folder.glob(".*")]
    assert hidden == [".lock"]


def test_two_launches_do_not_share_a_run(one_process: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from equipoise.training import run_directory

    run = copied(one_process, tmp_path / "run", 6)
    held = run_directory.FileLock(run / ".lock")
    waits: list[float] = []
    monkeypatch.setattr(
        run_directory, "FileLock", lambda path, timeout: (waits.append(timeout), held.__class__(path, timeout=0.1))[1]
    )
    with held, pytest.raises(ValueError, match="output_dir must not be in use by another run; got"):
        train(parse_run_settings([str(run / "settings.yaml"), "--output_dir", str(run), "--resume"]))
    assert waits == [60]


def test_any_checkpoint_loads_with_from_pretrained(one_process: Path) -> None:
    found = Checkpoints(one_process / "checkpoints", keep=1, background=False).found()
    assert [checkpoint.step for checkpoint in found] == [3, 6, 9, 12]
    last = AutoModelForCausalLM.from_pretrained(found[-1].model)
    assert AutoTokenizer.from_pretrained(found[0].model).eos_token_id is not None
    for name, weight in AutoModelForCausalLM.from_pretrained(one_process / "model").state_dict().items():
        assert torch.equal(last.state_dict()[name], weight)
