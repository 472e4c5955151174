"""`follow`: the Balancer closes its global batch with real optimizer steps, whoever makes or skips them.

The oracle of a skipped step is a run that never saw the skipped batch: its weights, loads and biases, to the bit.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.integrations import follow

Make = Callable[..., MoEConfig]
EXPERTS, RATE, SCALE = 8, 0.05, 2.0**10
MODES: dict[str, dict[str, Any]] = {
    "global_batch": {"balancing_mode": "global_batch", "router_aux_loss_coef": 0.5},
    "loss_free": {"balancing_mode": "loss_free", "scoring_func": "sigmoid", "bias_update_rate": RATE},
}


def tokens(seed: int) -> Tensor:
    return torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(seed))


def build(tiny_config: Make, mode: str = "loss_free") -> MoEForCausalLM:
    torch.manual_seed(0)
    model = MoEForCausalLM(tiny_config(**MODES[mode])).train()
    model.balancer._parameters = None  # what `follow` does is seen alone: the Balancer does not know its optimizer
    return model


def adamw(model: MoEForCausalLM, fused: bool) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)


def micro_batch(model: MoEForCausalLM, seed: int, scale: Callable[[Tensor], Tensor] = lambda loss: loss) -> Tensor:
    """One forward and backward pass; returns the load `[L, E]` counted from the selections themselves."""
    ids = tokens(seed)
    outputs = model(ids, labels=ids, output_router_logits=True, use_cache=False)
    scale(outputs.loss).backward()
    return torch.stack([experts.flatten().bincount(minlength=EXPERTS) for experts in outputs.selected_experts])


def state(model: MoEForCausalLM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def never_saw_it(tiny_config: Make, mode: str, seeds: list[list[int]]) -> Iterator[MoEForCausalLM]:
    """A run without gradient scaler over the batches that were really trained on, closed by hand."""
    model = build(tiny_config, mode)
    # Unfused, whatever the run compared with: powers of two scale and unscale gradients without rounding them.
    optimizer = adamw(model, fused=False)
    for batch in seeds:
        for seed in batch:
            micro_batch(model, seed)
        optimizer.step()
        optimizer.zero_grad()
        model.balancer.after_optimizer_step()
        yield model


def spoil(model: MoEForCausalLM) -> None:
    """One gradient overflows, as one does in fp16."""
    model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = float("inf")


# --- Gradient scaler ---


@pytest.mark.parametrize("unscaled_first", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("mode", ["global_batch", "loss_free"])
def test_fused_optimizer_drops_the_batch_of_a_skipped_step(tiny_config: Make, mode: str, unscaled_first: bool) -> None:
    # Guards against a hook that takes every call for a step: a fused optimizer is called on a skipped one as well.
    model = build(tiny_config, mode)
    optimizer = adamw(model, fused=True)
    follow(model.balancer, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    reference = never_saw_it(tiny_config, mode, [[0, 1], [3, 4]])

    def step(seeds: list[int], overflow: bool = False) -> Tensor:
        load = sum(micro_batch(model, seed, scaler.scale) for seed in seeds)
        if overflow:
            spoil(model)
        if unscaled_first:  # as a loop that clips gradients does
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return load

    first = step([0, 1])
    assert torch.equal(model.balancer.metrics()["load"], first)
    after_first, expected = state(model), state(next(reference))
    # The fused kernel rounds otherwise than the unfused one, so weights are compared with themselves.
    biases = [name for name in expected if "correction_bias" in name]
    assert len(biases) == 2
    assert_same_state({name: after_first[name] for name in biases}, {name: expected[name] for name in biases})

    step([2], overflow=True)
    assert len(calls) == 2  # it was called
    assert_same_state(state(model), after_first)  # moved nothing
    assert scaler.get_scale() == SCALE / 2
    assert model.balancer.steps == 1
    assert torch.equal(model.balancer.metrics()["load"], first)

    last = step([3, 4])
    assert torch.equal(model.balancer.metrics()["load"], last)  # [2] is not in it
    assert model.balancer.steps == 2
    expected = state(next(reference))
    for name, value in state(model).items():
        if name in biases:
            assert torch.equal(value, expected[name])
            assert value.any() == (mode == "loss_free")
        else:
            torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-4)


def test_a_scale_too_large_overflows_by_itself(tiny_config: Make) -> None:
    # No injected inf: the scaled gradients themselves overflow fp32, and the scaler finds its way to a real step.
    model = build(tiny_config)
    optimizer = adamw(model, fused=True)
    follow(model.balancer, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-60)
    before = state(model)
    for attempt in range(2):
        load = micro_batch(model, attempt, lambda loss: scaler.scale(2.0**10 * loss))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if attempt == 0:
            assert scaler.get_scale() == 2.0**67
            assert_same_state(state(model), before)
            assert model.balancer.metrics() == {}
    assert scaler.get_scale() == 2.0**67
    assert torch.equal(model.balancer.metrics()["load"], load)
    assert model.balancer.steps == 1


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("mode", ["global_batch", "loss_free"])
def test_unfused_optimizer_needs_the_word_of_the_loop(tiny_config: Make, mode: str, told: bool) -> None:
    # Guards against a loop's word that does not clear, or moves something. Without it the counts merge, as documented.
    model = build(tiny_config, mode)
    optimizer = adamw(model, fused=False)
    follow(model.balancer, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    reference = never_saw_it(tiny_config, mode, [[0, 1], [3]])

    loads = []
    for seeds in ([0, 1], [2], [3]):
        loads.append(sum(micro_batch(model, seed, scaler.scale) for seed in seeds))
        before = state(model)
        if seeds == [2]:
            spoil(model)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if seeds == [2]:
            assert calls == [1]  # the hook was not called, nothing could know
            assert scaler.get_scale() < scale
            if told:
                model.balancer.after_optimizer_step(skipped=True)
            assert_same_state(state(model), before)
            assert torch.equal(model.balancer.metrics()["load"], loads[0])
        elif told:
            # Power-of-two scales round nothing, so here the weights too are the same to the bit.
            assert_same_state(state(model), state(next(reference)))
    assert model.balancer.steps == 2
    assert torch.equal(model.balancer.metrics()["load"], loads[2] if told else loads[1] + loads[2])


def test_word_of_the_loop_and_hook_together_count_once(tiny_config: Make) -> None:
    # A loop written for unfused optimizers also speaks when a fused one has been followed: nothing may happen twice.
    model = build(tiny_config)
    optimizer = adamw(model, fused=True)
    follow(model.balancer, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    reference = never_saw_it(tiny_config, "loss_free", [[0]])
    for seed, overflow in ((7, True), (0, False)):
        micro_batch(model, seed, scaler.scale)
        if overflow:
            spoil(model)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.balancer.after_optimizer_step(skipped=scaler.get_scale() < scale)
    assert model.balancer.steps == 1
    for bias, expected in zip(model.selection_biases(), next(reference).selection_biases(), strict=True):
        assert torch.equal(bias, expected)
        assert bias.any()


# --- Accelerate ---


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate's state is shared by the process: other tests have their own settings."""

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("mode", ["global_batch", "loss_free"])
def test_accelerate_closes_once_per_real_step(tiny_config: Make, mode: str) -> None:
    # Guards against closing at every `optimizer.step()` of the loop: Accelerate's makes a step at every second only.
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    bare = build(tiny_config, mode)
    model, optimizer = accelerator.prepare(bare, adamw(bare, fused=False))
    assert isinstance(optimizer, AcceleratedOptimizer)
    follow(bare.balancer, optimizer)
    reference = build(tiny_config, mode)
    by_hand = adamw(reference, fused=False)
    loads: list[Tensor] = []
    for seed in range(4):
        ids = tokens(seed)
        with accelerator.accumulate(model):
            accelerator.backward(model(ids, labels=ids, use_cache=False).loss)
            optimizer.step()
            optimizer.zero_grad()
        loads.append(micro_batch(reference, seed, lambda loss: loss / 2))
        assert bare.balancer.steps == (seed + 1) // 2
        if seed % 2:
            by_hand.step()
            by_hand.zero_grad()
            reference.balancer.after_optimizer_step()
            assert torch.equal(bare.balancer.metrics()["load"], loads[-2] + loads[-1])
            assert_same_state(state(bare), state(reference))


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("fused", [True, False])
def test_accelerate_with_a_gradient_scaler(tiny_config: Make, fused: bool) -> None:
    # Accelerate replaces the optimizer's `step` while its scaler runs: the hook must be called all the same.
    Accelerator(cpu=True)  # makes the state that the optimizer's wrapper reads
    model = build(tiny_config)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    optimizer = AcceleratedOptimizer(adamw(model, fused), scaler=scaler)
    follow(model.balancer, optimizer)
    for seed in range(3):
        load = micro_batch(model, seed, scaler.scale)
        if seed == 1:
            spoil(model)
        before = state(model)
        optimizer.step()
        optimizer.zero_grad()
        if seed == 1:
            # Accelerate believes that a fused optimizer has made the step: a loop that asks it would be misled.
            assert optimizer.step_was_skipped != fused
            if optimizer.step_was_skipped:  # as the loop must, `follow` says
                model.balancer.after_optimizer_step(skipped=True)
            assert_same_state(state(model), before)
            assert model.balancer.steps == 1
        else:
            assert torch.equal(model.balancer.metrics()["load"], load)
    assert model.balancer.steps == 2


