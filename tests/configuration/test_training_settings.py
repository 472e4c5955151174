"""Settings from a file and flags over it."""

import json
from pathlib import Path

import pytest
import yaml

from equipoise.configuration import parse_run_settings

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "data": "corpus",
    "output_dir": "run",
    "max_steps": 200,
    "learning_rate": "1e-3",  # what YAML 1.1 makes of 1e-3
    "config_overrides": {"num_experts": 4, "router_aux_loss_coef": "1e-2", "rope_parameters": {"rope_theta": "1e6"}},
    "micro_batch_domains": "single",
    "gradient_checkpointing": True,
    "tokenizer": None,
}


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_flags_go_over_the_file(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"settings.{kind}"
    file.write_text(json.dumps(SETTINGS) if kind == "json" else yaml.safe_dump(SETTINGS))
    model, data, training = parse_run_settings([str(file), "--max_steps", "300", "--data", "other"])
    assert (training.max_steps, data.data, training.output_dir) == (300, "other", "run")
    assert training.learning_rate == pytest.approx(1e-3)
    assert training.gradient_checkpointing is True
    assert data.micro_batch_domains == "single"
    assert data.tokenizer is None
    rope = {"rope_theta": 1_000_000}
    assert model.overrides() == {"num_experts": 4, "router_aux_loss_coef": 0.01, "rope_parameters": rope}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "data must be given"),
        (["--data", "d"], "output_dir must be given"),
        (["missing.yaml"], "the settings file must exist; got missing.yaml"),
        (["--data=d", "--output_dir=o", "--max_steps=0"], "max_steps must be at least 1; got 0"),
        (["--data=d", "--output_dir=o", "--max_steps=5", "--warmup_steps=6"], "warmup_steps must be at most"),
        (["--data=d", "--output_dir=o", "--validation_fraction=1"], "validation_fraction must be between 0 and 1"),
        (["--data=d", "--output_dir=o", "--block_size=1"], "block_size must be at least 2; got 1"),
        (["--data=d", "--output_dir=o", "--adam_beta1=1.5"], "adam_beta1 must be at least 0 and below 1; got 1.5"),
    ],
)
def test_bad_settings_are_refused_by_name(flags: list[str], words: str) -> None:
    with pytest.raises(ValueError, match="must") as refused:
        parse_run_settings(flags)
    assert words in str(refused.value)


def test_overrides_must_be_a_mapping() -> None:
    model, _, _ = parse_run_settings(["--data=d", "--output_dir=o", "--config_overrides=[1, 2]"])
    with pytest.raises(ValueError, match="config_overrides must be a YAML mapping"):
        model.overrides()


def test_unknown_setting_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("learning_rte: 0.1\n")
    with pytest.raises(ValueError, match="learning_rte"):
        parse_run_settings([str(tmp_path / "settings.yaml")])


def test_a_file_that_is_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("data: [1\n")
    with pytest.raises(ValueError, match=r"the settings file must be YAML or JSON; got .*settings\.yaml"):
        parse_run_settings([str(tmp_path / "settings.yaml")])


@pytest.mark.parametrize("line", ["max_steps: many", "micro_batch_domains: sorted", "max_steps: 10.5"])
def test_wrong_type_in_a_file_ends_with_the_usage(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.yaml").write_text(f"data: d\noutput_dir: o\n{line}\n")
    with pytest.raises(SystemExit):
        parse_run_settings([str(tmp_path / "settings.yaml")])
    assert line.split(":")[0] in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(ROOT.glob("hub_configs/*/train.yaml")), ids=lambda file: file.parent.name)
def test_recipes_of_presets_are_valid(file: Path) -> None:
    model, _, _ = parse_run_settings([str(file)])
    assert ROOT / model.preset == file.parent
