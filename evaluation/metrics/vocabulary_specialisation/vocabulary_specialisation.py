"""How far the experts of a Mixture-of-Experts model specialise by token, layer by layer."""

import math

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Vocabulary specialisation: the share of a token id's occurrences that go to an expert. In a layer, with N_x the
occurrences of token id x and N_x(e) those of which expert e is among the `top_k` experts,

    vocabulary_specialisation(e, x) = N_x(e) / N_x        0 .. 1, uniform top_k/E, no unit

The figure of a layer is the mean over token ids of the largest such share, max_e N_x(e) / N_x, each id weighing the
same; layers are averaged, never pooled. 1 means that the id alone decides which expert comes first.

The largest of few noisy shares is large by chance (it is 1 for an id that occurs once), so ids that occur less than
`min_count` times are left out, and `null_mean` says what the figure is when the ids are dealt out anew among the
tokens of the layer: the same loads and frequencies, but experts that do not look at the id. Ids may be those that the
tokens are, those that follow, or those that the model predicts: whatever the caller gives.
"""

_KWARGS_DESCRIPTION = """
Args:
    token_ids (list of [T] int): the token ids of each item, a window; without padding. T may differ.
    experts (list of [L][T][K] int): for each item, layer and token the experts that it selected, best first if top_k
        is below K.
    index (list of int): only in the configuration "index". Items with the same index are one item and count once.
    num_experts (int): E; must be given.
    top_k (int): how many of a token's experts count, from 1 to K. OLMoE's figure is of 1.
    min_count (int): token ids that occur less often are left out. OLMoE's mean is of 1, its tables of 10.
    num_top_tokens (int): token ids to list for each expert.
    permutations (int): how often ids are dealt out anew for the null.
    seed (int): seeds the permutations.
    return_items (bool): whether to return `items` too.
Returns:
    vocabulary_specialisation: mean over layers of the figure above, top_k/E..1.
    null_mean: the same for ids that say nothing, mean over permutations.
    uniform: top_k/E.
    num_token_ids: different ids that occur at least min_count times. num_tokens, num_items: how many.
    layers: vocabulary_specialisation and null_mean, each a list with one value per layer; top_tokens [L][E], for each
        expert the ids of which it gets the largest shares, as dictionaries of token_id, share (0..1) and count (N_x),
        by share, then by count.
    items: columns with one value per item, in input order, or in order of the index: vocabulary_specialisation, a list
        with one value per layer, the mean over the item's tokens of the largest share of their ids (nan if all are
        rarer than min_count); index.
Raises:
    ValueError: there is no item, experts have not the form [L][T][K] with as many tokens as token_ids, an expert is
        none of num_experts or selected twice by a token, num_experts is not given, another number is out of its
        range, no id occurs min_count times, or items with the same index differ in their token ids.
Examples:
    >>> metric = evaluate.load("evaluation/metrics/vocabulary_specialisation")
    >>> result = metric.compute(
    ...     token_ids=[[7, 8, 7, 8], [7, 7]],
    ...     experts=[[[[0], [1], [0], [2]]], [[[0], [1]]]],
    ...     num_experts=4,
    ...     min_count=2,
    ... )
    >>> result["vocabulary_specialisation"], result["layers"]["top_tokens"][0][0]
    (0.625, [{'token_id': 7, 'share': 0.75, 'count': 4}])
