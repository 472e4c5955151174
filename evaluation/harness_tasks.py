"""What exported tasks call in lm-evaluation-harness: a copy lies beside them, so nothing of ours is imported."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import evaluate

_FOLDER = Path(__file__).parent


def load(file: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The items of a task (`custom_dataset`); the harness adds its own arguments."""
    lines = (_FOLDER / file).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def exact_match(item: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Scores one generated text (`process_results`)."""
    options = json.loads(item["options"])
    return _metric("exact_match").compute(predictions=results[:1], references=[item["reference"]], **options)


def pass_at_k(item: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Runs one generated program with its tests. The harness asks for `--confirm_run_unsafe_code` before."""
    program = item["before"] + results[0] + item["after"]
    result = _metric("pass_at_k").compute(
        predictions=[[program]], references=[item["reference"]], k=[1], allow_code_execution=True
    )
    return {"pass_at_1": result["pass@1"]}


def reasoning_gym(item: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Scores one generated text as its generator does."""
    from reasoning_gym import get_score_answer_fn

    entry = json.loads(item["entry"])
    try:
        return {"score": float(get_score_answer_fn(entry["metadata"]["source_dataset"])(results[0].strip(), entry))}
    except Exception:  # some raise whatever parsing an answer that is none raises
        return {"score": 0.0}


@cache
def _metric(name: str) -> evaluate.EvaluationModule:
    return evaluate.load(str(_FOLDER / "metrics" / name), keep_in_memory=True)
