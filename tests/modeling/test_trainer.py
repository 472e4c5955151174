"""`transformers.Trainer` itself, with the callback of the README, against the sum it should have minimised."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launched
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.balancing import load_balancing_loss, load_fraction, mean_scores, routing_scores

STEPS, ACCUMULATION, SEQUENCES = 3, 2, 2
COEFFICIENT, LEARNING_RATE = 0.5, 0.1


class AfterStep(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.balancer.after_optimizer_step()


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def build(tiny_config: Callable[..., MoEConfig]) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(router_aux_loss_coef=COEFFICIENT, load_estimate="running"))


def one_step_by_hand(model: MoEForCausalLM, micro_batches: list[Tensor]) -> Tensor:
    """The load of the batch; plain gradient descent on cross-entropy + LBL, `f` being the counts so far."""
    num_labels = sum(ids[:, 1:].numel() for ids in micro_batches)
    load, total = torch.zeros(2, 8, dtype=torch.long), torch.zeros(())
    for ids in micro_batches:
        model.eval()  # nothing of the Balancer takes part
        outputs = model(ids, output_router_logits=True, use_cache=False)
        logits = outputs.logits[:, :-1].flatten(0, 1)
        total = total + torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum") / num_labels
        load = load + torch.stack([experts.flatten().bincount(minlength=8) for experts in outputs.selected_experts])
        for layer, router_logits in enumerate(outputs.router_logits):
            mean_score = mean_scores(routing_scores(router_logits, "softmax"))
            lbl = load_balancing_loss(load_fraction(load[layer]), mean_score)
            total = total + COEFFICIENT * lbl / len(outputs.router_logits) / len(micro_batches)
    model.zero_grad()
    total.backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= LEARNING_RATE * weight.grad
    return load


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    fields = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return TrainingArguments(**fields | changes)


def test_trainer_minimises_what_is_written(tiny_config: Callable[..., MoEConfig], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 64, (STEPS * ACCUMULATION * SEQUENCES, 12), generator=generator)
    trained, by_hand = build(tiny_config), build(tiny_config)
    trainer = InOrder(
        model=trained,
        args=arguments(tmp_path, per_device_train_batch_size=SEQUENCES, gradient_accumulation_steps=ACCUMULATION),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[AfterStep()],
    )
    trainer.train()

    for step in ids.split(ACCUMULATION * SEQUENCES):
        load = one_step_by_hand(by_hand, list(step.split(SEQUENCES)))
    assert torch.equal(trained.balancer.metrics()["load"], load)
    for name, weight in by_hand.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), weight, atol=1e-5, rtol=1e-5, msg=name)


def train_on_a_rank(
    rank: int, world_size: int, config: MoEConfig, folder: str, average_tokens: bool, sequences: int
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = MoEForCausalLM(config)
    ids = torch.randint(2, 64, (STEPS * sequences, 12), generator=torch.Generator().manual_seed(1))
    with launched(rank, world_size) if world_size > 1 else nullcontext():
        trainer = InOrder(
            model=model,
            args=arguments(
                Path(folder),
                per_device_train_batch_size=sequences // world_size,
                average_tokens_across_devices=average_tokens,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            callbacks=[AfterStep()],
        )
        assert trainer.args.world_size == world_size
        trainer.train()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.processes
@pytest.mark.parametrize("average_tokens", [True, False])
@pytest.mark.parametrize("mode", ["global_batch", "loss_free"])
def test_trainer_on_two_processes_is_trainer_on_one(
    tiny_config: Callable[..., MoEConfig],
    tmp_path: Path,
    run_processes: Callable[..., list[Any]],
    average_tokens: bool,
    mode: str,
) -> None:
    # The stock auxiliary loss grows with the ranks. With sequences of one length the mean of the ranks' means, which
    # `average_tokens_across_devices=False` asks for, is the mean over the batch: one process is the oracle of both.
    config = tiny_config(
        balancing_mode=mode, router_aux_loss_coef=COEFFICIENT, router_z_loss_coef=0.01, bias_update_rate=0.01
    )
    sequences = 4
    alone = train_on_a_rank(0, 1, config, str(tmp_path), average_tokens, sequences)
    for weights in run_processes(2, train_on_a_rank, config, str(tmp_path), average_tokens, sequences):
        for name, value in alone.items():
            torch.testing.assert_close(weights[name], value, atol=2e-5, rtol=1e-4, msg=name)
