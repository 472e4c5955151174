"""Vocabulary specialisation, co-activation and saturation: OLMoE's equations, counted token by token."""

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

METRICS = Path(__file__).parents[2] / "evaluation" / "metrics"


def load(name: str) -> evaluate.EvaluationModule:
    return evaluate.load(str(METRICS / name), keep_in_memory=True)


def draw_experts(generator: np.random.Generator, layers: int, tokens: int, experts: int, chosen: int) -> np.ndarray:
    """[L, T, K], different within a token; low numbers are more frequent."""
    scores = generator.random((layers, tokens, experts)) ** np.arange(1, experts + 1)
    return scores.argsort(-1)[..., ::-1][..., :chosen]


FORMS = st.tuples(
    st.integers(1, 2),
    st.lists(st.integers(1, 8), min_size=1, max_size=4),
    st.integers(2, 6).flatmap(lambda experts: st.tuples(st.just(experts), st.integers(1, experts))),
    st.integers(0, 2**32 - 1),
)


@settings(max_examples=40)
@given(FORMS, st.data())
def test_saturation_is_the_share_in_common(form: Any, data: st.DataObject) -> None:
    layers, lengths, (experts, chosen), seed = form
    generator = np.random.default_rng(seed)
    early, late = ([draw_experts(generator, layers, length, experts, chosen) for length in lengths] for _ in range(2))
    top_k = data.draw(st.integers(1, chosen))
    result = load("router_saturation").compute(
        experts=early, final_experts=late, num_experts=experts, top_k=top_k, return_items=True
    )
    for layer in range(layers):
        shares = [
            [
                len(set(before[layer, token, :top_k]) & set(after[layer, token, :top_k])) / top_k
                for token in range(before.shape[1])
            ]
            for before, after in zip(early, late, strict=True)
        ]
        assert result["layers"]["router_saturation"][layer] == pytest.approx(
            np.mean(list(itertools.chain(*shares))), abs=1e-14
        )
        of_items = [values[layer] for values in result["items"]["router_saturation"]]
        assert of_items == pytest.approx([np.mean(of_item) for of_item in shares], abs=1e-14)
    assert result["items"]["num_tokens"] == lengths
    assert result["router_saturation"] == pytest.approx(np.mean(result["layers"]["router_saturation"]), abs=1e-14)


def test_saturation_ends_of_the_range_and_uniform() -> None:
    metric = load("router_saturation")
    generator = np.random.default_rng(0)
    early = draw_experts(generator, 2, 50, 8, 3)
    shuffled = generator.permuted(early, axis=-1)
    assert metric.compute(experts=[early], final_experts=[shuffled], num_experts=8)["router_saturation"] == 1
    low, high = np.tile([0, 1], (1, 5, 1)), np.tile([2, 3], (1, 5, 1))
    assert metric.compute(experts=[low], final_experts=[high], num_experts=4)["router_saturation"] == 0
    # Every pair of choices of 2 out of 4: the mean is what `uniform` says.
    choices = [list(pair) for pair in itertools.combinations(range(4), 2)]
    pairs = list(itertools.product(choices, choices))
    result = metric.compute(
        experts=[[[one for one, _ in pairs]]], final_experts=[[[other for _, other in pairs]]], num_experts=4
    )
    assert result["router_saturation"] == result["uniform"] == 0.5


