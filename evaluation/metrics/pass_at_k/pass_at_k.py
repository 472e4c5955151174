"""pass@k: how often at least one of k generated programs passes its tests."""

import math
import os
import warnings
from fractions import Fraction

import datasets
import evaluate

from .sandbox import Limits, run_candidates
from .supervisor import PROTECTIONS

_DESCRIPTION = """
pass@k: the probability that at least one of k programs drawn from those that a model wrote passes the tests. With n
candidates of which c pass in an item, it is estimated without bias by

    pass@k = mean over items of 1 - C(n - c, k) / C(n, k)

from 0 to 1, higher is better.

A candidate is Python; it is run, then its tests are run in its namespace, and it passes if both come to their end
without an exception, within the limits, and without exiting before. Each runs in a process of its own, with a limit on
processor time, wall time, memory, file size and processes, an empty environment, no standard input, and a temporary
working directory that is removed; what it starts is killed with it. It is further shut off as far as the system
allows, and `sandbox` of the result says how far (a warning says the same where something is open):

- network: it has none.
- processes: it sees and can signal no process but its own.
- files: it can change none outside its working directory. It can *read* whatever your user can.
- user: it does not run as root.

Network, processes and files need Linux with user namespaces (or root's right to make namespaces). A limit is no
virtual machine: do not run programs that someone wrote to do harm.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of str): for each item, the candidate programs.
    references (list of str): for each item, the tests: Python that raises an exception if the program is wrong.
    index (list of int): only in the configuration "index". Items with the same index are one item and count once.
    k (list of int): the values of k; each at most the number of candidates of every item.
    allow_code_execution (bool): must be True: the programs of a model are run on this machine.
    num_workers (int): programs that run at the same time, at most the processors; all of them if None. It does not
        change the result.
    cpu_seconds (int), wall_seconds (float): time of one candidate, on a processor and from start to end.
    memory_mb (int): memory of one process of a candidate in MiB.
    file_mb (int): size of a file in MiB; of all files together where `sandbox` says that files are protected.
    max_processes (int): processes and threads that a candidate may have besides its first.
    return_items (bool): whether to return `items` too.
Returns:
    pass@1 and so on, for each k: 0..1.
    num_items: how many items.
    sandbox: for each of network, processes, files and user whether all candidates were protected from it.
    items: columns with one value per item, in input order, or in order of the index: pass@k for each k,
        num_candidates, num_passed, status (of each candidate: passed, failed, exited early, timed out, killed,
        supervisor lost), detail (of each candidate, the last line of its output); index.
Raises:
    ValueError: `allow_code_execution` is not True, a limit or k is below 1, there is no item, an item has fewer
        candidates than k, tests are no Python, or items with the same index differ in their tests.
    RuntimeError: the sandbox does not work, so that not even an empty program passes.
Examples:
    >>> metric = evaluate.load("evaluation/metrics/pass_at_k")
    >>> result = metric.compute(
    ...     predictions=[["def add(a, b):\\n    return a + b", "def add(a, b):\\n    return a * b"]],
    ...     references=["assert add(2, 3) == 5"],
    ...     k=[1, 2],
    ...     allow_code_execution=True,
    ... )
    >>> result["pass@1"], result["pass@2"]
    (0.5, 1.0)
"""

_CITATION = """
@article{chen2021evaluating,
    title={Evaluating Large Language Models Trained on Code},
    author={Chen, Mark and others},
    journal={arXiv:2107.03374},
    note={Section 2.1, the unbiased estimator of pass@k},
    year={2021}
}
"""

