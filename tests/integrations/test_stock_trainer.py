"""BalancingCallback with a mode: stock models under `transformers.Trainer`, in one process and two."""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from launched import launched
from plain_loop import Shares, by_labels, by_tokens, plain_gradient
from stock_balancing import FAMILIES, Seen, biases_of, deepseek_v3, qwen3_moe, routers_of
from torch import Tensor
from trainers import Gradients, InOrder, Recorder, arguments, examples

import equipoise
from equipoise import BalancingCallback, MoEConfig, MoEForCausalLM

ACCUMULATION, SEQUENCES, RANKS = 2, 2, 2
COEFFICIENT, COMPLEMENT, Z_COEFFICIENT = 0.5, 0.3, 0.01

# Lengths and prompts of the eight sequences of a step, the first four being the first micro-step's. In ALIKE both
# micro-steps hold 4 tokens to 3 labels.
ALIKE = {"lengths": [12, 10, 12, 6, 4, 6, 2, 8], "prompts": [3, 2, 2, 3, 1, 2, 1, 1]}
UNEVEN = {"lengths": [12, 5, 9, 3, 12, 12, 7, 2], "prompts": [0, 2, 4, 0, 9, 1, 3, 1]}


def settings_of(mode: str) -> dict[str, Any]:
    """All terms at once: the mode's loss, a complementary one, the z-loss."""
    return {
        "balancing_mode": mode,
        "router_aux_loss_coef": COEFFICIENT,
        "complementary_balancing_mode": {"sequence": "micro_batch", "none": "none"}.get(mode, "sequence"),
        "complementary_aux_loss_coef": COMPLEMENT,
        "router_z_loss_coef": Z_COEFFICIENT,
    }


# --- Scale ---


def micro_batches(data: list[dict[str, Tensor]]) -> list[list[dict[str, Tensor]]]:
    """`[micro-step][rank]`: as Accelerate deals out a data set in order, each rank every second batch."""
    batches = [
        {name: torch.stack([row[name] for row in data[start : start + SEQUENCES]]) for name in data[0]}
        for start in range(0, len(data), SEQUENCES)
    ]
    return [batches[start : start + RANKS] for start in range(0, len(batches), RANKS)]


def gradient_under_trainer(
    rank: int, world_size: int, family: str, settings: dict[str, Any], folder: str, lengths: dict, late: bool
) -> dict[str, Any]:
    model, gradients = FAMILIES[family](), Gradients()
    recorder = Recorder(lambda model: model.balancer.metrics()["tokens"])
    balancing = BalancingCallback(**settings)
    callbacks = [gradients, recorder] if late else [gradients, balancing, recorder]
    with launched(rank, world_size):
        trainer = InOrder(
            model=model,
            args=arguments(
                folder,
                max_steps=1,
                per_device_train_batch_size=SEQUENCES,
                gradient_accumulation_steps=ACCUMULATION,
            ),
            train_dataset=examples(SEQUENCES * ACCUMULATION * RANKS, **lengths),
            callbacks=callbacks,
        )
        if late:
            trainer.add_callback(balancing)
            trainer.callback_handler.callbacks.append(trainer.pop_callback(Recorder))
        trainer.train()
    return {"gradients": gradients.first, "tokens": recorder.seen[0]}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("family", "mode", "lengths", "shares", "late"),
    [
        *(
            (family, mode, ALIKE, by_tokens, False)
            for family in ("qwen3_moe", "deepseek_v3")
            for mode in ("none", "micro_batch", "sequence", "global_batch")
        ),
        ("deepseek_v3", "loss_free", ALIKE, by_tokens, False),
        ("qwen3_moe", "global_batch", UNEVEN, by_labels, True),
        ("deepseek_v3", "sequence", UNEVEN, by_labels, True),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", None) or str(value)[:8],
)
def test_two_processes_under_trainer_minimise_the_loss_of_the_whole_batch(
    tmp_path: Path,
    run_processes: Callable[..., list[Any]],
    family: str,
    mode: str,
    lengths: dict[str, list[int]],
    shares: Shares,
    late: bool,
) -> None:
    # Guards against the stock loss, which grows with ranks and accumulation, and against adding both. `late` is given
    # to the Trainer once it is made: the model is then wrapped when its balancing begins.
    settings = settings_of(mode)
    data = examples(SEQUENCES * ACCUMULATION * RANKS, **lengths)
    seen = Seen(FAMILIES[family](), **settings)
    expected = seen.gradient_names(plain_gradient(seen, micro_batches(data), shares))
    tokens = sum(int(row["attention_mask"].sum()) for row in data)
    for result in run_processes(RANKS, gradient_under_trainer, family, settings, str(tmp_path), lengths, late):
        assert result["tokens"] == tokens
        # A model may have weights that act on nothing, which DDP gives a gradient of zeros.
        assert expected.keys() <= result["gradients"].keys()
        for name, gradient in result["gradients"].items():
            wanted = expected.get(name, torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5, msg=name)


