"""What all metric modules have in common: they load from a path, stand alone, say what they do, and give the same
digits whether one process holds all items or three hold them, with some twice and one process with fewer."""

import ast
import doctest
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
METRICS = ROOT / "evaluation" / "metrics"
NAMES = sorted(path.parent.name for path in METRICS.glob("*/README.md"))


def make_items(name: str, number: int = 11) -> tuple[str, dict[str, list], dict[str, Any]]:
    """Configuration, columns and arguments of a module."""
    generator = np.random.default_rng(7)
    layers, experts = 2, 5

    def counts(tokens: np.ndarray) -> list:
        return [
            [generator.multinomial(count, generator.dirichlet(np.ones(experts))).tolist() for _ in range(layers)]
            for count in tokens
        ]

    def selected(tokens: np.ndarray) -> list:
        return [generator.random((layers, count, experts)).argsort(-1)[..., :2].tolist() for count in tokens]

    tokens = generator.integers(3, 30, number)
    if name == "bits_per_byte":
        columns = {
            "nll": (generator.random(number) * 10).tolist(),
            "num_tokens": tokens.tolist(),
            "num_bytes": (3 * tokens).tolist(),
        }
        return "index", columns, {}
    if name == "multiple_choice":
        columns = {
            "log_likelihoods": (-generator.integers(1, 9, (number, 3)).astype(float)).tolist(),
            "num_tokens": generator.integers(1, 4, (number, 3)).tolist(),
            "num_bytes": generator.integers(1, 9, (number, 3)).tolist(),
            "answer": generator.integers(0, 3, number).tolist(),
        }
        return "index", columns, {}
    if name == "exact_match":
        columns = {
            "predictions": [f"it is {value}" for value in generator.integers(0, 3, number)],
            "references": [[str(value)] for value in generator.integers(0, 3, number)],
        }
        return "index", columns, {"numeric": True}
    if name == "pass_at_k":
        columns = {
            "predictions": [[f"x = {value}", "x = 1"] for value in generator.integers(0, 3, number)],
            "references": [f"assert x == {value}" for value in generator.integers(0, 3, number)],
        }
        return "index", columns, {"allow_code_execution": True, "k": [1, 2]}
    if name == "expert_load":
        return "index", {"load": counts(tokens)}, {}
    if name == "domain_specialisation":
        columns = {
            "domain": [("law", "code", "prose")[item % 3] for item in range(number)],
            "document": [item // 6 * 3 + item % 3 for item in range(number)],
            "load": counts(tokens),
            "token_load": (generator.random((number, layers, experts)) * 7).tolist(),
            "untrained_load": counts(tokens),
        }
        return "index+token_load+untrained_load", columns, {"num_experts_per_tok": 1, "permutations": 50}
    if name == "vocabulary_specialisation":
        columns = {"token_ids": [generator.integers(0, 6, count).tolist() for count in tokens]}
        return "index", columns | {"experts": selected(tokens)}, {"num_experts": experts}
    if name == "expert_coactivation":
        return "index", {"experts": selected(tokens)}, {"num_experts": experts}
    if name == "router_saturation":
        columns = {"experts": selected(tokens), "final_experts": selected(tokens)}
        return "index", columns, {"num_experts": experts}
    raise AssertionError(f"a test for {name} is missing: add items of it here")


def take(columns: dict[str, list], rows: list[int]) -> dict[str, list]:
    return {name: [column[row] for row in rows] for name, column in columns.items()}


def digits(result: dict) -> str:
    return json.dumps(result, sort_keys=True)


def _evaluate_on_a_rank(rank: int, world_size: int, folder: str, names: list[str]) -> dict[str, str]:
    """Items as a distributed sampler deals them: in batches, the last filled up with the first items."""
    results = {}
    for name in names:
        configuration, columns, arguments = make_items(name)
        number = len(next(iter(columns.values())))
        columns["index"] = [100 + row for row in range(number)]
        dealt = [*range(number), 0]  # 12 places, one of them filled up
        for case, rows in {
            "index": dealt[rank::world_size],
            # In blocks, the last process without any item at all.
            "default": list(range(number))[rank * 6 : rank * 6 + 6] if rank < 2 else [],
        }.items():
            chosen = configuration if case == "index" else configuration.removeprefix("index").strip("+") or "default"
            metric = evaluate.load(
                str(METRICS / name),
                chosen,
                num_process=world_size,
                process_id=rank,
                experiment_id=f"{name}-{case}",
                cache_dir=folder,
            )
            own = take(columns if case == "index" else {k: v for k, v in columns.items() if k != "index"}, rows)
            metric.add_batch(**{key: column[:3] for key, column in own.items()})
            if len(rows) > 3:
                metric.add_batch(**{key: column[3:] for key, column in own.items()})  # a shorter last batch
            result = metric.compute(**arguments, return_items=case == "index")
            assert (result is None) is (rank > 0)
            if result is not None:
                results[f"{name} {case}"] = digits(result)
    return results


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:pass_at_k")
def test_three_processes_give_the_digits_of_one(run_processes: Callable[..., list[Any]], tmp_path: Path) -> None:
    found = run_processes(3, _evaluate_on_a_rank, str(tmp_path), NAMES)[0]
    for name in NAMES:
        configuration, columns, arguments = make_items(name)
        number = len(next(iter(columns.values())))
        with_index = evaluate.load(str(METRICS / name), configuration, keep_in_memory=True)
        index = [100 + row for row in range(number)]
        expected = with_index.compute(**columns, index=index, **arguments, return_items=True)
        assert found[f"{name} index"] == digits(expected), name
        assert expected["items"]["index"] == index
        without = configuration.removeprefix("index").strip("+") or "default"
        alone = evaluate.load(str(METRICS / name), without, keep_in_memory=True)
        assert found[f"{name} default"] == digits(alone.compute(**columns, **arguments)), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:pass_at_k")
def test_neither_order_nor_copies_matter(name: str) -> None:
    configuration, columns, arguments = make_items(name, number=7)
    metric = evaluate.load(str(METRICS / name), configuration, keep_in_memory=True)
    columns["index"] = list(range(7))
    once = metric.compute(**columns, **arguments, return_items=True)
    again = metric.compute(**take(columns, [3, 0, 6, 3, 1, 2, 5, 4, 0, 6]), **arguments, return_items=True)
    assert digits(again) == digits(once)
    # Without an index a copy is an item.
    without = configuration.removeprefix("index").strip("+") or "default"
    alone = evaluate.load(str(METRICS / name), without, keep_in_memory=True)
    del columns["index"]
    assert digits(alone.compute(**take(columns, [6, 5, 4, 3, 2, 1, 0]), **arguments)) == digits(
        {key: value for key, value in once.items() if key != "items"}
    )
    columns = take(columns, [0, 1, 2, 3, 4, 5, 6, 0, 1])
    if name == "domain_specialisation":
        return  # its copies would be windows more of their documents
    assert digits(alone.compute(**columns, **arguments)) != digits(once)


@pytest.mark.parametrize("name", NAMES)
def test_an_index_of_two_items_is_an_error(name: str) -> None:
    """What it guards against: an index that starts anew in each process would silently drop items."""
    configuration, columns, arguments = make_items(name)
    metric = evaluate.load(str(METRICS / name), configuration, keep_in_memory=True)
    columns["index"] = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"index must name one item; got \d for items \d and \d, whose .* differ"):
        metric.compute(**columns, **arguments)


