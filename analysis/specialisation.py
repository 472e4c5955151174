"""How far experts specialise by domain, and how evenly they are loaded: statistics of a routing trace.

Shapes: W windows, U documents, L MoE layers, E experts, K experts per token; G domains, P permutations.
See `token_counts` for what token identity alone explains.

Every domain weighs the same in the measures of specialisation, however much held-out text it has: what is compared
is how the router treats each domain, and the figure of a run then does not move when a domain is given more text.
The measures of balance (MaxVio, entropy, dead experts) are those of the load as it is.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..balancing import dead_experts, load_entropy, max_vio
from .routing_trace import RoutingTrace


@dataclass(frozen=True)
class Specialisation:
    """Mutual information of domain and expert in each layer, against what chance gives."""

    bits: Tensor
    """`[L]` mutual information in bits, from 0 to log2(min(G, E))."""
    normalised: Tensor
    """`[L]` mutual information / min(H(domain), H(expert)), from 0 to 1."""
    null_bits: Tensor
    """`[P, L]` mutual information in bits under each permutation of the domain labels."""
    standard_error: Tensor
    """`[L]` of `bits`, from leaving out one document at a time; NaN where a domain has a single document."""
    standard_error_of_mean: Tensor
    """Scalar: the same of the mean over layers, whose errors are not independent."""

    @property
    def null_mean(self) -> Tensor:
        """`[L]` mean of the null in bits: the mutual information that a finite sample shows by chance."""
        return self.null_bits.mean(0)

    @property
    def null_quantile_95(self) -> Tensor:
        """`[L]` 95 % quantile of the null in bits."""
        return self.null_bits.quantile(0.95, dim=0)

    @property
    def p_value(self) -> Tensor:
        """`[L]` (1 + permutations that reach the observed value) / (1 + P), from 1 / (1 + P) to 1."""
        # A permutation that only renames the groups is the observed value but for rounding.
        reached = (self.null_bits >= self.bits - 1e-12).sum(0)
        return (1 + reached).double() / (1 + len(self.null_bits))

    def mean_over_layers(self) -> "Specialisation":
        """The same for the mean over layers, with L = 1: one number for a run."""
        return Specialisation(
            bits=self.bits.mean(0, keepdim=True),
            normalised=self.normalised.mean(0, keepdim=True),
            null_bits=self.null_bits.mean(1, keepdim=True),
            standard_error=self.standard_error_of_mean[None],
            standard_error_of_mean=self.standard_error_of_mean,
        )


@dataclass(frozen=True)
class Balance:
    """How evenly experts are loaded over an evaluation set, layer by layer."""

    max_vio_global: Tensor
    """`[L]` MaxVio of the load of all windows, from 0 (even) to E / K - 1."""
    max_vio_micro: Tensor
    """`[L]` mean MaxVio of groups of windows of one domain, from 0 to E / K - 1."""
    dead_experts: Tensor
    """`[L]` experts that no token selected, from 0 to E - K."""
    load_entropy: Tensor
    """`[L]` entropy of the load / log E, from 0 to 1 (even)."""


def load_by_domain(trace: RoutingTrace) -> Tensor:
    """Share of each domain's own selections that goes to each expert: `[G, L, E]` float64, rows sum to 1.

    Between 0 and 1 / K, since a token selects an expert once; 1 / E everywhere when nothing is specialised.
    Source: the figures of domain specialisation in arXiv 2501.11873 and in OLMoE, arXiv 2409.02060 (section 5).
    """
    return _shares(trace.load.double(), trace.domain, len(trace.domains))


def mutual_information(shares: Tensor) -> Tensor:
    """Mutual information of domain and expert, all domains weighing the same: `[..., G, L, E]` -> `[..., L]` in bits.

    I = H(mean_g s_g) - mean_g H(s_g), the entropy of the expert minus its entropy once the domain is known
    (with equal weights, the Jensen-Shannon divergence of the domains). 0 when all domains use the experts alike;
    at most log2(min(G, E)), and log2 G when no two domains share an expert. It is biased upwards on a finite
    sample: read it against `permutation_null`.

    Args:
        shares: rows that sum to 1, as from `load_by_domain`.
    """
    of_expert = _entropy_bits(shares.mean(-3))
    given_domain = _entropy_bits(shares).mean(-2)
    return (of_expert - given_domain).clamp_min(0)


def normalised_mutual_information(shares: Tensor) -> Tensor:
    """Mutual information / min(H(domain), H(expert)): `[..., G, L, E]` -> `[..., L]`, from 0 to 1, without unit.

    1 when the expert tells the domain or the domain the expert; 0 where either is certain beforehand.
    """
    limit = _entropy_bits(shares.mean(-3)).clamp_max(math.log2(shares.shape[-3]))
    return torch.where(limit > 1e-12, mutual_information(shares) / limit.clamp_min(1e-12), 0.0).clamp_max(1)


def permutation_null(trace: RoutingTrace, *, permutations: int = 1000, seed: int = 0) -> Tensor:
    """Mutual information when domain labels are dealt out anew among the documents: `[P, L]` in bits.

    The document is the unit that is exchangeable if domains do not matter. Tokens of a window are not independent,
    nor are windows of a document: to permute those would make the null too narrow, and anything look specialised.
    The test is exact if domains do not matter. If they do, dealt groups of documents differ too, the more the fewer
    documents there are, so that the null's mean is then more than sampling noise, and its excess an understatement.

    Raises:
        ValueError: `permutations` is not positive.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1; got {permutations}")
    load, domain = _documents(trace)
    generator = torch.Generator().manual_seed(seed)
    null = []
    for _ in range(permutations):
        dealt = domain[torch.randperm(len(domain), generator=generator)]
        null.append(mutual_information(_shares(load, dealt, len(trace.domains))))
    return torch.stack(null)


