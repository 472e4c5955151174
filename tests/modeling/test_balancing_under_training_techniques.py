"""Balancing of the whole model under what training does to it: checkpointing, compilation, autocast, evaluation in
between, frozen weights, casts at loading, several models in one process.

Each test compares with a computation that lacks the technique, or with the equation written out on the routing that
an evaluation forward pass returns, where nothing of the Balancer takes part.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_map

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.balancing import SignUpdate

Make = Callable[..., MoEConfig]
EXPERTS, TOP_K, COEFFICIENT, RATE = 8, 2, 0.5, 0.05
MODES: dict[str, dict[str, Any]] = {
    "global_batch": {"balancing_mode": "global_batch", "router_aux_loss_coef": COEFFICIENT},
    "loss_free": {"balancing_mode": "loss_free", "scoring_func": "sigmoid", "bias_update_rate": RATE},
    # Reads the scores of each micro-batch as well: counted twice, its histogram would be wrong.
    "quantile": {"balancing_mode": "loss_free", "scoring_func": "sigmoid", "bias_update_rule": "quantile"},
}
CHECKPOINTING = [{"use_reentrant": False}, {"use_reentrant": True}]


def tokens(seed: int, batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def build(config: MoEConfig, seed: int = 0) -> MoEForCausalLM:
    torch.manual_seed(seed)
    return MoEForCausalLM(config).train()


def counted(selected_experts: tuple[Tensor, ...]) -> Tensor:
    """Load `[L, E]` of the selections a forward pass returned."""
    return torch.stack([experts.flatten().bincount(minlength=EXPERTS) for experts in selected_experts])


def bits(model: MoEForCausalLM) -> list[list[int]]:
    return [bias.view(torch.int32).tolist() for bias in model.selection_biases()]


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients that are there and not all zero."""
    named = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: gradient.clone() for name, gradient in named.items() if gradient.any()}


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def balancing_by_hand(model: MoEForCausalLM, ids: Tensor, layers: list[int] | None = None) -> Tensor:
    """`coefficient / L * sum over the layers of E sum_i f_i P_i`, from the routing that evaluation returns."""
    outputs = model.eval()(ids, output_router_logits=True, use_cache=False)
    model.train()
    total = torch.zeros(())
    for layer, load in enumerate(counted(outputs.selected_experts)):
        if layers is None or layer in layers:
            mean_score = outputs.router_logits[layer].softmax(-1).mean(0)
            total = total + EXPERTS * (load / load.sum() * mean_score).sum()
    return COEFFICIENT * total / len(outputs.router_logits)


