"""Counts by token against plain sums, and what token identity alone explains in planted cases."""

from collections import Counter, defaultdict

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from equipoise.analysis import mutual_information
from equipoise.analysis.routing_trace import RoutedBatch
from equipoise.analysis.token_counts import FEWEST, TokenCounts, token_frequency

DOMAINS = ("a", "b", "c")


def windows_of(documents: list[tuple[str, list[list[int]]]]) -> Dataset:
    """A window a row, from documents: domain and the token ids of its windows."""
    rows = [
        {"input_ids": ids, "labels": ids, "document": number, "domain": domain}
        for number, (domain, windows) in enumerate(documents)
        for ids in windows
    ]
    return Dataset.from_list(rows)


def observe(counts: TokenCounts, windows: Dataset, select, batch_size: int = 3) -> None:
    """Shows the windows to `counts` in padded batches; `select(token, document, place) -> [layer][k]` routes."""
    for start in range(0, len(windows), batch_size):
        rows = range(start, min(start + batch_size, len(windows)))
        length = max(len(windows[row]["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        chosen = []
        for place, row in enumerate(rows):
            window = windows[row]
            ids[place, : len(window["input_ids"])] = torch.tensor(window["input_ids"])
            mask[place, : len(window["input_ids"])] = True
            for position in range(length):
                real = position < len(window["input_ids"])
                # Padding routes too, and must not be counted.
                chosen.append(select(window["input_ids"][position] if real else 0, window["document"], position))
        experts = torch.tensor(chosen).transpose(0, 1)  # [L, B*T, K]
        counts.observe(
            RoutedBatch(
                rows=torch.tensor(list(rows)), input_ids=ids, mask=mask, router_logits=(),
                selected_experts=tuple(experts), scoring_func="softmax",
            )
        )  # fmt: skip


@given(
    st.lists(
        st.tuples(
            st.sampled_from(DOMAINS),
            st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=9), min_size=1, max_size=3),
        ),
        min_size=4,
        max_size=14,
    ),
    st.integers(2, 5),
)
def test_prediction_matches_a_sum_over_the_other_folds(documents: list, folds: int) -> None:
    windows = windows_of(documents)

    def select(token: int, document: int, place: int) -> list[list[int]]:
        first = (token + document * place) % 5
        return [[first, (first + 1 + token) % 5 if (1 + token) % 5 else (first + 1) % 5], [token % 5, (token + 2) % 5]]

    counts = TokenCounts(windows, num_layers=2, num_experts=5, folds=folds)
    observe(counts, windows, select)

    # By hand: every selection with its document, the fold of a document being its place in its domain.
    place_in_domain, fold = defaultdict(int), {}
    for number, (domain, _) in enumerate(documents):
        fold[number] = place_in_domain[domain] % folds
        place_in_domain[domain] += 1
    names = sorted({domain for domain, _ in documents})
    for layer in range(2):
        chosen = defaultdict(Counter)  # (fold, token) -> experts
        tokens = []
        for number, (domain, parts) in enumerate(documents):
            for ids in parts:
                for position, token in enumerate(ids):
                    tokens.append((number, domain, token))
                    chosen[fold[number], token].update(select(token, number, position)[layer])
        for place, name in enumerate(names):
            expected = torch.zeros(5, dtype=torch.float64)
            for number, domain, token in tokens:
                if domain != name:
                    continue
                others = [count for (f, t), count in chosen.items() if f != fold[number] and t == token]
                if not others:  # never seen elsewhere: as all tokens together
                    others = [count for (f, _), count in chosen.items() if f != fold[number]]
                pooled = sum(others, Counter())
                for expert, count in pooled.items():
                    expected[expert] += count / pooled.total()
            if expected.sum():
                expected = expected / expected.sum()
                torch.testing.assert_close(counts.predicted_load_by_domain()[place, layer], expected)


def test_a_router_that_reads_tokens_is_predicted_to_the_last_digit() -> None:
    documents = [(domain, [[token, 7, token] * 4]) for token, domain in enumerate(DOMAINS) for _ in range(5)]
    windows = windows_of(documents)
    counts = TokenCounts(windows, num_layers=1, num_experts=8)
    observe(counts, windows, lambda token, document, place: [[token]])
    predicted = counts.predicted_load_by_domain()
    expected = torch.zeros(3, 1, 8, dtype=torch.float64)
    expected[..., 7] = 1 / 3
    expected[range(3), 0, range(3)] = 2 / 3
    torch.testing.assert_close(predicted, expected)
    assert float(mutual_information(predicted)) == pytest.approx(2 / 3 * torch.tensor(3.0).log2().item())


def test_a_router_that_reads_the_domain_is_not_explained_by_tokens() -> None:
    # The same tokens everywhere; only the document tells the domain.
    documents = [(domain, [[1, 2, 3, 4]]) for domain in DOMAINS for _ in range(6)]
    windows = windows_of(documents)
    counts = TokenCounts(windows, num_layers=1, num_experts=3)
    observe(counts, windows, lambda token, document, place: [[document // 6]])
    assert float(mutual_information(counts.predicted_load_by_domain())) == pytest.approx(0, abs=1e-12)


def test_a_document_is_not_explained_by_itself() -> None:
    # Every document has a token of its own, which tells its expert: fitted to itself it would explain all.
    documents = [(domain, [[number, number]]) for number, domain in enumerate(DOMAINS * 4)]
    windows = windows_of(documents)
    counts = TokenCounts(windows, num_layers=1, num_experts=3, folds=4)
    observe(counts, windows, lambda token, document, place: [[document % 3]])
    assert float(mutual_information(counts.predicted_load_by_domain())) == pytest.approx(0, abs=1e-12)


def test_memory_is_bounded_and_what_does_not_fit_shares_a_row() -> None:
    documents = [("a", [[1] * 6 + [2] * 3 + [3]]), ("b", [[1] * 6 + [2] * 3 + [4]])] * 3
    windows = windows_of(documents)
    row = 4 * 2 * 1 * 5
    counts = TokenCounts(windows, num_layers=1, num_experts=5, folds=2, memory=2 * row)
    assert counts.tokens.tolist() == [1, 2]
    assert counts.covered == pytest.approx(0.9)
    assert counts.load.numel() * counts.load.element_size() == 3 * row  # and the row of all others
    observe(counts, windows, lambda token, document, place: [[token]])
    assert counts.occurrences().tolist() == [36, 18]
    assert counts.load[:, 0, -1].sum(0).tolist() == [0, 0, 0, 3, 3]
    # The shared row is one token: 3 and 4 go to either of their experts.
    shares = counts.predicted_load_by_domain()[:, 0]
    torch.testing.assert_close(shares[0], shares[1])
    assert shares[0].tolist() == pytest.approx([0, 0.6, 0.3, 0.05, 0.05])


def test_vocabulary_specialisation_and_favourites() -> None:
    # Token 0 always selects expert 0; token 1 goes round three experts; token 2 is too rare to be read.
    documents = [("a", [[0] * 12 + [1] * 12 + [2]]), ("b", [[1] * 12])]
    windows = windows_of(documents)
    counts = TokenCounts(windows, num_layers=1, num_experts=4, folds=2)
    rounds = iter(range(10_000))

    def select(token: int, document: int, place: int) -> list[list[int]]:
        return [[{0: 0, 1: 1 + next(rounds) % 3, 2: 3}[token]]] if token != 0 or place < 12 else [[0]]

    observe(counts, windows, select, batch_size=1)
    assert FEWEST > 1
    assert float(counts.vocabulary_specialisation()) == pytest.approx((12 * 1 + 24 / 3) / 36)
    favourites = counts.favourites(0, 3)
    assert favourites[0] == [(0, 1.0)]
    assert [token for token, _ in favourites[1]] == [1]
    assert favourites[1][0][1] == pytest.approx(1 / 3)
    assert all(token != 2 for expert in favourites for token, _ in expert)


def test_frequencies_are_those_of_all_windows() -> None:
    windows = windows_of([("a", [[5, 5], [1]]), ("b", [[5, 9]])])
    assert token_frequency(windows).tolist() == [0, 1, 0, 0, 0, 3, 0, 0, 0, 1]
