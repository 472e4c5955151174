"""Balancing of a model that PEFT has wrapped: which routers are trained, whose bias moves, what an adapter saves.

Nobody tells the Balancer of the optimizer's steps.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from trainers import InOrder, arguments, examples
from transformers import AutoModelForCausalLM

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.balancing import SignUpdate

peft = pytest.importorskip("peft")

Make = Callable[..., MoEConfig]
EXPERTS, LAYERS, RATE = 8, 2, 0.05
LOSS_FREE = {"balancing_mode": "loss_free", "scoring_func": "sigmoid", "bias_update_rate": RATE}
GLOBAL_BATCH = {"balancing_mode": "global_batch", "router_aux_loss_coef": 0.5}
ATTENTION = ["q_proj", "v_proj"]
EXPERT_WEIGHTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def tokens(seed: int) -> Tensor:
    return torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(seed))


def build(config: MoEConfig) -> MoEForCausalLM:
    """Biases that are not zero, and centred: a copy must begin with them."""
    torch.manual_seed(0)
    model = MoEForCausalLM(config).train()
    for bias in model.selection_biases():
        bias.copy_(torch.linspace(-0.1, 0.1, EXPERTS))
    return model


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.0, **fields)


def wrapped(model: MoEForCausalLM, **fields: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between PEFT and Transformers are theirs
        return peft.get_peft_model(model, lora(**fields))


def gates(model: MoEForCausalLM) -> list[nn.Module]:
    return [layer.mlp.gate for layer in model.model.layers[1:]]


def biases_of(routers: list[Any]) -> Tensor:
    return torch.stack([router.e_score_correction_bias for router in routers]).clone()


def step(model: MoEForCausalLM, adapted: Any, seed: int) -> tuple[Tensor, Any]:
    """One optimizer step through the PEFT model; the load counted from its selections, and its outputs."""
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.1)
    ids = tokens(seed)
    outputs = adapted(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
    outputs.loss.backward()
    steps = model.balancer.steps
    optimizer.step()
    optimizer.zero_grad()
    assert model.balancer.steps == steps + 1
    load = torch.stack([experts.flatten().bincount(minlength=EXPERTS) for experts in outputs.selected_experts])
    return load, outputs


@pytest.mark.parametrize("targets", [{"target_modules": ATTENTION}, {"target_modules": "all-linear"}], ids=str)
def test_adapters_beside_the_routers_leave_the_biases(tiny_config: Make, targets: dict[str, Any]) -> None:
    # Guards against a bias that drifts in the frozen base model, and that no adapter file would hold.
    model = build(tiny_config(**LOSS_FREE))
    adapted = wrapped(model, **targets)
    before = biases_of(gates(model))
    weights = [gate.weight.clone() for gate in gates(model)]
    for seed in range(2):
        load, _ = step(model, adapted, seed)
    assert model.trained_routers() == [False] * LAYERS
    assert torch.equal(biases_of(gates(model)), before)
    assert all(torch.equal(gate.weight, weight) for gate, weight in zip(gates(model), weights, strict=True))
    assert torch.equal(model.balancer.metrics()["load"], load)  # the balance is measured all the same


def test_adapters_beside_the_routers_get_no_balancing_gradient(tiny_config: Make) -> None:
    # Guards against adapters that are bent to please routers which cannot learn.
    model = build(tiny_config(**GLOBAL_BATCH))
    _, outputs = step(model, wrapped(model, target_modules=ATTENTION), 0)
    assert outputs.aux_loss.item() > 0
    assert not outputs.aux_loss.requires_grad
    assert outputs.loss.requires_grad


def test_the_active_copy_of_a_router_is_balanced_and_saved(tiny_config: Make, tmp_path: Path) -> None:
    # Guards against moving the original's bias, which the forward pass no longer reads and the adapter does not save.
    model = build(tiny_config(**LOSS_FREE))
    before = biases_of(gates(model))
    adapted = wrapped(model, target_modules=ATTENTION, modules_to_save=["gate"])
    assert model.trained_routers() == [True] * LAYERS
    expected = before
    for seed in range(2):
        load, _ = step(model, adapted, seed)
        expected = SignUpdate().update(expected, load, RATE, None)
    active = [gate.modules_to_save["default"] for gate in gates(model)]
    assert torch.equal(biases_of(active), expected)
    assert torch.equal(biases_of([gate.original_module for gate in gates(model)]), before)
    assert torch.equal(torch.stack(model.selection_biases()), expected)
    assert biases_of(active).dtype == torch.float32

    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    kept = [value for name, value in sorted(saved.items()) if name.endswith("gate.e_score_correction_bias")]
    assert torch.equal(torch.stack(kept), expected)

    # A model of its own, begun as the first one was.
    other = build(tiny_config(**LOSS_FREE))
    restored = peft.PeftModel.from_pretrained(other, tmp_path, is_trainable=True)
    assert torch.equal(torch.stack(other.selection_biases()), expected)
    assert torch.equal(biases_of([gate.original_module for gate in gates(other)]), before)
    ids = tokens(5)
    torch.testing.assert_close(restored.eval()(ids).logits, adapted.eval()(ids).logits)
    restored.train()
    assert other.trained_routers() == [True] * LAYERS
    load, _ = step(other, restored, 2)  # and it goes on from there
    expected = SignUpdate().update(expected, load, RATE, None)
    assert torch.equal(torch.stack(other.selection_biases()), expected)

    merged = restored.merge_and_unload()
    assert torch.equal(biases_of(gates(merged)), expected)


def test_an_adapter_loaded_for_inference_is_not_balanced(tiny_config: Make, tmp_path: Path) -> None:
    model = build(tiny_config(**LOSS_FREE))
    wrapped(model, target_modules=ATTENTION, modules_to_save=["gate"]).save_pretrained(tmp_path)
    other = build(tiny_config(**LOSS_FREE))
    restored = peft.PeftModel.from_pretrained(other, tmp_path).train()
    before = torch.stack(other.selection_biases())
    ids = tokens(0)
    restored(input_ids=ids, labels=ids)
    other.balancer.after_optimizer_step()
    assert other.trained_routers() == [False] * LAYERS
    assert torch.equal(torch.stack(other.selection_biases()), before)


def test_of_two_adapters_the_active_one_is_balanced(tiny_config: Make) -> None:
    # Guards against biases looked up once: which copy routes changes with `set_adapter`.
    model = build(tiny_config(**LOSS_FREE))
    adapted = wrapped(model, target_modules=ATTENTION, modules_to_save=["gate"])
    before = torch.stack(model.selection_biases())
    load, _ = step(model, adapted, 0)
    first = SignUpdate().update(before, load, RATE, None)
    adapted.add_adapter("second", lora(target_modules=ATTENTION, modules_to_save=["gate"]))
    adapted.set_adapter("second")
    begun = torch.stack(model.selection_biases())
    load, _ = step(model, adapted, 1)
    second = SignUpdate().update(begun, load, RATE, None)
    assert torch.equal(biases_of([gate.modules_to_save["default"] for gate in gates(model)]), first)
    assert torch.equal(biases_of([gate.modules_to_save["second"] for gate in gates(model)]), second)
    assert torch.equal(biases_of([gate.original_module for gate in gates(model)]), before)


def test_a_reference_without_the_adapter_leaves_every_bias(tiny_config: Make) -> None:
    # Preference training takes its reference from the same model with the adapter switched off, without gradients.
    model = build(tiny_config(**LOSS_FREE))
    adapted = wrapped(model, target_modules=ATTENTION, modules_to_save=["gate"])
    before = torch.stack(model.selection_biases())
    ids = tokens(0)
    outputs = adapted(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
    with torch.no_grad(), adapted.disable_adapter():
        adapted(input_ids=tokens(1), labels=tokens(1))
    outputs.loss.backward()
    model.balancer.after_optimizer_step()
    load = torch.stack([experts.flatten().bincount(minlength=EXPERTS) for experts in outputs.selected_experts])
    assert torch.equal(model.balancer.metrics()["load"], load)
    assert torch.equal(torch.stack(model.selection_biases()), SignUpdate().update(before, load, RATE, None))
    assert torch.equal(biases_of([gate.original_module for gate in gates(model)]), before)


@pytest.mark.parametrize("mode", [LOSS_FREE, GLOBAL_BATCH], ids=["loss_free", "global_batch"])
@pytest.mark.parametrize("router", [[], ["gate"]], ids=["frozen router", "trained router"])
def test_adapters_on_the_experts_train(tiny_config: Make, mode: dict[str, Any], router: list[str]) -> None:
    model = build(tiny_config(**mode))
    targets = {"target_modules": [], "target_parameters": EXPERT_WEIGHTS}
    adapted = wrapped(model, **targets, modules_to_save=router or None)
    before = torch.stack(model.selection_biases())
    adapters = {name: weight.clone() for name, weight in adapted.named_parameters() if "lora_B" in name}
    assert len(adapters) == 2 * LAYERS
    load, outputs = step(model, adapted, 0)
    assert torch.isfinite(outputs.loss)
    assert torch.isfinite(outputs.aux_loss)
    assert (outputs.aux_loss.item() > 0) == (mode is GLOBAL_BATCH)
    assert outputs.aux_loss.requires_grad == (mode is GLOBAL_BATCH and bool(router))
    assert all(not torch.equal(adapted.get_parameter(name), weight) for name, weight in adapters.items())
    assert torch.equal(model.balancer.metrics()["load"], load)
    moves = mode is LOSS_FREE and bool(router)
    expected = SignUpdate().update(before, load, RATE, None) if moves else before
    assert torch.equal(torch.stack(model.selection_biases()), expected)


def test_gradient_norms_of_experts_leave_adapters_out(tiny_config: Make) -> None:
    # The adapters' weights are not stacked by expert: as `[E, ...]` they would be read wrongly, or raise.
    model = build(tiny_config(**GLOBAL_BATCH))
    adapted = wrapped(model, target_modules=[], target_parameters=EXPERT_WEIGHTS)
    ids = tokens(0)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert model.expert_gradient_norms() is None  # the experts' own parameters hold no gradient


def test_an_adapter_on_the_router_itself_is_balanced(tiny_config: Make) -> None:
    # Then `gate` is PEFT's wrapper of a parameter, which hides the router's other attributes.
    model = build(tiny_config(**LOSS_FREE))
    before = torch.stack(model.selection_biases())
    adapted = wrapped(model, target_modules=[], target_parameters=["mlp.gate.weight"])
    assert model.trained_routers() == [True] * LAYERS
    load, _ = step(model, adapted, 0)
    assert torch.equal(torch.stack(model.selection_biases()), SignUpdate().update(before, load, RATE, None))


# --- What was trained is what is loaded ---

ROUTER = ["mlp.gate.weight"]
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION},
    "experts": {"target_modules": [], "target_parameters": EXPERT_WEIGHTS},
    "router": {"target_modules": [], "target_parameters": ROUTER},
    "a copy of the router": {"target_modules": ATTENTION, "modules_to_save": ["gate"]},
    "all": {"target_modules": ATTENTION, "target_parameters": [*EXPERT_WEIGHTS, *ROUTER]},
    "all, with a copy of the router": {
        "target_modules": ATTENTION,
        "target_parameters": EXPERT_WEIGHTS,
        "modules_to_save": ["gate"],
    },
}


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(9)).logits


@pytest.mark.parametrize("targets", TARGETS.values(), ids=list(TARGETS))
def test_adapter_and_base_are_the_trained_model(tiny_config: Make, tmp_path: Path, targets: dict[str, Any]) -> None:
    # Guards against a bias that is left behind: other experts would be selected than in training.
    base = build(tiny_config(**LOSS_FREE))
    base.save_pretrained(tmp_path / "base")
    before = torch.stack(base.selection_biases())
    adapted = wrapped(MoEForCausalLM.from_pretrained(tmp_path / "base").train(), **targets)
    model = adapted.get_base_model()
    for seed in range(3):
        step(model, adapted, seed)
    biases, expected = torch.stack(model.selection_biases()), logits_of(adapted)
    trained = "modules_to_save" in targets or ROUTER[0] in targets.get("target_parameters", [])
    assert model.trained_routers() == [trained] * LAYERS
    assert torch.equal(biases, before) != trained
    adapted.save_pretrained(tmp_path / "adapter")

    other = MoEForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert torch.equal(torch.stack(other.selection_biases()), biases)
    assert torch.equal(logits_of(loaded), expected)

    # Transformers' own verbs. (Before 5.23 its load_adapter does not work with PEFT 0.18.)
    if find_spec("peft.utils.transformers_weight_conversion"):
        by_auto_class = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
        by_load_adapter = MoEForCausalLM.from_pretrained(tmp_path / "base")
        by_load_adapter.load_adapter(str(tmp_path / "adapter"))
        for again in (by_auto_class, by_load_adapter):
            assert torch.equal(torch.stack(again.selection_biases()), biases)
            assert torch.equal(logits_of(again), expected)

    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = MoEForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(torch.stack(merged.selection_biases()), biases)
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-5, rtol=1e-5)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in stored)


@pytest.mark.parametrize("targets", ["router", "a copy of the router"])
def test_a_second_adapter_comes_with_its_bias(tiny_config: Make, tmp_path: Path, targets: str) -> None:
    # Loaded under another name than it was saved with, beside one that was made before.
    model = build(tiny_config(**LOSS_FREE))
    model.save_pretrained(tmp_path / "base")
    adapted = wrapped(model, **TARGETS[targets])
    step(model, adapted, 0)
    biases, expected = torch.stack(model.selection_biases()), logits_of(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    other = MoEForCausalLM.from_pretrained(tmp_path / "base")
    others = wrapped(other, **TARGETS[targets])
    try:
        others.load_adapter(tmp_path / "adapter", "second")
    except ValueError as error:
        if "only one LoRA adapter" in str(error):
            pytest.skip("this version of PEFT allows one adapter of parameters")
        raise
    others.set_adapter("second")
    assert torch.equal(torch.stack(other.selection_biases()), biases)
    torch.testing.assert_close(logits_of(others), expected, atol=1e-6, rtol=1e-6)


def test_a_state_dict_loads_where_it_came_from(tiny_config: Make) -> None:
    # The bias is in it twice, under the router's name and the adapter's.
    adapted = wrapped(build(tiny_config(**LOSS_FREE)), **TARGETS["router"])
    step(adapted.get_base_model(), adapted, 0)
    for load, state in (
        (nn.Module.load_state_dict, adapted.state_dict()),
        (set_model_state_dict, get_model_state_dict(adapted)),  # as a distributed checkpoint does
    ):
        other = wrapped(build(tiny_config(**LOSS_FREE)), **TARGETS["router"])
        load(other, state)
        assert torch.equal(logits_of(other), logits_of(adapted))
        biases = [torch.stack(each.get_base_model().selection_biases()) for each in (other, adapted)]
        assert torch.equal(*biases)


@pytest.mark.parametrize("targets", ["router", "a copy of the router", "all"])
def test_trainer_saves_and_resumes_adapters_with_their_biases(tiny_config: Make, tmp_path: Path, targets: str) -> None:
    config = tiny_config(**LOSS_FREE)
    build(config).save_pretrained(tmp_path / "base")

    def train(folder: str, resume_from: str | None = None) -> Any:
        torch.manual_seed(1)
        trainer = InOrder(
            model=wrapped(MoEForCausalLM.from_pretrained(tmp_path / "base"), **TARGETS[targets]),
            args=arguments(
                tmp_path / folder,
                max_steps=4,
                learning_rate=0.05,
                per_device_train_batch_size=2,
                save_strategy="steps",
                save_steps=2,
            ),
            train_dataset=examples(8, lengths=[12, 5], prompts=[0]),
        )
        trainer.train(resume_from_checkpoint=resume_from)
        trainer.save_model(str(tmp_path / folder))
        return trainer.model

    whole = train("whole")
    rest = train("rest", str(tmp_path / "whole" / "checkpoint-2"))
    loaded = peft.PeftModel.from_pretrained(MoEForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "whole")
    biases = torch.stack(whole.get_base_model().selection_biases())
    for same in (rest, loaded):
        assert torch.equal(torch.stack(same.get_base_model().selection_biases()), biases)
        assert torch.equal(logits_of(same), logits_of(whole))