# --- Steps, logs, checkpoints ---

STEPS = 6
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    # Each goes on from what its balancer remembers: the last batch's load, or a momentum and a decayed rate.
    "global_batch": ("qwen3_moe", {"router_aux_loss_coef": 0.5, "load_estimate": "completed"}),
    "loss_free": (
        "deepseek_v3",
        {"bias_update_rule": "tanh_momentum", "bias_update_rate": 0.05, "bias_update_rate_decay": 0.9},
    ),
}


def trainer_of(model: Any, folder: Path | str, *callbacks: Any, world_size: int = 1, **changes: Any) -> InOrder:
    settings = {
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "per_device_train_batch_size": SEQUENCES // world_size,
        "gradient_accumulation_steps": ACCUMULATION,
    }
    return InOrder(
        model=model,
        args=arguments(folder, **settings | changes),
        train_dataset=examples(STEPS * ACCUMULATION * SEQUENCES, lengths=[12, 5, 9, 3], prompts=[0, 2, 4]),
        callbacks=list(callbacks),
    )


def run(rank: int, world_size: int, mode: str, folder: str, resume_from: str | None, adapter: bool) -> list[Any]:
    """Weights and biases, the state of the balancer, and what was logged, of a run or of the rest of one."""
    # Accelerate calls the device of such a process `cpu:0`, to which Transformers 5.17 fails to load an optimizer.
    device = patch.dict(os.environ, ACCELERATE_TORCH_DEVICE="cpu")
    family, settings = MODES[mode]
    with device, launched(rank, world_size) if world_size > 1 else nullcontext():
        model = FAMILIES[family]()
        if resume_from is not None and not adapter:
            # Trainer alone leaves the experts as they are (transformers#48805).
            model = type(model).from_pretrained(resume_from, use_cache=False)
        if adapter:
            import peft

            torch.manual_seed(1)
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_parameters=["mlp.gate.weight"]))
        callback = BalancingCallback(mode, **settings)
        trainer = trainer_of(
            model, folder, callback, world_size=world_size, save_strategy="steps", save_steps=STEPS // 2
        )
        trainer.train(resume_from_checkpoint=resume_from)
        history = [record for record in trainer.state.log_history if "loss" in record]
        for record in history:
            record.pop("epoch")
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        return [weights, json.dumps(callback.state()), json.dumps(history, sort_keys=True)]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("mode", "world_size", "adapter"),
    [
        ("global_batch", 1, False),
        ("loss_free", 1, False),
        ("loss_free", 1, True),
        ("loss_free", 2, True),
        ("loss_free", 2, False),
    ],
)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    tmp_path: Path, run_processes: Callable[..., list[Any]], mode: str, world_size: int, adapter: bool
) -> None:
    # With an adapter on the routers their biases, which are the base model's, are in no checkpoint of weights.
    if adapter:
        pytest.importorskip("peft")

    def both(folder: str, resume_from: str | None) -> list[Any]:
        work = (mode, folder, resume_from, adapter)
        return run_processes(2, run, *work) if world_size == 2 else [run(0, 1, *work)]

    whole = both(str(tmp_path / "whole"), None)
    rest = both(str(tmp_path / "rest"), str(tmp_path / "whole" / f"checkpoint-{STEPS // 2}"))
    for (weights, state, history), (same_weights, same_state, same_history) in zip(whole, rest, strict=True):
        for name, value in weights.items():
            assert torch.equal(same_weights[name], value), name
        moved = [value for name, value in weights.items() if name.endswith("e_score_correction_bias")]
        assert all(bias.any() for bias in moved)
        assert same_state == state
        assert same_history == history
    assert json.loads(history)[-1]["max_vio_batch"] > 0


