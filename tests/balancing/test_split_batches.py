"""However a global batch is split over ranks and micro-steps, its balancing is that of the whole.

Random models, masks and splits; the oracle is one process that holds the global batch, with the losses written out
from the routing alone: no Balancer in it. Guards against every way of weighing micro-batches wrongly (Megatron's mean
over micro-batches, label shares for routed tokens, counts per rank), and against counts that differ between ranks.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRMSNorm

from equipoise import MoEConfig, MoEForCausalLM

COEFFICIENT, SEQUENCE_COEFFICIENT, Z_COEFFICIENT = 0.5, 0.25, 0.05
Batch = dict[str, Tensor]


def draw_config(generator: torch.Generator, scoring_func: str, load_estimate: str) -> MoEConfig:
    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    experts = integer(2, 9)
    return MoEConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=integer(1, 3),
        num_attention_heads=2,
        num_experts=experts,
        num_experts_per_tok=integer(1, experts),
        moe_intermediate_size=8,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=0,
        scoring_func=scoring_func,
        load_estimate=load_estimate,
        router_aux_loss_coef=COEFFICIENT,
        complementary_balancing_mode="sequence",
        complementary_aux_loss_coef=SEQUENCE_COEFFICIENT,
        router_z_loss_coef=Z_COEFFICIENT,
    )


def draw_micro_batch(generator: torch.Generator) -> Batch:
    """Padded on either side, prompts without loss; now and then all padding, or without any loss."""

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    rows, length = int(integers(1, 3)), int(integers(2, 7))
    ids, lengths, prompts = integers(1, 39, rows, length), integers(0, length, rows), integers(0, length, rows)
    position = torch.arange(length)
    mask = position < lengths[:, None]
    if integers(0, 1) == 1:
        mask = mask.flip(-1)
    labels = ids.masked_fill((position < prompts[:, None]) | ~mask, -100)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels}


def draw_split(seed: int, world_size: int, accumulation: int) -> list[list[Batch]]:
    """The micro-batches of one global batch, `[accumulation][rank]`, with some loss somewhere: shares of no loss at
    all are 0 / 0."""
    generator = torch.Generator().manual_seed(seed)
    split: list[list[Batch]] = []
    while not count_labels([batch for step in split for batch in step]):
        split = [[draw_micro_batch(generator) for _ in range(world_size)] for _ in range(accumulation)]
    return split


def in_one_batch(micro_batches: list[Batch]) -> Batch:
    """All rows under each other, with padding on the right."""
    longest = max(batch["input_ids"].shape[1] for batch in micro_batches)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.cat(
            [
                torch.nn.functional.pad(batch[name], (0, longest - batch[name].shape[1]), value=fill)
                for batch in micro_batches
            ]
        )
        for name, fill in fills.items()
    }


def build(config: MoEConfig, dtype: torch.dtype) -> MoEForCausalLM:
    torch.manual_seed(0)
    model = MoEForCausalLM(config).to(dtype).train()
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # grouped_mm has no double
        for module in model.modules():
            if isinstance(module, Glm4MoeRMSNorm):
                # Transformers' norms compute in float32, and would round what reaches them.
                shape = tuple(module.weight.shape)
                norm = functools.partial(torch.nn.functional.rms_norm, eps=module.variance_epsilon)
                module.forward = lambda x, norm=norm, shape=shape, weight=module.weight: norm(x, shape, weight)
    return model


def count_labels(batches: list[Batch]) -> int:
    return sum(int(batch["labels"][:, 1:].ne(-100).sum()) for batch in batches)


def cross_entropy_sum(logits: Tensor, batch: Batch) -> Tensor:
    """In the logits' own type: Transformers' loss would round float64 to float32."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum", ignore_index=-100
    )


# --- what each rank does ---


def train_on_a_rank(
    rank: int, world_size: int, config: MoEConfig, dtype: torch.dtype, loop: str, splits: list[list[list[Batch]]]
) -> dict[str, Any]:
    """Gradient of the last global batch, summed over ranks and steps as `loop` does, and the balancer's view of it."""
    model = build(config, dtype)
    for split in splits:
        model.zero_grad()
        items = count_labels([batch for step in split for batch in step])
        mine = [step[rank] for step in split]
        if config.load_estimate == "exact":
            with model.balancer.prepass():
                for batch in mine:
                    model(**batch, use_cache=False)
        for batch in mine:
            if loop == "trainer":
                # The sum over ranks and micro-steps of shares of the global batch's loss.
                outputs = model(**batch, num_items_in_batch=items, use_cache=False)
                loss = cross_entropy_sum(outputs.logits, batch) / max(items, 1) + outputs.aux_loss
            else:
                # The mean over ranks and micro-steps; of the balancing alone, a mean of means is no one's oracle.
                loss = model(**batch, use_cache=False).aux_loss / (world_size * len(mine))
            loss.backward()
        model.balancer.after_optimizer_step()
    gradients = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in model.named_parameters()}
    if world_size > 1:
        for gradient in gradients.values():
            dist.all_reduce(gradient)
    metrics = model.balancer.metrics()
    return {"gradients": gradients, "load": metrics["load"], "lbl": metrics["load_balancing_loss_batch"]}


