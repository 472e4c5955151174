"""Balancer: a balancing mode made of counts, synchronisation, losses and bias updates.

`B` sequences, `T` positions, `N = B*T` tokens, `L` MoE layers, `E` experts, `K` experts per token, `R` ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ..configuration import BalancingMode, BiasUpdateRule, LoadEstimate, LossScope, ScoringFunction
from .bias_updates import BIAS_UPDATE_RULES
from .load import LoadCounts, count_load, dead_experts, load_entropy, load_fraction, max_vio
from .losses import load_balancing_loss, mean_scores, router_z_loss, routing_scores, sequence_load_balancing_loss
from .synchronizer import LoadCountSynchronizer, PendingCounts


@dataclass
class Observation:
    """The routing of one micro-batch, between `Balancer.observe` and `Balancer.loss`."""

    router_logits: Sequence[Tensor]
    selected_experts: Sequence[Tensor]
    mask: Tensor | None
    batch_size: int
    counts: LoadCounts
    """This rank's own counts."""
    pending: PendingCounts | None
    """The all-reduce under way, where a loss needs the other ranks' counts."""


@dataclass
class BalancingLoss:
    """What one micro-batch adds to the loss."""

    total: Tensor
    """Scalar: the terms below times their coefficients and this micro-batch's share of the global batch."""
    terms: dict[str, Tensor]
    """Detached scalars without coefficient or share, by name: `load_balancing_loss` (1 when balanced),
    `complementary_loss` (likewise) and `router_z_loss`; only those that act."""


