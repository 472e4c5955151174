"""Faults found in other frameworks, one test each, named after the fault.

Some need processes, shards, masks or adapters and stand where those are tested: `test_split_batches.py` (weights of
unequal micro-batches, world size), `test_balancing_under_sharding.py` (DDP overwriting counters kept as buffers),
`test_masks.py` (sequence-parallel padding), `test_balancing_under_peft.py` (the active copy of a router).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.balancing import Balancer, SignUpdate, load_balancing_loss, load_fraction

Make = Callable[..., MoEConfig]
MODES_WITH_LOSS = ["micro_batch", "sequence", "global_batch"]


def random_ids(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def build(make: Make, **changes: Any) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(make(**changes)).train()


def router(model: MoEForCausalLM) -> torch.nn.Parameter:
    return model.model.layers[1].mlp.gate.weight


# --- Transformers ---


@pytest.mark.parametrize("mode", MODES_WITH_LOSS)
def test_layers_collapsed_onto_different_experts_do_not_look_balanced(mode: str) -> None:
    # transformers#28255: pooled over layers, four collapsed layers have the loss of balance.
    layers = 4
    logits = [torch.zeros(8, layers).index_fill(1, torch.tensor([layer]), 20.0) for layer in range(layers)]
    balancer = Balancer(mode, num_experts=layers)
    observed = balancer.observe(logits, [layer.topk(1).indices for layer in logits], batch_size=1)
    assert balancer.loss(observed).terms["load_balancing_loss"].item() == pytest.approx(layers, rel=1e-3)


@pytest.mark.parametrize("mode", MODES_WITH_LOSS)
@pytest.mark.parametrize("steps", [2, 8])
def test_the_loss_does_not_grow_with_accumulation(tiny_config: Make, mode: str, steps: int) -> None:
    # transformers#48690: the router's gradient was .187 / .373 / .747 / 1.493 at 1 / 2 / 4 / 8 steps of one batch.
    norms = []
    for micro_batches in (1, steps):
        model = build(tiny_config, balancing_mode=mode)
        ids = random_ids()
        items = ids[:, 1:].numel() * micro_batches
        for _ in range(micro_batches):
            model(ids, labels=ids, num_items_in_batch=items).aux_loss.backward()
        norms.append(router(model).grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(2, 16), st.integers(1, 4), st.sampled_from(["softmax", "sigmoid"]))
def test_balance_is_one_whatever_k_e_and_l(layers: int, experts: int, per_token: int, scoring_func: Any) -> None:
    # Transformers' fractions sum to K, Megatron sums layers: coefficients carry over to no other model.
    per_token = min(per_token, experts)
    balancer = Balancer("micro_batch", num_experts=experts, scoring_func=scoring_func)
    chosen = (torch.arange(experts)[:, None] + torch.arange(per_token)) % experts
    logits = torch.randn(layers, experts, experts, generator=torch.Generator().manual_seed(experts))
    observed = balancer.observe(list(logits), [chosen] * layers, batch_size=1)
    assert balancer.loss(observed).terms["load_balancing_loss"].item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("mode", [*MODES_WITH_LOSS, "loss_free"])
def test_balancing_does_not_hang_on_output_router_logits(tiny_config: Make, mode: str) -> None:
    # Off unless asked for, and added once more by trainers that ask for it.
    losses, loads = [], []
    for asked in (False, True):
        model = build(tiny_config, balancing_mode=mode, output_router_logits=asked)
        outputs = model(random_ids(), labels=random_ids())
        losses.append(outputs.loss.item())
        assert losses[-1] == pytest.approx((outputs.lm_loss + outputs.aux_loss).item(), rel=1e-6)
        model.balancer.after_optimizer_step()
        loads.append(model.balancer.metrics()["load"])
    assert losses[0] == losses[1]
    assert torch.equal(*loads)


def test_reentrant_checkpointing_keeps_the_auxiliary_gradient(tiny_config: Make) -> None:
    # The stock loss carries none then, and adding the cross-entropy hides it: so the auxiliary loss alone here.
    gradients = []
    for checkpointing in (False, True):
        model = build(tiny_config)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model(random_ids(), labels=random_ids(), use_cache=False).aux_loss.backward()
        gradients.append(router(model).grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_4d_masks_are_taken(tiny_config: Make) -> None:
    # transformers#38910.
    model = build(tiny_config)
    causal = torch.ones(12, 12).tril().bool().expand(2, 1, 12, 12)
    four = model(random_ids(), attention_mask=causal, labels=random_ids()).aux_loss
    model.balancer.after_optimizer_step()
    two = model(random_ids(), attention_mask=torch.ones(2, 12), labels=random_ids()).aux_loss
    assert four.item() == pytest.approx(two.item(), rel=1e-6)


def test_the_correction_bias_is_updated_in_training(tiny_config: Make) -> None:
    # 32 modelling files carry `e_score_correction_bias`; none updates it.
    model = build(tiny_config, balancing_mode="loss_free", scoring_func="sigmoid", bias_update_rate=0.01)
    model(random_ids(), labels=random_ids())
    model.balancer.after_optimizer_step()
    load = model.balancer.metrics()["load"]
    for bias, counted in zip(model.selection_biases(), load, strict=True):
        step = 0.01 * torch.sign(counted.double().mean() - counted).float()
        torch.testing.assert_close(bias, step - step.mean())


# --- Megatron ---


def gradient_on_a_rank(rank: int, world_size: int, logits: Tensor, plain: bool) -> Tensor:
    """Of the balancing alone, as DDP would average it."""
    mine = logits.chunk(world_size)[rank].clone().requires_grad_()
    balancer = Balancer("global_batch", num_experts=logits.shape[-1], router_aux_loss_coef=1.0)
    observed = balancer.observe([mine], [mine.topk(2).indices], batch_size=1, num_labels=len(mine))
    total = balancer.loss(observed, None if plain else len(logits)).total
    (total / world_size if plain else total).backward()
    everyone = [torch.zeros_like(mine) for _ in range(world_size)]
    dist.all_gather(everyone, mine.grad)
    return torch.cat(everyone)


@pytest.mark.processes
@pytest.mark.parametrize("plain", [True, False])
def test_the_coefficient_does_not_shrink_with_the_ranks(run_processes: Callable[..., list[Any]], plain: bool) -> None:
    # Megatron-LM#3672: `sum P / T_global` on each rank, and DDP averages once more.
    logits = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = logits.clone().requires_grad_()
    load = torch.nn.functional.one_hot(whole.topk(2).indices, 6).sum((0, 1))
    load_balancing_loss(load_fraction(load, torch.float64), whole.softmax(-1).mean(0)).backward()
    for gradient in run_processes(2, gradient_on_a_rank, logits, plain):
        torch.testing.assert_close(gradient, whole.grad, atol=1e-12, rtol=1e-9)


def test_unequal_micro_batches_are_not_averaged_into_the_load() -> None:
    # A mean over micro-batches of 1 and of 9 tokens is not the load of 10.
    balancer = Balancer("global_batch", num_experts=2)
    for tokens, expert in ((1, 0), (9, 1)):
        chosen = torch.full((tokens, 1), expert)
        balancer.loss(balancer.observe([torch.zeros(tokens, 2)], [chosen], batch_size=1))
    assert balancer.synchronizer.running.load.tolist() == [[1, 9]]


def test_the_load_is_of_what_was_selected(tiny_config: Make) -> None:
    # Megatron's comes from unbiased top-k without groups.
    model = build(
        tiny_config, balancing_mode="loss_free", scoring_func="sigmoid", n_group=4, topk_group=2, bias_update_rate=0.1
    )
    for bias in model.selection_biases():
        bias.copy_(torch.tensor([3.0, 3.0, 0, 0, 0, 0, 0, 0]) - 0.75)
    outputs = model(random_ids(), labels=random_ids(), output_router_logits=True)
    model.balancer.after_optimizer_step()
    load = model.balancer.metrics()["load"]
    for layer, experts in enumerate(outputs.selected_experts):
        assert torch.equal(load[layer], experts.flatten().bincount(minlength=8))
        assert load[layer, :2].tolist() == [24, 24], "the two that the bias favours, one group, by every token"
    assert not torch.equal(load[0], outputs.router_logits[0].topk(2).indices.flatten().bincount(minlength=8))


def count_reductions(rank: int, world_size: int, mode: str, complement: str, micro_steps: int) -> list[dict[str, Any]]:
    """The all-reduces of one optimizer step of three layers."""
    made: list[dict[str, Any]] = []
    original = dist.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        made.append({"size": tensor.numel(), "async": bool(options.get("async_op"))})
        return original(tensor, *arguments, **options)

    biases = [torch.zeros(4) for _ in range(3)]
    balancer = Balancer(mode, num_experts=4, complementary_balancing_mode=complement, biases=lambda: biases)
    dist.all_reduce = counting
    try:
        for _ in range(micro_steps):
            logits = [torch.randn(5, 4) for _ in range(3)]
            balancer.loss(balancer.observe(logits, [layer.topk(2).indices for layer in logits], batch_size=1))
        balancer.after_optimizer_step()
        balancer.metrics()
    finally:
        dist.all_reduce = original
    return made


@pytest.mark.processes
@pytest.mark.parametrize(
    ("mode", "complement", "reductions", "asynchronous"),
    [
        ("global_batch", "micro_batch", 4, True),
        ("micro_batch", "none", 4, True),
        ("loss_free", "sequence", 4, True),
        ("loss_free", "none", 1, False),
        ("none", "none", 1, False),
    ],
)
def test_one_packed_reduction_and_none_for_logging(
    run_processes: Callable[..., list[Any]], mode: str, complement: str, reductions: int, asynchronous: bool
) -> None:
    # Megatron: one blocking all-reduce per layer and micro-batch. Others: one more per logged figure.
    for made in run_processes(2, count_reductions, mode, complement, 4):
        assert len(made) == reductions
        assert all(reduction["async"] is asynchronous for reduction in made)


# --- Low precision ---


def test_counts_lose_no_increment_and_flip_no_sign() -> None:
    # Megatron-LM#7081: in bf16, 256 + 1 is 256, so the busiest expert looks no busier than the others.
    biases = [torch.zeros(2)]
    balancer = Balancer("loss_free", num_experts=2, bias_update_rate=0.1, biases=lambda: biases)
    logits = torch.zeros(70_001, 2, dtype=torch.bfloat16)
    balancer.observe([logits], [(torch.arange(70_001) % 2)[:, None]], batch_size=1)
    balancer.after_optimizer_step()
    assert balancer.metrics()["load"].tolist() == [[35_001, 35_000]]
    assert biases[0].tolist() == pytest.approx([-0.1, 0.1])


@pytest.mark.parametrize("way", ["to", "bfloat16", "half", "from_config"])
def test_no_cast_reaches_the_bias(tiny_config: Make, way: str) -> None:
    # In bf16, 0.5 + 1e-3 is 0.5.
    config = tiny_config(balancing_mode="loss_free", scoring_func="sigmoid")
    model = (
        MoEForCausalLM._from_config(config, dtype=torch.bfloat16) if way == "from_config" else MoEForCausalLM(config)
    )
    model = {"to": lambda: model.to(torch.bfloat16), "bfloat16": model.bfloat16, "half": model.half}.get(
        way, lambda: model
    )()
    assert router(model).dtype in (torch.bfloat16, torch.float16)
    for bias in model.selection_biases():
        assert bias.dtype == torch.float32
        bias.fill_(0.5)
    model.train()(random_ids(), labels=random_ids())
    model.balancer.after_optimizer_step()
    assert all(0 < (bias - bias.mean()).abs().max() < 0.01 for bias in model.selection_biases())


def test_biases_do_not_drift_together() -> None:
    # One released model's span 6.8 to 7.06: 238 values, 8 of them left in bf16. Most experts below the mean load, so
    # the signs do not cancel.
    biases, load = torch.zeros(1, 8), torch.tensor([[100, 1, 1, 1, 1, 1, 1, 1]])
    for _ in range(5000):
        biases = SignUpdate().update(biases, load, 1e-3, None)
    assert biases.mean().abs().item() < 1e-4
    assert (biases[0, 1] - biases[0, 0]).item() == pytest.approx(10.0, rel=1e-3)


# --- Counting ---


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_recomputation_keeps_the_selection(tiny_config: Make, reentrant: bool, experts: str) -> None:
    # Recomputed top-k may fall otherwise, on a GPU by rounding, here by a bias that moves in between: with `eager`
    # experts CheckpointError, with `grouped_mm` a wrong gradient and no word.
    def gradients(checkpointing: bool | None) -> dict[str, Tensor]:
        model = build(tiny_config, balancing_mode="global_batch", scoring_func="sigmoid")
        model.set_experts_implementation(experts)
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        loss = model(random_ids(), labels=random_ids(), use_cache=False).loss
        for bias in model.selection_biases():
            bias.add_(torch.linspace(-1, 1, 8))
        loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    expected = gradients(None)
    for name, gradient in gradients(reentrant).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_nothing_twice_and_selects_the_same(tiny_config: Make, reentrant: bool) -> None:
    # torchtitan halves its counts, OLMo refuses checkpointing.
    model = build(tiny_config, balancing_mode="loss_free", scoring_func="sigmoid", bias_update_rate=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for layer, block in enumerate(model._moe_blocks()):
        block.gate.register_forward_hook(lambda *call, layer=layer: seen[layer].append(call[-1][2]))
    model(random_ids(), labels=random_ids(), use_cache=False).loss.backward()
    model.balancer.after_optimizer_step()
    assert model.balancer.metrics()["load"].sum(-1).tolist() == [2 * 12 * 2] * 2
    for first, again in seen.values():
        assert torch.equal(first, again)


def test_evaluation_does_not_leak_into_the_load(tiny_config: Make) -> None:
    model = build(tiny_config, balancing_mode="loss_free", scoring_func="sigmoid")
    model(random_ids(), labels=random_ids())
    model.eval()(random_ids(3), labels=random_ids(3))
    with torch.no_grad():
        model.train()(random_ids(5))
    model.balancer.after_optimizer_step()
    assert model.balancer.metrics()["load"].sum(-1).tolist() == [2 * 12 * 2] * 2


def test_a_frozen_models_bias_does_not_drift(tiny_config: Make) -> None:
    model = build(tiny_config, balancing_mode="loss_free", scoring_func="sigmoid", bias_update_rate=0.1)
    model.requires_grad_(False)
    model(random_ids(), labels=random_ids())
    model.balancer.after_optimizer_step()
    assert all(bias.abs().max() == 0 for bias in model.selection_biases())


def test_one_layer_without_balancing_does_not_stop_the_others(tiny_config: Make) -> None:
    # A dense layer first, a frozen router next, a trained one last.
    model = build(tiny_config, balancing_mode="loss_free", scoring_func="sigmoid", bias_update_rate=0.1)
    router(model).requires_grad_(False)
    model(random_ids(), labels=random_ids())
    model.balancer.after_optimizer_step()
    frozen, trained = model.selection_biases()
    assert frozen.abs().max() == 0
    assert trained.abs().max() > 0


@pytest.mark.parametrize("mode", MODES_WITH_LOSS)
def test_the_loss_is_not_dead(tiny_config: Make, mode: str) -> None:
    # Automodel#1408: the autograd function that scaled the loss was called, and its result dropped.
    model = build(tiny_config, balancing_mode=mode)
    outputs = model(random_ids(), labels=random_ids())
    alone = torch.autograd.grad(outputs.aux_loss, router(model), retain_graph=True)[0]
    language = torch.autograd.grad(outputs.loss - outputs.aux_loss, router(model), retain_graph=True)[0]
    whole = torch.autograd.grad(outputs.loss, router(model))[0]
    assert alone.abs().max() > 0
    torch.testing.assert_close(whole, alone + language, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("mode", ["none", *MODES_WITH_LOSS, "loss_free"])
@pytest.mark.parametrize("rule", ["sign", "tanh_momentum", "quantile"])
def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, mode: str, rule: Any) -> None:
    # Reading one number makes the host wait for all that the device has been given.
    biases = [torch.zeros(4) for _ in range(2)]
    balancer = Balancer(
        mode,
        num_experts=4,
        bias_update_rule=rule,
        scoring_func="sigmoid",
        biases=lambda: biases,
        router_z_loss_coef=0.1,
    )

    def refuse(*_: Any) -> Any:
        raise AssertionError("a tensor was read")

    def from_host(make: Any) -> Any:
        def checked(data: Any, *arguments: Any, **options: Any) -> Tensor:
            assert isinstance(data, Tensor), "a number was copied to the device, and waited for"
            return make(data, *arguments, **options)

        return checked

    monkeypatch.setattr(torch, "tensor", from_host(torch.tensor))
    monkeypatch.setattr(torch, "as_tensor", from_host(torch.as_tensor))
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "nonzero"):
        monkeypatch.setattr(Tensor, name, refuse)
    for _ in range(2):
        for _ in range(2):
            logits = [torch.randn(6, 4, requires_grad=True) for _ in range(2)]
            experts = [layer.topk(2).indices for layer in logits]
            mask = torch.ones(2, 3, dtype=torch.bool)
            observed = balancer.observe(logits, experts, batch_size=2, mask=mask, num_labels=torch.full((), 4))
            balancer.loss(observed, torch.full((), 8))
        balancer.after_optimizer_step()
        balancer.metrics()
    monkeypatch.undo()
    assert balancer.metrics()["tokens"].item() == 12
