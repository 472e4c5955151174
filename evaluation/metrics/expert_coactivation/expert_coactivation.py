"""Which experts of a Mixture-of-Experts model are selected together, layer by layer."""

import math

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Expert co-activation: how often a token that selects expert i selects expert j too. In a layer, with N_i the tokens
that select i and N_ij those that select both,

    coactivation(i, j) = N_ij / N_i        0 .. 1, no unit

It is not symmetric, is 1 on the diagonal, and nan in the row of an expert that no token selects. Each other row sums
to K, so that its mean off the diagonal says nothing: what is reported is how uneven a row is.

    strongest_partner   mean over experts i of max_{j != i} N_ij / N_i     (K-1)/(E-1) (even) .. 1
    largest             max over pairs i != j of N_ij / N_i                (K-1)/(E-1) (even) .. 1

Layers are averaged, never pooled. High values say that experts could be merged, or belong on one device. An expert
that nearly every token selects is everyone's partner: read them beside the load. This is the definition of OLMoE's
text, over all pairs of a token's experts; its published script counts only pairs that are neighbours in rank.
"""

_KWARGS_DESCRIPTION = """
Args:
    experts (list of [L][T][K] int): for each item (a window), layer and token the experts that it selected, without
        padding. T may differ.
    index (list of int): only in the configuration "index". Items with the same index are one item and count once.
    num_experts (int): E; must be given.
    return_items (bool): whether to return `items` too.
Returns:
    strongest_partner, largest: means over layers.
    uniform: (K-1)/(E-1), every entry off the diagonal if all pairs are as frequent.
    num_tokens, num_items: how many.
    layers: strongest_partner and largest, each a list with one value per layer; largest_pair [L][2], its i and j;
        coactivation [L][E][E].
    items: columns with one value per item, in input order, or in order of the index: coactivation, a list with one
        value per layer, the mean of coactivation(i, j) over the ordered pairs of the item's tokens; index.
Raises:
    ValueError: there is no item, experts have not the form [L][T][K] with K from 2 to E and T at least 1, an expert is
        none of num_experts or selected twice by a token, num_experts is not given, or items with the same index
        differ in their number of tokens.
Examples:
    >>> metric = evaluate.load("evaluation/metrics/expert_coactivation")
    >>> result = metric.compute(experts=[[[[0, 1], [1, 0], [0, 2]]]], num_experts=4)
    >>> result["layers"]["coactivation"][0][0]
    [1.0, 0.6666666666666666, 0.3333333333333333, 0.0]
    >>> result["layers"]["largest_pair"], result["uniform"]
    ([[1, 0]], 0.3333333333333333)
"""

_CITATION = """
@article{muennighoff2024olmoe,
    title={OLMoE: Open Mixture-of-Experts Language Models},
    author={Muennighoff, Niklas and others},
    journal={arXiv:2409.02060},
    note={Section 5.2, expert co-activation},
    year={2024}
}
"""

_OPTIONAL = {"index": datasets.Value("int64")}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ExpertCoactivation(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        whole = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "experts": datasets.Sequence(datasets.Sequence(datasets.Sequence(whole))),
                    **_optional_features(self.config_name, _OPTIONAL),
                }
            ),
        )

    def _compute(self, *, num_experts: int = 0, return_items: bool = False, **columns: list) -> dict:
        _check_given(columns)
        windows = _selections("experts", columns["experts"], num_experts)
        if windows[0].shape[-1] < 2:
            raise ValueError(f"experts must hold at least two for each token; got {windows[0].shape[-1]}")
        tokens = [window.shape[1] for window in windows]
        columns = _distinct({**columns, "experts": windows, "number of tokens": tokens}, same=("number of tokens",))

        together = np.zeros((len(windows[0]), num_experts, num_experts))
        for window in columns["experts"]:
            together += _pairs(window, num_experts)
        selected = together.diagonal(axis1=1, axis2=2)[..., None]
        coactivation = np.divide(together, selected, out=np.full(together.shape, math.nan), where=selected > 0)
        layers: dict[str, list] = {"strongest_partner": [], "largest": [], "largest_pair": []}
        for matrix in coactivation:
            others = np.where(np.eye(num_experts, dtype=bool) | np.isnan(matrix), -1.0, matrix)
            strongest = others.max(-1)[others.max(-1) >= 0]
            layers["strongest_partner"].append(math.fsum(strongest.tolist()) / len(strongest))
            layers["largest"].append(float(others.max()))
            layers["largest_pair"].append([int(expert) for expert in np.unravel_index(others.argmax(), others.shape)])
        experts_per_token = columns["experts"][0].shape[-1]
        result: dict = {
            "strongest_partner": math.fsum(layers["strongest_partner"]) / len(coactivation),
            "largest": math.fsum(layers["largest"]) / len(coactivation),
            "uniform": (experts_per_token - 1) / (num_experts - 1),
            "num_tokens": sum(columns["number of tokens"]),
            "num_items": len(columns["experts"]),
            "layers": {**layers, "coactivation": coactivation.tolist()},
        }
        if return_items:
            others = ~np.eye(num_experts, dtype=bool)
            of_pairs = np.nan_to_num(coactivation[:, others])  # [L, E * (E - 1)]
            scores = []
            for window in columns["experts"]:
                weights = _pairs(window, num_experts)[:, others]
                scores.append(((weights * of_pairs).sum(-1) / weights.sum(-1)).tolist())
            index = {name: columns[name] for name in columns if name == "index"}
            result["items"] = {"coactivation": scores, **index}
        return result


def _pairs(window: np.ndarray, num_experts: int) -> np.ndarray:
    """N_ij, with N_i on the diagonal: [L, T, K] -> [L, E, E]. Exact: sums of ones, far below 2**53."""
    member = np.zeros((*window.shape[:2], num_experts))
    np.put_along_axis(member, window, 1.0, axis=-1)
    return member.transpose(0, 2, 1) @ member


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


def _selections(name: str, column: list, num_experts: int) -> list[np.ndarray]:
    """The experts [L, T, K] of each item, checked."""
    if num_experts < 2:
        raise ValueError(f"num_experts must be given, and at least 2; got {num_experts}")
    windows: list[np.ndarray] = []
    for item, rows in enumerate(column):
        try:
            window = np.array(rows, dtype=np.int64)
        except (ValueError, TypeError):  # rows of different lengths
            window = np.zeros(0, dtype=np.int64)
        if window.ndim != 3 or window.size == 0:
            raise ValueError(f"{name} must be full rows [layers][tokens][experts]; got another form in item {item}")
        form = (window.shape[0], window.shape[2])
        if windows and form != (windows[0].shape[0], windows[0].shape[2]):
            raise ValueError(
                f"{name} must have the same layers and experts per token in all items; got {form} in item {item} and "
                f"{(windows[0].shape[0], windows[0].shape[2])} in item 0"
            )
        for expert in window[(window < 0) | (window >= num_experts)].tolist():
            raise ValueError(f"{name} must be from 0 to {num_experts - 1}; got {expert} in item {item}")
        ranked = np.sort(window, axis=-1)
        for layer, token, _ in np.argwhere(ranked[..., 1:] == ranked[..., :-1]):
            raise ValueError(
                f"{name} must differ within a token; got {window[layer, token].tolist()} in item {item}, layer "
                f"{layer}, token {token}"
            )
        windows.append(window)
    return windows
