"""Tasks as data: a YAML file says where the items come from, how they are put to a model, and how it is scored."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from .templates import Expression, Template

FOLDER = Path(__file__).parent / "tasks"
"""The tasks that come with the package."""
GATHERED = Path("corpus/task_items")
"""Where `scripts/prepare_data.py --corpus task_items` writes, relative to the working directory like every output."""

METRICS = ("multiple_choice", "exact_match", "pass_at_k", "reasoning_gym")
SCORES = ("accuracy", "accuracy_per_token", "accuracy_per_byte")
_GENERATING = ("exact_match", "pass_at_k", "reasoning_gym")
# field -> the metrics that need it
_NEEDED_BY = {
    "choices": ("multiple_choice",),
    "answer": ("multiple_choice", "exact_match", "reasoning_gym"),
    "entry": ("reasoning_gym",),
    "candidate": ("pass_at_k",),
    "test": ("pass_at_k",),
    "stop": _GENERATING,
    "max_new_tokens": _GENERATING,
}
# field -> the metrics that may have it, needed or not
_ONLY_WITH = _NEEDED_BY | {
    "score": ("multiple_choice",),
    "numeric": ("exact_match",),
    "regex": ("exact_match",),
    "ignore_case": ("exact_match",),
    "shot_answer": ("exact_match", "pass_at_k", "reasoning_gym"),
}
COMPLETION = "completion"
"""What a template of a candidate program calls the text that the model generated."""


@dataclass(frozen=True, kw_only=True)
class ItemSource:
    """Where rows come from: exactly one of `hub`, `files` and `gathered`."""

    hub: str | None = None
    """A data set of the Hub, e.g. `cais/mmlu`."""
    config: tuple[str, ...] = ()
    """Its configurations, one after another; rows get their name as the column `config`."""
    split: str | None = None
    """The split of the items."""
    revision: str | None = None
    """Its commit, branch or tag; None is the newest."""
    files: tuple[Path, ...] = ()
    """jsonl, json, parquet or csv files. In a task file relative to it, here absolute."""
    gathered: str | None = None
    """A file `<gathered>.jsonl` of what `prepare_data.py --corpus task_items` wrote."""

    def described(self) -> dict[str, Any]:
        """The fields that were given, JSON-able."""
        given = {name: value for name, value in vars(self).items() if value}
        return {
            name: [str(one) for one in value] if isinstance(value, tuple) else value for name, value in given.items()
        }


@dataclass(frozen=True, kw_only=True)
class Shots:
    """Solved items that stand before each item."""

    number: int = 0
    split: str | None = None
    """The split they are drawn from; None draws from the items themselves, never the item that is asked."""
    drawn: str = "first"
    """`first` takes the first of the split, `random` draws anew for each item, seeded."""
    same: str | None = None
    """A column in which they agree with the item: its subject, its language."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a task file says, read and checked by `read_task`."""

    name: str
    """The file's name without its ending."""
    path: Path
    description: str
    """A line for people."""
    domain: Template
    """The domain that an item counts for."""
    source: ItemSource
    columns: tuple[str, ...]
    """The columns that templates may read; all must be there."""
    where: Expression | None = None
    """Rows for which it is false are left out."""
    cluster: Expression | None = None
    """Items of one value are not independent (questions on one passage); None is each for itself."""
    preamble: Template
    """Stands before the shots."""
    prompt: Template
    """What is asked."""
    delimiter: str = " "
    """Between a prompt and its answer."""
    shot_delimiter: str = "\n\n"
    """After each shot."""
    shots: Shots
    metric: str
    """One of `METRICS`."""
    choices: Expression | tuple[Template, ...] = ()
    """`multiple_choice`: a template for each, or one expression that gives a list of texts."""
    answer: Expression | None = None
    """`multiple_choice`: the index of the right choice, from 0. `exact_match`: the reference. `reasoning_gym`: the
    answer that a shot shows."""
    shot_answer: Template | None = None
    """What a shot shows as its answer; None is the right choice, or `answer`."""
    score: str = "accuracy"
    """`multiple_choice`: the accuracy that tables show and models are compared by, one of `SCORES`."""
    numeric: bool = False
    """`exact_match`: compare a number of the text with that of the reference."""
    regex: str | None = None
    """`exact_match`: what of the text is compared."""
    ignore_case: bool = False
    """`exact_match`: whether upper and lower case are the same."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these."""
    max_new_tokens: int = 0
    """Generation ends after so many tokens."""
    candidate: Template | None = None
    """`pass_at_k`: the program, from the columns and `completion`, what the model generated."""
    test: Template | None = None
    """`pass_at_k`: the code that tests it, run after it."""
    entry: Expression | None = None
    """`reasoning_gym`: the entry that the generator's own scorer reads."""

    @property
    def shown_score(self) -> str:
        """The name of the score that tables show and models are compared by."""
        return {"multiple_choice": self.score, "pass_at_k": "pass@1", "reasoning_gym": "score"}.get(
            self.metric, self.metric
        )

    @property
    def generates(self) -> bool:
        """Whether the model writes text, instead of choosing among texts."""
        return self.metric in _GENERATING


