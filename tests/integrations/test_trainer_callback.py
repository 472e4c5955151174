"""BalancingCallback: what it logs, and that a resumed run is the run that was not interrupted."""

import json
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from launched import launched
from torch import Tensor
from trainers import InOrder, Recorder, arguments, examples
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerState
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import equipoise
from equipoise import BalancingCallback, MoEConfig, MoEForCausalLM
from equipoise.integrations.trainer_callback import find_balancer

Make = Callable[..., MoEConfig]
MODES: dict[str, dict[str, Any]] = {
    # Each goes on from what its balancer remembers: the last batch's load, or a momentum and a decayed rate.
    "global_batch": {"router_aux_loss_coef": 0.5, "load_estimate": "completed"},
    "loss_free": {
        "balancing_mode": "loss_free",
        "scoring_func": "sigmoid",
        "bias_update_rule": "tanh_momentum",
        "bias_update_rate": 0.05,
        "bias_update_rate_decay": 0.9,
    },
}
STEPS, ACCUMULATION, SEQUENCES = 6, 2, 2


def build(config: MoEConfig) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(config)


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


# --- Logs ---


@pytest.mark.parametrize("mode", MODES)
def test_logs_hold_the_balance(tiny_config: Make, tmp_path: Path, mode: str) -> None:
    recorder = Recorder(lambda model: (model.balancer.metrics()["load"], torch.stack(model.selection_biases())))
    late = Recorder()
    trainer = trainer_of(build(tiny_config(**MODES[mode])), tmp_path, BalancingCallback(), recorder)
    trainer.add_callback(late)
    trainer.eval_dataset = trainer.train_dataset
    trainer.train()
    trainer.evaluate()

    history = [record for record in trainer.state.log_history if "loss" in record]
    assert len(history) == len(recorder.seen) == STEPS
    for record, (load, biases) in zip(history, recorder.seen, strict=True):
        share = load.double() / load.sum(-1, keepdim=True)
        vio = share.max(-1).values * load.shape[-1] - 1
        entropy = -torch.where(share > 0, share * share.log(), 0.0).sum(-1) / math.log(load.shape[-1])
        assert record["max_vio_batch"] == pytest.approx(vio.mean().item(), rel=1e-5)
        assert record["max_vio_batch_worst"] == pytest.approx(vio.max().item(), rel=1e-5)
        assert record["max_vio_micro"] >= record["max_vio_batch"] - 1e-6  # a mean is never more uneven than its parts
        assert record["max_vio_micro_worst"] >= record["max_vio_micro"]
        assert record["load_entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
        assert record["dead_experts"] == (load == 0).sum().item()
        assert record["load_balancing_loss"] > 0.5
        if mode == "loss_free":
            widest = (biases.max(-1).values - biases.min(-1).values).max().item()
            assert record["bias_range"] == pytest.approx(widest, abs=1e-7)
            assert widest > 0
        assert ("bias_range" in record) == (mode == "loss_free")
    assert [logs["max_vio_batch"] for logs in late.logs if "loss" in logs] == [r["max_vio_batch"] for r in history]
    assert not any("max_vio_batch" in logs for logs in late.logs if "loss" not in logs)  # evaluation, summary
    json.dumps(trainer.state.log_history)  # numbers, which `trainer_state.json` can hold


def test_callbacks_that_report_see_it_when_it_comes_first(tiny_config: Make, tmp_path: Path) -> None:
    # Trainer's own reporting callbacks stand before those it is given.
    reporter = Recorder()
    trainer = trainer_of(build(tiny_config()), tmp_path, reporter, BalancingCallback(), max_steps=1)
    trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(BalancingCallback))
    trainer.train()
    assert reporter.logs[0]["max_vio_batch"] == trainer.state.log_history[0]["max_vio_batch"]


# --- Checkpoints ---


def run(
    rank: int, world_size: int, config: MoEConfig, folder: str, resume_from: str | None, with_callback: bool
) -> list[Any]:
    """Weights and biases, the state of the balancer, and what was logged, of a run or of the rest of one."""
    # Accelerate calls the device of such a process `cpu:0`, to which Transformers 5.17 fails to load an optimizer.
    device = patch.dict(os.environ, ACCELERATE_TORCH_DEVICE="cpu")
    with device, launched(rank, world_size) if world_size > 1 else nullcontext():
        model = build(config)
        callbacks = [BalancingCallback()] if with_callback else []
        saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
        trainer = trainer_of(model, folder, *callbacks, world_size=world_size, **saving)
        trainer.train(resume_from_checkpoint=resume_from)
        history = [record for record in trainer.state.log_history if "loss" in record]
        for record in history:
            record.pop("epoch")
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        return [weights, json.dumps(model.balancer.state_dict()), json.dumps(history, sort_keys=True)]


@pytest.mark.processes
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    tiny_config: Make, tmp_path: Path, run_processes: Callable[..., list[Any]], mode: str, world_size: int
) -> None:
    def both(folder: str, resume_from: str | None) -> list[Any]:
        work = (tiny_config(**MODES[mode]), folder, resume_from, True)
        return run_processes(2, run, *work) if world_size == 2 else [run(0, 1, *work)]

    whole = both(str(tmp_path / "whole"), None)
    checkpoint = tmp_path / "whole" / f"checkpoint-{STEPS // 2}"
    rest = both(str(tmp_path / "rest"), str(checkpoint))
    for (weights, balancer, history), (same_weights, same_balancer, same_history) in zip(whole, rest, strict=True):
        for name, value in weights.items():
            assert torch.equal(same_weights[name], value), name
        assert same_balancer == balancer
        assert same_history == history  # losses, norms and balance of all steps, those before the checkpoint too


