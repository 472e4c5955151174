"""Balancer: a balancing mode made of counts, synchronisation, losses and bias updates.

`B` sequences, `T` positions, `N = B*T` tokens, `L` MoE layers, `E` experts, `K` experts per token, `R` ranks.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..configuration.balancing_settings import BalancingMode, BalancingSettings
from ..configuration.configuration_moe import ScoringFunction
from .bias_updates import (
    BiasUpdate,
    CentredSignUpdate,
    ProportionalUpdate,
    SignUpdate,
    TanhMomentumUpdate,
)
from .imbalance import (
    check_expert_parallel_sizes,
    dead_experts,
    expert_parallel_slowdown,
    load_cv,
    load_entropy,
    max_vio,
)
from .load import LoadCounts, count_selections, load_fraction, to_fixed_point
from .losses import (
    load_balancing_loss,
    mean_scores,
    router_scores,
    router_z_loss,
    routing_scores,
    sequence_load_balancing_loss,
)
from .quantile import QuantileUpdate
from .synchronizer import LoadCountSynchronizer, PendingCounts


@dataclass
class Observation:
    """The routing of one micro-batch, between `Balancer.observe` and `Balancer.loss`."""

    router_logits: Tensor
    """`[L, N, E]`, with gradient where the router is trained."""
    selected_experts: Tensor
    """int64 `[L, N, K]`."""
    scores: Tensor
    """`[L, N, E]`, each row summing to 1."""
    mean_score: Tensor
    """`P`, `[L, E]`."""
    mask: Tensor
    """Boolean `[B, T]`."""
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

    In the forward pass: `observe` when the last layer has routed, `loss` after the language-model loss. Each optimizer
    step closes a global batch. It holds integer counts and no parameter, and it is no module: nothing in it is
    broadcast, cast or saved with the weights.

    **Steps.** Given the model's `parameters`, it learns of a step from torch, which tells of every optimizer's, and
    closes the batch when the optimizer is one that holds some of them; a fused one that a gradient scaler calls in
    vain says so itself. Where torch hears nothing the loop must call `after_optimizer_step`: under DeepSpeed, whose
    optimizers hold copies; and when a gradient scaler passes over an unfused optimizer, without which the counts of
    the skipped batch merge into the next one's. Calling it besides changes nothing: the batch is closed already.

    **Scale.** A coefficient means the same under any accumulation, world size, `K`, `E`, `L` and padding: the terms
    of micro-batch `m` are weighted by `T_m / T`, its share of the global batch's tokens (the sequence loss by its
    share of the sequences), in the convention of the loop that calls. `loss` says where that is exact.

    Args:
        balancing_mode: `none`; `micro_batch`, `sequence` or `global_batch` (a loss over that scope); `loss_free` (a
            bias).
        num_experts: `E`.
        scoring_func: the router's own, `softmax` or `sigmoid`.
        biases: returns the routers' selection biases, fp32 `[E]` each, in layer order. Asked anew each time: moving a
            module to another device replaces its buffers.
        trained: returns whether each layer's router is being trained, in layer order. A frozen router gets no
            balancing gradient and its bias does not move. `None`: all are.
        parameters: returns the parameters of the model, by which its optimizers are known. `None`: the loop tells of
            each step.
        process_group: the data-parallel group; `None` is the default group.
        expert_parallel_sizes: sizes of simulated expert-parallel groups, each a divisor of `E`, whose slowdown
            `metrics` then gives.
        **settings: the other fields of `BalancingSettings`.

    Raises:
        ValueError: a setting that cannot be, or `loss_free` without `biases`.
    """

    def __init__(
        self,
        balancing_mode: BalancingMode = "global_batch",
        *,
        num_experts: int,
        scoring_func: ScoringFunction = "softmax",
        biases: Callable[[], Sequence[Tensor]] | None = None,
        trained: Callable[[], Sequence[bool]] | None = None,
        parameters: Callable[[], Iterable[Tensor]] | None = None,
        process_group: dist.ProcessGroup | None = None,
        expert_parallel_sizes: Sequence[int] = (),
        **settings: Any,
    ) -> None:
        check_expert_parallel_sizes(expert_parallel_sizes, num_experts)
        self._initial_settings = BalancingSettings(balancing_mode=balancing_mode, **settings)
        self.settings = self._initial_settings.at(steps=0, tokens=0)
        """The settings now in force; `balancing_schedule` changes them at the end of a step."""
        modes = [change.get("balancing_mode") for change in self._initial_settings.balancing_schedule or []]
        if "loss_free" in [balancing_mode, *modes] and biases is None:
            raise ValueError("balancing_mode loss_free needs biases to update; got none")
        self.num_experts = num_experts
        self.scoring_func = scoring_func
        self.expert_parallel_sizes = expert_parallel_sizes
        self.synchronizer = LoadCountSynchronizer(process_group)
        self.in_prepass = False
        """Whether forward passes are being counted for `load_estimate: exact`, and nothing else."""
        self.steps = 0
        """Optimizer steps made."""
        self._biases = biases
        self._trained = trained
        self._parameters = parameters
        self._bias_update = self._make_bias_update()
        self._whole: LoadCounts | None = None
        """Counts of the whole global batch under way, from the pre-pass."""
        self._unsynchronised: LoadCounts | None = None
        """This rank's counts since the last optimizer step, where no loss needs the others' before it."""
        self._has_gradient, self._back_propagated = False, False
        """Whether a loss of this global batch has a gradient, and whether any took part in a backward pass."""
        self._tokens: Tensor | None = None
        """Tokens routed in all optimizer steps made."""
        self._max_vio_trend: Tensor | None = None
        """`[2, L]`: MaxVio, as running means over about 10 and about 100 global batches."""

    def _make_bias_update(self) -> BiasUpdate:
        settings = self._initial_settings
        match settings.bias_update_rule:
            case "sign":
                return SignUpdate()
            case "centred_sign":
                return CentredSignUpdate()
            case "proportional":
                return ProportionalUpdate()
            case "tanh_momentum":
                return TanhMomentumUpdate(settings.bias_update_kappa, settings.bias_update_momentum)
            case "quantile":
                return QuantileUpdate()

    @property
    def bias_update_rate(self) -> float:
        """The rate of the next bias update: the setting, or the rule's own, decayed by the steps made."""
        rate = self.settings.bias_update_rate
        rate = self._bias_update.default_rate if rate is None else rate
        return rate * self.settings.bias_update_rate_decay**self.steps

    def _scoped_losses(self) -> list[tuple[str, str, float]]:
        """The load-balancing losses that act: (name of the term, scope, coefficient)."""
        now = self.settings
        losses = [
            ("load_balancing_loss", str(now.balancing_mode), now.router_aux_loss_coef),
            ("complementary_loss", str(now.complementary_balancing_mode), now.complementary_aux_loss_coef),
        ]
        return [loss for loss in losses if loss[1] not in ("none", "loss_free") and loss[2] > 0]

    def _moves_biases(self) -> bool:
        return self.settings.balancing_mode == "loss_free" and self.bias_update_rate > 0

    def _has_loss(self) -> bool:
        return bool(self._scoped_losses()) or self.settings.router_z_loss_coef > 0

    @contextmanager
    def prepass(self) -> Iterator[None]:
        """Count the load of the whole global batch before any of it is trained on, for `load_estimate: exact`.

        Inside, put each of this rank's micro-batches of the coming optimizer step through the model, once and in
        training mode; gradients are off, nothing else is counted and nothing added to a loss. At the end the counts
        are summed over the ranks, so every rank must leave the block, having put in at least one micro-batch. It costs
        a second forward pass: for study, and for tests. Dropout draws anew, so with dropout it is not exact.

        Raises:
            RuntimeError: inside another pre-pass, or no micro-batch was put in.
        """
        if self.in_prepass:
            raise RuntimeError("prepass must not be inside another prepass")
        self._whole, self.in_prepass = None, True
        try:
            with torch.no_grad():
                yield
        except BaseException:
            self._whole = None
            raise
        finally:
            self.in_prepass = False
        if self._whole is None:
            raise RuntimeError("prepass must see at least one micro-batch of the model in training; got none")
        counts = self._whole
        (packed,) = self.synchronizer.sum_over_ranks(counts.pack())
        self._whole = LoadCounts.unpack(packed, *counts.load.shape)

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
            mask: boolean `[B, T]`, true for the positions to count; `None` counts every position.
            num_labels: how many positions of the micro-batch bear loss.

        Raises:
            RuntimeError: `load_estimate` is `exact` and no pre-pass has counted this global batch.
        """
        self._require_prepass()
        device = selected_experts[0].device
        trained = [True] * len(router_logits) if self._trained is None else self._trained()
        logits = torch.stack(
            [
                (layer if learns else layer.detach()).to(device)
                for layer, learns in zip(router_logits, trained, strict=True)
            ]
        )
        experts = torch.stack([layer.to(device) for layer in selected_experts])
        tokens = None
        if mask is None:
            mask = torch.ones(batch_size, experts.shape[1] // max(batch_size, 1), dtype=torch.bool, device=device)
        else:
            mask = mask.to(device)
            tokens = mask.reshape(-1)
            # Whatever padding holds, even NaN, comes neither into a sum nor into a gradient.
            logits = torch.where(tokens[:, None], logits, 0.0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._has_loss()):
            scores = routing_scores(logits, self.scoring_func)
            mean_score = mean_scores(scores, tokens)
        with torch.no_grad():
            counts = self._count(experts, mean_score, mask, tokens, num_labels)
        observation = Observation(logits, experts, scores, mean_score, mask, counts, pending=None)
        if self.in_prepass:
            self._whole = counts if self._whole is None else self._whole + counts
            return observation
        _counting.add(self)
        if self._moves_biases() and self._bias_update.needs_scores:
            assert self._biases is not None
            with torch.no_grad():
                biases = torch.stack([bias.to(device) for bias in self._biases()])
                self._bias_update.observe(router_scores(logits, self.scoring_func), biases, experts.shape[-1], tokens)
        if self._has_loss() and self.settings.load_estimate != "exact":
            observation.pending = self.synchronizer.start(counts)
        else:
            self._unsynchronised = counts if self._unsynchronised is None else self._unsynchronised + counts
        return observation

    def _count(
        self, experts: Tensor, mean_score: Tensor, mask: Tensor, kept: Tensor | None, num_labels: Tensor | int
    ) -> LoadCounts:
        tokens = mask.sum()
        load = count_selections(experts, self.num_experts, kept)
        slowdowns = [expert_parallel_slowdown(load, size) for size in self.expert_parallel_sizes]
        return LoadCounts(
            load=load,
            score_sum=to_fixed_point(mean_score.double() * tokens),
            uneven=to_fixed_point(torch.stack([max_vio(load), *slowdowns], dim=-1)),
            tokens=tokens,
            labels=tokens.new_full((), num_labels) if isinstance(num_labels, int) else num_labels.to(tokens),
            sequences=mask.any(dim=-1).sum(),
            micro_batches=torch.ones_like(tokens),
        )

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
        where they hold equally many tokens per label. With `load_estimate: exact` the pre-pass has counted the `M`
        micro-batches and `T` tokens of all ranks, and the shares `M * T_m / T` and `T_m / T` are exact always. The
        sequence loss counts sequences in the place of tokens.

        Args:
            observed: from `observe`.
            num_items_in_batch: positions that bear loss in the whole global batch.
        """
        logits = observed.router_logits
        dtype = torch.promote_types(logits.dtype, torch.float32)
        total = logits.new_zeros((), dtype=dtype)
        if self.in_prepass or not self._has_loss():
            return BalancingLoss(total, {})
        counts = observed.counts
        if observed.pending is None:
            assert self._whole is not None
            step = self._whole.to(logits.device)
            loop = step.micro_batches.to(dtype) if num_items_in_batch is None else torch.ones_like(total)
        else:
            step = self.synchronizer.wait(observed.pending)
            if num_items_in_batch is None:
                loop = torch.full_like(total, self.synchronizer.world_size)
            else:
                if isinstance(num_items_in_batch, int):
                    items = torch.full_like(total, num_items_in_batch)
                else:
                    items = num_items_in_batch.to(total)
                loop = step.labels.to(dtype) / items.clamp(min=1)
        token_share = loop * counts.tokens.to(dtype) / step.tokens.clamp(min=1).to(dtype)
        sequence_share = loop * counts.sequences.to(dtype) / step.sequences.clamp(min=1).to(dtype)

        # Each layer has a loss of its own: pooled, layers that collapse onto different experts would look balanced.
        terms: dict[str, Tensor] = {}
        for name, scope, coefficient in self._scoped_losses():
            if scope == "sequence":
                layers = sequence_load_balancing_loss(observed.scores, observed.selected_experts, observed.mask)
            else:
                load = counts.load if scope == "micro_batch" else self._global_load(step)
                layers = load_balancing_loss(load_fraction(load, dtype), observed.mean_score)
            term = layers.mean()
            total = total + coefficient * (sequence_share if scope == "sequence" else token_share) * term
            terms[name] = term.detach()
        if self.settings.router_z_loss_coef > 0:
            term = router_z_loss(logits, observed.mask.reshape(-1)).mean()
            total = total + self.settings.router_z_loss_coef * token_share * term
            terms["router_z_loss"] = term.detach()
        if total.requires_grad:
            self._has_gradient = True
            total.register_hook(self._note_backward)
        return BalancingLoss(total, terms)

    def _note_backward(self, gradient: Tensor) -> None:
        self._back_propagated = True

    def _global_load(self, step: LoadCounts) -> Tensor:
        """The load `[L, E]` that stands for the global batch's.

        Args:
            step: counts of the micro-step over all ranks; under `exact`, of the whole global batch.
        """
        match self.settings.load_estimate:
            case "current" | "exact":
                return step.load
            case "completed":
                return self.synchronizer.completed_load()
            case "running":
                assert self.synchronizer.running is not None
                return self.synchronizer.running.load

    @torch.no_grad()
    def after_optimizer_step(self, *, skipped: bool | Tensor = False) -> None:
        """Close the global batch: move the biases if the mode has them, keep the metrics, clear the counters.

        Every rank must call it once per optimizer step, after the last micro-batch; where torch has told of the step
        (see the class) there is nothing left to do, and nothing is done.

        Args:
            skipped: the step was not made (a gradient scaler found an overflow): clear the counters, move nothing. A
                tensor is read, which waits for its device.
        """
        try:
            gathered = self._synchronise_rest()
            counts = self.synchronizer.close(skipped=bool(skipped))
            if counts is not None:
                self._check_prepass(counts)
                if self._moves_biases():
                    self._move_biases(counts.load, gathered)
                self._follow_trend(counts)
                self.steps += 1
                self._tokens = counts.tokens if self._tokens is None else self._tokens + counts.tokens
                self._follow_schedule()
        finally:
            self._bias_update.forget()
            self._unsynchronised, self._whole = None, None
            self._has_gradient, self._back_propagated = False, False
            _counting.discard(self)

    def _follow_step_of(self, optimizer: Optimizer) -> None:
        """Close the global batch if `optimizer`, which has just stepped, trains this model."""
        if self._parameters is None:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in held for parameter in self._parameters()):
            return
        if self._has_gradient and not self._back_propagated:
            warnings.warn(
                "the balancing loss took no part in the backward pass: something else than the model's own `loss` was "
                "minimised. Add the output's `aux_loss` to it (docs/fine_tuning.md says at what scale).",
                stacklevel=2,
            )
        found_inf = getattr(optimizer, "found_inf", None)
        self.after_optimizer_step(skipped=False if found_inf is None else found_inf)

    def _require_prepass(self) -> None:
        exact = self._has_loss() and self.settings.load_estimate == "exact"
        if exact and self._whole is None and not self.in_prepass:
            raise RuntimeError("load_estimate exact needs each global batch to go through Balancer.prepass first")

    def _check_prepass(self, counts: LoadCounts) -> None:
        if self._whole is not None and int(self._whole.tokens) != int(counts.tokens):
            raise RuntimeError(
                f"prepass must see the micro-batches of the optimizer step; it saw {int(self._whole.tokens)} tokens, "
                f"the step {int(counts.tokens)}"
            )

    def _synchronise_rest(self) -> Tensor | None:
        """Sum over the ranks, in one all-reduce, what no loss needed earlier; returns what the bias rule gathered."""
        gathered, counts = self._bias_update.gathered(), self._unsynchronised
        tensors = [tensor for tensor in (None if counts is None else counts.pack(), gathered) if tensor is not None]
        if not tensors:
            return None
        summed = self.synchronizer.sum_over_ranks(*tensors)
        if counts is not None:
            self.synchronizer.add(LoadCounts.unpack(summed[0], *counts.load.shape))
        return None if gathered is None else summed[-1]

    def _move_biases(self, load: Tensor, gathered: Tensor | None) -> None:
        assert self._biases is not None
        if self._bias_update.needs_scores and gathered is None:
            return  # resumed in the middle of a batch from another rule: it begins with the next
        biases = self._biases()
        stacked = torch.stack([bias.to(load.device) for bias in biases])
        moved = self._bias_update.update(stacked, load, self.bias_update_rate, gathered)
        trained = [True] * len(biases) if self._trained is None else self._trained()
        for bias, new, learns in zip(biases, moved, trained, strict=True):
            if learns:
                bias.copy_(new)

    def _follow_trend(self, counts: LoadCounts) -> None:
        vio = max_vio(counts.load)
        # Not a number until there is a load: a batch without tokens is no balance.
        nothing = torch.full_like(vio, torch.nan).expand(2, -1)
        before = nothing if self._max_vio_trend is None else self._max_vio_trend.to(vio.device)
        short, long = torch.where(before.isnan(), vio, before)
        moved = torch.stack([short.lerp(vio, 0.1), long.lerp(vio, 0.01)])
        self._max_vio_trend = torch.where(counts.tokens > 0, moved, before)

    def _follow_schedule(self) -> None:
        schedule = self._initial_settings.balancing_schedule
        if not schedule or self._tokens is None:
            return
        # A threshold in tokens is the one thing that makes every step wait for the device.
        tokens = int(self._tokens) if any("tokens" in change for change in schedule) else 0
        self.settings = self._initial_settings.at(self.steps, tokens)

    def metrics(self) -> dict[str, Tensor]:
        """The balance of the last global batch over all ranks: the same on each, with no communication; tensors, so
        nothing waits for the device until they are read.

        Returns:
            Empty before the first optimizer step; then, each `[L]` unless said otherwise:

            - `load` int64 `[L, E]`, and `tokens`, a scalar;
            - `load_balancing_loss_batch`: LBL of the whole global batch, whatever the mode. It is no measure of
              balance: below 1, experts that are selected often are scored low;
            - `max_vio_batch`; `max_vio_micro`, its mean over micro-batches; `load_cv`, the coefficient of variation;
              `load_entropy`, 0 to 1; `dead_experts`; `largest_share` and `smallest_share` of the selections;
            - `token_gerrymandering`, boolean: LBL is below 0.99 while MaxVio has grown, its mean over about 10 batches
              being a tenth above that over 100. The loss is then being lowered without balance;
            - `expert_parallel_slowdown_<n>`, a scalar for each of `expert_parallel_sizes`: `expert_parallel_slowdown`
              of the micro-batches, mean over them and the layers;
            - with `loss_free`, `bias_range`, largest minus smallest bias.
        """
        counts = self.synchronizer.previous
        if counts is None or self._max_vio_trend is None:
            return {}
        fraction = load_fraction(counts.load)
        lbl = load_balancing_loss(fraction.double(), counts.score_mean()).float()
        uneven = counts.uneven_mean().float()
        short, long = self._max_vio_trend.to(lbl.device)
        metrics = {
            "load": counts.load,
            "tokens": counts.tokens,
            "load_balancing_loss_batch": lbl,
            "max_vio_batch": max_vio(counts.load),
            "max_vio_micro": uneven[:, 0],
            "load_cv": load_cv(counts.load),
            "load_entropy": load_entropy(counts.load),
            "dead_experts": dead_experts(counts.load),
            "largest_share": fraction.amax(dim=-1),
            "smallest_share": fraction.amin(dim=-1),
            "token_gerrymandering": (lbl < 0.99) & (short > 1.1 * long),
        }
        # Not strict: counts of a run that was resumed with other sizes hold none of these.
        for size, slowdown in zip(self.expert_parallel_sizes, uneven[:, 1:].unbind(dim=-1), strict=False):
            metrics[f"expert_parallel_slowdown_{size}"] = slowdown.mean()
        if self.settings.balancing_mode == "loss_free" and self._biases is not None:
            metrics["bias_range"] = torch.stack([(bias.max() - bias.min()).to(lbl.device) for bias in self._biases()])
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on from here, in numbers and lists. The biases are the model's and are saved with it.

        It can be written as JSON; its keys depend on the bias rule alone, so that a distributed checkpoint, which
        loads what its destination names, loads all of it. Between optimizer steps it is the same on every rank, and
        one rank's serves any number of ranks; in the middle of accumulation each rank has its own.
        """
        counts = {
            "running": self.synchronizer.running,
            "previous": self.synchronizer.previous,
            "unsynchronised": self._unsynchronised,
            "whole": self._whole,
        }
        return {
            "num_layers": max((len(value.load) for value in counts.values() if value is not None), default=0),
            "counts": {name: None if value is None else value.pack().tolist() for name, value in counts.items()},
            "accumulated": self.synchronizer.accumulated,
            "expert_parallel_sizes": list(self.expert_parallel_sizes),
            "steps": self.steps,
            "tokens": 0 if self._tokens is None else int(self._tokens),
            "max_vio_trend": None if self._max_vio_trend is None else self._max_vio_trend.tolist(),
            "bias_update_rule": self._initial_settings.bias_update_rule,
            "bias_update": {
                name: None if value is None else value.tolist()
                for name, value in self._bias_update.state_dict().items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, also into a Balancer with other settings: a run may resume in another mode. The
        state of another bias rule is left out."""
        counts = {
            name: None
            if packed is None
            else LoadCounts.unpack(torch.tensor(packed), state["num_layers"], self.num_experts)
            for name, packed in state["counts"].items()
        }
        if state["expert_parallel_sizes"] != list(self.expert_parallel_sizes):
            for name, value in counts.items():
                if value is not None:  # MaxVio stays; the slowdown of other groups means nothing here
                    measures = 1 if name == "previous" else 1 + len(self.expert_parallel_sizes)
                    kept = value.uneven[:, :1]
                    value.uneven = torch.nn.functional.pad(kept, (0, measures - 1))
        self.synchronizer.running, self.synchronizer.previous = counts["running"], counts["previous"]
        self.synchronizer.accumulated = state["accumulated"]
        self._unsynchronised, self._whole = counts["unsynchronised"], counts["whole"]
        self.steps = state["steps"]
        self._tokens = torch.tensor(state["tokens"])
        trend = state["max_vio_trend"]
        self._max_vio_trend = None if trend is None else torch.tensor(trend)
        if state["bias_update_rule"] == self._initial_settings.bias_update_rule:
            # In float64, which holds whatever a rule keeps; a rule takes its own type again.
            saved = state["bias_update"].items()
            self._bias_update.load_state_dict(
                {name: None if value is None else torch.tensor(value, dtype=torch.float64) for name, value in saved}
            )
        self._follow_schedule()


_counting: WeakSet[Balancer] = WeakSet()
"""The balancers in the middle of a global batch."""


def _follow_step(optimizer: Optimizer, *_: Any) -> None:
    for balancer in tuple(_counting):
        balancer._follow_step_of(optimizer)


# One hook for all balancers, since a model never sees its optimizer. Every rank calls its optimizer at every step, so
# all close a batch together, which in some modes is a collective. What a step leaves behind would tell less: the
# version of a weight also changes when weights are loaded or swapped, and need not change on a rank that holds no
# shard of it, or is sent it by another.
register_optimizer_step_post_hook(_follow_step)