class Balancer:
    """Balances the load of the experts in one of the five modes; the one object that others talk to.

    In the forward pass: `observe` when the last layer has routed, `loss` after the language-model loss. In the loop:
    `after_optimizer_step` once per real optimizer step. It holds integer counts and no parameter, and it is no module:
    nothing in it is broadcast, cast or saved with the weights.

    **Scale.** A coefficient means the same under any accumulation, world size, `K`, `E`, `L` and padding: the terms
    of micro-batch `m` are weighted by `T_m / T`, its share of the global batch's tokens (the sequence loss by its
    share of the sequences), in the convention of the loop that calls. `loss` says where that is exact.

    Args:
        mode: `none`; `micro_batch`, `sequence` or `global_batch` (a loss over that scope); `loss_free` (a bias).
        num_experts: `E`.
        scoring_func: the router's own, `softmax` or `sigmoid`.
        router_aux_loss_coef: coefficient of the mode's load-balancing loss.
        router_z_loss_coef: coefficient of the router z-loss, in any mode.
        load_estimate: the load that `global_batch` uses while the batch is being accumulated: `current` (this
            micro-step over all ranks), `running` (all micro-steps so far, the paper's buffer) or `completed` (these,
            and the previous batch's load for the part not yet seen).
        bias_update_rate: `u` of `loss_free`, in units of the score.
        bias_update_rule: a key of `BIAS_UPDATE_RULES`.
        complementary_balancing_mode: a second loss beside the mode's, or `none`.
        complementary_aux_loss_coef: its coefficient.
        biases: returns the routers' selection biases, fp32 `[E]` each, in layer order. Asked anew at each update:
            moving a module to another device replaces its buffers.
        process_group: the data-parallel group; `None` is the default group.

    Raises:
        ValueError: a mode, estimate, rule or complementary mode that does not exist, or `loss_free` without `biases`.
    """

    def __init__(
        self,
        mode: BalancingMode = "global_batch",
        *,
        num_experts: int,
        scoring_func: ScoringFunction = "softmax",
        router_aux_loss_coef: float = 0.01,
        router_z_loss_coef: float = 0.0,
        load_estimate: LoadEstimate = "running",
        bias_update_rate: float = 1e-3,
        bias_update_rule: BiasUpdateRule = "sign",
        complementary_balancing_mode: LossScope = "none",
        complementary_aux_loss_coef: float = 1e-4,
        biases: Callable[[], Sequence[Tensor]] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        for name, value, known in (
            ("balancing_mode", mode, get_args(BalancingMode)),
            ("load_estimate", load_estimate, get_args(LoadEstimate)),
            ("bias_update_rule", bias_update_rule, tuple(BIAS_UPDATE_RULES)),
            ("complementary_balancing_mode", complementary_balancing_mode, get_args(LossScope)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value}")
        if mode == "loss_free" and biases is None:
            raise ValueError("balancing_mode loss_free needs biases to update; got none")
        self.mode = mode
        self.num_experts = num_experts
        self.scoring_func = scoring_func
        self.router_aux_loss_coef = router_aux_loss_coef
        self.router_z_loss_coef = router_z_loss_coef
        self.load_estimate = load_estimate
        self.bias_update_rate = bias_update_rate
        self.bias_update_rule = bias_update_rule
        self.complementary_balancing_mode = complementary_balancing_mode
        self.complementary_aux_loss_coef = complementary_aux_loss_coef
        self.synchronizer = LoadCountSynchronizer(process_group)
        self._biases = biases
        self._unsynchronised: LoadCounts | None = None
        """This rank's counts since the last optimizer step, where no loss needs the others' before it."""
        self._max_vio_micro: Tensor | float = 0.0
        self._micro_batches = 0
        self._metrics: dict[str, Tensor] = {}

    def scoped_losses(self) -> list[tuple[str, str, float]]:
        """The load-balancing losses that act: (name of the term, scope, coefficient)."""
        losses = [
            ("load_balancing_loss", self.mode, self.router_aux_loss_coef),
            ("complementary_loss", self.complementary_balancing_mode, self.complementary_aux_loss_coef),
        ]
        return [loss for loss in losses if loss[1] not in ("none", "loss_free") and loss[2] > 0]

    @torch.compiler.disable
    def observe(
        self,
        router_logits: Sequence[Tensor],
        selected_experts: Sequence[Tensor],
        *,
        batch_size: int,
        mask: Tensor | None = None,
        num_labels: Tensor | int = 0,
    ) -> Observation:
        """Count the load of a micro-batch, and launch its all-reduce if a loss needs the other ranks' counts.

        Args:
            router_logits: one `[N, E]` per MoE layer, with gradient.
            selected_experts: one int64 `[N, K]` per MoE layer.
            batch_size: `B`.
            mask: boolean `[B, T]`, true for tokens; `None` counts every position.
            num_labels: how many positions of the micro-batch bear loss.
        """
        device = selected_experts[0].device
        with torch.no_grad():
            labels = torch.as_tensor(num_labels, dtype=torch.long, device=device)
            counts = count_load(selected_experts, self.num_experts, mask, batch_size, labels)
            self._max_vio_micro = self._max_vio_micro + max_vio(counts.load)
            self._micro_batches += 1
        pending = None
        if self.scoped_losses() or self.router_z_loss_coef > 0:
            pending = self.synchronizer.start(counts)
        else:
            self._unsynchronised = counts if self._unsynchronised is None else self._unsynchronised + counts
        return Observation(router_logits, selected_experts, mask, batch_size, counts, pending)

    @torch.compiler.disable
    def loss(self, observed: Observation, num_items_in_batch: Tensor | int | None = None) -> BalancingLoss:
        """The balancing loss of a micro-batch, scaled for the loop that will back-propagate it.

        With `T_m` the tokens of this micro-batch and `T_sync`, `labels_sync` those of the micro-step over all ranks:

        - A loop that averages the loss over ranks and divides it by the accumulation steps (a plain Accelerate loop)
          passes no `num_items_in_batch`: the share is `R * T_m / T_sync`.
        - A loop that sums `cross-entropy sum / num_items_in_batch` over ranks and accumulation steps
          (`transformers.Trainer`, and `equipoise.training`) passes it: the share is
          `(T_m / T_sync) * (labels_sync / num_items_in_batch)`.

        Both are exact for one micro-step. For several, the first is where they hold equally many tokens, the second
        where they hold equally many tokens per label. The sequence loss counts sequences in the place of tokens.

        Args:
            observed: from `observe`.
            num_items_in_batch: positions that bear loss in the whole global batch.
        """
        logits = observed.router_logits
        like = logits[0]
        dtype = torch.promote_types(like.dtype, torch.float32)
        total = like.new_zeros((), dtype=dtype)
        if observed.pending is None:
            return BalancingLoss(total, {})
        step = self.synchronizer.wait(observed.pending)
        counts = observed.counts
        if num_items_in_batch is None:
            loop: Tensor | float = float(self.synchronizer.world_size)
        else:
            items = torch.as_tensor(num_items_in_batch, device=like.device).clamp(min=1)
            loop = step.labels.to(dtype) / items.to(dtype)
        token_share = loop * counts.tokens.to(dtype) / step.tokens.clamp(min=1).to(dtype)
        sequence_share = loop * counts.sequences.to(dtype) / step.sequences.clamp(min=1).to(dtype)

        terms: dict[str, Tensor] = {}
        for name, scope, coefficient in self.scoped_losses():
            term = self._mean_over_layers(observed, self._load_of(scope, counts, step))
            total = total + coefficient * (sequence_share if scope == "sequence" else token_share) * term
            terms[name] = term.detach()
        if self.router_z_loss_coef > 0:
            flat = None if observed.mask is None else observed.mask.reshape(-1)
            z_losses = [router_z_loss(layer, None if flat is None else flat.to(layer.device)) for layer in logits]
            term = torch.stack([z_loss.to(like.device) for z_loss in z_losses]).mean()
            total = total + self.router_z_loss_coef * token_share * term
            terms["router_z_loss"] = term.detach()
        return BalancingLoss(total, terms)

    def _load_of(self, scope: str, counts: LoadCounts, step: LoadCounts) -> Tensor | None:
        """The load `[L, E]` of a scope; `None` for `sequence`, where each sequence has its own.

        Args:
            scope: `micro_batch`, `sequence` or `global_batch`.
            counts: of this rank's micro-batch.
            step: of the micro-step, over all ranks.
        """
        if scope == "sequence":
            return None
        if scope == "micro_batch":
            return counts.load
        if self.load_estimate == "current":
            return step.load
        if self.load_estimate == "completed":
            return self.synchronizer.completed_load()
        assert self.synchronizer.running is not None
        return self.synchronizer.running.load

    def _mean_over_layers(self, observed: Observation, load: Tensor | None) -> Tensor:
        """The load-balancing loss against `load`, or of each sequence without one; each layer by itself and then
        averaged: never pooled over layers, where layers that collapse onto different experts would balance each
        other."""
        losses = []
        for layer, (logits, experts) in enumerate(zip(observed.router_logits, observed.selected_experts, strict=True)):
            mask = None if observed.mask is None else observed.mask.to(logits.device)
            scores = routing_scores(logits, self.scoring_func)
            if load is None:
                if mask is None:
                    mask = logits.new_ones(observed.batch_size, logits.shape[0] // observed.batch_size).bool()
                loss = sequence_load_balancing_loss(scores, experts, mask)
            else:
                mean_score = mean_scores(scores, None if mask is None else mask.reshape(-1))
                fraction = load_fraction(load[layer], scores.dtype).to(logits.device)
                loss = load_balancing_loss(fraction, mean_score)
            losses.append(loss.to(observed.router_logits[0].device))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def after_optimizer_step(self, *, skipped: bool = False) -> None:
        """Close the global batch: move the biases if the mode has them, keep the metrics, clear the counters.

        Every rank must call it once per optimizer step, after the last micro-batch.

        Args:
            skipped: the step was not made (a gradient scaler found an overflow): clear the counters, move nothing.
        """
        if self._unsynchronised is not None:
            self.synchronizer.wait(self.synchronizer.start(self._unsynchronised))
        counts = self.synchronizer.close(skipped=skipped)
        max_vio_micro = torch.as_tensor(self._max_vio_micro) / max(self._micro_batches, 1)
        self._max_vio_micro, self._micro_batches, self._unsynchronised = 0.0, 0, None
        if counts is None:
            return
        if self.mode == "loss_free" and self.bias_update_rate > 0:
            assert self._biases is not None
            rule = BIAS_UPDATE_RULES[self.bias_update_rule]
            for bias, load in zip(self._biases(), counts.load, strict=True):
                bias.copy_(rule(bias, load.to(bias.device), self.bias_update_rate))
        self._metrics = {"load": counts.load, "tokens": counts.tokens, "max_vio_micro": max_vio_micro}

    def metrics(self) -> dict[str, Tensor]:
        """The last global batch, per MoE layer; tensors, so nothing waits for the device until they are read.

        Returns:
            `load` int64 `[L, E]` and `tokens` (over all ranks); `max_vio_batch`, `load_entropy` (0 to 1) and
            `dead_experts` `[L]` of that load; `max_vio_micro` `[L]`, the mean over this rank's own micro-batches; with
            `loss_free`, `bias_range` `[L]`, largest minus smallest bias. Empty before the first optimizer step.
        """
        if not self._metrics:
            return {}
        load = self._metrics["load"]
        derived = {
            "max_vio_batch": max_vio(load),
            "load_entropy": load_entropy(load),
            "dead_experts": dead_experts(load),
        }
        if self.mode == "loss_free" and self._biases is not None:
            derived["bias_range"] = torch.stack([bias.max() - bias.min() for bias in self._biases()])
        return self._metrics | derived

    def state_dict(self) -> dict[str, Any]:
        """Counts of the global batch under way and of the previous one, packed. The biases are the model's and are
        saved with it; `max_vio_micro` begins anew."""
        counts = {
            "running": self.synchronizer.running,
            "previous": self.synchronizer.previous,
            "unsynchronised": self._unsynchronised,
        }
        return {name: None if value is None else value.pack() for name, value in counts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        counts = {
            name: None if packed is None else LoadCounts.unpack(packed, self.num_experts)
            for name, packed in state.items()
        }
        self.synchronizer.running = counts["running"]
        self.synchronizer.previous = counts["previous"]
        self._unsynchronised = counts["unsynchronised"]
