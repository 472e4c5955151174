"""Global batches close by themselves: nobody tells the Balancer that the optimizer has stepped.

The oracle is the same training told of each real step by hand, in the place where it is made: the same weights, biases
and loads, to the bit.
"""

import copy
import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers import Adafactor

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.balancing import balancer as balancer_module
from equipoise.integrations import follow

Make = Callable[..., MoEConfig]
EXPERTS, STEPS = 8, 3
MODES: dict[str, dict[str, Any]] = {
    "global_batch": {"balancing_mode": "global_batch", "router_aux_loss_coef": 0.5},
    "loss_free": {"balancing_mode": "loss_free", "scoring_func": "sigmoid", "bias_update_rate": 0.05},
    "quantile": {"balancing_mode": "loss_free", "scoring_func": "sigmoid", "bias_update_rule": "quantile"},
}


def tokens(seed: int) -> Tensor:
    return torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(seed))


def build(tiny_config: Make, mode: str = "loss_free", *, told: bool = False, **fields: Any) -> MoEForCausalLM:
    """With `told`, a model whose Balancer knows of no step but those it is told of."""
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(**MODES[mode] | fields)).train()
    if told:
        model.balancer._parameters = None
    return model


def micro_batch(model: nn.Module, seed: int, scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> Tensor:
    """One forward and backward pass; returns the load `[L, E]` counted from the selections themselves."""
    ids = tokens(seed)
    outputs = model(ids, labels=ids, output_router_logits=True, use_cache=False)
    scale(outputs.loss).backward()
    return torch.stack([experts.flatten().bincount(minlength=EXPERTS) for experts in outputs.selected_experts])


def batches(accumulation: int) -> Iterator[range]:
    for step in range(STEPS):
        yield range(step * accumulation, (step + 1) * accumulation)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model: nn.Module, reference: nn.Module) -> None:
    got, expected = state(model), state(reference)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def adamw(weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=0.01)


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.01, foreach=False),
    "AdamW foreach": lambda weights: torch.optim.AdamW(weights, lr=0.01, foreach=True),
    "AdamW fused": lambda weights: torch.optim.AdamW(weights, lr=0.01, fused=True),
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "Adafactor of torch": lambda weights: torch.optim.Adafactor(weights, lr=0.01),
    "Adafactor of Transformers": lambda weights: Adafactor(weights, lr=0.01, relative_step=False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_a_step_closes_the_batch(tiny_config: Make, make: Callable, accumulation: int, mode: str) -> None:
    model, reference = build(tiny_config, mode), build(tiny_config, mode, told=True)
    optimizer, by_hand = make(model.parameters()), make(reference.parameters())
    for seeds in batches(accumulation):
        load = sum(micro_batch(model, seed) for seed in seeds)
        steps = model.balancer.steps
        optimizer.step()
        optimizer.zero_grad()
        assert model.balancer.steps == steps + 1
        assert torch.equal(model.balancer.metrics()["load"], load)

        for seed in seeds:
            micro_batch(reference, seed)
        by_hand.step()
        by_hand.zero_grad()
        reference.balancer.after_optimizer_step()
        assert_same(model, reference)
    assert torch.stack(model.selection_biases()).any() == (mode != "global_batch")


@pytest.mark.parametrize("word", ["before", "after", "after one step only", "a followed optimizer"])
def test_a_word_of_the_loop_changes_nothing(tiny_config: Make, word: str) -> None:
    # Guards against a batch that is closed twice, or biases that move twice.
    model, reference = build(tiny_config), build(tiny_config)
    optimizer, by_hand = adamw(model.parameters()), adamw(reference.parameters())
    if word == "a followed optimizer":
        follow(model.balancer, optimizer)
    for number, seeds in enumerate(batches(2)):
        for seed in seeds:
            micro_batch(model, seed)
            micro_batch(reference, seed)
        if word == "before":  # too early by a line: the batch is whole nevertheless
            model.balancer.after_optimizer_step()
        optimizer.step()
        if word == "after" or (word == "after one step only" and number == 0):
            model.balancer.after_optimizer_step()
        optimizer.zero_grad()
        by_hand.step()
        by_hand.zero_grad()
    assert model.balancer.steps == reference.balancer.steps == STEPS
    assert_same(model, reference)


def test_optimizers_that_share_the_weights_close_one_batch(tiny_config: Make) -> None:
    # As where matrices and the rest have optimizers of their own, routers on both sides of the divide.
    model, reference = build(tiny_config), build(tiny_config, told=True)
    optimizers = [adamw(list(model.parameters())[half::2]) for half in range(2)]
    by_hand = adamw(reference.parameters())
    for seeds in batches(2):
        for seed in seeds:
            micro_batch(model, seed)
            micro_batch(reference, seed)
        for optimizer in [*optimizers, by_hand]:
            optimizer.step()
            optimizer.zero_grad()
        reference.balancer.after_optimizer_step()
    assert model.balancer.steps == STEPS
    assert_same(model, reference)


def test_optimizers_inside_the_backward_pass_close_each_micro_batch(tiny_config: Make) -> None:
    # Each backward pass is then an optimizer step.
    model, reference = build(tiny_config), build(tiny_config, told=True)
    by_hand = adamw(reference.parameters())
    optimizers = {weight: adamw([weight]) for weight in model.parameters()}

    def step(weight: nn.Parameter) -> None:
        optimizers[weight].step()
        optimizers[weight].zero_grad()

    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(step)
    for seed in range(4):
        load = micro_batch(model, seed)
        assert torch.equal(model.balancer.metrics()["load"], load)
        micro_batch(reference, seed)
        by_hand.step()
        by_hand.zero_grad()
        reference.balancer.after_optimizer_step()
    assert model.balancer.steps == 4
    assert_same(model, reference)


# --- What is no step of this model ---


def load_weights(model: MoEForCausalLM) -> None:
    model.load_state_dict(state(model))


def swap_weights(model: MoEForCausalLM) -> None:
    """As an average of the weights is put in their place for a moment, and they come back."""
    kept = [weight.detach().clone() for weight in model.parameters()]
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)
        for weight, value in zip(model.parameters(), kept, strict=True):
            weight.copy_(value)