@settings(max_examples=40)
@given(FORMS)
def test_coactivation_is_counted_over_all_pairs(form: Any) -> None:
    layers, lengths, (experts, chosen), seed = form
    experts, chosen = max(experts, 2), max(chosen, 2)
    generator = np.random.default_rng(seed)
    windows = [draw_experts(generator, layers, length, experts, chosen) for length in lengths]
    result = load("expert_coactivation").compute(experts=windows, num_experts=experts, return_items=True)
    for layer in range(layers):
        tokens = [set(token) for window in windows for token in window[layer].tolist()]
        matrix = result["layers"]["coactivation"][layer]
        best = {}
        for i in range(experts):
            with_i = [token for token in tokens if i in token]
            for j in range(experts):
                if not with_i:
                    assert math.isnan(matrix[i][j])
                    continue
                assert matrix[i][j] == pytest.approx(sum(j in token for token in with_i) / len(with_i), abs=1e-15)
            if with_i:
                assert sum(matrix[i]) == pytest.approx(chosen)
                best[i] = max(matrix[i][j] for j in range(experts) if j != i)
        assert result["layers"]["strongest_partner"][layer] == pytest.approx(np.mean(list(best.values())), abs=1e-14)
        assert result["layers"]["largest"][layer] == max(best.values())
        i, j = result["layers"]["largest_pair"][layer]
        assert i != j
        assert matrix[i][j] == max(best.values())
        for item, window in enumerate(windows):
            pairs = [pair for token in window[layer].tolist() for pair in itertools.permutations(token, 2)]
            expected = np.mean([matrix[one][other] for one, other in pairs])
            assert result["items"]["coactivation"][item][layer] == pytest.approx(expected, abs=1e-14)


def test_coactivation_of_fixed_pairs_and_of_all_pairs() -> None:
    metric = load("expert_coactivation")
    pairs = [[[0, 3], [1, 2], [3, 0], [2, 1]]]
    result = metric.compute(experts=[pairs], num_experts=4)
    assert result["strongest_partner"] == result["largest"] == 1
    assert result["layers"]["coactivation"] == [[[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]]]
    even = [[list(pair) for pair in itertools.combinations(range(4), 2)]]
    result = metric.compute(experts=[even], num_experts=4)
    assert result["strongest_partner"] == result["largest"] == result["uniform"] == 1 / 3


@settings(max_examples=40)
@given(FORMS, st.integers(1, 3), st.data())
def test_vocabulary_is_counted_id_by_id(form: Any, min_count: int, data: st.DataObject) -> None:
    layers, lengths, (experts, chosen), seed = form
    generator = np.random.default_rng(seed)
    windows = [draw_experts(generator, layers, length, experts, chosen) for length in lengths]
    ids = [generator.integers(100, 104, length).tolist() for length in lengths]
    top_k = data.draw(st.integers(1, chosen))
    counts = Counter(itertools.chain(*ids))
    frequent = {token: count for token, count in counts.items() if count >= min_count}
    arguments = {
        "token_ids": ids,
        "experts": windows,
        "num_experts": experts,
        "top_k": top_k,
        "min_count": min_count,
        "num_top_tokens": 3,
        "permutations": 1,
    }
    if not frequent:
        with pytest.raises(ValueError, match="min_count must be at most that of the commonest id"):
            load("vocabulary_specialisation").compute(**arguments)
        return
    result = load("vocabulary_specialisation").compute(**arguments, return_items=True)
    assert (result["num_token_ids"], result["num_tokens"]) == (len(frequent), sum(lengths))
    for layer in range(layers):
        routed = Counter(
            (token, expert)
            for of_window, window in zip(ids, windows, strict=True)
            for token, selected in zip(of_window, window[layer].tolist(), strict=True)
            for expert in selected[:top_k]
        )
        share = {pair: count / counts[pair[0]] for pair, count in routed.items()}
        largest = {token: max(share.get((token, expert), 0) for expert in range(experts)) for token in counts}
        expected = np.mean([largest[token] for token in frequent])
        assert result["layers"]["vocabulary_specialisation"][layer] == pytest.approx(expected, abs=1e-14)
        for expert in range(experts):
            ranked = sorted(
                (-share[token, expert], -counts[token], token) for token in frequent if (token, expert) in share
            )
            found = result["layers"]["top_tokens"][layer][expert]
            assert [(-top["share"], -top["count"], top["token_id"]) for top in found] == ranked[:3]
        for item, of_window in enumerate(ids):
            of_item = [largest[token] for token in of_window if token in frequent]
            found = result["items"]["vocabulary_specialisation"][item][layer]
            assert found == pytest.approx(np.mean(of_item), abs=1e-14) if of_item else math.isnan(found)


