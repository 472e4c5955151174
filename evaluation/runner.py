"""An evaluation: what is asked is settled first, then each model is measured, then models are compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import write_json
from .comparison import Scores, compare, interval_record
from .continuations import continuation_items
from .items import Item, make_items
from .perplexity import ALL, DocumentMeasures, measure_documents
from .scoring import TaskResult, score_task, task_tokens
from .task_rows import load_rows
from .tasks import ItemSource, Shots, Task, find_task
from .templates import Template

CONTINUATION = Task(
    name="continuation",
    path=Path(),
    description="which of four texts goes on from a context, both from held-out documents",
    domain=Template(""),
    source=ItemSource(),
    columns=(),
    preamble=Template(""),
    prompt=Template(""),
    delimiter="",
    shots=Shots(),
    metric="multiple_choice",
    score="accuracy_per_byte",
)
"""The task that any corpus gives, made of held-out documents instead of a file."""


@dataclass(frozen=True)
class Plan:
    """What every model is asked."""

    documents: Dataset | None
    """Held-out text for bits per byte; None where there is none."""
    tasks: list[tuple[Task, list[Item]]]
    left_out: dict[str, str] = field(default_factory=dict)
    """Domain -> why it has no continuation items."""
    continuation_bytes: int = 0
    """Most bytes of a choice of `continuation`."""


@dataclass(frozen=True)
class ModelMeasures:
    """What one model did."""

    documents: DocumentMeasures | None
    tasks: dict[str, TaskResult]


def plan_evaluation(
    names: Sequence[str],
    documents: Dataset | None,
    *,
    data: Mapping[str, Path] | None = None,
    allow_code_execution: bool = False,
    limit: int | None = None,
    max_length: int | None = None,
    continuation_items_per_domain: int = 100,
    seed: int = 0,
) -> Plan:
    """Reads the tasks and makes their items.

    Args:
        names: Names of tasks, paths of task files, or `continuation`.
        documents: Held-out text, columns `text` and `domain`.
        data: Task name -> local rows instead of its source (see `load_rows`).
        allow_code_execution: Whether tasks may run programs that the model writes.
        limit: At most so many items of each task, drawn by `seed`.
        max_length: The fewest tokens that a model reads at once: a choice of `continuation` has 96 bytes, but at most
            half as many as that, so that whatever the tokenizer there is room for a context.
        continuation_items_per_domain: At most so many items of `continuation` in each domain.
        seed: Draws items and shots.

    Raises:
        ValueError: a task is not known or its file wrong, its rows cannot be had or do not suit it, it runs programs
            and must not, `continuation` is asked for without documents, or `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    data = dict(data or {})
    tasks: list[tuple[Task, list[Item]]] = []
    left_out: dict[str, str] = {}
    continuation_bytes = 96 if max_length is None else min(96, max(1, max_length // 2))
    read = [CONTINUATION if name == CONTINUATION.name else find_task(name) for name in dict.fromkeys(names)]
    if unknown := sorted(set(data) - {task.name for task in read if task is not CONTINUATION}):
        raise ValueError(f"task_data must name tasks that are asked; got {unknown[0]}")
    for task in read:
        if task.metric == "pass_at_k" and not allow_code_execution:
            raise ValueError(
                f"allow_code_execution must be given for the task {task.name}, which runs programs that the model "
                f"writes on this machine; got none"
            )
    for task in read:
        if task is CONTINUATION:
            if documents is None:
                raise ValueError("the task continuation must have held-out documents (--data); got none")
            items, left_out = continuation_items(
                documents,
                items_per_domain=continuation_items_per_domain,
                continuation_bytes=continuation_bytes,
                seed=seed,
            )
        else:
            items = make_items(task, *load_rows(task, data.get(task.name)), limit=limit, seed=seed)
        if items:
            tasks.append((task, items))
    return Plan(documents, tasks, left_out, continuation_bytes)


def plan_tokens(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, *, max_length: int, add_bos_token: bool = True
) -> list[Any]:
    """The tokens of each task of a plan. What does not fit is found here, before a model is loaded."""
    return [
        task_tokens(task, items, tokenizer, max_length=max_length, add_bos_token=add_bos_token)
        for task, items in plan.tasks
    ]


def measure_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    tokens: Sequence[Any],
    *,
    block_size: int,
    batch_size: int = 16,
    allow_code_execution: bool = False,
) -> ModelMeasures:
    """Puts all that is planned to a model; under `accelerate launch` on all processes, each of which returns all.

    Args:
        tokens: From `plan_tokens`.
        block_size: The longest window of a document, in tokens.
        batch_size: Sequences in one forward pass.
        allow_code_execution: Whether programs that the model writes may be run.
    """
    documents = None
    if plan.documents is not None:
        documents = measure_documents(model, tokenizer, plan.documents, block_size=block_size, batch_size=batch_size)
    tasks = {
        task.name: score_task(
            task,
            items,
            of_task,
            model,
            tokenizer,
            batch_size=batch_size,
            allow_code_execution=allow_code_execution,
        )
        for (task, items), of_task in zip(plan.tasks, tokens, strict=True)
    }
    return ModelMeasures(documents, tasks)


def report(plan: Plan, measures: ModelMeasures, *, seed: int = 0) -> dict[str, Any]:
    """What was found, JSON-able.

    Returns:
        `domains`: what `evaluate_domains` returns, with the 95% interval of `bits_per_byte` as `low` and `high`.
        `tasks`: task -> its description, metric, source, `truncated` (items whose contexts were cut off at their
        beginning) and `domains`: domain -> the scores of the metric, with `score` (the one that tables show), its
        interval `low` and `high`, `num_items`, and `clusters` (how many independent groups of items that rests on).
        `left_out`: domain -> why it has no continuation items.
    """
    domains: dict[str, Any] = {}
    if measures.documents is not None:
        found = measures.documents.scores()
        for domain, values in measures.documents.by_domain().items():
            domains[domain] = {**values, **_interval(found[domain], seed)}
    tasks = {}
    for task, _ in plan.tasks:
        result = measures.tasks[task.name]
        tasks[task.name] = {
            "description": task.description,
            "metric": task.metric,
            "score": task.shown_score,
            "shots": task.shots.number,
            "source": task.source.described()
            if task is not CONTINUATION
            else {"held_out_documents": True, "continuation_bytes": plan.continuation_bytes},
            "truncated": result.truncated,
            **result.notes,
            "domains": {
                domain: {
                    **values,
                    "score": result.scores[domain].score,
                    **_interval(result.scores[domain], seed),
                    "num_items": len(result.scores[domain].values),
                    "clusters": len(set(result.scores[domain].clusters)),
                }
                for domain, values in result.domains.items()
            },
        }
    return {"domains": domains, "tasks": tasks, "left_out": plan.left_out}


def compare_models(plan: Plan, first: ModelMeasures, second: ModelMeasures, *, seed: int = 0) -> dict[str, Any]:
    """Two models on the same items, measure by measure: see `compare`.

    p-values are adjusted over the domains of each measure. Tasks of one domain are one family, `tasks`, in which each
    is called by its task and domain. The pooled domain `all` is no further hypothesis: it is not adjusted.

    Returns:
        Measure (`bits_per_byte`, `continuation`, the tasks of several domains, `tasks`) -> domain -> the difference,
        second less first.
    """
    measures: dict[str, tuple[dict[str, Scores], dict[str, Scores]]] = {}
    if first.documents is not None and second.documents is not None:
        measures["bits_per_byte"] = first.documents.scores(), second.documents.scores()
    for task, _ in plan.tasks:
        pair = first.tasks[task.name].scores, second.tasks[task.name].scores
        if len(pair[0]) > 1:
            measures[task.name] = pair
        else:
            single = measures.setdefault("tasks", ({}, {}))
            for of_model, scores in zip(single, pair, strict=True):
                of_model.update({f"{task.name} ({domain})": found for domain, found in scores.items()})
    return {
        name: {
            **compare(_without_all(pair[0]), _without_all(pair[1]), seed=seed),
            **compare(_only_all(pair[0]), _only_all(pair[1]), seed=seed),
        }
        for name, pair in measures.items()
    }


def results(
    plan: Plan, measured: Mapping[str, ModelMeasures], settings: Mapping[str, dict[str, Any]], *, seed: int = 0
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """What each of several models did, and how all others differ from the first. JSON-able.

    Args:
        measured: Model's name -> what it did.
        settings: Model's name -> what else its report shall say of how it was measured.

    Returns:
        Model's name -> its `report`, with `settings` and `versions`; and a comparison (`first`, `second`, and as
        `measures` what `compare_models` returns) for each model but the first.
    """
    versions = {name: version(name) for name in ("equipoise", "torch", "transformers")}
    reports = {
        name: {**report(plan, measures, seed=seed), "settings": settings[name], "versions": versions}
        for name, measures in measured.items()
    }
    first, *others = measured
    comparisons = [
        {
            "first": first,
            "second": name,
            "measures": compare_models(plan, measured[first], measured[name], seed=seed),
        }
        for name in others
    ]
    return reports, comparisons


def write_results(
    reports: Mapping[str, dict[str, Any]],
    comparisons: Sequence[dict[str, Any]],
    outputs: Mapping[str, Path],
    comparison_output: Path | None,
) -> list[Path]:
    """Writes what `results` returned: each model's report to its file, and all of it to that of the comparison.

    Returns:
        The files.
    """
    records = {output: reports[name] for name, output in outputs.items()}
    if comparison_output is not None:
        records[comparison_output] = {
            "models": list(reports),
            "comparisons": list(comparisons),
            "evaluations": dict(reports),
        }
    return [write_json(output, record) for output, record in records.items()]


def _interval(scores: Scores, seed: int) -> dict[str, float | None]:
    return interval_record(*scores.interval(seed))


def _without_all(scores: Mapping[str, Scores]) -> dict[str, Scores]:
    return {domain: found for domain, found in scores.items() if domain != ALL}


def _only_all(scores: Mapping[str, Scores]) -> dict[str, Scores]:
    return {domain: found for domain, found in scores.items() if domain == ALL}
