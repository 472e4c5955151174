"""BalancingSettings: what cannot be is refused by name, and a schedule says what is in force when."""

from typing import Any

import pytest

from equipoise import MoEConfig
from equipoise.configuration import BalancingFields, BalancingSettings

SCHEDULE = [
    {"step": 100, "balancing_mode": "global_batch", "router_aux_loss_coef": 0.001},
    {"tokens": 5000, "balancing_mode": "loss_free"},
    {"step": 300, "bias_update_rate": 0},
]


def test_a_schedule_is_a_function_of_steps_and_tokens_alone() -> None:
    settings = BalancingSettings(balancing_mode="micro_batch", balancing_schedule=SCHEDULE)

    def at(steps: int, tokens: int) -> tuple[str, float, float | None]:
        now = settings.at(steps, tokens)
        return now.balancing_mode, now.router_aux_loss_coef, now.bias_update_rate

    assert at(0, 0) == at(99, 4999) == ("micro_batch", 0.01, None)
    assert at(100, 0) == ("global_batch", 0.001, None)
    assert at(50, 5000) == ("micro_batch", 0.01, None), "a change waits for the one before it"
    assert at(100, 5000) == ("loss_free", 0.001, None)
    assert at(300, 5000) == at(10**9, 10**15) == ("loss_free", 0.001, 0)


@pytest.mark.parametrize(
    "schedule",
    [
        [{"tokens": 1000, "balancing_mode": "loss_free"}, {"step": 2, "complementary_balancing_mode": "global_batch"}],
        [{"tokens": 2000, "balancing_mode": "none"}, {"step": 10, "balancing_mode": "micro_batch"}],
    ],
)
def test_no_change_overtakes_another(schedule: list[dict[str, Any]]) -> None:
    # The first would be refused in the middle of training, the second would never reach `none`.
    settings = BalancingSettings(balancing_schedule=schedule)
    first = {name: value for name, value in schedule[0].items() if name != "tokens"}
    for steps in (0, 2, 10, 1000):
        assert settings.at(steps, 999).balancing_mode == "global_batch"
    assert settings.at(0, 2000).balancing_mode == first["balancing_mode"]
    assert settings.at(10, 2000) == settings.at(10**6, 10**9)


def test_the_configuration_holds_every_field_of_balancing() -> None:
    config = MoEConfig(balancing_schedule=SCHEDULE, bias_update_rule="quantile", bias_update_rate=0.5)
    assert isinstance(config, BalancingFields)
    again = MoEConfig.from_dict(config.to_dict())
    assert BalancingSettings.of(again) == BalancingSettings.of(config)
    assert BalancingSettings.of(config).balancing_schedule == SCHEDULE
    assert config.to_dict()["bias_update_rule"] == "quantile"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"balancing_schedule": [{"balancing_mode": "none"}]},
            r"balancing_schedule\[0\] must be a mapping with either",
        ),
        ({"balancing_schedule": [{"step": 1, "tokens": 2}]}, "either step or tokens"),
        (
            {"balancing_schedule": [{"step": 9}, {"step": 8}]},
            r"\[1\].step must be a whole number of at least 9; got 8",
        ),
        ({"balancing_schedule": [{"tokens": -1}]}, r"\[0\].tokens must be a whole number of at least 0; got -1"),
        ({"balancing_schedule": [{"step": "soon"}]}, "must be a whole number of at least 0; got soon"),
        ({"balancing_schedule": [{"step": 1.5}]}, "must be a whole number of at least 0; got 1.5"),
        (
            {"balancing_schedule": [{"step": 1, "router_aux_loss_coef": None}]},
            "router_aux_loss_coef must be at least 0",
        ),
        ({"balancing_schedule": [{"step": 1, "num_experts": 4}]}, "may change balancing_mode, .*; got num_experts"),
        (
            {"balancing_schedule": [{"step": 1, "balancing_mode": "all"}]},
            "balancing_mode must be one of none.*got all",
        ),
        ({"balancing_schedule": [{"step": 1, "router_aux_loss_coef": -1}]}, "router_aux_loss_coef must be at least 0"),
        (
            {
                "complementary_balancing_mode": "sequence",
                "balancing_schedule": [{"step": 1, "balancing_mode": "sequence"}],
            },
            r"complementary_balancing_mode must differ from balancing_mode \(sequence\)",
        ),
        ({"bias_update_rule": "quantile", "bias_update_rate": 1.5}, "at most 1 with the quantile rule; got 1.5"),
        (
            {"bias_update_rate_decay": None},
            "bias_update_rate_decay must be between 0 and 1; got None|bias_update_rate",
        ),
        ({"bias_update_rate_decay": 1.5}, "bias_update_rate_decay must be between 0 and 1; got 1.5"),
        ({"bias_update_momentum": 1}, "bias_update_momentum must be at least 0 and below 1; got 1"),
        ({"bias_update_kappa": float("nan")}, "bias_update_kappa must be at least 0 and finite; got nan"),
    ],
)
def test_impossible_settings_are_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BalancingSettings(**fields)
    with pytest.raises(Exception, match=words):  # the same words in Transformers' own wrapping
        MoEConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_group": 4, "topk_group": 2}, r"bias_update_rule quantile must go without groups.*n_group \(4\)"),
        ({"num_experts": 8, "num_experts_per_tok": 8}, r"needs num_experts_per_tok below num_experts \(8\); got 8"),
    ],
)
def test_the_quantile_rule_is_refused_where_its_cutoff_is_another(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        MoEConfig(balancing_mode="loss_free", bias_update_rule="quantile", **fields)
    MoEConfig(balancing_mode="loss_free", bias_update_rule="sign", **fields)
