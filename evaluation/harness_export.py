"""Tasks for lm-evaluation-harness: the same items, prompts and scores, in a folder for its `--include_path`.

What is exported are items, shots and all, and not templates: the harness draws shots in ways of its own, and a
continuation task has no data set. A task of several domains becomes a group of one task each.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..data import write_whole
from . import harness_tasks
from .items import Item, candidate_program
from .scoring import METRICS_FOLDER
from .tasks import Task

PREFIX = "equipoise_"
"""Before a task's name: the harness has tasks of its own called so."""
# metric -> the metrics that the harness reports, the first for the group too
_HARNESS_METRICS = {
    "multiple_choice": ("acc", "acc_bytes"),
    "exact_match": ("exact_match",),
    "pass_at_k": ("pass_at_1",),
    "reasoning_gym": ("score",),
}
_COMPLETION = "\x00completion\x00"


def export_to_harness(tasks: Sequence[tuple[Task, Sequence[Item]]], folder: str | Path) -> list[str]:
    """Writes tasks of a plan for lm-evaluation-harness 0.4.13.

    Run them with `lm_eval run --include_path FOLDER --tasks equipoise_NAME --model hf`, and among the `--model_args`
    `add_bos_token=True`, since contexts begin with the bos token here, and `trust_remote_code=True` for a model whose
    code lies beside its weights.

    `acc` is our `accuracy` and `acc_bytes` our `accuracy_per_byte`, but that a tie counts for the first choice there;
    what is generated is scored by our own metrics, of which the folder holds a copy. Scores agree where no token
    reaches over the end of a context (see `requests`) and no context is cut off.

    Args:
        folder: New or empty.

    Returns:
        The harness's names of the tasks.

    Raises:
        ValueError: `folder` holds something, or a program cannot be put together from what stands before and after
            the completion.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"export_lm_eval must be a folder that does not exist or is empty; got {folder}")

    def write(temporary: Path) -> None:
        temporary.mkdir(parents=True)
        shutil.copy(str(harness_tasks.__file__), temporary / "harness_tasks.py")
        for metric in {task.metric for task, _ in tasks} & {"exact_match", "pass_at_k"}:
            shutil.copytree(
                METRICS_FOLDER / metric,
                temporary / "metrics" / metric,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        for task, items in tasks:
            _write_task(temporary, task, items)

    write_whole(folder, write)
    return [PREFIX + task.name for task, _ in tasks]


def _write_task(folder: Path, task: Task, items: Sequence[Item]) -> None:
    name = PREFIX + task.name
    by_domain: dict[str, list[Item]] = {}
    for item in items:
        by_domain.setdefault(item.domain, []).append(item)
    if len(by_domain) == 1:
        _write_domain(folder, task, name, items)
        return
    parts = {domain: f"{name}_{re.sub(r'[^0-9A-Za-z_.-]', '_', domain)}" for domain in by_domain}
    for domain, of_domain in by_domain.items():
        _write_domain(folder, task, parts[domain], of_domain)
    group = {
        "group": name,
        "task": list(parts.values()),
        "aggregate_metric_list": [
            {"metric": metric, "aggregation": "mean", "weight_by_size": True}
            for metric in _HARNESS_METRICS[task.metric]
        ],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(group, sort_keys=False), encoding="utf-8")


def _write_domain(folder: Path, task: Task, name: str, items: Sequence[Item]) -> None:
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps({"context": item.context, **_row(task, item)}, ensure_ascii=False) + "\n")
    described: dict[str, Any] = {
        "task": name,
        "test_split": "test",
        "doc_to_text": "context",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in _HARNESS_METRICS[task.metric]
        ],
        "metadata": {"version": 1, "file": f"{name}.jsonl"},
    }
    functions = {"custom_dataset": "load"}
    if task.generates:
        described |= {
            "output_type": "generate_until",
            "doc_to_target": "reference",
            "generation_kwargs": {
                "until": list(task.stop),
                "max_gen_toks": task.max_new_tokens,
                "do_sample": False,
            },
        }
        functions["process_results"] = task.metric
        if task.metric == "pass_at_k":
            described["unsafe_code"] = True
    else:
        described |= {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": items[0].delimiter,
        }
    text = yaml.safe_dump(described, sort_keys=False, allow_unicode=True)
    # The harness's own tag, which names a function of a file beside this one.
    text += "".join(f"{field}: !function harness_tasks.{function}\n" for field, function in functions.items())
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def _row(task: Task, item: Item) -> dict[str, Any]:
    if task.metric == "multiple_choice":
        return {"choices": list(item.choices), "answer": item.answer}
    row: dict[str, Any] = {"reference": item.reference}
    if task.metric == "exact_match":
        options = {"numeric": task.numeric, "regex": task.regex, "ignore_case": task.ignore_case}
        return row | {"options": json.dumps(options)}
    if task.metric == "reasoning_gym":
        assert task.entry is not None
        return row | {"entry": json.dumps(task.entry(item.row))}
    parts = candidate_program(task, item, _COMPLETION).split(_COMPLETION)
    if len(parts) != 2:
        raise ValueError(
            f"{task.name}: candidate must hold completion once, as it is, to be exported; got it "
            f"{len(parts) - 1} times"
        )
    return row | {"before": parts[0], "after": parts[1]}
