"""What a run writes about itself beside the metrics: the last page, and its versions."""

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


__all__ = ["summary", "versions"]