@pytest.mark.parametrize("name", NAMES)
def test_loads_by_path_as_a_metric(name: str) -> None:
    metric = evaluate.load(str(METRICS / name), keep_in_memory=True)
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == name
    with pytest.raises(ValueError, match=r"config_name must join names of \['index'.*\] by '\+'; got 'indexed'"):
        evaluate.load(str(METRICS / name), "indexed")


@pytest.mark.parametrize("name", NAMES)
def test_says_formula_range_units_and_source(name: str) -> None:
    metric = evaluate.load(str(METRICS / name), keep_in_memory=True)
    for part in ("Args:", "Returns:", "Raises:", "ValueError", "Examples:", "return_items", "index"):
        assert part in metric.inputs_description
    for feature in metric.features:
        assert re.search(rf"^    {feature} \(list of ", metric.inputs_description, re.MULTILINE), feature
    assert re.search(r"arXiv:\d{4}\.\d{5}", metric.citation)
    assert "=" in metric.description
    assert re.search(r"0\s*(\.\.|to|\()|From 0", metric.description)


def examples() -> list:
    found = []
    for name in NAMES:
        source = ast.parse((METRICS / name / f"{name}.py").read_text(encoding="utf-8"))
        texts = [
            node.value for node in ast.walk(source) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        (usage,) = [text for text in texts if text.strip().startswith("Args:")]
        found.append(pytest.param(usage, id=f"{name} docstring"))
        readme = (METRICS / name / "README.md").read_text(encoding="utf-8")
        blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
        assert blocks, f"{name}/README.md has no example"
        found.append(pytest.param("\n".join(blocks), id=f"{name} README"))
    return found


@pytest.mark.parametrize("text", examples())
@pytest.mark.filterwarnings("ignore:pass_at_k")
def test_examples_give_what_they_say(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    test = doctest.DocTestParser().get_doctest(text, {"evaluate": evaluate}, "example", None, 0)
    assert len(test.examples) > 1
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert result.failed == 0, "\n".join(said)


@pytest.mark.parametrize("name", NAMES)
def test_could_be_pushed_as_a_space(name: str) -> None:
    readme = (METRICS / name / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("---\ntitle: ")
    front = readme.split("---\n")[1]
    for line in ("sdk: static", "- evaluate", "- metric", "description: "):
        assert line in front
    for heading in ("## How to use", "## Limitations", "## Source"):
        assert heading in readme
    for feature in evaluate.load(str(METRICS / name), keep_in_memory=True).features:
        assert f"`{feature}`" in readme


def test_modules_stand_alone_and_share_their_helpers_word_for_word() -> None:
    allowed = {"datasets", "evaluate", "numpy", "tqdm"}
    helpers: dict[str, dict[str, str]] = {}
    for file in METRICS.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{file.name} imports from outside its folder"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                tops = {str(name).split(".")[0] for name in names}
                assert not {top for top in tops if top not in allowed and top not in sys.stdlib_module_names}, (
                    f"{file.name}: {tops}"
                )
        if file.stem == file.parent.name:
            for node in tree.body:
                if isinstance(node, ast.FunctionDef):
                    helpers.setdefault(node.name, {})[file.stem] = ast.unparse(node)
    for name in ("_optional_features", "_check_given", "_distinct"):
        assert sorted(helpers[name]) == NAMES
    for name in ("_optional_features", "_check_given", "_distinct", "_tables", "_selections"):
        assert len(set(helpers[name].values())) == 1, f"{name} is not the same in {sorted(helpers[name])}"
