"""A task put to a model: items to tokens, tokens to likelihoods or texts, these to a metric, domain by domain."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .comparison import Scores
from .generation import Stopping, generate_texts
from .items import Item, candidate_program
from .likelihoods import choice_log_likelihoods
from .perplexity import ALL
from .processes import gather, this_process
from .requests import ChoiceRequest, Prompt, choice_requests, prompts
from .tasks import Task

METRICS_FOLDER = Path(__file__).parent / "metrics"


@dataclass(frozen=True)
class TaskResult:
    """What a model did on a task."""

    domains: dict[str, dict[str, Any]]
    """Domain -> the means of the metric's scores; then `all`, where there is more than one domain."""
    scores: dict[str, Scores]
    """For the same keys, the score that tables show, item by item."""
    truncated: int
    """How many items' contexts were cut off at their beginning to fit the model."""
    notes: dict[str, Any]
    """What else the metric says, not of a domain."""


def task_tokens(
    task: Task, items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, *, max_length: int, add_bos_token: bool
) -> list[ChoiceRequest] | list[Prompt]:
    """The tokens of a task's items, for `score_task`.

    Raises:
        ValueError: they do not fit into `max_length`; the message names the task.
    """
    try:
        if task.generates:
            return prompts(
                tokenizer,
                items,
                max_length=max_length,
                max_new_tokens=task.max_new_tokens,
                add_bos_token=add_bos_token,
            )
        return choice_requests(tokenizer, items, max_length=max_length, add_bos_token=add_bos_token)
    except ValueError as error:
        raise ValueError(f"{task.name}: {error}") from error


def score_task(
    task: Task,
    items: Sequence[Item],
    tokens: Sequence[Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    allow_code_execution: bool = False,
) -> TaskResult:
    """Puts the items to the model and scores what it says.

    Args:
        tokens: Of the items, from `task_tokens`.
        batch_size: Most sequences in one forward pass.
        allow_code_execution: Whether programs that the model writes may be run.

    Returns:
        On every process the same.

    Raises:
        ValueError: the model's log-likelihoods are not finite; a program would have to be run and must not.
    """
    columns: dict[str, list]
    if task.generates:
        stopping = Stopping(task.stop, task.max_new_tokens)
        texts = generate_texts(model, tokenizer, tokens, stopping, batch_size=batch_size, description=task.name)
        columns = {"texts": texts}
    else:
        columns = {
            "log_likelihoods": choice_log_likelihoods(model, tokens, batch_size=batch_size, description=task.name),
            "num_tokens": [[len(one) for one in request.continuations] for request in tokens],
        }
    # On one process only: the programs of `pass_at_k` must not run on all.
    found = [(0, _item_scores(task, items, columns, allow_code_execution))] if this_process().is_main_process else []
    by_item, notes = gather(found, 1)[0]
    rows: dict[str, list[int]] = {domain: [] for domain in sorted({item.domain for item in items})}
    for row, item in enumerate(items):
        rows[item.domain].append(row)
    if len(rows) > 1:
        rows[ALL] = list(range(len(items)))
    return TaskResult(
        domains={
            domain: {name: math.fsum(values[row] for row in chosen) / len(chosen) for name, values in by_item.items()}
            for domain, chosen in rows.items()
        },
        scores={
            domain: Scores(
                values=[by_item[task.shown_score][row] for row in chosen],
                weights=[1] * len(chosen),
                clusters=[items[row].cluster for row in chosen],
            )
            for domain, chosen in rows.items()
        },
        truncated=sum(one.truncated > 0 for one in tokens),
        notes=notes,
    )


def multiple_choice_columns(items: Sequence[Item]) -> dict[str, list]:
    """What the metric `multiple_choice` needs to know of items."""
    return {
        "num_bytes": [[len(choice.encode()) for choice in item.choices] for item in items],
        "answer": [item.answer for item in items],
    }


def _item_scores(
    task: Task, items: Sequence[Item], columns: dict[str, list], allow_code_execution: bool
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Each score of the task's metric, item by item; and what else there is to say."""
    if task.metric == "reasoning_gym":
        return {"score": _own_scorers(task, items, columns["texts"])}, {}
    metric = evaluate.load(str(METRICS_FOLDER / task.metric), keep_in_memory=True)
    if task.metric == "multiple_choice":
        result = metric.compute(**columns, **multiple_choice_columns(items), return_items=True)
        return result["items"], {}
    if task.metric == "exact_match":
        result = metric.compute(
            predictions=columns["texts"],
            references=[item.reference for item in items],
            numeric=task.numeric,
            regex=task.regex,
            ignore_case=task.ignore_case,
            return_items=True,
        )
        answered = [float(text is not None) for text in result["items"]["extracted"]]
        return {"exact_match": result["items"]["exact_match"], "answered": answered}, {}
    result = metric.compute(
        predictions=[[candidate_program(task, *one)] for one in zip(items, columns["texts"], strict=True)],
        references=[item.reference for item in items],
        k=[1],
        allow_code_execution=allow_code_execution,
        return_items=True,
    )
    return {"pass@1": result["items"]["pass@1"]}, {"sandbox": result["sandbox"]}


def _own_scorers(task: Task, items: Sequence[Item], texts: Sequence[str]) -> list[float]:
    """The scorers of reasoning-gym's generators: from 0 to 1, 1 for a right answer."""
    try:
        from reasoning_gym import get_score_answer_fn
    except ImportError as error:
        raise ValueError(f"{task.name}: reasoning-gym must be installed, whose scorers it uses; {error}") from error
    assert task.entry is not None
    values = []
    for item, text in zip(items, texts, strict=True):
        entry = task.entry(item.row)
        scorer = get_score_answer_fn(entry["metadata"]["source_dataset"])
        try:
            values.append(float(scorer(text.strip(), entry)))
        except Exception:  # some raise whatever parsing an answer that is none raises
            values.append(0.0)
    return values
