"""How far the routers of a Mixture-of-Experts model have settled, layer by layer."""

import math

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Router saturation: how many of the experts that a token selects at a checkpoint it also selects at the end of training.
With S_n and S'_n the `top_k` experts of token n at the checkpoint and at the end, over N tokens,

    router_saturation = 1/N sum_n |S_n and S'_n| / top_k        0 .. 1 (settled), no unit

in each layer; layers are averaged, never pooled. Two routers that are balanced and know nothing of each other share
`uniform` = top_k/E. At 1 the same experts are selected, though their weights may still change. The two checkpoints see
the same text; the later one need not be the last (or even of the same run: then it compares two runs, but experts of
different runs have no common numbering).
"""

_KWARGS_DESCRIPTION = """
Args:
    experts (list of [L][T][K] int): for each item (a window), layer and token the experts that it selected at the
        checkpoint, without padding; best first if top_k is below K. T may differ.
    final_experts (list of [L][T][K] int): those that it selected at the end.
    index (list of int): only in the configuration "index". Items with the same index are one item and count once.
    num_experts (int): E; must be given.
    top_k (int): how many of a token's experts to compare, from 1 to K; all if None.
    return_items (bool): whether to return `items` too.
Returns:
    router_saturation: mean over layers, 0..1.
    uniform: top_k/E.
    num_tokens, num_items: how many.
    layers: router_saturation, a list with one value per layer.
    items: columns with one value per item, in input order, or in order of the index: router_saturation, a list with
        one value per layer; num_tokens, by which they average to the layer's; index.
Raises:
    ValueError: there is no item, experts have not the form [L][T][K] or final_experts another, an expert is none of
        num_experts or selected twice by a token, num_experts is not given, top_k is out of its range, or items with
        the same index differ in their number of tokens.
Examples:
    >>> metric = evaluate.load("evaluation/metrics/router_saturation")
    >>> result = metric.compute(
    ...     experts=[[[[0, 1], [2, 3]]]], final_experts=[[[[1, 0], [2, 1]]]], num_experts=8
    ... )
    >>> result["router_saturation"], result["uniform"]
    (0.75, 0.25)
"""

_CITATION = """
@article{muennighoff2024olmoe,
    title={OLMoE: Open Mixture-of-Experts Language Models},
    author={Muennighoff, Niklas and others},
    journal={arXiv:2409.02060},
    note={Section 5.1, router saturation},
    year={2024}
}
"""

_OPTIONAL = {"index": datasets.Value("int64")}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RouterSaturation(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        experts = datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("int64"))))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "experts": experts,
                    "final_experts": experts,
                    **_optional_features(self.config_name, _OPTIONAL),
                }
            ),
        )

    def _compute(
        self, *, num_experts: int = 0, top_k: int | None = None, return_items: bool = False, **columns: list
    ) -> dict:
        _check_given(columns)
        for name in ("experts", "final_experts"):
            columns[name] = _selections(name, columns[name], num_experts)
        for item, (window, final) in enumerate(zip(columns["experts"], columns["final_experts"], strict=True)):
            if window.shape != final.shape:
                raise ValueError(
                    f"final_experts must have the form of experts, {window.shape}; got {final.shape} in item {item}"
                )
        experts_per_token = columns["experts"][0].shape[-1]
        top_k = experts_per_token if top_k is None else top_k
        if not 1 <= top_k <= experts_per_token:
            raise ValueError(f"top_k must be from 1 to {experts_per_token}; got {top_k}")
        columns["number of tokens"] = [window.shape[1] for window in columns["experts"]]
        columns = _distinct(columns, same=("number of tokens",))

        common = [
            _in_common(window[..., :top_k], final[..., :top_k])
            for window, final in zip(columns["experts"], columns["final_experts"], strict=True)
        ]  # each [L], of whole numbers
        tokens = columns["number of tokens"]
        layers = [int(total) / (sum(tokens) * top_k) for total in np.sum(common, axis=0)]
        result: dict = {
            "router_saturation": math.fsum(layers) / len(layers),
            "uniform": top_k / num_experts,
            "num_tokens": sum(tokens),
            "num_items": len(tokens),
            "layers": {"router_saturation": layers},
        }
        if return_items:
            scores = [(shared / (number * top_k)).tolist() for shared, number in zip(common, tokens, strict=True)]
            index = {name: columns[name] for name in columns if name == "index"}
            result["items"] = {"router_saturation": scores, "num_tokens": tokens, **index}
        return result


def _in_common(window: np.ndarray, final: np.ndarray) -> np.ndarray:
    """How many experts tokens share, summed over tokens: two [L, T, k] -> [L]."""
    return (window[..., :, None] == final[..., None, :]).sum((1, 2, 3))


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
