"""Training without logits is training with them, in every way that a head is used."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launched import launched
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trainers import Gradients, arguments, examples
from transformers import Trainer

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.integrations import shard, sharding_mesh

Make = Callable[..., MoEConfig]
Run = Callable[..., list[Any]]
IDS = torch.randint(2, 64, (3, 20), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(20) < torch.tensor([[0], [7], [20]]), -100)


def build(config: MoEConfig) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(config).train()


def step(model: Any, **inputs: Any) -> dict[str, Any]:
    """Losses and gradients of one forward and backward pass, and how often the head was called as a module."""
    model.zero_grad()
    calls: list[int] = []
    base = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "module", model)
    watched = base.lm_head.register_forward_hook(lambda *_: calls.append(1))
    outputs = model(input_ids=IDS, use_cache=False, **inputs)
    watched.remove()
    outputs.loss.backward()
    gradients = {name: whole(weight.grad) for name, weight in model.named_parameters() if weight.grad is not None}
    losses = {"loss": outputs.loss.detach(), "lm_loss": outputs.lm_loss, "aux_loss": outputs.aux_loss.detach()}
    return {"gradients": gradients, "head calls": len(calls), "logits": outputs.logits is not None, **losses}


def whole(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.clone()
    # Tensor parallelism packs the experts in a way that torch 2.11 cannot put together: there, this rank's part.
    return tensor.to_local().clone() if "_StridedShard" in str(tensor.placements) else tensor.full_tensor()


def assert_alike(skipped: dict[str, Any], made: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert made["logits"]
    assert not skipped["logits"]
    for name in ("loss", "lm_loss", "aux_loss"):
        torch.testing.assert_close(skipped[name].double(), made[name].double(), rtol=tolerance, atol=tolerance)
    assert skipped["gradients"].keys() == made["gradients"].keys()
    for name, gradient in made["gradients"].items():
        allowed = tolerance * (1 + gradient.abs().max().item())
        torch.testing.assert_close(skipped["gradients"][name], gradient, rtol=tolerance, atol=allowed, msg=name)


@pytest.mark.parametrize("labels", ["labels", "shift_labels"])
@pytest.mark.parametrize("num_items", [None, 50])
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_is_the_same_without_logits(tiny_config: Make, tied: bool, num_items: int | None, labels: str) -> None:
    model = build(tiny_config(tie_word_embeddings=tied, router_aux_loss_coef=0.5)).double()
    given = {"labels": LABELS, "num_items_in_batch": num_items}
    if labels == "shift_labels":
        given = {"shift_labels": nn.functional.pad(LABELS[:, 1:], (0, 1), value=-100), "num_items_in_batch": num_items}
        given["labels"] = LABELS
    made, skipped = step(model, **given), step(model, skip_logits=True, **given)
    assert (made["head calls"], skipped["head calls"]) == (1, 0)
    assert_alike(skipped, made, 1e-6)  # Transformers' own loss function rounds to fp32


def test_losses_of_tokens_come_with_and_without_logits(tiny_config: Make) -> None:
    model = build(tiny_config(balancing_mode="none"))
    outputs = [
        model(IDS, labels=LABELS, use_cache=False, skip_logits=skip, output_token_losses=True)
        for skip in (True, False)
    ]
    logits = outputs[1].logits.detach().double()
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten(), reduction="none")
    for output in outputs:
        assert not output.token_losses.requires_grad
        torch.testing.assert_close(output.token_losses[:, :-1].flatten().double(), expected, rtol=1e-5, atol=1e-6)
        assert not output.token_losses[:, -1].any()
        torch.testing.assert_close(output.loss.double(), expected.sum() / LABELS[:, 1:].ne(-100).sum())


def test_the_configuration_skips_in_training_with_labels_alone(tiny_config: Make, tmp_path: Path) -> None:
    build(tiny_config(skip_logits_in_training=True)).save_pretrained(tmp_path)
    model = MoEForCausalLM.from_pretrained(tmp_path).train()
    assert model(IDS, labels=LABELS).logits is None
    assert model(IDS, labels=LABELS, skip_logits=False).logits is not None
    assert model(IDS).logits is not None  # a loop that takes its loss elsewhere
    model.eval()
    assert model(IDS, labels=LABELS).logits is not None
    assert model(IDS, labels=LABELS, skip_logits=True).logits is None
    for name in ("skip_logits", "output_token_losses"):
        with pytest.raises(ValueError, match=f"{name} must be False without labels; got True"):
            model(IDS, **{name: True})


def test_a_loss_function_of_ones_own_gets_logits(tiny_config: Make) -> None:
    model = build(tiny_config(balancing_mode="none"))
    model.loss_function = lambda logits, **_: logits.square().mean()
    made, skipped = (model(IDS, labels=LABELS, skip_logits=skip) for skip in (False, True))
    assert skipped.logits is None
    assert torch.equal(made.loss, skipped.loss)


@pytest.mark.parametrize("kind", ["frozen", "LoRA on the head", "a head of its own"])
def test_heads_under_peft(tiny_config: Make, kind: str) -> None:
    peft = pytest.importorskip("peft")
    model: Any = build(tiny_config())
    if kind == "frozen":
        model.lm_head.requires_grad_(False)
    elif kind == "LoRA on the head":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    else:
        fields = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
        model = peft.get_peft_model(model, peft.LoraConfig(**fields))
    made, skipped = step(model, labels=LABELS), step(model, labels=LABELS, skip_logits=True)
    assert skipped["head calls"] == (0 if kind == "frozen" else 1)  # an adapter changes what the head computes
    assert_alike(skipped, made)
    assert ("lm_head.weight" in skipped["gradients"]) is False or kind != "frozen"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_trains_without_logits(tiny_config: Make, tmp_path: Path, smoothing: float) -> None:
    """Under label smoothing Trainer takes the labels away and asks for logits: it gets them."""
    gradients = []
    for skip in (False, True):
        model = build(tiny_config())
        model.config.skip_logits_in_training = skip
        calls: list[int] = []
        model.lm_head.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        kept, data = Gradients(), examples(4, [12, 7], [0, 3])
        changes = {"max_steps": 1, "label_smoothing_factor": smoothing, "per_device_train_batch_size": 2}
        trainer = Trainer(model, arguments(tmp_path, **changes), train_dataset=data, callbacks=[kept])
        trainer.train()
        assert bool(calls) == (not skip or smoothing > 0)
        gradients.append(kept.first)
        assert trainer.evaluate(data)["eval_loss"] > 0
        assert trainer.predict(data).predictions.shape == (4, 12, 64)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def _spread(rank: int, world_size: int, config: MoEConfig, folder: str) -> dict[str, Any]:
    """Steps with and without logits under every way to spread a model over processes."""
    results: dict[str, Any] = {}
    kinds = ["DDP", "FSDP2", "FSDP2 in bf16", "FSDP2, its own group", "tensor parallelism"]
    for kind in kinds:
        model: Any = build(copy.deepcopy(config))
        if kind == "DDP":
            model = DistributedDataParallel(model)
        elif kind == "FSDP2, its own group":
            fully_shard(model.lm_head)
            fully_shard(model)
        elif kind == "tensor parallelism":
            with launched(rank, world_size):
                model = MoEForCausalLM.from_pretrained(folder, tp_plan="auto").train()
        else:
            model = shard(model, sharding_mesh("cpu"), bf16=kind.endswith("bf16"))
        results[kind] = [step(model, labels=LABELS, skip_logits=skip) for skip in (False, True)]
    return results


@pytest.mark.processes
def test_heads_that_are_spread_over_processes(tiny_config: Make, tmp_path: Path, run_processes: Run) -> None:
    """A whole weight is used as it is; of a part of one the module makes logits, as it must."""
    config = tiny_config(tie_word_embeddings=False, balancing_mode="none", router_z_loss_coef=0.1)
    build(config).save_pretrained(tmp_path)
    for results in run_processes(2, _spread, config, str(tmp_path)):
        for kind, (made, skipped) in results.items():
            assert skipped["head calls"] == (1 if kind in ("FSDP2, its own group", "tensor parallelism") else 0), kind
            assert_alike(skipped, made, 2e-2 if kind.endswith("bf16") else 1e-5)