# --- the oracle ---


def routing(model: MoEForCausalLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits `[L, N, E]`, normalised scores `[L, N, E]`, one-hot selections `[L, N, E]` and language-model logits."""
    outputs = model(
        batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True, use_cache=False
    )
    logits = torch.stack(outputs.router_logits)
    scores = logits.exp() if model.config.scoring_func == "softmax" else 1 / (1 + (-logits).exp())
    chosen = torch.nn.functional.one_hot(torch.stack(outputs.selected_experts), model.config.num_experts).sum(2)
    return logits, scores / scores.sum(-1, keepdim=True), chosen, outputs.logits


def lbl(load: Tensor, mean_score: Tensor) -> Tensor:
    """Mean over layers of `E * sum f P`; 0 where nothing was counted."""
    fraction = load / load.sum(-1, keepdim=True).clamp(min=1)
    return (load.shape[-1] * (fraction * mean_score).sum(-1)).mean()


def other_losses(logits: Tensor, scores: Tensor, chosen: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence LBL and z-loss of a batch, as sums over its sequences and its tokens."""
    shape = (len(logits), *mask.shape, -1)
    sequences = logits.new_zeros(())
    for row, tokens in enumerate(mask):
        if tokens.any():
            counted = chosen.view(shape)[:, row, tokens].sum(1).to(scores.dtype)
            sequences = sequences + lbl(counted, scores.view(shape)[:, row, tokens].mean(1))
    z = logits[:, mask.flatten()].exp().sum(-1).log().square().sum() / len(logits)
    return sequences, z


def whole_batch_oracle(config: MoEConfig, dtype: torch.dtype, loop: str, split: list[list[Batch]]) -> dict[str, Any]:
    """One process, one batch."""
    model = build(config, dtype).eval()
    batch = in_one_batch([batch for step in split for batch in step])
    mask = batch["attention_mask"].bool()
    logits, scores, chosen, lm_logits = routing(model, batch)
    tokens = mask.flatten()
    load = chosen[:, tokens].sum(1)
    mean_score = scores[:, tokens].sum(1) / tokens.sum().clamp(min=1)
    sequences, z = other_losses(logits, scores, chosen, mask)
    total = (
        COEFFICIENT * lbl(load.to(dtype), mean_score)
        + SEQUENCE_COEFFICIENT * sequences / mask.any(-1).sum().clamp(min=1)
        + Z_COEFFICIENT * z / tokens.sum().clamp(min=1)
    )
    if loop == "trainer":
        total = total + cross_entropy_sum(lm_logits, batch) / max(count_labels([batch]), 1)
    total.backward()
    fraction = load / load.sum(-1, keepdim=True).clamp(min=1)
    return {
        "gradients": {name: weight.grad for name, weight in model.named_parameters()},
        "load": load,
        "lbl": config.num_experts * (fraction * mean_score).sum(-1),
    }


def formula_oracle(
    config: MoEConfig, dtype: torch.dtype, loop: str, splits: list[list[list[Batch]]]
) -> dict[str, Any]:
    """One process that goes through the micro-batches one by one: the written formula of each estimate and share."""
    model = build(config, dtype).eval()
    previous, previous_tokens = None, 0
    for split in splits:
        model.zero_grad()
        items = count_labels([batch for step in split for batch in step])
        seen, seen_tokens = torch.zeros(config.num_moe_layers, config.num_experts, dtype=torch.double), 0
        for step in split:
            routed = [routing(model, batch) for batch in step]
            masks = [batch["attention_mask"].bool() for batch in step]
            tokens, sequences = sum(int(m.sum()) for m in masks), sum(int(m.any(-1).sum()) for m in masks)
            loads = [chosen[:, mask.flatten()].sum(1) for (_, _, chosen, _), mask in zip(routed, masks, strict=True)]
            seen, seen_tokens = seen + sum(loads), seen_tokens + tokens
            load = seen
            if config.load_estimate == "current":
                load = sum(loads)
            if config.load_estimate == "completed" and previous is not None:
                load = seen + max(0.0, 1 - seen_tokens / max(previous_tokens, 1)) * previous
            # The shares: of this micro-step's tokens, times what the loop makes of a micro-step.
            loop_share = count_labels(step) / max(items, 1) if loop == "trainer" else 1 / len(split)
            for batch, mask, (logits, scores, chosen, lm_logits) in zip(step, masks, routed, strict=True):
                kept = mask.flatten()
                share, sequence_share = int(kept.sum()) / max(tokens, 1), 1 / max(sequences, 1)
                mean_score = scores[:, kept].sum(1) / kept.sum().clamp(min=1)
                row_losses, z = other_losses(logits, scores, chosen, mask)
                total = loop_share * (
                    COEFFICIENT * share * lbl(load.to(dtype), mean_score)
                    + SEQUENCE_COEFFICIENT * sequence_share * row_losses
                    + Z_COEFFICIENT * z / max(tokens, 1)
                )
                if loop == "trainer":
                    total = total + cross_entropy_sum(lm_logits, batch) / max(items, 1)
                total.backward()
        previous, previous_tokens = seen, seen_tokens
    return {"gradients": {name: weight.grad for name, weight in model.named_parameters()}, "load": seen.long()}


# --- the properties ---


def compare(ranks: list[dict[str, Any]], expected: dict[str, Any], dtype: torch.dtype) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    whole = torch.cat([g.flatten() for g in expected["gradients"].values() if g is not None]).norm()
    for rank in ranks:
        assert torch.equal(rank["load"], expected["load"])
        if "lbl" in expected:  # in fixed point, 2**-24 a micro-batch
            torch.testing.assert_close(rank["lbl"], expected["lbl"].float(), atol=1e-5, rtol=1e-5)
        for name, gradient in expected["gradients"].items():
            if gradient is None:
                continue
            # Relative to the weight's own gradient; where that is small, to the whole model's: what is left of terms
            # that cancel is rounding.
            size = gradient.norm().clamp(min=0.1 * float(whole) + 1e-12)
            error = (rank["gradients"][name] - gradient).norm() / size
            assert error < tolerance, f"{name}: relative error {error:.1e}"


def split_in(run_processes: Callable[..., list[Any]], world_size: int, *arguments: Any) -> list[dict[str, Any]]:
    if world_size == 1:
        return [train_on_a_rank(0, 1, *arguments)]
    return run_processes(world_size, train_on_a_rank, *arguments)


dtypes, loops = st.sampled_from([torch.float32, torch.float64]), st.sampled_from(["trainer", "plain"])
scorings, seeds = st.sampled_from(["softmax", "sigmoid"]), st.integers(0, 2**31)
oracle_settings = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.processes
@pytest.mark.parametrize("world_size", [1, 2, 4])
@oracle_settings
@given(seeds, dtypes, loops, scorings, st.integers(1, 4))
def test_exact_equals_one_big_batch_under_any_accumulation(
    run_processes: Callable[..., list[Any]],
    world_size: int,
    seed: int,
    dtype: torch.dtype,
    loop: str,
    scoring_func: str,
    accumulation: int,
) -> None:
    config = draw_config(torch.Generator().manual_seed(seed), scoring_func, "exact")
    split = draw_split(seed, world_size, accumulation)
    ranks = split_in(run_processes, world_size, config, dtype, loop, [split])
    compare(ranks, whole_batch_oracle(config, dtype, loop, split), dtype)


@pytest.mark.processes
@pytest.mark.parametrize("world_size", [1, 2, 4])
@oracle_settings
@given(seeds, dtypes, loops, scorings, st.sampled_from(["running", "current", "completed"]))
def test_without_accumulation_every_estimate_equals_one_big_batch(
    run_processes: Callable[..., list[Any]],
    world_size: int,
    seed: int,
    dtype: torch.dtype,
    loop: str,
    scoring_func: str,
    estimate: str,
) -> None:
    config = draw_config(torch.Generator().manual_seed(seed), scoring_func, estimate)
    # The batch before must leave nothing behind.
    splits = [draw_split(seed + 1, world_size, 1), draw_split(seed, world_size, 1)]
    ranks = split_in(run_processes, world_size, config, dtype, loop, splits)
    compare(ranks, whole_batch_oracle(config, dtype, loop, splits[-1]), dtype)


@pytest.mark.processes
@pytest.mark.parametrize("world_size", [1, 2, 4])
@oracle_settings
@given(seeds, dtypes, loops, scorings, st.sampled_from(["running", "current", "completed"]), st.integers(2, 4))
def test_with_accumulation_each_estimate_is_its_written_formula(
    run_processes: Callable[..., list[Any]],
    world_size: int,
    seed: int,
    dtype: torch.dtype,
    loop: str,
    scoring_func: str,
    estimate: str,
    accumulation: int,
) -> None:
    config = draw_config(torch.Generator().manual_seed(seed), scoring_func, estimate)
    splits = [draw_split(seed + step, world_size, accumulation) for step in range(3)]
    ranks = split_in(run_processes, world_size, config, dtype, loop, splits)
    compare(ranks, formula_oracle(config, dtype, loop, splits), dtype)
