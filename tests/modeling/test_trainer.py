"""`transformers.Trainer` with nothing but the model, against the sum that it should have minimised, written out."""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launched
from plain_loop import Shares, by_labels, by_micro_step, by_rank, by_tokens, plain_gradient
from torch import Tensor
from torch.nn.functional import cross_entropy
from trainers import Gradients, InOrder, arguments, examples

from equipoise import MoEConfig, MoEForCausalLM

ACCUMULATION, SEQUENCES, RANKS = 2, 2, 2
"""Two ranks, each of two sequences in each of two micro-batches."""
COEFFICIENT, COMPLEMENT, Z_COEFFICIENT = 0.5, 0.3, 0.01
Make = Callable[..., MoEConfig]

# Lengths and prompts of the eight sequences of a step, the first four being the first micro-step's. In ALIKE both
# micro-steps hold 4 tokens to 3 labels, 40 to 30 and 20 to 15, which their two ranks share unevenly.
ALIKE = {"lengths": [12, 10, 12, 6, 4, 6, 2, 8], "prompts": [3, 2, 2, 3, 1, 2, 1, 1]}
UNEVEN = {"lengths": [12, 5, 9, 3, 12, 12, 7, 2], "prompts": [0, 2, 4, 0, 9, 1, 3, 1]}


def config_of(tiny_config: Make, mode: str, **fields: Any) -> MoEConfig:
    """All terms at once: the mode's loss, a complementary one, the z-loss."""
    complement = {"sequence": "micro_batch", "none": "none"}.get(mode, "sequence")
    sigmoid = {"scoring_func": "sigmoid", "bias_update_rate": 0.05} if mode == "loss_free" else {}
    terms = {
        "router_aux_loss_coef": COEFFICIENT,
        "complementary_balancing_mode": complement,
        "complementary_aux_loss_coef": COMPLEMENT,
        "router_z_loss_coef": Z_COEFFICIENT,
    }
    return tiny_config(balancing_mode=mode, **sigmoid | terms | fields)


def micro_batches(data: list[dict[str, Tensor]]) -> list[list[dict[str, Tensor]]]:
    """`[micro-step][rank]`: as Accelerate deals out a data set in order, each rank every second batch."""
    batches = [
        {name: torch.stack([row[name] for row in data[start : start + SEQUENCES]]) for name in data[0]}
        for start in range(0, len(data), SEQUENCES)
    ]
    return [batches[start : start + RANKS] for start in range(0, len(batches), RANKS)]


def build(config: MoEConfig) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(config)