"""

_CITATION = """
@article{muennighoff2024olmoe,
    title={OLMoE: Open Mixture-of-Experts Language Models},
    author={Muennighoff, Niklas and others},
    journal={arXiv:2409.02060},
    note={Section 5.4, vocabulary specialization},
    year={2024}
}
"""

_OPTIONAL = {"index": datasets.Value("int64")}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class VocabularySpecialisation(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        whole = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "token_ids": datasets.Sequence(whole),
                    "experts": datasets.Sequence(datasets.Sequence(datasets.Sequence(whole))),
                    **_optional_features(self.config_name, _OPTIONAL),
                }
            ),
        )

    def _compute(
        self,
        *,
        num_experts: int = 0,
        top_k: int = 1,
        min_count: int = 10,
        num_top_tokens: int = 10,
        permutations: int = 10,
        seed: int = 0,
        return_items: bool = False,
        **columns: list,
    ) -> dict:
        _check_given(columns)
        columns["experts"] = _selections("experts", columns["experts"], num_experts)
        for item, (ids, experts) in enumerate(zip(columns["token_ids"], columns["experts"], strict=True)):
            if len(ids) != experts.shape[1]:
                raise ValueError(
                    f"token_ids must hold an id for each token ({experts.shape[1]}); got {len(ids)} in item {item}"
                )
        for name, value, most in (
            ("top_k", top_k, columns["experts"][0].shape[-1]),
            ("min_count", min_count, math.inf),
            ("num_top_tokens", num_top_tokens, math.inf),
            ("permutations", permutations, math.inf),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{name} must be from 1 to {most}; got {value}")
        columns = _distinct(columns, same=("token_ids",))

        ids = [np.array(given) for given in columns["token_ids"]]
        selected = [experts[..., :top_k] for experts in columns["experts"]]
        # In an order that does not depend on the order of the items, as the null deals by position.
        order = sorted(range(len(ids)), key=lambda item: (ids[item].tobytes(), selected[item].tobytes()))
        vocabulary, tokens, counts = np.unique(
            np.concatenate([ids[item] for item in order]), return_inverse=True, return_counts=True
        )
        experts = np.concatenate([selected[item] for item in order], axis=1)  # [L, N, top_k]
        frequent = counts >= min_count
        if not frequent.any():
            raise ValueError(f"min_count must be at most that of the commonest id, {counts.max()}; got {min_count}")

        generator = np.random.default_rng(seed)
        layers: dict[str, list] = {"vocabulary_specialisation": [], "null_mean": [], "top_tokens": []}
        largest = []
        for of_layer in experts:
            shares = _shares(tokens, of_layer, counts, num_experts)  # [ids, E]
            largest.append(shares.max(-1))
            layers["vocabulary_specialisation"].append(_mean(largest[-1][frequent]))
            null = []
            for _ in range(permutations):
                dealt = _shares(generator.permutation(tokens), of_layer, counts, num_experts)
                null.append(_mean(dealt.max(-1)[frequent]))
            layers["null_mean"].append(_mean(np.array(null)))
            layers["top_tokens"].append(_top_tokens(shares, vocabulary, counts, frequent, num_top_tokens))
        result: dict = {
            "vocabulary_specialisation": _mean(np.array(layers["vocabulary_specialisation"])),
            "null_mean": _mean(np.array(layers["null_mean"])),
            "uniform": top_k / num_experts,
            "num_token_ids": int(frequent.sum()),
            "num_tokens": len(tokens),
            "num_items": len(ids),
            "layers": layers,
        }
        if return_items:
            scores = []
            for given in ids:
                number = np.searchsorted(vocabulary, given)
                number = number[frequent[number]]
                scores.append([_mean(of_layer[number]) for of_layer in largest])
            index = {name: columns[name] for name in columns if name == "index"}
            result["items"] = {"vocabulary_specialisation": scores, **index}
        return result


def _shares(tokens: np.ndarray, experts: np.ndarray, counts: np.ndarray, num_experts: int) -> np.ndarray:
    """`tokens` [N], each the number of an id, `experts` [N, top_k] -> N_x(e) / N_x [ids, E]."""
    pairs = (tokens[:, None] * num_experts + experts).ravel()
    routed = np.bincount(pairs, minlength=len(counts) * num_experts).reshape(len(counts), num_experts)
    return routed / counts[:, None]


def _top_tokens(
    shares: np.ndarray, vocabulary: np.ndarray, counts: np.ndarray, frequent: np.ndarray, number: int
) -> list[list[dict]]:
    tops = []
    for of_expert in shares.T:
        found = np.flatnonzero(frequent & (of_expert > 0))
        found = found[np.lexsort((vocabulary[found], -counts[found], -of_expert[found]))][:number]
        tops.append(
            [
                {"token_id": int(vocabulary[each]), "share": float(of_expert[each]), "count": int(counts[each])}
                for each in found
            ]
        )
    return tops


def _mean(values: np.ndarray) -> float:
    # fsum rounds once, so that the order of the items does not matter.
    return math.fsum(values.tolist()) / len(values) if len(values) else math.nan


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
