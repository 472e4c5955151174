"""What a model card tells of a run, read from its directory and held against a form."""

import filecmp
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .reading import check_fields, read_mapping

PICTURES = ("training.png", "load.png", "specialisation.png")

_NUMBER = (int, float)
_SPECIALISATION = {
    "mutual_information_bits": _NUMBER,
    "mutual_information_normalised": _NUMBER,
    "null_mean_bits": _NUMBER,
    "null_quantile_95_bits": _NUMBER,
    "p_value": _NUMBER,
}
# What a card tells of each record, and how it finds it there (see `check_fields`).
_FORMS: dict[str, Any] = {
    "settings.yaml": {
        "block_size": int,
        "global_batch_size?": int,
        "micro_batch_size": int,
        "micro_batch_domains": str,
        "adam_beta1": _NUMBER,
        "adam_beta2": _NUMBER,
        "weight_decay": _NUMBER,
        "max_grad_norm": _NUMBER,
        "learning_rate": _NUMBER,
        "learning_rate_schedule": str,
        "min_learning_rate_ratio": _NUMBER,
        "warmup_steps": int,
        "mixed_precision": str,
        "seed": int,
    },
    "data.json": {
        "*": {
            "source": {"hub?": str, "data_files?": [str]},
            "weight?": _NUMBER,
            "documents?": int,
            "bytes?": int,
            "held_out_documents?": int,
            "held_out_bytes?": int,
        }
    },
    "training.json": {
        "world_size": int,
        "gradient_accumulation_steps": int,
        "domains": list,
        "epochs?": {"*": _NUMBER},
        "steps": int,
        "skipped_steps?": int,
        "tokens": int,
        "seconds": _NUMBER,
        "tokens_per_second": _NUMBER,
        "lm_loss_start?": _NUMBER,
        "lm_loss_end?": _NUMBER,
        "max_vio_batch?": [_NUMBER],
        "max_vio_micro?": [_NUMBER],
        "device": str,
        "versions?": dict,
    },
    "evaluation.json": {
        "domains": {
            "*": {"bits_per_byte": _NUMBER, "perplexity": _NUMBER, "num_tokens": int, "num_bytes": int},
        },
        "settings": {"model": str, "data?": str, "block_size": int},
    },
    "analysis/analysis.json": {
        "layers": [
            {"layer": int, "max_vio_global": _NUMBER, "dead_experts": int, "load_entropy": _NUMBER, **_SPECIALISATION}
        ],
        "mean_over_layers": _SPECIALISATION,
        "settings": {"model": str, "data?": str, "permutations": int},
    },
}


@dataclass
class RunRecords:
    """What a run directory holds about its run; a part that is not there is empty."""

    settings: dict[str, Any] = field(default_factory=dict)
    """`settings.yaml`"""
    data: dict[str, Any] = field(default_factory=dict)
    """`data.json`: domain -> source, weight, documents, bytes"""
    training: dict[str, Any] = field(default_factory=dict)
    """`training.json`"""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """`evaluation.json`, if it is of this run's model and held-out documents"""
    other_evaluation: bool = False
    """Whether there is one that is not."""
    analysis: dict[str, Any] = field(default_factory=dict)
    """`analysis/analysis.json`, likewise"""
    other_analysis: bool = False
    """Whether there is one that is not."""
    pictures: tuple[Path, ...] = ()
    """Those of `analysis/` that a card shows."""

    @classmethod
    def read(cls, run: Path) -> "RunRecords":
        """
        Raises:
            ValueError: a file cannot be read, or lacks a field that a card needs.
        """
        evaluation, analysis = _read(run, "evaluation.json"), _read(run, "analysis/analysis.json")
        own_evaluation = bool(evaluation) and _measured(run, evaluation["settings"])
        own_analysis = bool(analysis) and _measured(run, analysis["settings"])
        pictures = [run / "analysis" / name for name in PICTURES]
        return cls(
            settings=_read(run, "settings.yaml"),
            data=_read(run, "data.json"),
            training=_read(run, "training.json"),
            evaluation=evaluation if own_evaluation else {},
            other_evaluation=bool(evaluation) and not own_evaluation,
            analysis=analysis if own_analysis else {},
            other_analysis=bool(analysis) and not own_analysis,
            pictures=tuple(picture for picture in pictures if own_analysis and picture.is_file()),
        )


def _read(run: Path, name: str) -> dict[str, Any]:
    """A record of the run, that holds what a card tells of it; an empty one where there is none."""
    file = run / name
    if not file.is_file():
        return {}
    record = read_mapping(file)
    check_fields(record, _FORMS[name], str(file))
    return record


def _measured(run: Path, settings: dict[str, Any]) -> bool:
    """Whether these settings of an evaluation or an analysis name the run's own model and held-out documents."""
    if settings.get("data") is None:
        return False
    model, data = Path(settings["model"]), Path(settings["data"])
    if (model.name, data.name) != ("model", "validation.parquet"):
        return False
    together = model.parent == data.parent
    if not model.parent.exists():  # the run was moved since, or was measured from another directory
        return together
    # Runs that are measured together may share documents, which are recorded as those of the first.
    own = run / data.name
    same = together or (data.is_file() and own.is_file() and filecmp.cmp(data, own))
    return same and model.parent.samefile(run)
