"""Which experts each token of the vocabulary goes to, counted so that no document is judged by its own counts.

Shapes: B sequences, T positions, L MoE layers, E experts, K experts per token, V vocabulary; G domains, F folds,
M tokens of the vocabulary that are counted by themselves.
"""

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from .routing_trace import RoutedBatch

FOLDS = 5
MEMORY = 2**29
"""Bytes that the counts may take: with 16 experts in 4 layers 400,000 tokens of the vocabulary, with 128 in 48 layers
4,000. The tokens that are least frequent in the text share one row."""
FEWEST = 8
"""A share of a token's occurrences is read only where it occurs so often, as in OLMoE."""


class TokenCounts:
    """Counts selections by token of the vocabulary, expert and fold of documents: an observer of `trace_windows`.

    Each domain's documents are dealt out in turn to `F` folds. What a token does is estimated for a document from the
    other folds, never from itself; the memory this takes depends on the vocabulary, not on the amount of text.

    Args:
        windows: from `evaluation_windows`, all that will be observed.
        num_layers: L.
        num_experts: E.
        folds: F, at least 2.
        memory: most bytes that the counts may take; tokens that do not fit, the least frequent, share a row.
    """

    def __init__(
        self, windows: Dataset, *, num_layers: int, num_experts: int, folds: int = FOLDS, memory: int = MEMORY
    ) -> None:
        frequency = token_frequency(windows)
        row_bytes = 4 * folds * num_layers * num_experts
        order = np.argsort(-frequency, kind="stable")[: np.count_nonzero(frequency)]
        self.tokens = torch.from_numpy(order[: max(1, memory // row_bytes)].copy())
        """`[M]` int64: the tokens counted by themselves, the most frequent first."""
        self.covered = float(frequency[self.tokens.numpy()].sum() / frequency.sum())
        """Share of the text that they are."""
        self._row = torch.full((len(frequency),), len(self.tokens))
        self._row[self.tokens] = torch.arange(len(self.tokens))
        names = windows["domain"][:]
        self.domains = tuple(sorted(set(names)))
        index = {name: position for position, name in enumerate(self.domains)}
        self._domain = torch.tensor([index[name] for name in names])
        self._fold = _folds(self._domain.numpy(), np.array(windows["document"][:]), folds)
        rows = len(self.tokens) + 1  # the last is that of all other tokens
        self.load = torch.zeros(folds, num_layers, rows, num_experts, dtype=torch.int32)
        """`[F, L, M + 1, E]`: selections of each expert by each token."""
        self.count = torch.zeros(folds, len(self.domains), rows, dtype=torch.int64)
        """`[F, G, M + 1]`: occurrences of each token in each domain."""

    def observe(self, batch: RoutedBatch) -> None:
        real = batch.mask.cpu()
        length = real.shape[1]
        token = self._row[batch.input_ids.cpu()[real]]
        fold = self._fold[batch.rows].repeat_interleave(length).view(real.shape)[real]
        domain = self._domain[batch.rows].repeat_interleave(length).view(real.shape)[real]
        _, layers, rows, experts = self.load.shape
        place = (fold * len(self.domains) + domain) * rows + token
        self.count.view(-1).index_add_(0, place, torch.ones_like(place))
        for layer in range(layers):
            selected = batch.selected_experts[layer].cpu()[real.flatten()]
            place = (((fold * layers + layer) * rows + token)[:, None] * experts + selected).flatten()
            self.load.view(-1).index_add_(0, place, torch.ones_like(place, dtype=torch.int32))

    def predicted_load_by_domain(self) -> Tensor:
        """Share of each domain's selections by expert if token identity alone decided: `[G, L, E]` float64.

        `sum_t n_(d,t) p(e | t)` over its own sum, with `p(e | t)` from the documents of the other folds; a token that
        occurs in none of them goes where all their tokens together go. Its mutual information with the domain is what
        a router would show that knows the vocabulary of each domain and nothing of the context.
        """
        predicted = torch.zeros(len(self.domains), *self.load.shape[1::2], dtype=torch.float64)
        for layer in range(self.load.shape[1]):
            total = self.load[:, layer].sum(0)
            for fold in range(len(self.load)):
                others = (total - self.load[fold, layer]).double()  # [M + 1, E]
                seen = others.sum(-1, keepdim=True)
                everything = others.sum(0) / others.sum().clamp_min(1)
                chance = torch.where(seen > 0, others / seen.clamp_min(1), everything)
                predicted[:, layer] += self.count[fold].double() @ chance
        return predicted / predicted.sum(-1, keepdim=True)

    def shares(self, layer: int) -> Tensor:
        """Share of each token's occurrences for which it selects each expert: `[M, E]` float64, rows sum to K."""
        return self.load[:, layer, :-1].sum(0).double() / self.occurrences()[:, None]

    def occurrences(self) -> Tensor:
        """`[M]` int64: how often each token occurs."""
        return self.count.sum((0, 1))[:-1]

    def vocabulary_specialisation(self) -> Tensor:
        """`[L]` float64: how far tokens keep to one expert, from K / E (tokens do not matter) to 1.

        OLMoE's vocabulary specialisation of an expert and a token is the share of the token's occurrences for which it
        selects the expert (arXiv 2409.02060, section 5, with the input token). This is its largest value over the
        experts, averaged over the text's tokens that occur `FEWEST` times or more; NaN where none does.
        """
        count = self.occurrences().double()
        weight = count * (count >= FEWEST)
        largest = torch.stack([self.shares(layer).amax(-1) for layer in range(self.load.shape[1])])
        return largest @ weight / weight.sum()

    def favourites(self, layer: int, number: int) -> list[list[tuple[int, float]]]:
        """Each expert's favourite tokens: those that tell most of it, of those that occur `FEWEST` times or more.

        Ranked by what a token adds to the mutual information of token and expert, `n_(t,e) log2(p(e | t) / p(e))`:
        frequent, and more so here than elsewhere.

        Returns:
            For each of the E experts at most `number` tokens, each with the share of its occurrences for which it
            selects the expert.
        """
        shares = self.shares(layer)
        load = shares * self.occurrences()[:, None]
        mean = load.sum(0) / self.occurrences().sum()
        gain = torch.where(load > 0, load * (shares / mean.clamp_min(1e-300)).log2(), 0.0)
        gain[self.occurrences() < FEWEST] = 0
        best = gain.T.topk(min(number, len(gain)))
        return [
            [
                (int(self.tokens[row]), float(shares[row, expert]))
                for row, worth in zip(rows, gains, strict=True)
                if worth > 0
            ]
            for expert, (rows, gains) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        ]


def token_frequency(windows: Dataset) -> np.ndarray:
    """How often each token of the vocabulary occurs in the windows: int64, up to the largest token there is."""
    frequency = np.zeros(0, dtype=np.int64)
    for batch in windows.select_columns(["input_ids"]).with_format("arrow").iter(10_000):
        ids = batch["input_ids"].combine_chunks().flatten().to_numpy()
        counted = np.bincount(ids, minlength=len(frequency))
        counted[: len(frequency)] += frequency
        frequency = counted
    return frequency


def _folds(domain: np.ndarray, document: np.ndarray, folds: int) -> Tensor:
    """Fold of each window: the documents of a domain are dealt out in turn."""
    fold = np.zeros(len(document), dtype=np.int64)
    for one in np.unique(domain):
        of_domain = domain == one
        fold[of_domain] = np.unique(document[of_domain], return_inverse=True)[1] % folds
    return torch.from_numpy(fold)


__all__ = ["FEWEST", "FOLDS", "TokenCounts", "token_frequency"]