_OPTIONAL = {"index": datasets.Value("int64")}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PassAtK(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("string")),
                    "references": datasets.Value("string"),
                    **_optional_features(self.config_name, _OPTIONAL),
                }
            ),
        )

    def _compute(
        self,
        *,
        k: tuple[int, ...] | list[int] = (1,),
        allow_code_execution: bool = False,
        num_workers: int | None = None,
        cpu_seconds: int = 5,
        wall_seconds: float = 15.0,
        memory_mb: int = 1024,
        file_mb: int = 16,
        max_processes: int = 16,
        return_items: bool = False,
        **columns: list,
    ) -> dict:
        if allow_code_execution is not True:
            raise ValueError(
                "allow_code_execution must be True, since pass@k runs programs that a model wrote on this machine; "
                f"got {allow_code_execution!r}"
            )
        limits = Limits(cpu_seconds, wall_seconds, memory_mb, file_mb, max_processes)
        _check_settings(list(k), limits, num_workers)
        _check_given(columns)
        for item, (candidates, tests) in enumerate(zip(columns["predictions"], columns["references"], strict=True)):
            _check_item(item, candidates, tests, largest_k=max(k))
        columns = _distinct(columns, same=("references",))

        programs = [
            (candidate, tests)
            for candidates, tests in zip(columns["predictions"], columns["references"], strict=True)
            for candidate in candidates
        ]
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        outcomes, sandbox = run_candidates(programs, limits, min(num_workers or processors, processors))
        for name, held in sandbox.items():
            if not held:
                warnings.warn(f"pass_at_k: on this system the candidates {PROTECTIONS[name]}", stacklevel=2)

        items: dict[str, list] = {"num_candidates": [], "num_passed": [], "status": [], "detail": []}
        remaining = iter(outcomes)
        for candidates in columns["predictions"]:
            own = [next(remaining) for _ in candidates]
            items["num_candidates"].append(len(own))
            items["num_passed"].append(sum(outcome.status == "passed" for outcome in own))
            items["status"].append([outcome.status for outcome in own])
            items["detail"].append([outcome.detail for outcome in own])
        counts = list(zip(items["num_candidates"], items["num_passed"], strict=True))
        items |= {f"pass@{each}": [_estimate(total, passed, each) for total, passed in counts] for each in k}
        result: dict = {f"pass@{each}": math.fsum(items[f"pass@{each}"]) / len(counts) for each in k}
        result |= {"num_items": len(counts), "sandbox": sandbox}
        if return_items:
            result["items"] = items | {name: columns[name] for name in columns if name == "index"}
        return result


def _estimate(total: int, passed: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), in exact integers and rounded once."""
    return float(1 - Fraction(math.comb(total - passed, k), math.comb(total, k)))


def _check_settings(k: list[int], limits: Limits, num_workers: int | None) -> None:
    if os.name != "posix":
        raise ValueError(f"pass_at_k must run on a POSIX system, whose limits it uses; got {os.name}")
    if not k or min(k) < 1:
        raise ValueError(f"k must hold numbers of at least 1; got {k}")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers must be at least 1; got {num_workers}")
    for name, value in vars(limits).items():
        least = 0 if name == "max_processes" else 1
        if value < least or (name != "wall_seconds" and not isinstance(value, int)):
            raise ValueError(f"{name} must be a whole number of at least {least}; got {value}")


def _check_item(item: int, candidates: list[str], tests: str, largest_k: int) -> None:
    if len(candidates) < largest_k:
        raise ValueError(
            f"k must be at most the candidates of every item; got {largest_k} and {len(candidates)} candidates "
            f"in item {item}"
        )
    if None in candidates:
        raise ValueError(f"predictions must be texts; got None in item {item}")
    try:
        compile(tests, "tests.py", "exec")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"references must be Python; got {error} in item {item}") from error


def _optional_features(config_name: str, optional: dict) -> dict:
    """The optional features that the configuration names, joined by "+"; "default" has none."""
    names = [] if config_name == "default" else config_name.split("+")
    for name in names:
        if name not in optional:
            raise ValueError(f"config_name must join names of {sorted(optional)} by '+'; got {config_name!r}")
    return {name: optional[name] for name in names}


def _check_given(columns: dict[str, list]) -> None:
    for name, column in columns.items():
        if not column:
            raise ValueError(f"{name} must hold at least one item; got none")
        if None in column:
            raise ValueError(f"{name} must be given for every item; got None in item {column.index(None)}")


def _distinct(columns: dict[str, list], same: tuple[str, ...]) -> dict[str, list]:
    """The first item of each index, in order of the index; without an index, all items as they came.

    Raises:
        ValueError: two items have one index, but differ in a column of `same`, which describes the item itself.
    """
    if "index" not in columns:
        return columns
    first: dict[int, int] = {}
    for item, number in enumerate(columns["index"]):
        kept = first.setdefault(number, item)
        for name in same:
            if columns[name][item] != columns[name][kept]:
                raise ValueError(
                    f"index must name one item; got {number} for items {kept} and {item}, whose {name} differ: "
                    f"{columns[name][kept]!r} and {columns[name][item]!r}"
                )
    order = [first[number] for number in sorted(first)]
    return {name: [column[item] for item in order] for name, column in columns.items()}
