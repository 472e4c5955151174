"""Domain specialisation: closed forms, scikit-learn, scipy, all permutations, and the statistics of the report."""

import itertools
import math
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from equipoise.analysis import RoutingTrace, measure_specialisation

METRIC = Path(__file__).parents[2] / "evaluation" / "metrics" / "domain_specialisation"


@pytest.fixture(scope="module")
def metric() -> evaluate.EvaluationModule:
    return evaluate.load(str(METRIC), keep_in_memory=True)


def items(load: np.ndarray, domain: list[int], document: list[int] | None = None) -> dict[str, Any]:
    return {
        "load": np.asarray(load).tolist(),
        "domain": [f"domain {index}" for index in domain],
        "document": document or list(range(len(domain))),
    }


@pytest.mark.parametrize(
    ("shares", "bits", "normalised", "divergence"),
    [
        (np.eye(8), 3, 1, 1),  # planted: an expert for each domain
        (np.eye(4).repeat(2, 0), 2, 1, 24 / 28),  # an expert for two domains: it tells which pair
        (np.eye(4).repeat(2, 1), 2, 1, 1),  # two experts for each domain: they tell which
        (np.ones((6, 10)), 0, 0, 0),  # all alike
        (np.eye(5)[[0, 0, 0]], 0, 0, 0),  # a collapsed router
        (np.array([[2, 0], [1, 1]]), 0.311278124459133, 0.311278124459133 / 0.811278124459133, 0.311278124459133),
    ],
)
def test_closed_forms(
    metric: evaluate.EvaluationModule, shares: np.ndarray, bits: float, normalised: float, divergence: float
) -> None:
    load = (shares * 12).astype(int)[:, None]
    result = metric.compute(**items(load, list(range(len(load)))), num_experts_per_tok=1, permutations=20)
    assert result["mutual_information"] == pytest.approx(bits, abs=1e-12)
    assert result["normalised_mutual_information"] == pytest.approx(normalised, abs=1e-12)
    assert result["jensen_shannon"] == pytest.approx(divergence, abs=1e-12)
    assert result["p_value"] == 1  # one document per domain: each permutation is a renaming


def test_planted_experts_stand_out_and_uniform_ones_are_at_the_null(metric: evaluate.EvaluationModule) -> None:
    generator = np.random.default_rng(0)
    domain = [number % 4 for number in range(40)]
    planted = np.eye(4, dtype=int)[domain][:, None] * 100
    result = metric.compute(**items(planted, domain), num_experts_per_tok=1, permutations=200)
    assert result["normalised_mutual_information"] == pytest.approx(1, abs=1e-12)
    assert result["p_value"] == 1 / 201
    assert result["null_quantile_95"] < 0.5

    layers = 200  # each an experiment in which domains do not matter
    uniform = generator.multinomial(100, [0.25] * 4, size=(40, layers))
    result = metric.compute(**items(uniform, domain), num_experts_per_tok=1, permutations=200)
    of_layers = result["layers"]
    assert result["mutual_information"] == pytest.approx(result["null_mean"], rel=0.05)
    assert np.mean(of_layers["p_value"]) == pytest.approx(0.5, abs=0.06)
    above = np.greater(of_layers["mutual_information"], of_layers["null_quantile_95"])
    assert 0.01 < above.mean() < 0.1