@pytest.mark.processes
@pytest.mark.parametrize("mode", MODES)
def test_steps_on_two_processes_are_those_on_one(
    tmp_path: Path, run_processes: Callable[..., list[Any]], mode: str
) -> None:
    [alone, _, _] = run(0, 1, mode, str(tmp_path / "one"), None, False)
    for weights, _, _ in run_processes(2, run, mode, str(tmp_path / "two"), None, False):
        for name, value in alone.items():
            if name.endswith("e_score_correction_bias"):
                torch.testing.assert_close(weights[name], value, atol=2e-3, rtol=0, msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_logs_hold_the_balance_of_what_was_routed(tmp_path: Path, mode: str) -> None:
    family, settings = MODES[mode]
    model = FAMILIES[family]()
    loads: list[Tensor] = [torch.zeros(len(routers_of(model)), 8)]
    masks: list[Tensor] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"].flatten() != 0), with_kwargs=True
    )

    def count(router: Any, args: Any, output: Any) -> None:
        loads[-1][routers_of(model).index(router)] += output[2][masks[-1]].flatten().bincount(minlength=8)

    for router in routers_of(model):
        router.register_forward_hook(count)
    recorder = Recorder(lambda model: loads.append(torch.zeros_like(loads[0])))
    trainer = trainer_of(model, tmp_path, BalancingCallback(mode, **settings), recorder)
    trainer.eval_dataset = trainer.train_dataset
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    history = [record for record in trainer.state.log_history if "loss" in record]
    assert len(history) == STEPS
    for record, load in zip(history, loads, strict=False):
        vio = load.max(-1).values / load.mean(-1) - 1
        assert record["max_vio_batch"] == pytest.approx(vio.mean().item(), rel=1e-5)
        assert record["max_vio_batch_worst"] == pytest.approx(vio.max().item(), rel=1e-5)
        assert record["dead_experts"] == (load == 0).sum().item()
        assert ("bias_range" in record) == (mode == "loss_free")
    assert not any("max_vio_batch" in record for record in trainer.state.log_history if "loss" not in record)


def test_the_balancing_is_taken_off_when_training_ends(tmp_path: Path) -> None:
    model, untouched = qwen3_moe(), qwen3_moe()
    trainer = trainer_of(model, tmp_path, BalancingCallback("global_batch"), max_steps=1)
    assert not hasattr(model, "balancer")  # until training begins
    trainer.train()
    for module, same in zip(model.modules(), untouched.modules(), strict=True):
        assert vars(module).keys() - {"_is_accelerate_prepared"} == vars(same).keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    trainer.train()  # and is put on again
    kept = trainer_of(model, tmp_path, BalancingCallback("global_batch", detach=False), max_steps=1)
    kept.train()
    assert model.balancer.steps == 1
    assert equipoise.integrations.trainer_callback.find_balancer(model) is model.balancer
    kept.train()  # its own balancer is no obstacle
    assert model.balancer.steps == 1


def test_a_training_that_broke_off_can_be_begun_again(tmp_path: Path) -> None:
    model = deepseek_v3()
    trainer = trainer_of(model, tmp_path, BalancingCallback("loss_free", bias_update_rate=0.05))

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.lm_head.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    trainer.train()
    assert biases_of(model).any()
    assert not hasattr(model, "balancer")


