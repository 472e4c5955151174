"""docs/evaluation.md against what is there: its tables, its example of a task, its flags."""

import re
from pathlib import Path

import pytest
import yaml

from equipoise.evaluation import find_task, read_task, task_names

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def task_row(name: str) -> str:
    task = find_task(name)
    domain = yaml.safe_load(task.path.read_text(encoding="utf-8"))["domain"].replace("{{ config }}", "each language")
    source = f"`{task.source.hub}`" if task.source.hub else "task items"
    return f"| `{name}` | {domain} | {task.description} | `{task.shown_score}` | {task.shots.number} | {source} |"


def rows(first: str) -> list[str]:
    """Of the table whose head begins so."""
    lines = PAGE[PAGE.index(first) :].splitlines()[2:]
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("|"))]


def test_the_table_of_tasks_is_that_of_the_folder() -> None:
    assert rows("| task | domain |") == [task_row(name) for name in task_names()]


def test_the_table_of_metrics_names_every_module() -> None:
    modules = sorted({path.parent.name for path in (ROOT / "evaluation" / "metrics").glob("*/README.md")})
    assert sorted(row.split("`")[1] for row in rows("| metric | what |")) == modules


def test_the_example_of_a_task_can_be_read(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "capitals.yaml").write_text(text, encoding="utf-8")
    task = read_task(tmp_path / "capitals.yaml")
    assert task.prompt({"country": "Chile"}).endswith("Chile is")


@pytest.mark.parametrize("script", ["evaluate_model", "prepare_data"])
def test_flags_of_the_commands_exist(script: str) -> None:
    source = (ROOT / "scripts" / f"{script}.py").read_text(encoding="utf-8")
    # A command may go on after a backslash.
    commands = re.findall(rf"scripts/{script}\.py((?:[^\n`\\]|\\\n)*)", PAGE)
    assert commands
    for command in commands:
        for flag in re.findall(r"--(\w+)", command):
            assert flag == "help" or re.search(rf"^    {flag}: ", source, re.MULTILINE), f"{script} --{flag}"