def jackknife(trace: RoutingTrace) -> tuple[Tensor, Tensor]:
    """Standard error of the mutual information over the documents that happened to be held out: `[L]`, and of its mean
    over layers, in bits.

    Each document is left out in turn, within its domain (the stratified jackknife: `sum_g (n_g - 1) / n_g` times the
    squared deviations from the domain's mean). It knows nothing of what another seed of training would give.
    """
    load, domain = _documents(trace)
    by_domain = _by_domain(load, domain, len(trace.domains))
    without = torch.empty(load.shape[:2], dtype=torch.float64)
    for document, of in enumerate(domain.tolist()):
        left = by_domain.clone()
        left[of] -= load[document]
        without[document] = mutual_information(left / left.sum(-1, keepdim=True))
    without = torch.cat([without, without.mean(1, keepdim=True)], dim=1)  # [U, L + 1]
    variance = torch.zeros(without.shape[1], dtype=torch.float64)
    for of in range(len(trace.domains)):
        values = without[domain == of]
        variance += (len(values) - 1) / len(values) * (values - values.mean(0)).square().sum(0)
    error = variance.sqrt()
    return error[:-1], error[-1]


def domain_divergence(shares: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each pair of domains' use of the experts: `[G, L, E]` -> `[L, G, G]` in bits.

    `H((s_a + s_b) / 2) - (H(s_a) + H(s_b)) / 2`: 0 where two domains use the experts alike, 1 where they share none
    (Lin, Divergence measures based on the Shannon entropy, 1991).
    """
    shares = shares.transpose(0, 1)  # [L, G, E]
    entropy = _entropy_bits(shares)
    together = _entropy_bits((shares[:, :, None] + shares[:, None]) / 2)
    return (together - (entropy[:, :, None] + entropy[:, None]) / 2).clamp_min(0)


def effective_experts(shares: Tensor) -> Tensor:
    """How many experts a domain uses, as many as would have its entropy if used alike: `[G, L, E]` -> `[G, L]`, from 1
    to E."""
    return 2 ** _entropy_bits(shares)


def measure_specialisation(trace: RoutingTrace, *, permutations: int = 1000, seed: int = 0) -> Specialisation:
    """Mutual information of domain and expert, layer by layer, with its permutation null."""
    shares = load_by_domain(trace)
    error, error_of_mean = jackknife(trace)
    return Specialisation(
        bits=mutual_information(shares),
        normalised=normalised_mutual_information(shares),
        null_bits=permutation_null(trace, permutations=permutations, seed=seed),
        standard_error=error,
        standard_error_of_mean=error_of_mean,
    )


def measure_balance(trace: RoutingTrace, *, micro_batch_size: int = 8) -> Balance:
    """MaxVio at two scopes, dead experts and entropy (MaxVio: arXiv 2408.15664).

    Args:
        micro_batch_size: windows in a group. Each domain's windows, in their order, are cut into groups of nearly
            equal size as close to this as they allow.

    Raises:
        ValueError: `micro_batch_size` is not positive.
    """
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be at least 1; got {micro_batch_size}")
    total = trace.load.sum(0)  # [L, E]
    groups = [
        group.sum(0)
        for domain in range(len(trace.domains))
        for group in _split(trace.load[trace.domain == domain], micro_batch_size)
    ]
    return Balance(
        max_vio_global=max_vio(total),
        max_vio_micro=max_vio(torch.stack(groups)).mean(0),
        dead_experts=dead_experts(total),
        load_entropy=load_entropy(total),
    )


def _shares(load: Tensor, domain: Tensor, num_domains: int) -> Tensor:
    """`load` [U, L, E] float64 and `domain` [U] -> [G, L, E], each domain's load over its own sum."""
    by_domain = _by_domain(load, domain, num_domains)
    return by_domain / by_domain.sum(-1, keepdim=True)


def _by_domain(load: Tensor, domain: Tensor, num_domains: int) -> Tensor:
    """`load` [U, L, E] float64 and `domain` [U] -> [G, L, E], each domain's load."""
    member = F.one_hot(domain, num_domains).to(load)  # [U, G]
    return (member.T @ load.flatten(1)).unflatten(1, load.shape[1:])


def _documents(trace: RoutingTrace) -> tuple[Tensor, Tensor]:
    """Load [U, L, E] float64 and domain [U] of each document."""
    ids, of_window = trace.document.unique(return_inverse=True)
    load = torch.zeros(len(ids), *trace.load.shape[1:], dtype=torch.float64)
    load.index_add_(0, of_window, trace.load.double())
    domain = torch.zeros(len(ids), dtype=torch.int64)
    domain[of_window] = trace.domain  # all windows of a document agree
    return load, domain


def _split(windows: Tensor, size: int) -> tuple[Tensor, ...]:
    return windows.tensor_split(max(1, round(len(windows) / size)))


def _entropy_bits(shares: Tensor) -> Tensor:
    return torch.special.entr(shares).sum(-1) / math.log(2)
