"""What a live view shows: a logged line's numbers, under names that trackers group into panels.

TensorBoard, trackio and others put what stands before the first `/` into one panel:

- `loss/lm_loss`, `loss/aux_loss`; `loss_by_domain/<domain>`;
- `balance/<measure>_mean` and `balance/<measure>_worst`, over layers; `<measure>_by_layer/<layer>`, each MoE layer;
- `optimization/`: learning rate, gradient norm, skipped steps; `pace/`: tokens per second and the like;
  `step_seconds/<phase>`.
"""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

PANEL_OF = {
    "lm_loss": "loss",
    "aux_loss": "loss",
    "load_balancing_loss": "loss",
    "complementary_loss": "loss",
    "router_z_loss": "loss",
    "learning_rate": "optimization",
    "grad_norm": "optimization",
    "skipped_steps": "optimization",
    "domain_loss": "loss_by_domain",
}
# The other measures of a layer are worst where they are largest.
WORST_WHERE_SMALLEST = ("load_entropy", "smallest_share")

# Charts of several lines, which TensorBoard shows under "Custom scalars"; tags are regular expressions.
TENSORBOARD_LAYOUT = {
    "Loss": {
        "Language-model loss by domain": ["Multiline", ["loss_by_domain/.*"]],
        "Language-model loss": ["Multiline", ["loss/lm_loss"]],
        "What balancing adds, and its terms without coefficients": ["Multiline", ["loss/(?!lm_loss).*"]],
    },
    "Balance by layer": {
        "MaxVio of the global batch": ["Multiline", ["max_vio_batch_by_layer/.*"]],
        "MaxVio of a micro-batch": ["Multiline", ["max_vio_micro_by_layer/.*"]],
        "Entropy of the load, 1 when even": ["Multiline", ["load_entropy_by_layer/.*"]],
        "Dead experts": ["Multiline", ["dead_experts_by_layer/.*"]],
        "Load-balancing loss of the global batch": ["Multiline", ["load_balancing_loss_batch_by_layer/.*"]],
        "Range of the selection biases": ["Multiline", ["bias_range_by_layer/.*"]],
    },
    "Balance": {
        "MaxVio, worst layer": ["Multiline", ["balance/max_vio_batch_worst", "balance/max_vio_micro_worst"]],
        "MaxVio, mean over layers": ["Multiline", ["balance/max_vio_batch_mean", "balance/max_vio_micro_mean"]],
    },
    "Pace": {"Seconds of a step by phase": ["Multiline", ["step_seconds/.*"]]},
}


def check_trackers(names: list[str]) -> None:
    """
    Raises:
        ValueError: Accelerate knows no such tracker; or its package is missing, and Accelerate would leave it out
            without a word.
    """
    installed = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in installed:
            raise ValueError(
                f"trackers must be among those that Accelerate finds installed ({', '.join(installed) or 'none'}); "
                f"got {name}"
            )


def start_trackers(accelerator: Accelerator, settings: dict[str, Any]) -> None:
    """Start the trackers that the Accelerator was made with, with the run's settings and TensorBoard's charts.

    Args:
        settings: all of the run's, `output_dir` among them.
    """
    scalars = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
    # By itself trackio would give a run that is resumed another name each time.
    names = {"trackio": {"name": Path(settings["output_dir"]).resolve().name, "resume": "allow"}}
    accelerator.init_trackers("equipoise", config=scalars, init_kwargs=names)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard" and accelerator.is_main_process:
            tracker.writer.add_custom_scalars(TENSORBOARD_LAYOUT)


def panels(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of `metrics.jsonl`, by the names above; what is missing (`None`) is left out."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            panel = PANEL_OF.get(name, name)
            numbers |= {f"{panel}/{key}": float(number) for key, number in value.items() if number is not None}
        elif isinstance(value, list):
            numbers |= {f"{name}_by_layer/{layer}": float(number) for layer, number in enumerate(value)}
            numbers[f"balance/{name}_mean"] = sum(value) / len(value)
            numbers[f"balance/{name}_worst"] = float(min(value) if name in WORST_WHERE_SMALLEST else max(value))
        elif value is not None:
            panel = "balance" if name.startswith("expert_parallel_slowdown") else PANEL_OF.get(name, "pace")
            numbers[f"{panel}/{name}"] = float(value)
    return numbers


__all__ = ["check_trackers", "panels", "start_trackers"]