def test_trainer_may_restore_the_callback_itself(tmp_path: Path) -> None:
    [weights, _, _] = run(0, 1, "loss_free", str(tmp_path), None, False)
    settings = MODES["loss_free"][1]
    checkpoint = str(tmp_path / f"checkpoint-{STEPS // 2}")
    model = type(deepseek_v3()).from_pretrained(checkpoint, use_cache=False)
    callback = BalancingCallback("loss_free", **settings)
    trainer = trainer_of(model, tmp_path / "rest", callback, restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_without_a_mode_it_goes_with_a_balancer_that_is_there(tmp_path: Path) -> None:
    model = deepseek_v3()
    balancer = equipoise.balance(model, "loss_free", bias_update_rate=0.05)
    trainer = trainer_of(model, tmp_path, BalancingCallback(), save_strategy="steps", save_steps=STEPS // 2)
    trainer.train()
    assert model.balancer is balancer
    assert trainer.state.log_history[0]["bias_range"] > 0
    checkpoint = str(tmp_path / f"checkpoint-{STEPS // 2}")
    again = type(model).from_pretrained(checkpoint, use_cache=False)
    equipoise.balance(again, "loss_free", bias_update_rate=0.05)
    trainer_of(again, tmp_path / "rest", BalancingCallback()).train(resume_from_checkpoint=checkpoint)
    assert torch.equal(biases_of(again), biases_of(model))
    assert again.balancer.state_dict() == balancer.state_dict()


# --- Adapters ---


def test_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = deepseek_v3()
    lora = peft.LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["gate"])
    wrapped = peft.get_peft_model(model, lora)
    trainer = trainer_of(wrapped, tmp_path, BalancingCallback("loss_free", bias_update_rate=0.05))
    trainer.train()
    gates = [module for module in wrapped.modules() if type(module).__name__ == "ModulesToSaveWrapper"]
    assert gates
    for gate in gates:  # the copy that is trained, and not the base model's
        assert gate.modules_to_save["default"].e_score_correction_bias.any()
        assert not gate.original_module.e_score_correction_bias.any()


def test_frozen_routers_are_not_balanced(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(deepseek_v3(), peft.LoraConfig(r=2, target_modules=["o_proj"]))
    trainer = trainer_of(model, tmp_path, BalancingCallback("loss_free", bias_update_rate=0.05), max_steps=2)
    trainer.train()
    assert not biases_of(model).any()


# --- What is refused ---


def refused(message: str, *given: Any, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message):
        BalancingCallback(*given, **settings)


def test_settings_that_cannot_be_are_refused_at_once() -> None:
    refused("balancing_mode must be one of none, micro_batch, .*; got globul", "globul")
    refused(r"settings must be balancing fields of MoEConfig \(.*\); got router_aux_loss", "none", router_aux_loss=1)
    refused("router_aux_loss_coef must be at least 0 and finite; got -1", "global_batch", router_aux_loss_coef=-1)
    refused("balancing_mode must be given with bias_update_rate; got None", bias_update_rate=1e-3)


def test_models_that_cannot_be_balanced_so_are_refused_when_the_trainer_is_made(
    tmp_path: Path, tiny_config: Callable[..., MoEConfig]
) -> None:
    own = MoEForCausalLM(tiny_config())
    balanced = qwen3_moe()
    equipoise.balance(balanced, "global_batch")
    for model, mode, message in [
        (qwen3_moe(), "loss_free", "balancing_mode loss_free needs routers with a correction bias"),
        (own, "global_batch", "balancing_mode must not be given for a model with a balancer: .* for MoEForCausalLM"),
        (balanced, "micro_batch", "must not be given for a model with a balancer: .* got micro_batch for Qwen3Moe"),
        (torch.nn.Linear(2, 2), "global_batch", "model must be a model of Transformers"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer_of(model, tmp_path, BalancingCallback(mode))