def test_experts_that_read_only_the_id_and_experts_that_do_not_read_it() -> None:
    metric = load("vocabulary_specialisation")
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 40, 4000)
    by_id = (ids % 8)[None, :, None]
    result = metric.compute(token_ids=[ids], experts=[by_id], num_experts=8)
    assert result["vocabulary_specialisation"] == 1
    assert [top["token_id"] % 8 for top in result["layers"]["top_tokens"][0][3]] == [3] * 5
    blind = generator.integers(0, 8, (30, 4000, 1))
    result = metric.compute(token_ids=[ids], experts=[blind], num_experts=8)
    assert result["uniform"] == 0.125
    assert result["vocabulary_specialisation"] > 0.15  # the largest of noisy shares: read it against the null
    assert result["vocabulary_specialisation"] == pytest.approx(result["null_mean"], rel=0.01)


WINDOW = [[[0, 1], [1, 2]], [[2, 3], [0, 3]]]  # two layers, two tokens, two experts each


@pytest.mark.parametrize("name", ["vocabulary_specialisation", "expert_coactivation", "router_saturation"])
@pytest.mark.parametrize(
    ("windows", "num_experts", "message"),
    [
        ([WINDOW, WINDOW], 0, "num_experts must be given, and at least 2; got 0"),
        ([WINDOW, WINDOW], 3, r"experts must be from 0 to 2; got 3 in item 0"),
        ([WINDOW, [[[0, 1]], [[2, -1]]]], 4, r"experts must be from 0 to 3; got -1 in item 1"),
        ([WINDOW, [[[0, 1], [2, 2]]] * 2], 4, r"must differ within a token; got \[2, 2\] in item 1, layer 0, token 1"),
        ([WINDOW, [[[0, 1], [1]], [[2, 3], [0, 3]]]], 4, "must be full rows .* got another form in item 1"),
        ([WINDOW, [[[0, 1], [1, 2]], [[2, 3]]]], 4, "must be full rows .* got another form in item 1"),
        ([WINDOW, [[], []]], 4, "must be full rows .* got another form in item 1"),
        (
            [WINDOW, WINDOW[:1]],
            4,
            r"same layers and experts per token .* got \(1, 2\) in item 1 and \(2, 2\)",
        ),
        ([], 4, "must hold at least one item; got none"),
    ],
)
def test_refuses_experts(name: str, windows: list, num_experts: int, message: str) -> None:
    columns = {"experts": windows}
    if name == "vocabulary_specialisation":
        columns["token_ids"] = [[5, 6]] * len(windows)
    if name == "router_saturation":
        columns["final_experts"] = windows
    with pytest.raises(ValueError, match=message):
        load(name).compute(**columns, num_experts=num_experts)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vocabulary_specialisation", {"token_ids": [[5]]}, r"an id for each token \(2\); got 1 in item 0"),
        ("vocabulary_specialisation", {"top_k": 3}, "top_k must be from 1 to 2; got 3"),
        ("vocabulary_specialisation", {"min_count": 0}, "min_count must be from 1 to inf; got 0"),
        ("vocabulary_specialisation", {"permutations": 0}, "permutations must be from 1 to inf; got 0"),
        ("vocabulary_specialisation", {"num_top_tokens": 0}, "num_top_tokens must be from 1 to inf; got 0"),
        ("vocabulary_specialisation", {"min_count": 2}, "at most that of the commonest id, 1; got 2"),
        ("router_saturation", {"final_experts": [[[[0, 1]]] * 2]}, r"\(2, 2, 2\); got \(2, 1, 2\) in item 0"),
        ("router_saturation", {"top_k": 0}, "top_k must be from 1 to 2; got 0"),
        ("router_saturation", {"top_k": 3}, "top_k must be from 1 to 2; got 3"),
        ("expert_coactivation", {"experts": [[[[0], [1]]]]}, "experts must hold at least two for each token; got 1"),
    ],
)
def test_refuses(name: str, changes: dict, message: str) -> None:
    columns = {"experts": [WINDOW], "num_experts": 4}
    if name == "vocabulary_specialisation":
        columns["token_ids"] = [[5, 6]]
    if name == "router_saturation":
        columns["final_experts"] = [WINDOW]
    with pytest.raises(ValueError, match=message):
        load(name).compute(**columns | changes)
