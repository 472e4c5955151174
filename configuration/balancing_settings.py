"""BalancingSettings: how the load of the experts is balanced, in a model's configuration or by itself."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

BalancingMode = Literal["none", "micro_batch", "sequence", "global_batch", "loss_free"]
LossScope = Literal["none", "micro_batch", "sequence", "global_batch"]
LoadEstimate = Literal["current", "running", "completed", "exact"]
BiasUpdateRule = Literal["sign", "centred_sign", "proportional", "tanh_momentum", "quantile"]
BalancedPositions = Literal["tokens", "labels"]


# repr: a configuration that holds these fields prints all of its own.
@dataclass(kw_only=True, repr=False)
class BalancingFields:
    """The fields of balancing, shared by [`BalancingSettings`] and [`MoEConfig`]; `docs/balancing.md` has the
    equations and what was measured."""

    balancing_mode: BalancingMode = "global_batch"
    """Over what the load is balanced: `none`; a loss over each `micro_batch`, each `sequence`, or the
    `global_batch` (arXiv 2501.11873); or `loss_free`, a bias on the selection (arXiv 2408.15664)."""
    router_aux_loss_coef: float | int = 0.01
    """Coefficient of the load-balancing loss of `balancing_mode`. It means the same under any world size,
    accumulation, number of experts, of layers, and padding."""
    router_z_loss_coef: float | int = 0.0
    """Coefficient of the router z-loss (ST-MoE, arXiv 2202.08906), in any mode."""
    load_estimate: LoadEstimate = "completed"
    """Which load stands for the global batch's while it is being accumulated: `current`, the synchronised counts of
    this micro-step; `running`, those of all micro-steps since the last optimizer step (the paper's buffer);
    `completed`, these and the previous global batch's load for the part not yet seen (closest to `exact`, as
    measured); `exact`, the whole batch's own, counted beforehand by `Balancer.prepass`."""
    balanced_positions: BalancedPositions = "tokens"
    """Which positions are counted and balanced: all `tokens`, or only those that bear loss, the `labels`."""
    bias_update_rule: BiasUpdateRule = "sign"
    """How `loss_free` moves the bias: `sign` (arXiv 2408.15664), `centred_sign`, `proportional`, `tanh_momentum`
    (SMEBU, arXiv 2602.17004) or `quantile` (not with `n_group` above 1)."""
    bias_update_rate: float | int | None = None
    """How far `loss_free` moves a bias at each optimizer step, in units of the score; for `quantile` the share, at
    most 1, of the way to the quantile. `None` takes the rule's own: 0.001 for `sign`, `centred_sign` and
    `tanh_momentum`, 0.01 for `proportional`, 0.2 for `quantile`. 0 leaves the biases where they are."""
    bias_update_rate_decay: float | int = 1.0
    """Factor on `bias_update_rate` after each optimizer step; 1 keeps it constant."""
    bias_update_kappa: float | int = 2.0
    """How sharply `tanh_momentum` clamps the step: `tanh(kappa * shortfall / mean load)`."""
    bias_update_momentum: float | int = 0.5
    """How much of its last step `tanh_momentum` keeps."""
    complementary_balancing_mode: LossScope = "none"
    """A second load-balancing loss beside `balancing_mode`: a little micro-batch beside the global batch, or a little
    sequence beside the bias."""
    complementary_aux_loss_coef: float | int = 1e-4
    """Coefficient of the complementary load-balancing loss."""
    balancing_schedule: list[dict[str, Any]] | None = None
    """Changes during training, in order: `[{step: 1000, balancing_mode: global_batch}, {tokens: 2000000000,
    bias_update_rate: 0}]`. Each acts once that many optimizer steps have been made, or that many tokens routed, and
    the changes before it have acted."""

    def validate_balancing(self):
        """Raises ValueError, naming the field, for values that cannot be."""
        for name in (
            "router_aux_loss_coef",
            "router_z_loss_coef",
            "bias_update_rate",
            "bias_update_kappa",
            "complementary_aux_loss_coef",
        ):
            value = getattr(self, name)
            if name == "bias_update_rate" and value is None:
                continue
            # Written so that NaN is refused too.
            if not _is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite; got {value}")
        decay, momentum = self.bias_update_rate_decay, self.bias_update_momentum
        if not _is_number(decay) or not 0 <= decay <= 1:
            raise ValueError(f"bias_update_rate_decay must be between 0 and 1; got {decay}")
        if not _is_number(momentum) or not 0 <= momentum < 1:
            raise ValueError(f"bias_update_momentum must be at least 0 and below 1; got {momentum}")
        if self.bias_update_rule == "quantile" and (self.bias_update_rate or 0) > 1:
            raise ValueError(f"bias_update_rate must be at most 1 with the quantile rule; got {self.bias_update_rate}")
        if self.complementary_balancing_mode != "none" and self.complementary_balancing_mode == self.balancing_mode:
            raise ValueError(
                f"complementary_balancing_mode must differ from balancing_mode ({self.balancing_mode}); "
                f"got {self.complementary_balancing_mode}"
            )
        if self.balancing_schedule:
            _check_schedule(self.balancing_schedule)
            settings = BalancingSettings.of(self, balancing_schedule=None)
            for change in self.balancing_schedule:
                settings = settings.changed(change)  # checks each stage as it will be