_TEMPLATES = ("domain", "preamble", "prompt", "shot_answer", "candidate", "test")
_EXPRESSIONS = ("where", "cluster", "answer", "entry")


def task_names() -> list[str]:
    """The tasks that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_task(name: str) -> Task:
    """The task of that name, or of the file at that path.

    Raises:
        ValueError: there is none, or its file is wrong (see `read_task`).
    """
    if name.endswith((".yaml", ".yml")):
        return read_task(name)
    if name not in task_names():
        raise ValueError(f"tasks must be among {', '.join(task_names())}, or paths of YAML files; got {name}")
    return read_task(FOLDER / f"{name}.yaml")


def read_task(path: str | Path) -> Task:
    """Reads a task file.

    ```yaml
    description: science questions for primary school
    domain: science
    source: {hub: allenai/ai2_arc, config: ARC-Easy, split: test}
    columns: [question, choices, answerKey]
    prompt: "Question: {{ question }}\\nAnswer:"
    choices: choices.text
    answer: choices.label.index(answerKey)
    metric: multiple_choice
    score: accuracy_per_byte
    shots: {number: 0}
    ```

    Raises:
        ValueError: the file is missing or no mapping; a field is missing, unknown, of the wrong kind or not one of the
            task's metric; a template is no Jinja2 or reads what is not among the columns. The message names the file,
            the field, what it must be and what it got.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"a task must be a file; got {path}, which is none")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: a task must be YAML; got {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a task must be a mapping of fields to values; got {values!r}")
    return _Reader(path, values).task()


class _Reader:
    """Checks the fields of one file, one after another."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def task(self) -> Task:
        known = [field.name for field in fields(Task) if field.name not in ("name", "path")]
        for name in self.values:
            if name not in known:
                raise self.must("a field", f"one of {', '.join(known)}", name)
        for name in ("description", "domain", "source", "columns", "prompt", "metric"):
            if name not in self.values:
                raise self.must(name, "given", None)
        metric = self.one_of("metric", METRICS)
        for name, metrics in _NEEDED_BY.items():
            if metric in metrics and name not in self.values:
                raise self.must(name, f"given for the metric {metric}", None)
        for name, metrics in _ONLY_WITH.items():
            if name in self.values and metric not in metrics:
                raise self.must(name, f"given only for {' or '.join(metrics)}", f"it for {metric}")

        read: dict[str, Any] = {
            "name": self.path.stem,
            "path": self.path,
            "preamble": Template(""),
            "metric": metric,
            "source": self.source(),
            "shots": self.shots(),
            "columns": self.texts("columns"),
        }
        for name in self.values:
            if name in _TEMPLATES:
                read[name] = self.template(name, self.values[name])
            elif name in _EXPRESSIONS:
                read[name] = self.expression(name, self.values[name])
            elif name in ("description", "delimiter", "shot_delimiter", "regex"):
                read[name] = self.text(name)
            elif name == "choices":
                read[name] = self.choices()
            elif name == "score":
                read[name] = self.one_of(name, SCORES)
            elif name in ("numeric", "ignore_case"):
                read[name] = self.boolean(name)
            elif name == "stop":
                read[name] = self.texts(name)
            elif name == "max_new_tokens":
                read[name] = self.whole(name, self.values[name], least=1)
        self.check_columns(read)
        return Task(**read)

    def must(self, name: str, rule: str, got: Any) -> ValueError:
        return ValueError(f"{self.path}: {name} must be {rule}; got {got!r}")

    def text(self, name: str) -> str:
        if not isinstance(self.values[name], str):
            raise self.must(name, "a text (put it in quotes)", self.values[name])
        return self.values[name]

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.values[name]
        if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
            raise self.must(name, "a list of texts", value)
        return tuple(value)

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        if self.values[name] not in allowed:
            raise self.must(name, f"one of {', '.join(allowed)}", self.values[name])
        return self.values[name]

    def boolean(self, name: str) -> bool:
        if not isinstance(self.values[name], bool):
            raise self.must(name, "true or false", self.values[name])
        return self.values[name]

    def whole(self, name: str, value: Any, least: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.must(name, f"a whole number of at least {least}", value)
        return value

    def template(self, name: str, value: Any) -> Template:
        if not isinstance(value, str):
            raise self.must(name, "a Jinja2 template (put it in quotes)", value)
        try:
            return Template(value)
        except ValueError as error:
            raise self.must(name, f"a Jinja2 template ({error})", value) from error

    def expression(self, name: str, value: Any) -> Expression:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # an answer that is the same for all rows
        if not isinstance(value, str):
            raise self.must(name, "a Jinja2 expression, without braces (put it in quotes)", value)
        try:
            return Expression(value)
        except ValueError as error:
            raise self.must(name, f"a Jinja2 expression, without braces ({error})", value) from error

    def choices(self) -> Expression | tuple[Template, ...]:
        value = self.values["choices"]
        if not isinstance(value, list):
            return self.expression("choices", value)
        if len(value) < 2:
            raise self.must("choices", "an expression, or a list of at least two templates", value)
        return tuple(self.template("choices", one) for one in value)

    def mapping(self, name: str, kind: type) -> dict[str, Any]:
        value = self.values[name]
        known = [field.name for field in fields(kind)]
        if not isinstance(value, Mapping) or not set(value) <= set(known):
            raise self.must(name, f"a mapping with keys among {', '.join(known)}", value)
        return dict(value)

    def source(self) -> ItemSource:
        values = self.mapping("source", ItemSource)
        kinds = [name for name in ("hub", "files", "gathered") if name in values]
        if len(kinds) != 1:
            raise self.must("source", "exactly one of hub, files, gathered", values)
        if "hub" in values and "split" not in values:
            raise self.must("source.split", "given with hub", None)
        for name in ("config", "revision") if "hub" not in values else ():
            if name in values:
                raise self.must(f"source.{name}", "given only with hub", values[name])
        for name in ("config", "files"):
            value = [values[name]] if isinstance(values.get(name), str) else values.get(name, [])
            if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
                raise self.must(f"source.{name}", "a text or a list of texts", value)
            values[name] = tuple(value)
        for name in ("hub", "split", "revision", "gathered"):
            if name in values and (not isinstance(values[name], str) or not values[name]):
                raise self.must(f"source.{name}", "a text (put it in quotes)", values[name])
        values["files"] = tuple(self.path.absolute().parent / name for name in values["files"])
        return ItemSource(**values)

    def shots(self) -> Shots:
        values = self.mapping("shots", Shots) if "shots" in self.values else {}
        if "number" in values:
            self.whole("shots.number", values["number"], least=0)
        if values.get("drawn", "first") not in ("first", "random"):
            raise self.must("shots.drawn", "first or random", values["drawn"])
        for name in ("split", "same"):
            if not isinstance(values.get(name, ""), str):
                raise self.must(f"shots.{name}", "a text (put it in quotes)", values[name])
        return Shots(**values)

    def check_columns(self, read: dict[str, Any]) -> None:
        """Whether templates read nothing but the columns, so that a misspelt name is found here."""
        allowed = set(read["columns"]) | ({"config"} if read["source"].config else set())
        for name, value in read.items():
            for template in value if name == "choices" and isinstance(value, tuple) else (value,):
                if isinstance(template, Template | Expression):
                    own = {COMPLETION} if name == "candidate" else set()
                    if unknown := sorted(template.columns - allowed - own):
                        raise self.must(name, f"made of the columns {', '.join(sorted(allowed))}", unknown[0])
        if read["shots"].same and read["shots"].same not in allowed:
            raise self.must("shots.same", f"one of the columns {', '.join(sorted(allowed))}", read["shots"].same)
