"""`equipoise.balance` on stock models in one process, against the loss written out (`plain_loop`)."""

import copy
import functools
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeModel,
)

import equipoise
from equipoise import MoEConfig, MoEForCausalLM
from equipoise.balancing import (
    Balancer,
    CentredSignUpdate,
    LoadCounts,
    ProportionalUpdate,
    SignUpdate,
    TanhMomentumUpdate,
)
from equipoise.integrations import find_routers
from equipoise.integrations.stock_routers import causal_language_model
from equipoise.integrations.trainer_callback import find_balancer
from tests.plain_loop import Routed, plain_gradient
from tests.stock_balancing import FAMILIES, Seen, biases_of, deepseek_v3, qwen3_moe
from tests.stock_balancing import routers_of as modules_of_routers

Batch = dict[str, Tensor]
SETTINGS: dict[str, Any] = {
    "balancing_mode": "global_batch",
    "router_aux_loss_coef": 0.5,
    "complementary_balancing_mode": "sequence",
    "complementary_aux_loss_coef": 0.3,
    "router_z_loss_coef": 0.01,
    "load_estimate": "running",
}


def routers_of(model: nn.Module) -> list[Any]:
    return list(modules_of_routers(model))


def micro_batch(seed: int, lengths: list[int]) -> Batch:
    """Sequences of other lengths than one another, of which the first two tokens bear no loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


BATCHES = [micro_batch(1, [9, 4, 7]), micro_batch(2, [3, 9, 8])]


def averages(steps: list[list[Routed]], number: int, rank: int) -> tuple[float, float]:
    """A loop that averages: each micro-batch's mean cross-entropy, and its share of the micro-step's tokens."""
    return 1 / len(steps) / len(steps[0]) / steps[number][rank].labels, 1 / len(steps)


def seen(model: nn.Module, **settings: Any) -> Any:
    """What shows `plain_gradient` its routing."""
    return Seen(model, **settings)


def accumulate(model: nn.Module, batches: list[Batch] = BATCHES, scale: float = 1.0) -> dict[str, Tensor]:
    """The gradient of a plain loop."""
    for batch in batches:
        (scale * model(**batch).loss / len(batches)).backward()
    weights = causal_language_model(model).named_parameters()
    return {name: weight.grad / scale for name, weight in weights if weight.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], prefix: str = "model.") -> None:
    expected = {name.removeprefix(prefix): gradient for name, gradient in expected.items()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-6, rtol=1e-4, msg=name)


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def compiled(model: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager")


WRAPPINGS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: model,
    "checkpointing": lambda model: checkpointed(model, reentrant=False),
    # Recorded router logits have no gradient there, so that others' losses do nothing.
    "reentrant checkpointing": lambda model: checkpointed(model, reentrant=True),
    "compilation": compiled,
}
CASES = [
    (family, wrapping, first)
    for family in FAMILIES
    for wrapping in WRAPPINGS
    for first in ("balance", "wrap")
    # Takes seconds each.
    if wrapping != "compilation" or (family, first) in {("qwen3_moe", "balance"), ("deepseek_v3", "wrap")}
]


@pytest.mark.parametrize(("family", "wrapping", "first"), CASES)
def test_gradient_is_that_of_the_loss_written_out(family: str, wrapping: str, first: str) -> None:
    """Under accumulation, where the stock loss grows with the steps and sees one micro-batch at a time; pooled over
    layers it would be another loss; and a loss scaler's factor reaches all of it."""
    layers = 2 if wrapping == "compilation" else 3  # for time
    stock = FAMILIES[family](num_hidden_layers=layers)
    expected = plain_gradient(seen(stock, **SETTINGS), [[batch] for batch in BATCHES], averages)
    model = FAMILIES[family](num_hidden_layers=layers, output_router_logits=True).train()
    if first == "wrap":
        wrapped = WRAPPINGS[wrapping](model)
        balancer = equipoise.balance(wrapped, **SETTINGS)
    else:
        balancer = equipoise.balance(model, **SETTINGS)
        wrapped = WRAPPINGS[wrapping](model)
    assert_same(accumulate(wrapped, scale=8.0), expected)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in BATCHES)
    assert int(running(balancer).tokens) == tokens  # once, though hooks ran twice
    assert find_balancer(wrapped) is balancer


