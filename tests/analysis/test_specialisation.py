"""Statistics of routing traces against closed forms, direct sums, and simulated truth."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from sklearn.metrics import mutual_info_score

from equipoise.analysis import (
    RoutingTrace,
    domain_divergence,
    load_by_domain,
    measure_balance,
    measure_specialisation,
    mutual_information,
    normalised_mutual_information,
    permutation_null,
)
from equipoise.analysis.specialisation import effective_experts, jackknife


def make_trace(load: torch.Tensor, domain: list[int], document: list[int] | None = None) -> RoutingTrace:
    """`load` [W, L, E] with one expert per token."""
    return RoutingTrace(
        load=load.int(),
        num_tokens=load[:, 0].sum(-1),
        domain=torch.tensor(domain),
        document=torch.tensor(document or list(range(len(domain)))),
        domains=tuple(f"domain{index}" for index in range(max(domain) + 1)),
    )


def random_trace(seed: int = 0, windows: int = 30, layers: int = 3, experts: int = 5) -> RoutingTrace:
    generator = torch.Generator().manual_seed(seed)
    load = torch.randint(0, 20, (windows, layers, experts), generator=generator)
    load[..., 0] += 200 - load.sum(-1)  # as many selections in every layer
    return make_trace(load, [window % 4 for window in range(windows)])


def test_load_by_domain_is_each_domains_own_share() -> None:
    trace = random_trace()
    shares = load_by_domain(trace)
    for domain in range(4):
        for layer in range(3):
            counts = [0] * 5
            for window in range(30):
                if int(trace.domain[window]) == domain:
                    for expert in range(5):
                        counts[expert] += int(trace.load[window, layer, expert])
            expected = [count / sum(counts) for count in counts]
            assert shares[domain, layer].tolist() == pytest.approx(expected, abs=1e-15)


def test_mutual_information_matches_its_definition() -> None:
    shares = load_by_domain(random_trace())
    for layer in range(3):
        joint = [[float(shares[g, layer, e]) / 4 for e in range(5)] for g in range(4)]
        bits = 0.0
        for g in range(4):
            for e in range(5):
                of_expert = sum(joint[other][e] for other in range(4))
                if joint[g][e] > 0:
                    bits += joint[g][e] * math.log2(joint[g][e] / (0.25 * of_expert))
        assert float(mutual_information(shares)[layer]) == pytest.approx(bits, abs=1e-14)
        of_experts = [sum(joint[g][e] for g in range(4)) for e in range(5)]
        limit = min(2.0, -sum(p * math.log2(p) for p in of_experts if p))
        assert float(normalised_mutual_information(shares)[layer]) == pytest.approx(bits / limit, abs=1e-14)


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 7))
def test_measures_match_scikit_learn_and_scipy(seed: int, domains: int, experts: int) -> None:
    # Whole counts, of which every domain has as many: scikit-learn takes no shares.
    draw = np.random.default_rng(seed)
    counts = draw.multinomial(500, draw.dirichlet(np.full(experts, 0.3), size=(domains, 2)))
    shares = torch.from_numpy(counts / 500)
    divergence, used = domain_divergence(shares), effective_experts(shares)
    for layer in range(2):
        table = shares[:, layer].numpy()
        expected = mutual_info_score(None, None, contingency=counts[:, layer]) / math.log(2)
        assert float(mutual_information(shares)[layer]) == pytest.approx(expected, abs=1e-9)
        for one in range(domains):
            assert float(used[one, layer]) == pytest.approx(2 ** entropy(table[one], base=2), rel=1e-9)
            for other in range(domains):
                squared = np.nan_to_num(jensenshannon(table[one], table[other], base=2)) ** 2
                assert float(divergence[layer, one, other]) == pytest.approx(squared, abs=1e-9)


def test_mutual_information_of_two_domains_is_their_divergence() -> None:
    shares = load_by_domain(random_trace())[:2]
    torch.testing.assert_close(domain_divergence(shares)[:, 0, 1], mutual_information(shares))


def test_jackknife_leaves_out_one_document_at_a_time() -> None:
    # Two windows a document; domains of 3, 3 and 4 documents.
    trace = random_trace(windows=20)
    domain = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2]).repeat_interleave(2)
    trace = RoutingTrace(trace.load, trace.num_tokens, domain, torch.arange(10).repeat_interleave(2), ("a", "b", "c"))
    values = []
    for document in range(10):
        kept = trace.document != document
        part = RoutingTrace(
            trace.load[kept], trace.num_tokens[kept], trace.domain[kept], trace.document[kept], trace.domains
        )
        values.append(mutual_information(load_by_domain(part)))
    values = torch.stack(values).numpy()
    for measured, of_documents in zip(
        (*jackknife(trace)[0].tolist(), float(jackknife(trace)[1])),
        (*values.T, values.mean(1)),
        strict=True,
    ):
        variance = sum(
            (len(part) - 1) / len(part) * ((part - part.mean()) ** 2).sum()
            for part in (of_documents[:3], of_documents[3:6], of_documents[6:])
        )
        assert measured == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_standard_error_is_near_that_of_new_documents() -> None:
    # Many held-out sets drawn anew: the spread of the measurement is what the jackknife says of each.
    generator = torch.Generator().manual_seed(0)
    taste = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    bits, errors = [], []
    for _ in range(60):
        mood = torch.randn(40, 3, generator=generator) * 0.4
        of = torch.arange(40) % 2
        load = torch.poisson((taste[of].log() + mood).softmax(-1) * 300, generator=generator)[:, None]
        found = measure_specialisation(make_trace(load, of.tolist()), permutations=1)
        bits.append(float(found.bits))
        errors.append(float(found.standard_error))
    assert np.mean(errors) == pytest.approx(np.std(bits), rel=0.3)


def test_no_standard_error_from_a_single_document() -> None:
    trace = random_trace(windows=4)
    assert bool(measure_specialisation(trace, permutations=1).standard_error.isnan().all())


@pytest.mark.parametrize(
    ("shares", "bits", "normalised"),
    [
        (torch.eye(8), 3, 1),  # an expert for each domain
        (torch.eye(4).repeat_interleave(2, 0), 2, 1),  # an expert for two domains: it tells which pair
        (torch.eye(4).repeat_interleave(2, 1) / 2, 2, 1),  # two experts for each domain: they tell which
        (torch.full((6, 10), 0.1), 0, 0),  # all alike
        (torch.eye(5)[:1].repeat(3, 1), 0, 0),  # a collapsed router
        (torch.tensor([[1.0, 0.0], [0.5, 0.5]]), 0.311278124459133, 0.311278124459133 / 0.811278124459133),
    ],
)
def test_closed_forms(shares: torch.Tensor, bits: float, normalised: float) -> None:
    shares = shares.double()[:, None]
    assert float(mutual_information(shares)) == pytest.approx(bits, abs=1e-12)
    assert float(normalised_mutual_information(shares)) == pytest.approx(normalised, abs=1e-12)


def test_domains_weigh_the_same_however_much_text_they_have() -> None:
    trace = random_trace()
    more = trace.domain == 2
    larger = RoutingTrace(
        load=torch.cat([trace.load, *[trace.load[more]] * 9]),
        num_tokens=torch.cat([trace.num_tokens, *[trace.num_tokens[more]] * 9]),
        domain=torch.cat([trace.domain, *[trace.domain[more]] * 9]),
        document=torch.cat([trace.document, *[trace.document[more]] * 9]),
        domains=trace.domains,
    )
    torch.testing.assert_close(
        measure_specialisation(larger, permutations=1).bits, measure_specialisation(trace, permutations=1).bits
    )


def test_specialised_trace_is_found() -> None:
    load = torch.eye(4).repeat(10, 1)[:, None] * 100
    found = measure_specialisation(make_trace(load, [0, 1, 2, 3] * 10), permutations=200)
    assert float(found.bits) == pytest.approx(2)
    assert float(found.p_value) == 1 / 201
    assert float(found.null_quantile_95) < 0.5


def test_null_is_calibrated_though_windows_of_a_document_are_alike() -> None:
    # Each layer is one experiment without any effect of the domain; documents differ, their windows hardly do.
    layers, documents, windows_each = 300, 24, 8
    generator = torch.Generator().manual_seed(0)
    taste = torch.randn(documents, layers, 6, generator=generator).softmax(-1)
    load = torch.poisson(taste.repeat_interleave(windows_each, 0) * 60, generator=generator)
    document = [window // windows_each for window in range(documents * windows_each)]
    domain = [number % 3 for number in document]
    p_value = measure_specialisation(make_trace(load, domain, document), permutations=199).p_value
    assert float(p_value.mean()) == pytest.approx(0.5, abs=0.06)
    assert 0.01 < float((p_value <= 0.05).double().mean()) < 0.1

    # What it guards against: to permute windows is to find specialisation where there is none.
    by_window = measure_specialisation(make_trace(load, domain), permutations=199).p_value
    assert float((by_window <= 0.05).double().mean()) > 0.9


def test_null_matches_a_direct_permutation_and_its_seed() -> None:
    trace = random_trace(windows=12)
    null = permutation_null(trace, permutations=5, seed=3)
    assert torch.equal(null, permutation_null(trace, permutations=5, seed=3))
    assert not torch.equal(null, permutation_null(trace, permutations=5, seed=4))
    dealt = trace.domain[torch.randperm(12, generator=torch.Generator().manual_seed(3))]
    again = RoutingTrace(trace.load, trace.num_tokens, dealt, trace.document, trace.domains)
    torch.testing.assert_close(null[0], mutual_information(load_by_domain(again)))


def test_p_value_is_one_where_nothing_can_be_told() -> None:
    # One document per domain: every permutation is a renaming.
    trace = random_trace(windows=4)
    assert measure_specialisation(trace, permutations=50).p_value.tolist() == [1.0] * 3


def test_balance_at_both_scopes() -> None:
    trace = random_trace(windows=40)
    trace.load[:, 1, 4] = 0
    measured = measure_balance(trace, micro_batch_size=5)

    def max_vio(rows: torch.Tensor, layer: int) -> float:
        total = [sum(int(row[layer, expert]) for row in rows) for expert in range(5)]
        return max(total) / (sum(total) / 5) - 1

    for layer in range(3):
        assert float(measured.max_vio_global[layer]) == pytest.approx(max_vio(trace.load, layer), rel=1e-5)
        groups = []
        for domain in range(4):  # 10 windows each: two groups of five
            rows = trace.load[trace.domain == domain]
            groups += [max_vio(rows[:5], layer), max_vio(rows[5:], layer)]
        assert float(measured.max_vio_micro[layer]) == pytest.approx(sum(groups) / 8, rel=1e-5)
    assert measured.dead_experts.tolist() == [0, 1, 0]
    assert bool((measured.load_entropy > 0).all())
    assert bool((measured.load_entropy < 1).all())


def test_micro_batch_larger_than_a_domain_takes_the_domain() -> None:
    trace = random_trace(windows=4)
    torch.testing.assert_close(
        measure_balance(trace, micro_batch_size=100).max_vio_micro,
        measure_balance(trace, micro_batch_size=1).max_vio_micro,
    )


def test_refuses() -> None:
    trace = random_trace()
    with pytest.raises(ValueError, match="permutations must be at least 1; got 0"):
        permutation_null(trace, permutations=0)
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1; got 0"):
        measure_balance(trace, micro_batch_size=0)
