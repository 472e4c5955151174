"""What a run writes about itself beside the metrics: the last page, and numbers as trackers take them."""

import json
from importlib.metadata import version
from typing import Any

from .prepare import Prepared


def versions() -> dict[str, str]:
    """Of what decides over a run's numbers."""
    return {name: version(name) for name in ("equipoise", "torch", "transformers", "accelerate")}


def summary(prepared: Prepared, step: int, tokens: int, seconds: float, skipped_steps: int) -> dict[str, Any]:
    """`training.json`: what a finished run was, and cost.

    Args:
        seconds: of training, over all launches.
    """
    lines = (prepared.run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [record for record in map(json.loads, lines) if "lm_loss" in record]
    first, last = (logged[0], logged[-1]) if logged else ({}, {})
    return {
        "world_size": prepared.accelerator.num_processes,
        "gradient_accumulation_steps": prepared.accumulation,
        "balancing_mode": prepared.config.balancing_mode,
        "parameters": prepared.parameters,
        "domains": prepared.packed.domains,
        "epochs": prepared.batches.epochs(step),
        "steps": step,
        "skipped_steps": skipped_steps,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "lm_loss_start": first.get("lm_loss"),
        "lm_loss_end": last.get("lm_loss"),
        "max_vio_batch": last.get("max_vio_batch"),
        "max_vio_micro": last.get("max_vio_micro"),
        "device": str(prepared.accelerator.device),
        "versions": versions(),
    }


def flat(record: dict[str, Any]) -> dict[str, float]:
    """A record's numbers under flat names, lists and mappings spread out: `max_vio_batch/0`, `domain_loss/code`."""
    numbers: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            numbers |= flat({f"{name}/{inner}": number for inner, number in value.items()})
        elif isinstance(value, list):
            numbers |= flat({f"{name}/{index}": number for index, number in enumerate(value)})
        elif isinstance(value, int | float):
            numbers[name] = float(value)
    return numbers


__all__ = ["flat", "summary", "versions"]