@pytest.mark.parametrize("mode", ["micro_batch", "sequence", "none"])
def test_every_mode(mode: str) -> None:
    settings = SETTINGS | {"balancing_mode": mode, "complementary_balancing_mode": "none"}
    expected = plain_gradient(seen(qwen3_moe(), **settings), [[batch] for batch in BATCHES], averages)
    model = qwen3_moe().train()
    equipoise.balance(model, **settings)
    assert_same(accumulate(model), expected)


def test_share_of_the_batch_where_the_loop_gives_its_labels() -> None:
    """As Trainer does: cross-entropies divided by the labels of the whole batch, and not by the micro-steps."""

    def shares(steps: list[list[Routed]], number: int, rank: int) -> tuple[float, float]:
        labels = sum(step[0].labels for step in steps)
        return 1 / labels, steps[number][0].labels / labels

    expected = plain_gradient(seen(qwen3_moe(), **SETTINGS), [[batch] for batch in BATCHES], shares)
    model = qwen3_moe().train()
    equipoise.balance(model, **SETTINGS)
    labels = sum(int(batch["labels"][:, 1:].ne(-100).sum()) for batch in BATCHES)
    for batch in BATCHES:
        model(**batch, num_items_in_batch=torch.tensor(labels)).loss.backward()
    assert_same({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}, expected)


def test_exact_load_of_the_batch_from_a_pre_pass() -> None:
    """One large batch is the oracle: its load is known from the start."""
    batches = [micro_batch(3, [6, 6]), micro_batch(4, [6, 6])]
    both = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    settings: dict[str, Any] = {"router_aux_loss_coef": 0.5}
    expected = plain_gradient(seen(qwen3_moe(), balancing_mode="global_batch", **settings), [[both]], averages)
    model = checkpointed(qwen3_moe(), reentrant=True).train()
    balancer = equipoise.balance(model, load_estimate="exact", **settings)
    with balancer.prepass():
        for batch in batches:
            model(**batch)
    assert_same(accumulate(model, batches), expected)


def running(balancer: Balancer) -> LoadCounts:
    """What was counted since the last step."""
    assert balancer.synchronizer.running is not None
    return balancer.synchronizer.running


def test_evaluation_counts_nothing_adds_nothing_and_gives_router_logits() -> None:
    model = qwen3_moe(output_router_logits=True, router_aux_loss_coef=10.0)
    bare = qwen3_moe().eval()
    balancer = equipoise.balance(model)
    for training in (False, True):
        model.train(training)
        with torch.no_grad():
            outputs = model(**BATCHES[0])
            model.generate(BATCHES[0]["input_ids"], max_new_tokens=2, do_sample=False)
        torch.testing.assert_close(outputs.loss, bare(**BATCHES[0]).loss)
        assert len(outputs.router_logits) == 3
        assert balancer.synchronizer.running is None
        assert balancer.metrics() == {}
    model.train()
    (0 * model(**BATCHES[0]).loss).backward()
    model.eval()(**BATCHES[1])
    assert int(running(balancer).tokens) == int(BATCHES[0]["attention_mask"].sum())


