"""What decays, and the learning rate of every step, against closed forms."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.configuration import TrainingSettings
from equipoise.training.optimization import build_optimizer, build_schedule

Make = Callable[..., MoEConfig]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("router_decay", [None, 0.0, 0.3])
def test_norms_biases_and_embeddings_do_not_decay(tied: bool, router_decay: float | None, tiny_config: Make) -> None:
    model = MoEForCausalLM(tiny_config(tie_word_embeddings=tied, attention_bias=True))
    settings = TrainingSettings(weight_decay=0.1, router_weight_decay=router_decay)
    optimizer = build_optimizer(model, settings)
    decay = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    found = {name: decay[id(weight)] for name, weight in model.named_parameters()}
    for name, value in found.items():
        if "norm" in name or name.endswith("bias") or "embed_tokens" in name:
            assert value == 0, name
        elif name.endswith("gate.weight"):
            assert value == (0.1 if router_decay is None else router_decay), name
        else:
            assert value == 0.1, name
    assert ("lm_head.weight" in found) == (not tied)  # its own matrix decays, a tied one is the embedding
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def rate(schedule: str, step: int, warmup: int, decay: int, total: int, lowest: float) -> float:
    """Share of the peak for the optimizer step that `step` others came before."""
    if step < warmup:
        start = lowest if schedule == "wsd" else 0.0
        return start + (1 - start) * step / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        done = (step - warmup) / max(1, total - warmup)
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2
    return 1.0 if step < total - decay else lowest + (1 - lowest) * (total - step) / decay


@given(
    schedule=st.sampled_from(["cosine", "wsd", "constant"]),
    total=st.integers(1, 60),
    warmup=st.integers(0, 60),
    decay=st.integers(1, 60),
    lowest=st.floats(0, 1),
    resumed=st.integers(0, 60),
)
def test_the_rate_of_a_step(schedule: str, total: int, warmup: int, decay: int, lowest: float, resumed: int) -> None:
    warmup = min(warmup, total)
    decay = min(decay, total - warmup)
    if schedule == "wsd" and decay == 0:
        return
    settings = TrainingSettings(
        learning_rate=0.02,
        learning_rate_schedule=schedule,
        max_steps=total,
        warmup_steps=warmup,
        decay_steps=decay,
        min_learning_rate_ratio=lowest,
    )
    for first in (0, min(resumed, total)):  # from the beginning, and from anywhere
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=0.02)
        following = build_schedule(optimizer, settings, first)
        for step in range(first, total):
            assert following.get_last_lr()[0] == optimizer.param_groups[0]["lr"]
            assert following.get_last_lr()[0] == pytest.approx(
                0.02 * rate(schedule, step, warmup, decay, total, lowest), abs=1e-9
            )
            optimizer.step()
            following.step()


def test_a_longer_run_goes_on_along_the_longer_curve() -> None:
    rates = {}
    for total in (100, 200):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        settings = TrainingSettings(learning_rate=1.0, max_steps=total, warmup_steps=0)
        rates[total] = build_schedule(optimizer, settings, 100).get_last_lr()[0]
    assert rates[100] == pytest.approx(0.1)
    assert rates[200] == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"learning_rate_schedule": "wsd", "decay_steps": 90, "max_steps": 100, "warmup_steps": 20},
            "decay_steps must",
        ),
        ({"shard_size": 2}, "sharding must be hsdp where shard_size is given; got none"),
        ({"max_hours": 0}, "max_hours must be above 0; got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1; got 0"),
        (
            {"sharding": "fsdp", "expert_parallel_size": 2},
            "sharding must be none with an expert_parallel_size",
        ),
        (
            {"sharding": "fsdp", "log_expert_gradients": True},
            "log_expert_gradients must be off",
        ),
    ],
)
def test_bad_settings_are_named(fields: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainingSettings(**fields)


@pytest.mark.parametrize(
    ("size", "processes", "expected"),
    [
        (None, 3, 3),
        (32, 2, 4),
        (32, 4, 4),
        (32, 3, "a multiple of micro_batch_size"),
        (20, 1, "must be a multiple of"),
    ],
)
def test_the_global_batch_is_dealt_out(size: int | None, processes: int, expected: int | str) -> None:
    settings = TrainingSettings(global_batch_size=size, micro_batch_size=8)
    if isinstance(expected, int):
        assert settings.micro_batches_per_step(processes) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            settings.micro_batches_per_step(processes)