def random_items(seed: int, *, windows: int = 30, layers: int = 3, experts: int = 5) -> dict[str, Any]:
    """Documents of two windows, four domains, one expert per token; domains differ a little."""
    generator = np.random.default_rng(seed)
    document = [window // 2 for window in range(windows)]
    domain = [number % 4 for number in document]
    taste = generator.dirichlet(np.ones(experts) * 5, size=(4, layers))
    load = np.stack([generator.multinomial(50, taste[index]) for index in domain])
    return items(load, domain, document)


def test_matches_the_report(metric: evaluate.EvaluationModule) -> None:
    columns = random_items(0)
    result = metric.compute(**columns, num_experts_per_tok=1, permutations=3000)["layers"]
    load = torch.tensor(columns["load"])
    names = sorted(set(columns["domain"]))
    trace = RoutingTrace(
        load=load.int(),
        num_tokens=load[:, 0].sum(-1),
        domain=torch.tensor([names.index(name) for name in columns["domain"]]),
        document=torch.tensor(columns["document"]),
        domains=tuple(names),
    )
    report = measure_specialisation(trace, permutations=3000)
    assert result["mutual_information"] == pytest.approx(report.bits.tolist(), abs=1e-13)
    assert result["normalised_mutual_information"] == pytest.approx(report.normalised.tolist(), abs=1e-13)
    # Other random numbers, the same distribution: means within four standard errors of their difference.
    error = 4 * report.null_bits.std(0) * math.sqrt(2 / 3000)
    assert bool(((torch.tensor(result["null_mean"]) - report.null_mean).abs() < error).all())
    assert result["null_quantile_95"] == pytest.approx(report.null_quantile_95.tolist(), rel=0.06)
    assert result["p_value"] == pytest.approx(report.p_value.tolist(), abs=0.04)


def test_the_null_is_the_mean_over_all_permutations(metric: evaluate.EvaluationModule) -> None:
    generator = np.random.default_rng(1)
    load = generator.multinomial(30, [0.4, 0.3, 0.3], size=(6, 1))
    domain = [0, 0, 0, 1, 1, 1]
    exact = []
    for chosen in itertools.combinations(range(6), 3):
        groups = np.array([load[list(chosen), 0].sum(0), load[[n for n in range(6) if n not in chosen], 0].sum(0)])
        exact.append(mutual_info_score(None, None, contingency=groups) / math.log(2))  # groups of equal weight
    # Windows of a document move together: each document is cut into two windows here.
    halves = np.concatenate([load // 2, load - load // 2])
    columns = items(halves, domain * 2, list(range(6)) * 2)
    result = metric.compute(**columns, num_experts_per_tok=1, permutations=4000, seed=5)
    assert result["null_mean"] == pytest.approx(np.mean(exact), abs=4 * np.std(exact) / math.sqrt(4000))
    assert result["null_quantile_95"] == pytest.approx(np.quantile(exact, 0.95), rel=0.2)
    expected = np.mean(np.array(exact) >= exact[0] - 1e-12)
    assert result["p_value"] == pytest.approx(expected, abs=4 * math.sqrt(expected / 4000))
    assert metric.compute(**columns, num_experts_per_tok=1, permutations=50, seed=5) == metric.compute(
        **columns, num_experts_per_tok=1, permutations=50, seed=5
    )
    assert (
        metric.compute(**columns, num_experts_per_tok=1, permutations=50, seed=6)["null_mean"]
        != metric.compute(**columns, num_experts_per_tok=1, permutations=50, seed=5)["null_mean"]
    )


@settings(max_examples=50)
@given(st.integers(2, 5), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_matches_scikit_learn_and_scipy(domains: int, experts: int, seed: int) -> None:
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    generator = np.random.default_rng(seed)
    tokens = 24  # in each domain, as scikit-learn weighs tokens and not domains
    load = np.stack(
        [generator.multinomial(tokens, generator.dirichlet(np.ones(experts) / 2)) for _ in range(domains)]
    )[:, None]
    result = metric.compute(**items(load, list(range(domains))), num_experts_per_tok=1, permutations=1)
    of_domain = np.repeat(np.arange(domains), tokens)
    of_expert = np.concatenate([np.repeat(np.arange(experts), counts) for counts in load[:, 0]])
    assert result["mutual_information"] == pytest.approx(
        mutual_info_score(of_domain, of_expert) / math.log(2), abs=1e-12
    )
    if len(set(of_expert)) > 1:  # scikit-learn calls two partitions of one part the same
        expected = normalized_mutual_info_score(of_domain, of_expert, average_method="min")
        assert result["normalised_mutual_information"] == pytest.approx(expected, abs=1e-9)
    for one in range(domains):
        for other in range(domains):
            distance = jensenshannon(load[one, 0], load[other, 0], base=2)
            found = result["layers"]["jensen_shannon_pairs"][0][one][other]
            assert found == pytest.approx(0 if math.isnan(distance) else distance**2, abs=1e-7)


def test_domains_weigh_the_same_however_much_text_they_have(metric: evaluate.EvaluationModule) -> None:
    columns = random_items(2)
    again = [number for number, name in enumerate(columns["domain"]) if name == "domain 1"] * 9
    larger = {name: column + [column[number] for number in again] for name, column in columns.items()}
    for name in ("mutual_information", "normalised_mutual_information", "jensen_shannon"):
        one, other = (
            metric.compute(**given, num_experts_per_tok=1, permutations=1)[name] for given in (columns, larger)
        )
        assert one == pytest.approx(other, abs=1e-14)


def test_share_of_a_domains_tokens_routed_to_an_expert(metric: evaluate.EvaluationModule) -> None:
    # Two experts per token: domain a has 10 tokens, all to expert 0 and half each to 1 and 2.
    result = metric.compute(
        load=[[[4, 4, 0, 0]], [[6, 1, 5, 0]], [[0, 3, 3, 6]]],
        domain=["a", "a", "b"],
        document=[0, 1, 2],
        num_experts_per_tok=2,
        permutations=1,
    )
    assert result["domains"] == ["a", "b"]
    assert result["layers"]["domain_specialisation"] == [[[1.0, 0.5, 0.5, 0.0], [0.0, 0.5, 0.5, 1.0]]]
    assert result["uniform"] == 0.5
    assert (result["num_items"], result["num_documents"]) == (3, 3)


def test_items_average_to_the_mutual_information(metric: evaluate.EvaluationModule) -> None:
    columns = random_items(3)
    result = metric.compute(**columns, num_experts_per_tok=1, permutations=1, return_items=True)
    load = np.array(columns["load"])
    for layer in range(3):
        bits = np.array(result["items"]["pointwise_bits"])[:, layer]
        of_domains = []
        for name in result["domains"]:
            mine = [given == name for given in columns["domain"]]
            of_domains.append(np.average(bits[mine], weights=load[mine, layer].sum(-1)))
        assert np.mean(of_domains) == pytest.approx(result["layers"]["mutual_information"][layer], abs=1e-13)


def test_nulls_of_token_identity_and_of_an_untrained_router() -> None:
    metric = evaluate.load(str(METRIC), "token_load+untrained_load", keep_in_memory=True)
    alone = evaluate.load(str(METRIC), keep_in_memory=True)
    columns = random_items(4)
    untrained = random_items(5)["load"]
    token = (np.random.default_rng(6).random(np.shape(columns["load"])) * 3).tolist()
    result = metric.compute(
        **columns, token_load=token, untrained_load=untrained, num_experts_per_tok=1, permutations=10
    )
    without = alone.compute(**columns, num_experts_per_tok=1, permutations=10)
    assert {name: result[name] for name in without if name != "layers"} == {
        name: value for name, value in without.items() if name != "layers"
    }
    assert "untrained" not in without
    expected = alone.compute(**columns | {"load": untrained}, num_experts_per_tok=1, permutations=1)
    assert result["untrained"] == expected["mutual_information"]
    assert result["untrained_normalised"] == expected["normalised_mutual_information"]
    for layer in range(3):
        shares = []
        for name in result["domains"]:
            rows = [np.array(token[n])[layer] for n, given in enumerate(columns["domain"]) if given == name]
            shares.append(sum(rows) / np.sum(rows))
        bits = entropy(np.mean(shares, 0), base=2) - np.mean([entropy(row, base=2) for row in shares])
        assert result["layers"]["token_identity"][layer] == pytest.approx(bits, abs=1e-13)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be given, and at least 1; got 0"),
        ({"permutations": 0}, "permutations must be at least 1; got 0"),
        ({"domain": ["a"] * 4}, r"domain must have at least two values; got \['a'\]"),
        ({"document": [0, 0, 1, 0]}, "document must be of one domain; got document 0 of 'a' and, in item 3, of 'b'"),
        (
            {"load": [[[2, 2]], [[2, 2]], [[3, 2]], [[2, 2]]]},
            r"num_experts_per_tok \(2\) times .* got \[5\] in item 2",
        ),
        ({"load": [[[2, 2], [2, 2]]] * 3 + [[[2, 2], [1, 1]]]}, r"got \[4, 2\] in item 3"),
        ({"load": [[[2, 2]], [[4, 0]], [[2, 2]], [[2, 2]]]}, r"at most the item's tokens \(2\); got 4 in item 1"),
        ({"load": [[[2, 2]], [[2, 2]], [[0, 0]], [[0, 0]]]}, "a token of each domain in each layer; got none of 'b'"),
        ({"load": [[[2, 2]], [[2, 2]], [[0, 0]], [[2, 2]]]}, "one token of each document; got none of document 2"),
    ],
)
def test_refuses(metric: evaluate.EvaluationModule, changes: dict, message: str) -> None:
    arguments = {
        "load": [[[2, 2]]] * 4,
        "domain": ["a", "a", "b", "b"],
        "document": [0, 1, 2, 3],
        "num_experts_per_tok": 2,
        "permutations": 5,
    }
    with pytest.raises(ValueError, match=message):
        metric.compute(**arguments | changes)


def test_refuses_loads_of_other_forms() -> None:
    metric = evaluate.load(str(METRIC), "token_load", keep_in_memory=True)
    columns = random_items(0, layers=1)
    for token, message in (
        ([[[0.5] * 4]] * 30, r"token_load must have the layers and experts of load, \(1, 5\); got \(1, 4\)"),
        ([[[0.5] * 5]] * 29 + [[[math.nan] * 5]], "token_load must be finite and at least 0; got .* in item 29"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.compute(**columns, token_load=token, num_experts_per_tok=1)
