"""Items: what a model is asked, made of a task's rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.corpus_files import seeded
from .task_rows import Row
from .tasks import COMPLETION, Task
from .templates import Expression, Template


@dataclass(frozen=True, kw_only=True)
class Item:
    """One item. `choices` are there where a model chooses among texts, `reference` where it writes one."""

    domain: str
    cluster: str
    """Items of one cluster are not independent of each other."""
    context: str
    """All that stands before the answer."""
    delimiter: str = ""
    """Between the context and a choice; it is scored with the choice, and not counted in its length."""
    choices: tuple[str, ...] = ()
    answer: int = 0
    """The index of the right choice."""
    reference: str = ""
    """The text that is right."""
    row: Row
    """What it was made of."""


def make_items(
    task: Task, rows: Sequence[Row], shot_rows: Sequence[Row] | None, *, limit: int | None = None, seed: int = 0
) -> list[Item]:
    """The task's items, in the order of the rows.

    Args:
        rows: From `load_rows`.
        shot_rows: What shots are drawn from; None is `rows`, without the row that is asked.
        limit: At most so many items, drawn by `seed`; None is all.
        seed: Draws shots that the task wants drawn at random, and the items within `limit`.

    Raises:
        ValueError: a template does not suit a row, an answer is not among the choices, or there are too few rows to
            draw shots from. The message names the task, the row, the field, what it must be and what it got.
    """
    pool = rows if shot_rows is None else shot_rows
    drawer = _ShotDrawer(task, pool, among_items=shot_rows is None, seed=seed)
    chosen = sorted(range(len(rows)), key=lambda number: seeded(seed, f"{task.name}/{number}"))[:limit]
    items = []
    for number in sorted(chosen):
        try:
            items.append(_item(task, rows[number], number, drawer.draw(number, rows[number])))
        except ValueError as error:
            raise ValueError(f"{task.name}: row {number}: {error}") from error
    return items


def candidate_program(task: Task, item: Item, completion: str) -> str:
    """The program that an item of `pass_at_k` runs, with what the model generated in its place."""
    return _rendered("candidate", task.candidate, item.row | {COMPLETION: completion})


class _ShotDrawer:
    """Draws the rows that stand, solved, before an item."""

    def __init__(self, task: Task, rows: Sequence[Row], *, among_items: bool, seed: int) -> None:
        self.task, self.rows, self.among_items, self.seed = task, rows, among_items, seed
        self.pools: dict[Any, list[int]] = {}
        for index, row in enumerate(rows):
            self.pools.setdefault(self._group(row), []).append(index)

    def draw(self, number: int, asked: Row) -> list[Row]:
        """Shots for the row of this number, never itself."""
        shots = self.task.shots
        if not shots.number:
            return []
        pool = list(self.pools.get(self._group(asked), []))
        if self.among_items:
            pool.remove(number)
        if len(pool) < shots.number:
            raise ValueError(
                f"shots.number must be at most the rows that shots can be drawn from ({len(pool)}); got {shots.number}"
            )
        if shots.drawn == "random":
            pool.sort(key=lambda index: seeded(self.seed, f"{self.task.name}/{number}/{index}"))
        return [self.rows[index] for index in pool[: shots.number]]

    def _group(self, row: Row) -> Any:
        return row[self.task.shots.same] if self.task.shots.same else None


def _item(task: Task, row: Row, number: int, shots: Sequence[Row]) -> Item:
    parts = [_rendered("preamble", task.preamble, row)]
    for shot in shots:
        parts += [_rendered("prompt", task.prompt, shot), task.delimiter, _shown_answer(task, shot)]
        parts.append(task.shot_delimiter)
    values = {
        "domain": _rendered("domain", task.domain, row),
        "cluster": str(number) if task.cluster is None else str(_rendered("cluster", task.cluster, row)),
        "context": "".join([*parts, _rendered("prompt", task.prompt, row)]),
        "row": row,
    }
    if not values["domain"]:
        raise ValueError("domain must not be empty; got an empty text")
    if task.metric == "multiple_choice":
        choices = _choices(task, row)
        return Item(delimiter=task.delimiter, choices=choices, answer=_answer_index(task, row, choices), **values)
    if task.metric == "pass_at_k":
        return Item(reference=_rendered("test", task.test, row), **values)
    return Item(reference=_reference(task, row), **values)


def _shown_answer(task: Task, row: Row) -> str:
    if task.shot_answer is not None:
        return _rendered("shot_answer", task.shot_answer, row)
    if task.metric == "multiple_choice":
        choices = _choices(task, row)
        return choices[_answer_index(task, row, choices)]
    if task.answer is None:
        raise ValueError(f"shot_answer must be given for shots of the metric {task.metric}; got none")
    return _reference(task, row)


def _choices(task: Task, row: Row) -> tuple[str, ...]:
    if isinstance(task.choices, tuple):
        choices = [_rendered("choices", template, row) for template in task.choices]
    else:
        choices = _rendered("choices", task.choices, row)
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(f"choices must be a list of texts, none empty; got {choices!r}")
    if len(choices) < 2:
        raise ValueError(f"choices must be at least two; got {choices!r}")
    return tuple(choices)


def _answer_index(task: Task, row: Row, choices: Sequence[str]) -> int:
    answer = _rendered("answer", task.answer, row)
    if isinstance(answer, str) and answer.strip().isdecimal():
        answer = int(answer)  # HellaSwag's label is a text
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"answer must be between 0 and {len(choices) - 1}, the index of a choice; got {answer!r}")
    return answer


def _reference(task: Task, row: Row) -> str:
    answer = str(_rendered("answer", task.answer, row))
    if not answer.strip():
        raise ValueError("answer must not be empty; got an empty text")
    return answer


def _rendered(field: str, template: Template | Expression | None, row: Row) -> Any:
    assert template is not None
    try:
        return template(row)
    except ValueError as error:
        raise ValueError(f"{field} must suit the row; got {error}") from error