SCHEDULABLE = (
    "balancing_mode",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "load_estimate",
    "bias_update_rate",
    "complementary_balancing_mode",
    "complementary_aux_loss_coef",
)
"""What `balancing_schedule` may change."""


@dataclass(kw_only=True)
class BalancingSettings(BalancingFields):
    """Settings of balancing by themselves.

    Raises:
        ValueError: a value that cannot be; the message names the field, what it must be and what it got.
    """

    def __post_init__(self) -> None:
        for name, known in (
            ("balancing_mode", BalancingMode),
            ("load_estimate", LoadEstimate),
            ("balanced_positions", BalancedPositions),
            ("bias_update_rule", BiasUpdateRule),
            ("complementary_balancing_mode", LossScope),
        ):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}; got {getattr(self, name)}")
        self.validate_balancing()

    @classmethod
    def of(cls, holder: BalancingFields, **changes: Any) -> "BalancingSettings":
        """The settings that a configuration holds, with changes by keyword."""
        return cls(**{field.name: getattr(holder, field.name) for field in fields(BalancingFields)} | changes)

    def changed(self, change: Mapping[str, Any]) -> "BalancingSettings":
        """These settings with one change of a schedule, checked."""
        values = {name: value for name, value in change.items() if name in SCHEDULABLE}
        return replace(self, **values, balancing_schedule=None)

    def at(self, steps: int, tokens: int) -> "BalancingSettings":
        """The settings after so many optimizer steps and routed tokens, by the schedule."""
        settings = self
        for change in self.balancing_schedule or []:
            if steps < change.get("step", 0) or tokens < change.get("tokens", 0):
                break  # a change waits for the one before it: so every state there can be has been checked
            settings = settings.changed(change)
        return settings


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_schedule(schedule: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError unless each change says when and what, in ascending order."""
    reached: dict[str, float] = {"step": 0, "tokens": 0}
    for position, change in enumerate(schedule):
        where = f"balancing_schedule[{position}]"
        if not isinstance(change, Mapping) or ("step" in change) == ("tokens" in change):
            raise ValueError(f"{where} must be a mapping with either step or tokens; got {change}")
        when = "step" if "step" in change else "tokens"
        value = change[when]
        if not _is_number(value) or not reached[when] <= value < math.inf or value != int(value):
            raise ValueError(f"{where}.{when} must be a whole number of at least {reached[when]}; got {value}")
        reached[when] = value
        for name in change:
            if name != when and name not in SCHEDULABLE:
                raise ValueError(f"{where} may change {', '.join(SCHEDULABLE)}; got {name}")