def train(
    model: MoEForCausalLM, seeds: list[list[int]], forward: Callable[..., Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Optimizer steps on micro-batches of these seeds; after each, what balancing has made of it."""
    forward = model if forward is None else forward  # a compiled module has no truth value
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in seeds:
        for seed in step:
            ids = tokens(seed)
            (forward(input_ids=ids, labels=ids, use_cache=False).loss / len(step)).backward()
        found = gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        model.balancer.after_optimizer_step()
        yield {"load": model.balancer.metrics()["load"], "bits": bits(model), "gradients": found}


def assert_same_training(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for mine, other in zip(got, expected, strict=True):
        assert torch.equal(mine["load"], other["load"])
        assert mine["bits"] == other["bits"]
        assert_same_gradients(mine["gradients"], other["gradients"])


# --- Gradient checkpointing ---


@pytest.mark.parametrize("kind", CHECKPOINTING, ids=["non-reentrant", "reentrant"])
def test_checkpointing_keeps_the_gradient_of_the_balancing_loss(tiny_config: Make, kind: dict[str, bool]) -> None:
    # Guards against logits that leave the layer detached: backward of the whole loss would hide it.
    model = build(tiny_config(**MODES["global_batch"]))
    ids = tokens(0)
    balancing_by_hand(model, ids).backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(kind)
    model(ids, labels=ids, use_cache=False).aux_loss.backward()
    assert "model.layers.1.mlp.gate.weight" in expected
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("kind", CHECKPOINTING, ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("mode", ["loss_free", "quantile"])
def test_checkpointing_moves_the_biases_as_without(tiny_config: Make, mode: str, kind: dict[str, bool]) -> None:
    # Guards against a recomputation that counts again, or that selects with a bias moved in between.
    plain, checkpointed = build(tiny_config(**MODES[mode])), build(tiny_config(**MODES[mode]))
    checkpointed.gradient_checkpointing_enable(kind)
    seeds = [[0, 1], [2, 3]]
    expected = list(train(plain, seeds))
    assert_same_training(list(train(checkpointed, seeds)), expected)
    assert expected[0]["load"].sum(-1).tolist() == [2 * 2 * 12 * TOP_K] * 2
    assert any(bias.abs().max() > 0 for bias in plain.selection_biases())


@pytest.mark.parametrize("kind", CHECKPOINTING, ids=["non-reentrant", "reentrant"])
def test_checkpointing_keeps_the_selection_where_inputs_are_rebuilt(tiny_config: Make, kind: dict[str, bool]) -> None:
    # Guards against a selection kept in a list: FSDP2 with a policy and DeepSpeed ZeRO-3 give each module new ones.
    found = []
    for checkpointed in (False, True):
        model = build(tiny_config(**MODES["loss_free"]))
        if checkpointed:
            model.gradient_checkpointing_enable(kind)
            for module in model.model.layers.modules():
                module.register_forward_pre_hook(
                    lambda _, args, kwargs: tree_map(lambda leaf: leaf, (args, kwargs)), with_kwargs=True
                )
        loss = model(tokens(0), labels=tokens(0), use_cache=False).loss
        for bias in model.selection_biases():
            bias.copy_(torch.linspace(-1, 1, EXPERTS))  # another selection, were it made anew
        loss.backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0])


@pytest.mark.parametrize("kind", CHECKPOINTING, ids=["non-reentrant", "reentrant"])
def test_checkpointing_counts_the_prepass_once(tiny_config: Make, kind: dict[str, bool]) -> None:
    # Under `exact` the load is the pre-pass's: a count lost or doubled there changes the gradient and raises nothing.
    model = build(tiny_config(**MODES["global_batch"], load_estimate="exact"))
    model.gradient_checkpointing_enable(kind)
    micro_batches = [tokens(0), tokens(1)]
    balancing_by_hand(model, torch.cat(micro_batches)).backward()
    expected = gradients(model)
    model.zero_grad()
    with model.balancer.prepass():
        for ids in micro_batches:
            model(ids, labels=ids, use_cache=False)
    for ids in micro_batches:
        (model(ids, labels=ids, use_cache=False).aux_loss / len(micro_batches)).backward()
    assert_same_gradients(gradients(model), expected)
    model.balancer.after_optimizer_step()  # raises if the pre-pass saw other tokens than the step


# --- Compilation ---


def test_a_compiled_model_is_balanced_as_an_eager_one(tiny_config: Make) -> None:
    # Guards against counts that were traced once and replayed, or biases that were baked in as constants.
    # A loss and a bias at once, in a small decoder: compiling is what takes the time here.
    fields = MODES["loss_free"] | {"num_hidden_layers": 2, "first_k_dense_replace": 0, "use_qk_norm": False}
    loss = {"complementary_balancing_mode": "global_batch", "complementary_aux_loss_coef": COEFFICIENT}
    eager, compiled = build(tiny_config(**fields, **loss)), build(tiny_config(**fields, **loss))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    seeds = [[0, 1], [2]]
    expected = list(train(eager, seeds))
    got = list(train(compiled, seeds, forward=torch.compile(compiled, backend="aot_eager")))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # something was compiled
    torch.compiler.reset()
    assert_same_training(got, expected)
    assert expected[0]["bits"] != expected[1]["bits"]


# --- Mixed precision ---


@pytest.mark.parametrize("mode", ["global_batch", "loss_free"])
def test_autocast_counts_what_it_selected(tiny_config: Make, mode: str) -> None:
    # Guards against counts recomputed from logits (in bf16 they select others), and a bias or logits in bf16.
    model = build(tiny_config(**MODES[mode]))
    for bias in model.selection_biases():
        bias.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
    before = torch.stack(model.selection_biases())
    load = torch.zeros(2, EXPERTS, dtype=torch.long)
    for seed in range(2):
        ids = tokens(seed, batch=4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(ids, labels=ids, output_router_logits=True, use_cache=False)
        assert outputs.logits.dtype == torch.bfloat16  # autocast is really on
        assert {logits.dtype for logits in outputs.router_logits} == {torch.float32}
        assert outputs.aux_loss.dtype == torch.float32
        load += counted(outputs.selected_experts)
        outputs.loss.backward()
    model.balancer.after_optimizer_step()
    assert torch.equal(model.balancer.metrics()["load"], load)
    after = torch.stack(model.selection_biases())
    assert after.dtype == torch.float32
    expected = SignUpdate().update(before, load, RATE, None) if mode == "loss_free" else before
    assert torch.equal(after, expected)
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)


# --- Evaluation in between ---


@pytest.mark.parametrize("mode", ["global_batch", "loss_free", "quantile"])
def test_evaluation_in_the_middle_of_accumulation_changes_nothing(tiny_config: Make, mode: str) -> None:
    # Guards against evaluation that counts into the batch under way, clears it, or moves a bias.
    undisturbed, disturbed = build(tiny_config(**MODES[mode])), build(tiny_config(**MODES[mode]))

    def with_evaluation(**batch: Any) -> Any:
        outputs = disturbed(**batch)
        state = bits(disturbed)
        other = tokens(99, batch=3)
        disturbed.eval()
        for grad in (nullcontext(), torch.no_grad(), torch.inference_mode()):
            with grad:
                evaluated = disturbed(other, labels=other)
                assert evaluated.aux_loss is None
        disturbed.generate(other, attention_mask=torch.ones_like(other), max_new_tokens=3, do_sample=False)
        disturbed.train()
        with torch.no_grad():  # the language-model loss of a training batch, without gradients
            disturbed(other, labels=other)
        disturbed.generate(other, attention_mask=torch.ones_like(other), max_new_tokens=3, do_sample=False)
        assert bits(disturbed) == state
        return outputs

    seeds = [[0, 1], [2, 3]]
    expected = list(train(undisturbed, seeds))
    assert_same_training(list(train(disturbed, seeds, forward=with_evaluation)), expected)


# --- Frozen weights ---


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_router_gives_no_balancing_gradient(tiny_config: Make, frozen: int) -> None:
    # Guards against a loss that bends hidden states to please a router that cannot learn; L stays L, so that freezing
    # one layer does not raise the weight of the others.
    model = build(tiny_config(**MODES["global_batch"]))
    gate = model.model.layers[1 + frozen].mlp.gate
    gate.weight.requires_grad_(False)
    ids = tokens(0)
    balancing_by_hand(model, ids, layers=[1 - frozen]).backward()
    expected = gradients(model)
    model.zero_grad()
    outputs = model(ids, labels=ids, use_cache=False)
    outputs.aux_loss.backward()
    assert_same_gradients(gradients(model), expected)
    assert gate.weight.grad is None
    assert f"model.layers.{2 - frozen}.mlp.gate.weight" in expected
    # Still in the value, which is a measure of balance.
    torch.testing.assert_close(outputs.aux_loss.detach(), balancing_by_hand(model, ids).detach())


@pytest.mark.parametrize("mode", ["loss_free", "quantile"])
def test_the_bias_of_a_frozen_router_does_not_move(tiny_config: Make, mode: str) -> None:
    # Guards against a frozen, already balanced router whose selection drifts from step to step.
    model, free = build(tiny_config(**MODES[mode])), build(tiny_config(**MODES[mode]))
    gate = model.model.layers[2].mlp.gate
    gate.weight.requires_grad_(False)
    gate.e_score_correction_bias.copy_(torch.linspace(-0.1, 0.2, EXPERTS))  # not centred: centring it would show
    before = bits(model)
    (step,) = train(model, [[0, 1]])
    (other,) = train(free, [[0, 1]])
    assert bits(model)[1] == before[1]
    assert bits(model)[0] == bits(free)[0] != before[0]  # the layer below sees the same inputs in both
    assert step["load"].sum(-1).tolist() == other["load"].sum(-1).tolist()  # counted all the same, for the metrics
    gate.weight.requires_grad_(True)
    list(train(model, [[2]]))
    assert bits(model)[1] != before[1]


@pytest.mark.parametrize("mode", ["global_batch", "loss_free"])
def test_a_wholly_frozen_model_stays_as_it_is(tiny_config: Make, mode: str) -> None:
    # Guards against a teacher or reference model, run in training mode for its dropout, that drifts.
    model = build(tiny_config(**MODES[mode])).requires_grad_(False)
    before = bits(model)
    for seed in range(3):
        ids = tokens(seed)
        outputs = model(ids, labels=ids)
        assert not outputs.aux_loss.requires_grad
        assert not outputs.loss.requires_grad
        model.balancer.after_optimizer_step()
    assert bits(model) == before
    assert model.balancer.metrics()["tokens"].item() == ids.numel()


# --- Loading in another dtype, on the meta device ---


def moved(config: MoEConfig) -> MoEForCausalLM:
    """Biases with bits that bf16 cannot hold."""
    model = build(config)
    for layer, bias in enumerate(model.selection_biases()):
        bias.copy_(torch.randn(EXPERTS, generator=torch.Generator().manual_seed(layer)) * 0.1 + 1e-4)
    assert all((bias.bfloat16().float() != bias).any() for bias in model.selection_biases())
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_loading_in_bf16_keeps_every_bit_of_the_biases(tiny_config: Make, tmp_path: Path, tied: bool) -> None:
    model = moved(tiny_config(**MODES["loss_free"], tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "fp32")
    loaded = MoEForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "bf16")  # and once more, from a bf16 model
    again = MoEForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto")
    for other in (loaded, again):
        assert other.lm_head.weight.dtype == torch.bfloat16
        assert bits(other) == bits(model)
        assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied
        assert torch.equal(other.lm_head.weight, model.lm_head.weight.bfloat16())
    # What is loaded is what is moved: the balancer must not hold on to biases that loading has replaced.
    before = torch.stack(loaded.selection_biases())
    ids = tokens(0)
    load = counted(loaded.train()(ids, labels=ids, output_router_logits=True).selected_experts)
    loaded.balancer.after_optimizer_step()
    assert torch.equal(torch.stack(loaded.selection_biases()), SignUpdate().update(before, load, RATE, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_made_on_the_meta_device_begins_with_zero_biases(tiny_config: Make, dtype: torch.dtype) -> None:
    # Guards against the garbage of `to_empty`: a buffer that no initialisation reaches.
    with torch.device("meta"):
        model = MoEForCausalLM(tiny_config(**MODES["loss_free"])).to(dtype)
    model.to_empty(device="cpu")
    for bias in model.selection_biases():
        bias.fill_(float("nan"))
    model.init_weights()
    for bias in model.selection_biases():
        assert bias.dtype == torch.float32
        assert bias.tolist() == [0.0] * EXPERTS
    ids = tokens(0)
    outputs = model.train()(ids, labels=ids)
    assert torch.isfinite(outputs.loss)
    model.balancer.after_optimizer_step()
    assert all(bias.abs().max() > 0 for bias in model.selection_biases())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_without_biases_loads_with_zeros(tiny_config: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    # Guards against weights of a model that was trained without biases: loading makes the model on the meta device,
    # and what the file does not hold must be initialised.
    model = build(tiny_config(**MODES["loss_free"]))
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    kept = {name: weight for name, weight in load_file(file).items() if "correction_bias" not in name}
    assert len(kept) == len(load_file(file)) - 2
    save_file(kept, file, metadata={"format": "pt"})
    assert json.loads((tmp_path / "config.json").read_text())["balancing_mode"] == "loss_free"
    loaded = MoEForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for bias in loaded.selection_biases():
        assert bias.dtype == torch.float32
        assert bias.tolist() == [0.0] * EXPERTS


# --- Several models ---


@pytest.mark.parametrize("mode", ["global_batch", "loss_free", "quantile"])
def test_two_models_in_one_process_do_not_mix(tiny_config: Make, mode: str) -> None:
    # Guards against state in a class or a module: counters, biases, the rule's own.
    seeds = {0: [[0, 1], [2, 3]], 1: [[4], [5, 6]]}
    alone = {seed: list(train(build(tiny_config(**MODES[mode]), seed), seeds[seed])) for seed in seeds}
    first, second = build(tiny_config(**MODES[mode]), 0), build(tiny_config(**MODES[mode]), 1)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (first, second)]

    def micro_batch(model: MoEForCausalLM, seed: int, accumulation: int) -> None:
        ids = tokens(seed)
        (model(ids, labels=ids, use_cache=False).loss / accumulation).backward()

    def step(index: int) -> dict[str, Any]:
        model, optimizer = (first, second)[index], optimizers[index]
        found = gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        model.balancer.after_optimizer_step()
        return {"load": model.balancer.metrics()["load"], "bits": bits(model), "gradients": found}

    together: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    micro_batch(first, 0, 2)
    micro_batch(second, 4, 1)
    micro_batch(first, 1, 2)
    together[1].append(step(1))
    micro_batch(second, 5, 2)
    together[0].append(step(0))
    micro_batch(first, 2, 2)
    micro_batch(second, 6, 2)
    micro_batch(first, 3, 2)
    together[0].append(step(0))
    together[1].append(step(1))
    for seed in seeds:
        assert_same_training(together[seed], alone[seed])
    assert alone[0][0]["bits"] != alone[1][0]["bits"] or mode == "global_batch"