def test_without_the_callback_the_resumed_run_forgets_the_last_load(tiny_config: Make, tmp_path: Path) -> None:
    # What the test above would not show if the state did not matter.
    work = tiny_config(**MODES["global_batch"]), str(tmp_path)
    whole, _, _ = run(0, 1, *work, None, False)
    rest, _, _ = run(0, 1, *work, str(tmp_path / f"checkpoint-{STEPS // 2}"), False)
    assert any(not torch.equal(rest[name], value) for name, value in whole.items())


def test_a_checkpoint_of_a_run_without_the_callback_can_be_resumed_and_saved(
    tiny_config: Make, tmp_path: Path
) -> None:
    # Trainer looks each callback up in the state it has read, when it saves again.
    config = tiny_config(**MODES["loss_free"])
    run(0, 1, config, str(tmp_path / "bare"), None, False)
    run(0, 1, config, str(tmp_path / "rest"), str(tmp_path / "bare" / f"checkpoint-{STEPS // 2}"), True)
    state = TrainerState.load_from_json(str(tmp_path / "rest" / f"checkpoint-{STEPS}" / "trainer_state.json"))
    assert state.stateful_callbacks["BalancingCallback"]["attributes"]["balancer_state"]["steps"] == STEPS // 2


def test_trainer_may_restore_the_callback_itself(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config(**MODES["loss_free"])
    whole, balancer, _ = run(0, 1, config, str(tmp_path), None, True)
    model = build(config)
    trainer = trainer_of(model, tmp_path / "rest", BalancingCallback(), restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert json.dumps(model.balancer.state_dict()) == balancer
    assert all(torch.equal(model.state_dict()[name], value) for name, value in whole.items())


# --- Steps ---


def test_it_changes_nothing_where_the_balancer_sees_the_steps(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config(**MODES["loss_free"])
    bare, bare_balancer, _ = run(0, 1, config, str(tmp_path / "bare"), None, False)
    weights, balancer, _ = run(0, 1, config, str(tmp_path / "with"), None, True)
    assert balancer == bare_balancer
    assert all(torch.equal(weights[name], value) for name, value in bare.items())


def test_a_step_that_the_scaler_passes_over_is_closed(tiny_config: Make, tmp_path: Path) -> None:
    # In fp16 with an unfused optimizer only Accelerate's word tells: the counts would merge into the next batch.
    Accelerator(cpu=True)  # makes the state that the optimizer's wrapper reads
    model = build(tiny_config(**MODES["loss_free"])).train()
    callback = BalancingCallback()
    trainer = trainer_of(model, tmp_path, callback)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), scaler=scaler)
    loads: list[Tensor] = []
    for step in range(3):
        ids = torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(step))
        outputs = model(ids, labels=ids, output_router_logits=True, use_cache=False)
        scaler.scale(outputs.loss).backward()
        if step == 1:
            model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = float("inf")
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped == (step == 1)
        callback.on_step_end(trainer.args, trainer.state, trainer.control, model=model, optimizer=optimizer)
        loads.append(torch.stack([experts.flatten().bincount(minlength=8) for experts in outputs.selected_experts]))
    assert model.balancer.steps == 2
    assert torch.equal(model.balancer.metrics()["load"], loads[2])


# --- Which models ---


def test_a_model_that_does_not_balance_is_refused(tmp_path: Path) -> None:
    stock = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=4,
        )
    )
    message = "model must have a balancer, as MoEForCausalLM has, or BalancingCallback a .*; got Qwen3MoeForCausalLM"
    with pytest.raises(ValueError, match=message):
        trainer_of(stock, tmp_path, BalancingCallback())
    trainer = trainer_of(stock, tmp_path)
    trainer.add_callback(BalancingCallback)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_adapters(tiny_config: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = build(tiny_config(**MODES["loss_free"]))
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    trainer = trainer_of(peft.get_peft_model(model, lora), tmp_path, BalancingCallback())
    trainer.train()
    assert model.balancer.steps == STEPS
    assert trainer.state.log_history[0]["bias_range"] > 0


def test_torch_compile(tiny_config: Make, tmp_path: Path) -> None:
    torch.compiler.reset()
    model = build(tiny_config(**MODES["loss_free"], num_hidden_layers=2))
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = trainer_of(model, tmp_path, BalancingCallback(), max_steps=2, **compiled)
    trainer.train()
    assert model.balancer.steps == 2
    assert trainer.state.log_history[0]["bias_range"] > 0


def test_a_model_that_brought_its_own_code(tiny_config: Make, tmp_path: Path) -> None:
    # Its Balancer is of another class, which no check by type would know.
    build(tiny_config(**MODES["loss_free"])).save_pretrained(tmp_path / "saved")
    remote: Any = get_class_from_dynamic_module("modeling_moe.MoEForCausalLM", str(tmp_path / "saved"))
    model = remote.from_pretrained(tmp_path / "saved")
    assert not isinstance(find_balancer(model), equipoise.Balancer)
    trainer = trainer_of(model, tmp_path, BalancingCallback(), max_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["bias_range"] > 0