def evaluate(model: MoEForCausalLM) -> None:
    model.eval()
    model(tokens(99), labels=tokens(99))
    with torch.no_grad():
        model.train()(tokens(98), labels=tokens(98))


def step_another_model(model: MoEForCausalLM) -> None:
    other = copy.deepcopy(model)
    optimizer = adamw(other.parameters())
    steps = other.balancer.steps
    micro_batch(other, 97)
    optimizer.step()
    assert other.balancer.steps == steps + 1


@pytest.mark.parametrize("event", [load_weights, swap_weights, evaluate, step_another_model])
def test_nothing_else_closes_the_batch(tiny_config: Make, event: Callable[[MoEForCausalLM], None]) -> None:
    model, reference = build(tiny_config), build(tiny_config)
    optimizer, by_hand = adamw(model.parameters()), adamw(reference.parameters())
    for seeds in batches(2):
        for seed in seeds:
            micro_batch(model, seed)
            event(model)
            micro_batch(reference, seed)
        optimizer.step()
        event(model)
        optimizer.zero_grad()
        by_hand.step()
        by_hand.zero_grad()
    assert model.balancer.steps == STEPS
    assert_same(model, reference)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_a_gradient_scaler_skips(tiny_config: Make, fused: bool) -> None:
    # A fused optimizer is called on such a step too and must move no bias; over an unfused one the scaler passes, and
    # the batch merges into the next, as documented, unless the loop says that it was skipped.
    model = build(tiny_config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loads = []
    for step in range(3):
        loads.append(micro_batch(model, step, scaler.scale))
        if step == 1:
            model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = float("inf")
            before = state(model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step == 1:
            assert model.balancer.steps == 1
            assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert model.balancer.steps == 2
    assert torch.equal(model.balancer.metrics()["load"], loads[2] if fused else loads[1] + loads[2])


def test_the_pre_pass_is_of_the_coming_step(tiny_config: Make) -> None:
    # Guards against counts of the pre-pass that close with, or are dropped by, the step before.
    fields = {"load_estimate": "exact"}
    model, reference = (build(tiny_config, "global_batch", told=told, **fields) for told in (False, True))
    optimizer, by_hand = adamw(model.parameters()), adamw(reference.parameters())
    for seeds in batches(2):
        for each in (model, reference):
            with each.balancer.prepass():
                for seed in seeds:
                    each(tokens(seed), labels=tokens(seed))
            for seed in seeds:
                micro_batch(each, seed)
        for each in (optimizer, by_hand):
            each.step()
            each.zero_grad()
        reference.balancer.after_optimizer_step()
        assert_same(model, reference)
    assert model.balancer.steps == STEPS


# --- Under other techniques ---


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(tiny_config: Make, reentrant: bool) -> None:
    model = build(tiny_config)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    optimizer = adamw(model.parameters())
    for seeds in batches(2):
        load = sum(micro_batch(model, seed) for seed in seeds)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(model.balancer.metrics()["load"], load)
    assert model.balancer.steps == STEPS


@pytest.mark.parametrize("compiled", ["model", "step"])
def test_torch_compile(tiny_config: Make, compiled: str) -> None:
    torch.compiler.reset()
    model = build(tiny_config)
    optimizer = adamw(model.parameters())
    called = torch.compile(model, backend="aot_eager") if compiled == "model" else model
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager") if compiled == "step" else optimizer.step
    for number, seeds in enumerate(batches(2)):
        load = sum(micro_batch(called, seed) for seed in seeds)
        step()
        optimizer.zero_grad()
        assert model.balancer.steps == number + 1
        assert torch.equal(model.balancer.metrics()["load"], load)


def test_a_copy_is_followed_and_a_model_that_is_gone_is_not_kept(tiny_config: Make) -> None:
    model = build(tiny_config)
    micro_batch(model, 0)  # copied in the middle of a batch
    twin = copy.deepcopy(model)
    load = micro_batch(model, 1) + micro_batch(build(tiny_config), 0)
    for each in (model, twin):
        optimizer = adamw(each.parameters())
        if each is twin:
            micro_batch(twin, 1)
        optimizer.step()
        assert each.balancer.steps == 1
        assert torch.equal(each.balancer.metrics()["load"], load)

    micro_batch(model, 2)  # and dropped in the middle of one
    gone = weakref.ref(model.balancer)
    assert gone() in balancer_module._counting
    del model, each, optimizer
    gc.collect()
    assert gone() is None


def sharded(rank: int, world_size: int, config: MoEConfig, how: str) -> list[Any]:
    """Trains with nothing but the model; returns steps, loads, and each rank's own counts."""
    torch.manual_seed(0)
    model = MoEForCausalLM(config).train()
    called: Any = model
    if how == "ddp" or how == "zero_redundancy":
        called = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (world_size,))
        if how == "lora":
            import peft

            # Of rank 1, so that the second rank's shard of it is empty.
            lora = peft.LoraConfig(r=1, target_modules=[], target_parameters=["mlp.gate.weight"])
            called = peft.get_peft_model(model, lora)
        for layer in model.model.layers if how != "fsdp root" else []:
            fully_shard(layer, mesh=mesh, reshard_after_forward=how != "fsdp kept")
        fully_shard(model, mesh=mesh)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = (
        ZeroRedundancyOptimizer(weights, torch.optim.AdamW, lr=0.01)
        if how == "zero_redundancy"
        else torch.optim.AdamW(weights, lr=0.01)
    )
    results: list[Any] = []
    for step in range(STEPS):
        own = [micro_batch(called, 100 * rank + 2 * step + number) for number in range(2)]
        optimizer.step()
        optimizer.zero_grad()
        biases = torch.stack(model.selection_biases())
        results.append([model.balancer.steps, model.balancer.metrics()["load"], sum(own), biases.clone()])
    return results


@pytest.mark.processes
@pytest.mark.parametrize("how", ["ddp", "zero_redundancy", "fsdp", "fsdp kept", "fsdp root", "lora"])
def test_all_ranks_close_together(tiny_config: Make, run_processes: Callable[..., list[Any]], how: str) -> None:
    # In loss_free the close is a collective: a rank that did not see the step would hang the others. FSDP2 shows each
    # rank another piece of a weight, or none, and at times the whole; under ZeRO only one rank steps on a weight.
    if how == "lora":
        pytest.importorskip("peft")
    first, second = run_processes(2, sharded, tiny_config(**MODES["loss_free"]), how)
    for step, (one, two) in enumerate(zip(first, second, strict=True)):
        assert one[0] == two[0] == step + 1
        assert torch.equal(one[1], one[2] + two[2])
        assert torch.equal(two[1], one[1])
        assert torch.equal(one[3], two[3])
        assert one[3].any()


# --- A loss that nobody minimises ---


def minimise(model: MoEForCausalLM, loss: Callable[[Any], Tensor]) -> None:
    optimizer = adamw([weight for weight in model.parameters() if weight.requires_grad])
    for _ in range(2):
        loss(model(tokens(0), labels=tokens(0))).backward()
        optimizer.step()


def test_a_balancing_loss_that_is_left_out_is_noticed(tiny_config: Make) -> None:
    # As by a loop, or a Trainer's `compute_loss_func`, that takes the logits and forgets `aux_loss`.
    with pytest.warns(UserWarning, match="balancing loss took no part in the backward pass"):
        minimise(build(tiny_config, "global_batch"), lambda outputs: outputs.logits.square().mean())


@pytest.mark.parametrize(
    ("mode", "frozen", "loss"),
    [
        ("global_batch", False, lambda outputs: outputs.loss),
        ("global_batch", False, lambda outputs: outputs.logits.square().mean() + outputs.aux_loss),
        ("global_batch", True, lambda outputs: outputs.logits.square().mean()),  # there is nothing to minimise
        ("loss_free", False, lambda outputs: outputs.logits.square().mean()),
    ],
    ids=["its own loss", "aux_loss added", "frozen routers", "no loss"],
)
def test_no_false_alarm(tiny_config: Make, mode: str, frozen: bool, loss: Callable[[Any], Tensor]) -> None:
    model = build(tiny_config, mode)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.requires_grad_(not frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minimise(model, loss)
