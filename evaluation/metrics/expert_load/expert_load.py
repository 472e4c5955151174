"""How evenly the experts of a Mixture-of-Experts model are loaded, layer by layer."""

import math

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Expert load: how evenly tokens fall on the experts. With x_i the tokens of all items that selected expert i in a layer,
n = sum_i x_i, E experts, and K experts selected by each token:

    max_vio        max_i x_i / (n / E) - 1               0 (even) .. E/K - 1
    load_entropy   -sum_i (x_i/n) ln(x_i/n) / ln E       ln K / ln E .. 1 (even)
    gini           sum_ij |x_i - x_j| / (2 E n)          0 (even) .. 1 - K/E
    load_cv        standard deviation / mean of the x_i  0 (even) .. sqrt(E/K - 1)
    largest_share  max_i x_i / n                         1/E (even) .. 1/K
    dead_experts   how many x_i are 0                    0 .. E - K, experts

All but `dead_experts` are without unit. Each is computed in each layer and then averaged over layers; layers are never
pooled. An item is a window, a document or a batch: the result is of the load of all items together (MaxVio *global*),
`items` of each alone (their mean is MaxVio *micro* or *batch*, if items are micro-batches or global batches).
"""

_KWARGS_DESCRIPTION = """
Args:
    load (list of [L][E] int): for each item, how many of its tokens selected each expert in each layer.
    index (list of int): only in the configuration "index". Items with the same index are one item and count once.
    return_items (bool): whether to return `items` too.
Returns:
    max_vio, load_entropy, gini, load_cv, largest_share, dead_experts: means over layers.
    num_items: how many items.
    layers: the same six, each a list with one value per layer.
    items: columns with one value per item, in input order, or in order of the index: the same six, each a list with
        one value per layer (nan in a layer where the item has no token); index.
Raises:
    ValueError: there is no item, an item's load has not the form [L][E] of the others, there are fewer than two
        experts, a count is negative, a layer has no token in all items, or items with the same index differ in how
        many selections they count.
Examples:
    >>> metric = evaluate.load("evaluation/metrics/expert_load")
    >>> result = metric.compute(load=[[[4, 0, 0, 0]], [[0, 2, 2, 0]]])
    >>> result["max_vio"], result["gini"], result["dead_experts"]
    (1.0, 0.375, 1.0)
"""

_CITATION = """
@article{wang2024auxiliary,
    title={Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts},
    author={Wang, Lean and others},
    journal={arXiv:2408.15664},
    note={Section 4.1, MaxVio global and batch},
    year={2024}
}
"""

_OPTIONAL = {"index": datasets.Value("int64")}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExpertLoad(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "load": datasets.Sequence(datasets.Sequence(datasets.Value("int64"))),
                    **_optional_features(self.config_name, _OPTIONAL),
                }
            ),
        )

    def _compute(self, *, return_items: bool = False, **columns: list) -> dict:
        _check_given(columns)
        tables = _tables("load", columns["load"], np.int64)  # [N, L, E]
        sums = tables.sum((1, 2)).tolist()
        columns = _distinct({**columns, "load": list(tables), "sum of load": sums}, same=("sum of load",))
        tables = np.stack(columns["load"])
        total = tables.sum(0)
        for layer, counts in enumerate(total.tolist()):
            if sum(counts) == 0:
                raise ValueError(f"load must count at least one token in each layer; got none in layer {layer}")
        layers = _measures(total)
        number = len(tables)
        result: dict = {name: math.fsum(values) / len(values) for name, values in layers.items()}
        result |= {"num_items": number, "layers": layers}
        if return_items:
            each = [_measures(table) for table in tables]
            result["items"] = {name: [measures[name] for measures in each] for name in layers}
            result["items"] |= {name: columns[name] for name in columns if name == "index"}
        return result


def _measures(table: np.ndarray) -> dict[str, list[float]]:
    """Each measure in each layer, from counts [L, E]. Python's integers are exact and its division rounds once."""
    measures: dict[str, list[float]] = {}
    for counts in table.tolist():
        total, experts = sum(counts), len(counts)
        shares = [count / total if total else math.nan for count in counts]
        squares = sum(count * count for count in counts)
        ranked = sum((2 * rank - experts - 1) * count for rank, count in enumerate(sorted(counts), start=1))
        values = {
            "max_vio": (max(counts) * experts - total) / total if total else math.nan,
            "load_entropy": -math.fsum(share * math.log(share) for share in shares if share) / math.log(experts),
            "gini": ranked / (experts * total) if total else math.nan,
            "load_cv": math.sqrt(experts * squares - total * total) / total if total else math.nan,
            "largest_share": max(counts) / total if total else math.nan,
            "dead_experts": counts.count(0) if total else math.nan,
        }
        for name, value in values.items():
            measures.setdefault(name, []).append(value + 0.0)  # and -0.0, the entropy of one expert, becomes 0.0
    return measures


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


def _tables(name: str, column: list, kind: type) -> np.ndarray:
    """The tables [L][E] of all items as one array [N, L, E]."""
    shape = (len(column[0]), len(column[0][0]) if column[0] else 0)
    if shape[0] < 1 or shape[1] < 2:
        raise ValueError(f"{name} must have at least one layer and two experts; got the form {shape} in item 0")
    for item, rows in enumerate(column):
        if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
            raise ValueError(
                f"{name} must have the same {shape[0]} layers and {shape[1]} experts in all items; got rows of "
                f"{[len(row) for row in rows]} in item {item}"
            )
        least = min(min(row) for row in rows)
        if not (least >= 0 and math.isfinite(math.fsum(math.fsum(row) for row in rows))):
            raise ValueError(f"{name} must be finite and at least 0; got {rows} in item {item}")
    return np.array(column, dtype=kind)
