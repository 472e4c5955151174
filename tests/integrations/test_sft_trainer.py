"""TRL's SFTTrainer with nothing but the model: balanced, and once.

It puts a forward of its own in the place of the model's, past it to a fused head, with Transformers' auxiliary loss.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from launched import launched
from plain_loop import Batch, by_micro_step, cross_entropy_sum, plain_gradient
from torch import Tensor
from torch.utils.data import SequentialSampler
from trainers import Gradients, fields
from transformers import PreTrainedTokenizerBase
from transformers.models.mixtral import modeling_mixtral

from equipoise import BalancingCallback, MoEConfig, MoEForCausalLM

trl = pytest.importorskip("trl")
SFTConfig, SFTTrainer = trl.SFTConfig, trl.SFTTrainer

Make = Callable[..., MoEConfig]
ACCUMULATION, SEQUENCES, LENGTH = 2, 2, 24
LOSSES: dict[str, dict[str, Any]] = {
    # Each with a second term: what TRL multiplies with the coefficient of the first must come out right all the same.
    "global_batch": {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.01},
    "micro_batch": {"balancing_mode": "micro_batch", "router_aux_loss_coef": 0.5},
    "sequence": {
        "balancing_mode": "sequence",
        "router_aux_loss_coef": 0.2,
        "complementary_balancing_mode": "global_batch",
        "complementary_aux_loss_coef": 0.3,
    },
    "none": {"balancing_mode": "none"},
    "loss_free": {"balancing_mode": "loss_free", "scoring_func": "sigmoid", "bias_update_rate": 0.05},
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


def build(tiny_config: Make, tokenizer: PreTrainedTokenizerBase, mode: str = "global_batch") -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(vocab_size=len(tokenizer), **LOSSES[mode]))


def settings(folder: Path | str, **changes: Any) -> Any:
    return SFTConfig(
        **fields(
            folder,
            **{
                "bf16": False,
                "max_steps": 1,
                "per_device_train_batch_size": SEQUENCES,
                "gradient_accumulation_steps": ACCUMULATION,
                "max_length": LENGTH,
            }
            | changes,
        )
    )


def trainer_of(model: Any, tokenizer: Any, folder: Path | str, *callbacks: Any, **changes: Any) -> InOrder:
    others = {
        name: changes.pop(name) for name in ("peft_config", "compute_loss_func", "eval_dataset") if name in changes
    }
    data = Dataset.from_dict(changes.pop("data", {"text": TEXTS}))
    return InOrder(
        model=model,
        args=settings(folder, **changes),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        **others,
    )


def batches_of(trainer: Any) -> list[list[Batch]]:
    """Those of the first step, as the trainer itself cuts and collates them; in one process."""
    batches = [batch for batch, _ in zip(trainer.get_train_dataloader(), range(ACCUMULATION), strict=False)]
    return [[dict(batch)] for batch in batches]


def dft(logits: Tensor, labels: Tensor) -> Tensor:
    """arXiv 2508.05629: each token's loss times its probability, which gets no gradient."""
    chosen = logits.log_softmax(-1).gather(-1, labels[:, None])
    return -(chosen * chosen.exp().detach()).sum()


PROMPTS = {"prompt": [text[:9] for text in TEXTS], "completion": [text[9:] for text in TEXTS]}


