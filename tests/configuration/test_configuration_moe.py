"""MoEConfig: what it accepts, what it refuses and with which words, and that it needs no torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from equipoise import MoEConfig

PRESETS = sorted(path.parent for path in (Path(__file__).parents[2] / "hub_configs").glob("*/config.json"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"balancing_mode": "global"}, ["balancing_mode", "global_batch", "got global"]),
        ({"complementary_balancing_mode": "loss_free"}, ["complementary_balancing_mode", "got loss_free"]),
        ({"scoring_func": "tanh"}, ["scoring_func", "sigmoid", "got tanh"]),
        ({"bias_update_rule": "cosine"}, ["bias_update_rule", "sign", "got cosine"]),
        (
            {"num_experts": 16, "num_experts_per_tok": 17},
            ["num_experts_per_tok must be between 1 and num_experts (16); got 17"],
        ),
        ({"num_experts_per_tok": 0}, ["num_experts_per_tok", "got 0"]),
        ({"num_experts": 64, "n_group": 3}, ["n_group must divide num_experts (64); got 3"]),
        ({"n_group": 4, "topk_group": 5}, ["topk_group must be between 1 and n_group (4); got 5"]),
        ({"num_experts": 8, "n_group": 8, "num_experts_per_tok": 1}, ["n_group", "at least 2 experts"]),
        (
            {"num_experts": 16, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 5},
            ["num_experts_per_tok", "topk_group", "(4)", "got 5"],
        ),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, ["num_key_value_heads must divide", "(6)", "got 4"]),
        ({"head_dim": 7}, ["head_dim", "even", "7"]),
        ({"first_k_dense_replace": 13}, ["first_k_dense_replace", "(12)", "got 13"]),
        ({"router_aux_loss_coef": -0.1}, ["router_aux_loss_coef must be at least 0 and finite; got -0.1"]),
        (
            {"balancing_mode": "sequence", "complementary_balancing_mode": "sequence"},
            ["complementary_balancing_mode must differ from balancing_mode"],
        ),
        ({"vocab_size": 0}, ["vocab_size must be at least 1; got 0"]),
        ({"num_attention_heads": 0}, ["num_attention_heads must be at least 1; got 0"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads must be at least 1; got 0"]),
        ({"num_experts": 0}, ["num_experts", "0"]),
        ({"attention_dropout": 1.5}, ["attention_dropout must be at least 0 and below 1; got 1.5"]),
        ({"initializer_range": -1}, ["initializer_range must be at least 0 and finite; got -1"]),
        ({"routed_scaling_factor": float("nan")}, ["routed_scaling_factor must be above 0 and finite; got nan"]),
        ({"partial_rotary_factor": 1.5}, ["partial_rotary_factor must be above 0 and at most 1; got 1.5"]),
        ({"partial_rotary_factor": "x"}, ["partial_rotary_factor must be above 0 and at most 1; got x"]),
        ({"router_z_loss_coef": float("nan")}, ["router_z_loss_coef must be at least 0 and finite; got nan"]),
        ({"rope_parameters": {"rope_type": "spiral"}}, ["rope_type must be one of", "yarn", "got spiral"]),
        ({"hidden_size": "wide"}, ["hidden_size", "int", "wide"]),
    ],
)
def test_impossible_fields_are_refused_by_name(fields: dict, words: list[str]) -> None:
    with pytest.raises(StrictDataclassError) as refused:
        MoEConfig(**fields)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ],
)
def test_every_kind_of_rope_survives_saving(rope: dict, tmp_path: Path) -> None:
    config = MoEConfig(rope_parameters=dict(rope))
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MoEConfig)
    assert rope.items() <= loaded.rope_parameters.items()
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


@pytest.mark.parametrize(
    "name",
    [name for name, value in MoEConfig().to_dict().items() if isinstance(value, float)],
)
def test_whole_numbers_are_numbers(name: str) -> None:
    value = 1 if name == "routed_scaling_factor" else 0
    assert getattr(MoEConfig(**{name: value}), name) == value


def test_a_size_taken_away_later_is_named() -> None:
    config = MoEConfig()
    config.num_key_value_heads = None
    with pytest.raises(StrictDataclassError, match="num_key_value_heads must be at least 1; got None"):
        config.validate()


def test_transformers_names_for_the_number_of_experts() -> None:
    config = MoEConfig(num_experts=32, num_shared_experts=2)
    assert (config.num_local_experts, config.n_routed_experts, config.n_shared_experts) == (32, 32, 2)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_presets_load(preset: Path) -> None:
    config = AutoConfig.from_pretrained(preset)
    assert isinstance(config, MoEConfig)
    # Transformers keeps a misspelt field without a word.
    written = json.loads((preset / "config.json").read_text())
    assert set(written) <= set(MoEConfig().to_dict())


def test_importable_with_torch_blocked() -> None:
    code = """
import sys
sys.modules["torch"] = None  # any import of torch raises
import equipoise
from transformers import AutoConfig
config = AutoConfig.for_model("equipoise_moe", num_experts=4, num_experts_per_tok=2)
assert type(config) is equipoise.MoEConfig and config.num_experts == 4
from equipoise.configuration import parse_run_settings
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_printed_configuration_shows_all_its_fields() -> None:
    """Bases that are dataclasses bring a `repr` of their own fields alone."""
    shown = repr(MoEConfig(hidden_size=48, balancing_mode="sequence", num_attention_heads=4))
    for field in ('"hidden_size": 48', '"balancing_mode": "sequence"', '"vocab_size": 32000'):
        assert field in shown