def gradient_under_trainer(
    rank: int, world_size: int, config: MoEConfig, folder: str, lengths: dict[str, list[int]], changes: dict[str, Any]
) -> dict[str, Any]:
    model, gradients = build(config), Gradients()
    own_loss = changes.pop("own_loss", False)

    def loss_function(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch
        if outputs.aux_loss is not None:  # in training
            processes, accumulation = trainer.accelerator.num_processes, trainer.current_gradient_accumulation_steps
            loss = loss + outputs.aux_loss / (processes * accumulation)
        return loss

    with launched(rank, world_size):
        trainer = InOrder(
            model=model,
            args=arguments(
                folder,
                max_steps=1,
                per_device_train_batch_size=SEQUENCES,
                gradient_accumulation_steps=ACCUMULATION,
                **changes,
            ),
            train_dataset=examples(SEQUENCES * ACCUMULATION * RANKS, **lengths),
            callbacks=[gradients],
            compute_loss_func=loss_function if own_loss else None,
        )
        trainer.train()
    return {"gradients": gradients.first, "tokens": model.balancer.metrics()["tokens"]}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("mode", "lengths", "shares", "changes"),
    [
        *((mode, ALIKE, by_tokens, {}) for mode in ("none", "micro_batch", "sequence", "global_batch", "loss_free")),
        *((mode, UNEVEN, by_labels, {}) for mode in ("sequence", "global_batch")),
        ("global_batch", ALIKE, by_tokens, {"gradient_checkpointing": True}),
        ("global_batch", UNEVEN, by_rank, {"average_tokens_across_devices": False}),
        ("global_batch", UNEVEN, by_micro_step, {"own_loss": True}),
        ("sequence", UNEVEN, by_micro_step, {"own_loss": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", None) or ",".join(value),
)
def test_two_processes_under_trainer_minimise_the_loss_of_the_whole_batch(
    tiny_config: Make,
    tmp_path: Path,
    run_processes: Callable[..., list[Any]],
    mode: str,
    lengths: dict[str, list[int]],
    shares: Shares,
    changes: dict[str, Any],
) -> None:
    # Guards against an auxiliary loss that grows with ranks and accumulation, as the stock one does.
    config = config_of(tiny_config, mode)
    data = examples(SEQUENCES * ACCUMULATION * RANKS, **lengths)
    expected = plain_gradient(build(config), micro_batches(data), shares)
    tokens = sum(int(row["attention_mask"].sum()) for row in data)
    for result in run_processes(RANKS, gradient_under_trainer, config, str(tmp_path), lengths, dict(changes)):
        assert result["tokens"] == tokens
        assert result["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(result["gradients"][name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def weights_after_steps(
    rank: int, world_size: int, config: MoEConfig, folder: str, steps: int, changes: dict[str, Any]
) -> dict[str, Tensor]:
    model = build(config)
    sequences = 4
    with launched(rank, world_size) if world_size > 1 else nullcontext():
        trainer = InOrder(
            model=model,
            args=arguments(
                folder,
                max_steps=steps,
                learning_rate=0.1,
                optim="sgd",
                per_device_train_batch_size=sequences // world_size,
                **changes,
            ),
            train_dataset=examples(steps * sequences, lengths=[12], prompts=[0]),
        )
        trainer.train()
    assert model.balancer.steps == steps
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.processes
@pytest.mark.parametrize("average_tokens", [True, False])
@pytest.mark.parametrize("mode", ["global_batch", "loss_free"])
def test_steps_on_two_processes_are_those_on_one(
    tiny_config: Make, tmp_path: Path, run_processes: Callable[..., list[Any]], average_tokens: bool, mode: str
) -> None:
    # Biases included. With sequences of one length a mean of the ranks' means is the mean over the batch: one process
    # is the oracle of both settings.
    work = (str(tmp_path), 3, {"average_tokens_across_devices": average_tokens})
    alone = weights_after_steps(0, 1, config_of(tiny_config, mode), *work)
    for weights in run_processes(2, weights_after_steps, config_of(tiny_config, mode), *work):
        for name, value in alone.items():
            torch.testing.assert_close(weights[name], value, atol=2e-5, rtol=1e-4, msg=name)
    assert any(value.any() for name, value in alone.items() if "correction_bias" in name) == (mode == "loss_free")


def test_several_steps_with_accumulation(tiny_config: Make, tmp_path: Path) -> None:
    # The load of an earlier step must not come into a later one: the default estimate would let it.
    config = config_of(tiny_config, "global_batch", load_estimate="running")
    steps, rate = 3, 0.1
    data = examples(steps * RANKS * ACCUMULATION * SEQUENCES, **UNEVEN)
    trained, by_hand = build(config), build(config)
    trainer = InOrder(
        model=trained,
        args=arguments(
            tmp_path,
            max_steps=steps,
            learning_rate=rate,
            optim="sgd",
            per_device_train_batch_size=SEQUENCES * RANKS,
            gradient_accumulation_steps=ACCUMULATION,
        ),
        train_dataset=data,
    )
    trainer.train()
    for start in range(0, len(data), len(data) // steps):
        # Two sequences of each half: what two ranks would have had is in one forward pass here, which for these terms
        # is the same.
        gradient = plain_gradient(by_hand, micro_batches(data[start : start + len(data) // steps]), by_labels)
        with torch.no_grad():
            for name, value in gradient.items():
                by_hand.get_parameter(name).sub_(rate * value)
    for name, weight in by_hand.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), weight, atol=1e-5, rtol=1e-5, msg=name)


# --- Losses that Trainer computes itself: it takes the labels away from the model ---


def loss_of_one_step(model: MoEForCausalLM, folder: Path, data: list[dict[str, Tensor]], **changes: Any) -> float:
    own = changes.pop("compute_loss_func", None)
    trainer = InOrder(
        model=model,
        args=arguments(folder, max_steps=1, per_device_train_batch_size=len(data), **changes),
        train_dataset=data,
        compute_loss_func=own,
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def test_a_loss_that_forgets_the_balancing_loss_is_noticed(tiny_config: Make, tmp_path: Path) -> None:
    def forgetful(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    data = examples(4, **UNEVEN)
    with pytest.warns(UserWarning, match="balancing loss took no part in the backward pass"):
        loss_of_one_step(build(config_of(tiny_config, "global_batch")), tmp_path, data, compute_loss_func=forgetful)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the balancing loss")
        loss_of_one_step(build(config_of(tiny_config, "global_batch")), tmp_path, data)


def test_label_smoothing_shifts_the_labels(tiny_config: Make, tmp_path: Path) -> None:
    # Trainer shifts them for the models whose names it knows; otherwise each token would learn to predict itself. The
    # balancing loss is left out, which is noticed.
    model, data = build(config_of(tiny_config, "global_batch")), examples(4, **UNEVEN)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        logits = model.eval()(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].flatten(0, 1)
    expected = cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.1).item()
    with pytest.warns(UserWarning, match="balancing loss took no part in the backward pass"):
        loss = loss_of_one_step(model, tmp_path, data, label_smoothing_factor=0.1)
    assert loss == pytest.approx(expected, rel=1e-4)
