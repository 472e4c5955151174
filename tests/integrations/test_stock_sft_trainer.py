"""BalancingCallback under TRL's SFTTrainer, which goes past a stock model's forward to a fused head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from launched import launched
from plain_loop import Batch, by_micro_step, plain_gradient
from stock_balancing import FAMILIES, Seen, biases_of, qwen3_moe
from torch import Tensor
from torch.utils.data import SequentialSampler
from trainers import Gradients, fields
from transformers import PreTrainedTokenizerBase
from transformers.models.mixtral import modeling_mixtral

import equipoise
from equipoise import BalancingCallback

trl = pytest.importorskip("trl")
SFTConfig, SFTTrainer = trl.SFTConfig, trl.SFTTrainer

ACCUMULATION, SEQUENCES, LENGTH = 2, 2, 24
SETTINGS: dict[str, dict[str, Any]] = {
    # With a second term: what TRL multiplies with a coefficient of its own must come out right all the same.
    "global_batch": {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.01},
    "sequence": {"router_aux_loss_coef": 0.2},
    "none": {},
    "loss_free": {"bias_update_rate": 0.05},
}
TEXTS = [f"def f{number}(x):\n    return x + {number}\n" * (1 + number % 4) for number in range(16)]


class InOrder(SFTTrainer):
    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


@pytest.fixture(autouse=True)
def stock_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' auxiliary loss must not be computed, let alone added."""

    def refuse(*_: Any) -> None:
        raise AssertionError("Transformers' auxiliary loss was computed")

    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", refuse)