def test_without_labels_the_loss_is_left_alone_and_tuples_get_theirs() -> None:
    model = qwen3_moe().train()
    unlabelled = {name: value for name, value in BATCHES[0].items() if name != "labels"}
    stock, stock_tuple = model(**unlabelled), model(**BATCHES[0], return_dict=False)
    equipoise.balance(model, "micro_batch", router_aux_loss_coef=0.5)
    ours, ours_tuple = model(**unlabelled), model(**BATCHES[0], return_dict=False)
    assert ours.loss is None
    assert torch.equal(ours.logits, stock.logits)
    assert ours.aux_loss.requires_grad
    assert ours.aux_losses.keys() == {"load_balancing_loss"}
    torch.testing.assert_close(ours_tuple[0] - stock_tuple[0], ours.aux_loss, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("additive", [False, True])
def test_masks_of_four_dimensions(additive: bool) -> None:
    """The stock loss crashes on them (transformers#38910)."""
    batch = BATCHES[0]
    length = batch["input_ids"].shape[1]
    causal = torch.ones(length, length).tril().bool() & batch["attention_mask"][:, None, None].bool()
    mask = torch.where(causal, 0.0, torch.finfo(torch.float32).min) if additive else causal
    counted = []
    for attention_mask in (batch["attention_mask"], mask):
        model = qwen3_moe(output_router_logits=True).train()
        balancer = equipoise.balance(model)
        model(**batch | {"attention_mask": attention_mask}).loss.backward()
        counted.append(running(balancer).load)
    assert torch.equal(*counted)


def test_only_positions_with_loss_count_where_asked() -> None:
    model = qwen3_moe().train()
    balancer = equipoise.balance(model, balanced_positions="labels")
    model(**BATCHES[0])
    assert int(running(balancer).tokens) == int(BATCHES[0]["labels"][:, 1:].ne(-100).sum())
    with pytest.raises(ValueError, match="labels must be given"):
        model(BATCHES[0]["input_ids"])


def test_a_frozen_router_is_not_balanced() -> None:
    model = deepseek_v3().train()
    frozen, trained = routers_of(model)
    frozen.requires_grad_(False)
    balancer = equipoise.balance(
        model, "loss_free", complementary_balancing_mode="micro_batch", complementary_aux_loss_coef=5.0
    )
    assert balancer.trained_routers() == [False, True]
    aux_loss = model(**BATCHES[0]).aux_loss
    aux_loss.backward()
    assert trained.weight.grad.abs().sum() > 0
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert torch.equal(frozen.e_score_correction_bias, torch.zeros(8))
    assert trained.e_score_correction_bias.abs().sum() > 0
    balancer.detach()

    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    balancer = equipoise.balance(model, "loss_free")
    before = biases_of(model).clone()
    model(**BATCHES[0]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert torch.equal(biases_of(model), before)


@pytest.mark.parametrize(
    "rule",
    [SignUpdate, CentredSignUpdate, ProportionalUpdate, TanhMomentumUpdate],
    ids=["sign", "centred_sign", "proportional", "tanh_momentum"],
)
def test_biases_follow_the_load(rule: type, request: pytest.FixtureRequest) -> None:
    """Of the selections with bias and groups, over both micro-steps, step by step."""
    name = request.node.callspec.id
    model = deepseek_v3().train()
    for router in routers_of(model):
        router.e_score_correction_bias.normal_(std=0.3)
    balancer = equipoise.balance(model, "loss_free", bias_update_rule=name, bias_update_rate=0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    update = rule()
    for step in range(3):
        batches = [micro_batch(10 * step + number, [7, 5]) for number in range(2)]
        load = torch.zeros(2, 8, dtype=torch.long)
        for batch in batches:
            model.eval()
            seen = Seen(model)(**{key: batch[key] for key in ("input_ids", "attention_mask")}).selected_experts
            kept = torch.stack(seen)[:, batch["attention_mask"].flatten().bool()].flatten(1)
            load += torch.stack([layer.bincount(minlength=8) for layer in kept])
        expected = update.update(biases_of(model).clone(), load, 0.02, None)
        model.train()
        accumulate(model, batches)
        optimizer.step()
        optimizer.zero_grad()
        assert balancer.steps == step + 1
        torch.testing.assert_close(biases_of(model), expected)


def test_quantiles_balance_where_the_largest_sums_are_selected() -> None:
    """Without groups; with them the rule would ask the wrong question."""
    with pytest.raises(ValueError, match=r"bias_update_rule must not be quantile.*DeepseekV3TopkRouter"):
        equipoise.balance(deepseek_v3(), "loss_free", bias_update_rule="quantile")
    model = deepseek_v3(n_group=1, topk_group=1).train()
    balancer = equipoise.balance(model, "loss_free", bias_update_rule="quantile", bias_update_rate=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batch, uneven = micro_batch(0, [24] * 8), []
    for _ in range(12):
        model(**batch).loss.backward()
        optimizer.step()
        uneven.append(balancer.metrics()["max_vio_batch"].mean())
    assert uneven[-1] < 0.3 * uneven[0]


@pytest.mark.parametrize("cast", ["before", "after"])
def test_biases_stay_in_fp32_when_the_model_does_not(cast: str) -> None:
    """In bf16, 0.5 + 0.001 is 0.5: nothing would ever move."""
    model = deepseek_v3()
    for router in routers_of(model):
        router.e_score_correction_bias.fill_(0.5)
    if cast == "before":
        model = model.bfloat16()
    balancer = equipoise.balance(model, "loss_free", bias_update_rule="centred_sign", bias_update_rate=1e-3)
    model = model.bfloat16().train()
    model(**BATCHES[0]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    for bias in balancer.selection_biases():
        assert bias.dtype == torch.float32
        assert (bias - 0.5).abs().max() > 5e-4
    assert torch.stack(balancer.selection_biases()).equal(biases_of(model))
    assert model.lm_head.weight.dtype == torch.bfloat16


def ernie(**changes: Any) -> Ernie4_5_MoeForCausalLM:
    """Whose bias is a parameter, `[1, E]`, of a module within the router."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_num_experts": 8,
        "moe_k": 2,
        "initializer_range": 0.2,
    }
    return Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**fields | changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_that_are_parameters_move_too(dtype: torch.dtype) -> None:
    model = ernie().to(dtype).train()
    balancer = equipoise.balance(model, "loss_free", bias_update_rate=0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(**BATCHES[0]).loss.backward()
    optimizer.step()
    for name, weight in model.named_parameters():
        if "e_score_correction_bias" in name:
            assert weight.shape == (1, 8)
            assert weight.dtype == torch.float32
            assert weight.abs().sum() > 0
            assert weight.grad is None
    assert all(bias.shape == (8,) for bias in balancer.selection_biases())


ADAPTERS: dict[str, tuple[dict[str, Any], bool]] = {
    "routers frozen": ({}, False),
    "a copy of each router": ({"modules_to_save": ["gate"]}, True),
    "LoRA on routers": ({"target_parameters": ["mlp.gate.weight"]}, True),
}


@pytest.mark.parametrize("reentrant", [None, True])
@pytest.mark.parametrize("first", ["balance", "wrap"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters(adapter: str, first: str, reentrant: bool | None) -> None:
    """PEFT calls the model's forward past its hooks, and puts copies and wrappers in the place of routers."""
    fields, trained = ADAPTERS[adapter]
    settings: dict[str, Any] = {"complementary_balancing_mode": "micro_batch", "complementary_aux_loss_coef": 0.5}
    config = LoraConfig(target_modules=["o_proj"], lora_dropout=0.0, **fields)
    model: Any = deepseek_v3()
    if reentrant is not None:
        checkpointed(model, reentrant)
        model.enable_input_require_grads()
    if first == "balance":
        balancer = equipoise.balance(model, "loss_free", **settings)
        model = get_peft_model(model, config)
    else:
        model = get_peft_model(model, config)
        balancer = equipoise.balance(model, "loss_free", **settings)
    assert find_balancer(model) is balancer
    assert balancer.trained_routers() == [trained, trained]
    model.train()
    outputs = model(**BATCHES[0])
    assert outputs.aux_loss.requires_grad == trained
    outputs.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    moved = torch.stack(balancer.selection_biases())
    assert bool(moved.abs().sum() > 0) == trained
    held = {name: buffer for name, buffer in model.named_buffers() if "correction_bias" in name and buffer.any()}
    assert len(held) == (2 if trained else 0)
    assert all(("modules_to_save" in name) == ("modules_to_save" in fields) for name in held)
    if adapter == "a copy of each router":
        stock = deepseek_v3().train()
        equipoise.balance(stock, "micro_batch", router_aux_loss_coef=0.5)
        stock(**BATCHES[0]).loss.backward()
        copies = [weight.grad for name, weight in model.named_parameters() if "modules_to_save" in name]
        for found, router in zip(copies, routers_of(stock), strict=True):
            torch.testing.assert_close(found, router.weight.grad, atol=1e-6, rtol=1e-4)
    balancer.detach()
    model(**BATCHES[0]).loss.backward()
    assert torch.equal(torch.stack(balancer.selection_biases()), moved)


def test_reentrant_checkpointing_refuses_what_would_be_lost() -> None:
    """A balancing loss that comes to its leaves after the layers were computed again would do nothing, in silence."""
    model = checkpointed(qwen3_moe(), reentrant=True).train()
    equipoise.balance(model)
    outputs = model(**BATCHES[0])
    outputs.logits.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="before it, under reentrant"):
        outputs.aux_loss.backward()

    model = qwen3_moe().train()
    equipoise.balance(model)
    layer = model.model.layers[0]
    layer.forward = _in_own_checkpoint(layer.forward)
    with pytest.raises(RuntimeError, match="must be Transformers' own"):
        model(**BATCHES[0])


def _in_own_checkpoint(function: Any) -> Any:
    def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(
            lambda hidden: function(hidden, **kwargs), hidden_states, use_reentrant=True
        )

    return forward


def test_several_forward_passes_before_one_backward_pass() -> None:
    """Each reentrant recomputation must find the gradients of its own forward pass."""
    gradients = []
    for reentrant in (False, True):
        model = checkpointed(qwen3_moe(), reentrant).train()
        equipoise.balance(model, router_aux_loss_coef=2.0)
        sum(model(**batch).loss for batch in BATCHES).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert_same(gradients[1], gradients[0], prefix="")


@pytest.mark.parametrize("first", ["balance", "prepare"])
def test_accelerate_wraps_and_unwraps_the_forward(first: str) -> None:
    """It peels off whatever it finds around the model's own, at the end of a run or in its middle."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model: Any = deepseek_v3().train()
    if first == "balance":
        balancer = equipoise.balance(model)
        model = accelerator.prepare(model)
    else:
        model = accelerator.prepare(model)
        balancer = equipoise.balance(model)
    try:
        for unwrap in (False, True):
            if unwrap:
                model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            balancer.after_optimizer_step()
            outputs = model(**BATCHES[0])
            accelerator.backward(outputs.loss)
            assert outputs.aux_loss.requires_grad
            assert int(running(balancer).tokens) == int(BATCHES[0]["attention_mask"].sum())
        balancer.detach()
        assert getattr(model(**BATCHES[0]), "aux_loss", None) is None
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_detach_leaves_what_has_wrapped_the_forward_since() -> None:
    model = qwen3_moe().train()
    balancer = equipoise.balance(model)
    model.forward = wrapper = functools.wraps(model.forward)(functools.partial(model.forward))
    balancer.detach()
    assert model.forward is wrapper
    assert model(**BATCHES[0]).aux_loss is None


def test_others_see_the_forward_s_own_arguments() -> None:
    """Trainer takes from a data set the columns that it finds there."""
    model = qwen3_moe()
    arguments = inspect.signature(model.forward)
    for forward in (model.forward, functools.partial(model.forward)):  # the class's, and a function of someone's
        model.forward = forward
        balancer = equipoise.balance(model)
        assert inspect.signature(model.forward) == arguments
        assert model.train()(**BATCHES[0]).aux_loss.requires_grad
        balancer.detach()
        assert model.forward is forward


def test_a_forward_pass_that_fails_leaves_nothing_behind() -> None:
    model = qwen3_moe().train()
    balancer = equipoise.balance(model)
    with pytest.raises(ValueError, match="must have 2 or 4 dimensions"):
        model(**BATCHES[0] | {"attention_mask": torch.ones(3, 9, 9)})
    model.eval()(**BATCHES[0])
    assert balancer.recorder.routing is None
    assert balancer.synchronizer.running is None
    model.train()(**BATCHES[0])
    assert int(running(balancer).tokens) == int(BATCHES[0]["attention_mask"].sum())


def test_a_copy_of_the_model_has_a_balancer_of_its_own() -> None:
    model = deepseek_v3().train()
    balancer = equipoise.balance(model, "loss_free")
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for twin in (copy.deepcopy(model), torch.load(pickled, weights_only=False)):
        assert twin.balancer is not balancer
        twin(**BATCHES[0]).loss.backward()
        assert balancer.synchronizer.running is None
        torch.optim.SGD(twin.parameters(), lr=0.0).step()
        assert twin.balancer.steps == 1
        assert biases_of(twin).abs().sum() > 0
    assert balancer.steps == 0
    assert biases_of(model).abs().sum() == 0


def test_detach_leaves_the_model_as_it_was() -> None:
    def left(model: Any) -> list[Any]:
        return [
            (sorted(vars(module)), list(module._forward_hooks), list(module._forward_pre_hooks))
            for module in model.modules()
        ] + [vars(model.model.layers[0])["_gradient_checkpointing_func"], copy.deepcopy(model.config.to_dict())]

    model = checkpointed(qwen3_moe(output_router_logits=True), reentrant=True).train()
    stock = model(**BATCHES[0]).loss  # Transformers hooks its own recorders first
    before = left(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer = equipoise.balance(model, optimizer=optimizer)
    assert not torch.equal(model(**BATCHES[0]).loss, stock)
    with pytest.raises(ValueError, match=r"detach\(\) it first"):
        equipoise.balance(model)
    balancer.detach()
    balancer.detach()
    assert left(model) == before
    loss = model(**BATCHES[0]).loss
    assert torch.equal(loss, stock)
    loss.backward()
    optimizer.step()
    assert balancer.steps == 0


def test_what_has_nothing_to_balance_is_refused(tiny_config: Callable[..., MoEConfig]) -> None:
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    dense = LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=4))
    with pytest.raises(ValueError, match=r"model must have routers: .*_can_record_outputs.*got LlamaForCausalLM"):
        equipoise.balance(dense)
    with pytest.raises(ValueError, match="model must be a model of Transformers, or wrap one; got Linear"):
        equipoise.balance(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"loss of labels.*got Qwen3MoeModel"):
        equipoise.balance(Qwen3MoeModel(qwen3_moe().config))
    with pytest.raises(ValueError, match=r"must not have a balancer.*MoEForCausalLM"):
        equipoise.balance(MoEForCausalLM(tiny_config()))
    with pytest.raises(ValueError, match=r"loss_free needs.*Qwen3MoeTopKRouter.*global_batch.*scripts/convert.py"):
        equipoise.balance(qwen3_moe(), "loss_free")
    with pytest.raises(ValueError, match="loss_free needs"):
        equipoise.balance(qwen3_moe(), balancing_schedule=[{"step": 5, "balancing_mode": "loss_free"}])
    with pytest.raises(ValueError, match="router_aux_loss_coef must be at least 0"):
        equipoise.balance(qwen3_moe(), router_aux_loss_coef=-1)
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer"):
        equipoise.balance(qwen3_moe(), optimizer=object())


def test_an_optimizer_that_is_named_closes_each_batch_once() -> None:
    """Though torch tells of its steps too."""
    model = deepseek_v3().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer = equipoise.balance(model, "loss_free", optimizer=optimizer, bias_update_rate=0.1)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(()))])
    for step in range(2):
        model(**BATCHES[step]).loss.backward()
        other.step()
        assert balancer.steps == step
        optimizer.step()
        assert balancer.steps == step + 1
        assert int(balancer.metrics()["tokens"]) == int(BATCHES[step]["attention_mask"].sum())
    assert biases_of(model).abs().max() < 0.3  # two steps of 0.1, less their mean


def test_a_refused_optimizer_leaves_nothing_behind() -> None:
    model = qwen3_moe()
    with pytest.raises(TypeError):
        equipoise.balance(model, optimizer=object())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    equipoise.balance(model)


def test_routers_in_layer_order() -> None:
    found = find_routers(deepseek_v3())
    assert [router.path for router in found] == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    assert [(router.num_experts, router.num_experts_per_tok, router.scoring_func) for router in found] == [
        (8, 2, "sigmoid")
    ] * 2