# --- The handle, and what cannot be followed ---


def test_removing_the_handle_ends_it(tiny_config: Make) -> None:
    model = build(tiny_config)
    optimizer = adamw(model, fused=False)
    handle = follow(model.balancer, optimizer)
    micro_batch(model, 0)
    optimizer.step()
    assert model.balancer.steps == 1
    handle.remove()
    before = torch.stack(model.selection_biases())
    load = micro_batch(model, 1)
    optimizer.step()
    assert model.balancer.steps == 1
    assert torch.equal(torch.stack(model.selection_biases()), before)
    model.balancer.after_optimizer_step()  # the counts are the loop's again, none is lost
    assert torch.equal(model.balancer.metrics()["load"], load)


def test_what_is_no_optimizer_is_refused(tiny_config: Make) -> None:
    model = build(tiny_config)
    for wrong in (None, object(), model, model.parameters()):
        with pytest.raises(TypeError, match=f"optimizer must be a torch optimizer; got {type(wrong).__name__}"):
            follow(model.balancer, wrong)


def test_deepspeed_is_refused_with_the_way_out(tiny_config: Make) -> None:
    # Its optimizer steps inside the backward pass, in parts: a hook would close in the middle of a batch.
    class DeepSpeedOptimizerWrapper:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    class ZeroOptimizer:
        """As in `deepspeed.runtime.zero`: no torch optimizer, and its class's name does not say whose it is."""

        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    ZeroOptimizer.__module__ = "deepspeed.runtime.zero.stage_1_and_2"
    model = build(tiny_config)
    optimizer = adamw(model, fused=False)
    for wrapped in (
        DeepSpeedOptimizerWrapper(optimizer),
        ZeroOptimizer(optimizer),
        DeepSpeedOptimizerWrapper(ZeroOptimizer(optimizer)),
    ):
        with pytest.raises(TypeError, match=r"must not be DeepSpeed's.*balancer\.after_optimizer_step\(\)"):
            follow(model.balancer, wrapped)
    micro_batch(model, 0)
    optimizer.step()
    assert model.balancer.steps == 0  # nothing was hooked before it was refused