def build(family: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    return FAMILIES[family](vocab_size=len(tokenizer))


def trainer_of(model: Any, tokenizer: Any, folder: Path | str, *callbacks: Any, **changes: Any) -> InOrder:
    others = {name: changes.pop(name) for name in ("peft_config", "eval_dataset") if name in changes}
    settings = {
        "bf16": False,
        "max_steps": 1,
        "per_device_train_batch_size": SEQUENCES,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_length": LENGTH,
    }
    return InOrder(
        model=model,
        args=SFTConfig(**fields(folder, **settings | changes)),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **others,
    )


def first_batches(trainer: Any, number: int) -> list[Batch]:
    return [dict(batch) for batch, _ in zip(trainer.get_train_dataloader(), range(number), strict=False)]


def same(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected.keys() <= gradients.keys()
    for name, gradient in gradients.items():
        wanted = expected.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("family", "mode", "changes"),
    [
        *(("qwen3_moe", mode, {}) for mode in ("none", "sequence", "global_batch")),
        ("qwen3_moe", "global_batch", {"loss_type": "chunked_nll"}),
        ("qwen3_moe", "global_batch", {"router_aux_loss_coef": 0.7}),  # TRL's own coefficient has no say
        ("qwen3_moe", "global_batch", {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        ("deepseek_v3", "global_batch", {"router_aux_loss_coef": 0.01}),  # it has none of its own
        ("deepseek_v3", "loss_free", {}),
    ],
    ids=str,
)
def test_the_gradient_is_that_of_a_plain_loop(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, family: str, mode: str, changes: dict[str, Any]
) -> None:
    # An average over ranks and micro-steps, which is TRL's convention for an auxiliary loss.
    gradients = Gradients()
    settings = {"balancing_mode": mode, **SETTINGS[mode]}
    trainer = trainer_of(
        build(family, tokenizer), tokenizer, tmp_path, gradients, BalancingCallback(**settings), **changes
    )
    batches = [[batch] for batch in first_batches(trainer, ACCUMULATION)]
    trainer.train()
    seen = Seen(build(family, tokenizer), **settings)
    same(gradients.first, seen.gradient_names(plain_gradient(seen, batches, by_micro_step)))
    record = trainer.state.log_history[0]
    assert record["max_vio_batch"] > 0
    assert "bias_range" in record if mode == "loss_free" else "bias_range" not in record


def train_on_a_rank(
    rank: int, world_size: int, tokenizer: PreTrainedTokenizerBase, folder: str, mode: str
) -> dict[str, Tensor]:
    gradients = Gradients()
    callback = BalancingCallback(mode, **SETTINGS[mode])
    with launched(rank, world_size):
        trainer_of(build("qwen3_moe", tokenizer), tokenizer, folder, gradients, callback).train()
    return gradients.first


@pytest.mark.processes
def test_two_processes_minimise_what_a_plain_loop_does(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, run_processes: Callable[..., list[Any]]
) -> None:
    # As many batches as two ranks have in two micro-steps; the ranks take turns.
    trainer = trainer_of(build("qwen3_moe", tokenizer), tokenizer, tmp_path)
    taken = first_batches(trainer, 4)
    seen = Seen(build("qwen3_moe", tokenizer), balancing_mode="global_batch", **SETTINGS["global_batch"])
    expected = seen.gradient_names(plain_gradient(seen, [taken[:2], taken[2:]], by_micro_step))
    for gradients in run_processes(2, train_on_a_rank, tokenizer, str(tmp_path), "global_batch"):
        same(gradients, expected)


@pytest.mark.parametrize("mode", ["global_batch", "loss_free"])
def test_adapters(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, mode: str) -> None:
    # PEFT calls the forward that TRL replaced past every hook of the model.
    peft = pytest.importorskip("peft")
    family = "qwen3_moe" if mode == "global_batch" else "deepseek_v3"
    lora = peft.LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["gate"], task_type="CAUSAL_LM")
    gradients = Gradients()
    settings = {"balancing_mode": mode, **SETTINGS[mode]}
    callback = BalancingCallback(**settings)
    trainer = trainer_of(build(family, tokenizer), tokenizer, tmp_path, gradients, callback, peft_config=lora)
    batches = [[batch] for batch in first_batches(trainer, ACCUMULATION)]
    trainer.train()
    seen = Seen(build(family, tokenizer), **settings)
    expected = seen.gradient_names(plain_gradient(seen, batches, by_micro_step))
    routers = [name for name in gradients.first if "gate" in name and "shared" not in name]
    assert len(routers) == (3 if mode == "global_batch" else 2)
    for name in routers:  # LoRA begins at 0: the routers' gradients are those of the model without it
        own = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        torch.testing.assert_close(gradients.first[name], expected[own], atol=1e-5, rtol=1e-5, msg=name)
    assert trainer.state.log_history[0].get("bias_range", 1) > 0


def test_biases_move_once_a_step_without_a_word_to_trl(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = build("deepseek_v3", tokenizer)
    trainer = trainer_of(
        model, tokenizer, tmp_path, BalancingCallback("loss_free", bias_update_rate=0.05), max_steps=3
    )
    trainer.train()
    # Steps of the rate up or down, less their mean.
    levels = (biases_of(model) - biases_of(model)[:, :1]) / 0.05
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert 0 < levels.abs().max() <= 6


def test_a_loss_that_trl_would_leave_out_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for family, changes in [("deepseek_v3", {}), ("qwen3_moe", {"router_aux_loss_coef": 0.0})]:
        model = build(family, tokenizer)
        trainer = trainer_of(model, tokenizer, tmp_path, BalancingCallback("global_batch"), **changes)
        with pytest.raises(ValueError, match=r"router_aux_loss_coef .* leaves out load_balancing_loss .* got 0\.0"):
            trainer.train()


def test_a_balancer_that_does_not_know_of_trl_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = build("qwen3_moe", tokenizer)
    equipoise.balance(model, "global_batch")
    trainer = trainer_of(model, tokenizer, tmp_path, BalancingCallback())
    with pytest.raises(ValueError, match="balancing_mode must be given to BalancingCallback under TRL"):
        trainer.train()


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_evaluation_is_the_cross_entropy_alone(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, family: str
) -> None:
    model = build(family, tokenizer)
    data = Dataset.from_dict({"text": TEXTS[:4]})
    callback = BalancingCallback("global_batch", detach=False, router_aux_loss_coef=0.5)
    changes = {"per_device_eval_batch_size": 4, "learning_rate": 0.0, "router_aux_loss_coef": 0.7}
    trainer = trainer_of(model, tokenizer, tmp_path, callback, eval_dataset=data, **changes)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    batch = dict(next(iter(trainer.get_eval_dataloader())))
    with torch.no_grad():
        outputs = build(family, tokenizer).eval()(**batch)
    assert loss == pytest.approx(outputs.loss.item(), rel=1e-5)


def test_the_forward_is_trl_s_again_afterwards(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = qwen3_moe(vocab_size=len(tokenizer))
    trainer = trainer_of(model, tokenizer, tmp_path, BalancingCallback("global_batch"))
    forward = vars(model)["forward"]
    trainer.train()
    assert vars(model)["forward"] is forward
    assert not model._forward_hooks