@pytest.mark.parametrize(
    ("mode", "data", "changes"),
    [
        *((mode, {"text": TEXTS}, {}) for mode in LOSSES),
        ("global_batch", PROMPTS, {}),  # the loss is on the completion, all tokens are balanced
        ("sequence", {"text": TEXTS}, {"packing": True}),  # position_ids in the place of a mask
        ("global_batch", PROMPTS, {"packing": True, "packing_strategy": "bfd"}),
        ("global_batch", {"text": TEXTS}, {"packing": True, "packing_strategy": "wrapped"}),
        ("global_batch", {"text": TEXTS}, {"padding_free": True, "max_length": None}),
        ("global_batch", {"text": TEXTS}, {"loss_type": "dft"}),
        ("global_batch", {"text": TEXTS}, {"loss_type": "chunked_nll"}),
        ("global_batch", {"text": TEXTS}, {"gradient_checkpointing": False}),
        ("global_batch", {"text": TEXTS}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ],
    ids=str,
)
def test_the_gradient_is_that_of_a_plain_loop(
    tiny_config: Make,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    mode: str,
    data: dict[str, list[str]],
    changes: dict[str, Any],
) -> None:
    model, gradients = build(tiny_config, tokenizer, mode), Gradients()
    trainer = trainer_of(model, tokenizer, tmp_path, gradients, data=data, **changes)
    batches = batches_of(trainer)
    assert len(batches) == ACCUMULATION
    loss = dft if changes.get("loss_type") == "dft" else cross_entropy_sum
    expected = plain_gradient(build(tiny_config, tokenizer, mode), batches, by_micro_step, loss)
    trainer.train()
    assert model.balancer.steps == 1
    kept = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for step in batches for batch in step]
    assert model.balancer.metrics()["tokens"] == sum(int(mask.sum()) for mask in kept)
    assert gradients.first.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients.first[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def train_on_a_rank(
    rank: int, world_size: int, config: MoEConfig, tokenizer: PreTrainedTokenizerBase, folder: str
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, gradients = MoEForCausalLM(config), Gradients()
    with launched(rank, world_size):
        trainer_of(model, tokenizer, folder, gradients).train()
    return gradients.first


@pytest.mark.processes
def test_two_processes_minimise_what_a_plain_loop_does(
    tiny_config: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, run_processes: Callable[..., list[Any]]
) -> None:
    config = tiny_config(vocab_size=len(tokenizer), **LOSSES["global_batch"])
    model = build(tiny_config, tokenizer)
    trainer = trainer_of(copy.deepcopy(model), tokenizer, tmp_path, gradient_accumulation_steps=4)
    # As many batches as two ranks have in two micro-steps; the ranks take turns.
    taken = [dict(batch) for batch, _ in zip(trainer.get_train_dataloader(), range(4), strict=False)]
    expected = plain_gradient(model, [taken[:2], taken[2:]], by_micro_step)
    for gradients in run_processes(2, train_on_a_rank, config, tokenizer, str(tmp_path)):
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_biases_move_once_a_step(tiny_config: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = build(tiny_config, tokenizer, "loss_free")
    trainer = trainer_of(model, tokenizer, tmp_path, BalancingCallback(), max_steps=3)
    trainer.train()
    assert model.balancer.steps == 3
    moved = torch.stack(model.selection_biases())
    # Steps of the rate up or down, less their mean.
    levels = (moved - moved[:, :1]) / 0.05
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert moved.any()
    record = trainer.state.log_history[-2]
    assert record["bias_range"] > 0
    assert record["aux_loss"] == 0  # TRL's word for what it adds


def test_evaluation_is_the_cross_entropy_alone(
    tiny_config: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = build(tiny_config, tokenizer)
    data = Dataset.from_dict({"text": TEXTS[:4]})
    trainer = trainer_of(model, tokenizer, tmp_path, eval_dataset=data, per_device_eval_batch_size=4)
    loss = trainer.evaluate()["eval_loss"]
    batch = dict(next(iter(trainer.get_eval_dataloader())))
    with torch.no_grad():
        outputs = build(tiny_config, tokenizer).eval()(**batch)
    assert loss == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert model.balancer.metrics() == {}


def test_what_is_no_fused_forward_is_the_model_s_own(
    tiny_config: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = build(tiny_config, tokenizer)
    trainer_of(model, tokenizer, tmp_path).train()
    own = build(tiny_config, tokenizer)
    own.load_state_dict(model.state_dict())
    ids = torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    for each in (model, own):
        each.balancer.synchronizer.previous = None
    assert torch.equal(model.train()(ids, labels=ids).loss, own.train()(ids, labels=ids).loss)
    generated = [each.eval().generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for each in (model, own)]
    assert torch.equal(*generated)


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_another_coefficient_than_the_model_s_is_refused(
    tiny_config: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, coefficient: float
) -> None:
    # TRL's coefficient would scale the z-loss as well, and 0 would leave both out without a word.
    trainer = trainer_of(build(tiny_config, tokenizer), tokenizer, tmp_path, router_aux_loss_coef=coefficient)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef must be .* \(0.5\).* got " + str(coefficient)):
        trainer.train()


def test_no_coefficient_is_needed_where_there_is_no_loss(
    tiny_config: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = build(tiny_config, tokenizer, "loss_free")
    trainer_of(model, tokenizer, tmp_path, router_aux_loss_coef=0.0).train()
    assert model.balancer.steps == 1


def test_adapters(tiny_config: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = build(tiny_config, tokenizer)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["gate"], task_type="CAUSAL_LM")
    gradients = Gradients()
    trainer = trainer_of(model, tokenizer, tmp_path, gradients, peft_config=lora)
    expected = plain_gradient(build(tiny_config, tokenizer), batches_of(trainer), by_micro_step)
    trainer.train()
    routers = [name for name in gradients.first if "gate" in name]
    assert len(routers) == 2
    for name in routers:  # LoRA begins at 0: the routers' gradients are those of the model without it
        own = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        torch.testing.assert_close(gradients.first[name], expected[own], atol=1e-5, rtol=1e-5, msg=name)


def test_a_loss_of_one_s_own(tiny_config: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    # TRL then calls the model without labels: the recipe of docs/fine_tuning.md.
    model, gradients = build(tiny_config, tokenizer), Gradients()

    def loss_function(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch
        if outputs.aux_loss is not None:
            processes, accumulation = trainer.accelerator.num_processes, trainer.current_gradient_accumulation_steps
            loss = loss + outputs.aux_loss / (processes * accumulation)
        return loss

    with pytest.warns(FutureWarning, match="compute_loss_func"):
        trainer = trainer_of(model, tokenizer, tmp_path, gradients, compute_loss_func=loss_function)
    expected = plain_gradient(build(tiny_config, tokenizer), batches_of(trainer), by_micro_step)
    trainer.train()
    assert model.balancer.steps == 1
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients.first[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


def test_label_smoothing_leaves_the_balancing_loss_out(
    tiny_config: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.warns(FutureWarning, match="label_smoothing_factor"):
        trainer = trainer_of(build(tiny_config, tokenizer), tokenizer, tmp_path, label_smoothing_factor=0.1)
    with pytest.warns(UserWarning, match="balancing loss took no part in the backward pass"):
        trainer.train()


def test_preferences(tiny_config: Make, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    # The same forward of TRL's under DPO: chosen and rejected texts are counted, the reference's forward is not.
    model = build(tiny_config, tokenizer)
    rows = {**PROMPTS, "chosen": PROMPTS["completion"], "rejected": [text[::-1] for text in PROMPTS["completion"]]}
    rows.pop("completion")
    config = {"bf16": False, "max_steps": 1, "per_device_train_batch_size": 2, "max_length": LENGTH}
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=build(tiny_config, tokenizer),
        args=trl.DPOConfig(**fields(tmp_path, **config)),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    assert model.balancer.steps == 1
    assert model.balancer.metrics()["tokens"] == batch["attention_mask"].sum()
    assert trainer.state.log_history[0]["aux_loss"] > 0.5
