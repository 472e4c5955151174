"""Load-balancing losses of each MoE layer, and the router z-loss.

`B` sequences, `T` positions, `N = B*T` tokens, `E` experts, `K` experts per token; `...` stands for any leading
dimensions, such as the layers: each layer has a loss of its own, and nothing is pooled over layers.

All of them take fp32 or fp64 and return `[...]` of the same type. Masked positions (padding) enter nowhere; where no
token is left the value is 0, with gradient 0.
"""

import torch
from torch import Tensor

from ..configuration.configuration_moe import ScoringFunction
from .load import load_fraction


def router_scores(router_logits: Tensor, scoring_func: ScoringFunction) -> Tensor:
    """The scores `[..., N, E]`, between 0 and 1, to which a router adds its selection bias.

    Args:
        router_logits: `[..., N, E]`.
        scoring_func: the router's own.
    """
    return router_logits.softmax(dim=-1) if scoring_func == "softmax" else router_logits.sigmoid()


def routing_scores(router_logits: Tensor, scoring_func: ScoringFunction) -> Tensor:
    """Scores `[..., N, E]` of each token over the experts, each row summing to 1.

    Sigmoid scores are divided by their row's sum, as in the sequence-wise loss of DeepSeek-V3 (arXiv 2412.19437,
    equation 19), so that the same loss and coefficient serve both scoring functions.

    Args:
        router_logits: `[..., N, E]`.
        scoring_func: what the router itself uses.

    Returns:
        `[..., N, E]` in at least fp32.
    """
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    if scoring_func == "softmax":
        return logits.softmax(dim=-1)
    # softmax(logsigmoid(x)) = sigmoid(x) / sum sigmoid(x), without 0 / 0 where every sigmoid underflows.
    return torch.nn.functional.logsigmoid(logits).softmax(dim=-1)


def mean_scores(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """`P_i`: scores summed over the tokens, divided by the number of tokens.

    Args:
        scores: `[..., N, E]` from `routing_scores`.
        mask: boolean `[N]`, or with leading dimensions of its own; true for tokens.

    Returns:
        `[..., E]`.
    """
    if mask is None:
        return scores.sum(dim=-2) / max(scores.shape[-2], 1)
    tokens = mask.sum(dim=-1, keepdim=True).clamp(min=1)
    # where, not a product: a padded position may hold NaN or inf, and 0 * inf is NaN.
    return torch.where(mask[..., None], scores, 0.0).sum(dim=-2) / tokens


def load_balancing_loss(fraction: Tensor, mean_score: Tensor) -> Tensor:
    """`LBL = E * sum_i f_i P_i`, exactly 1 when either is uniform, whatever `K` and `E`.

    It is linear in `P`, so with `f` counted over the global batch each rank may keep its own tokens' `P`: the mean of
    the ranks' losses is the global batch's (arXiv 2501.11873).

    Args:
        fraction: load fraction `f`, `[..., E]`, summing to 1; carries no gradient.
        mean_score: `P`, `[..., E]`, summing to 1.
    """
    return fraction.shape[-1] * (fraction * mean_score).sum(dim=-1)


def sequence_load_balancing_loss(scores: Tensor, selected_experts: Tensor, mask: Tensor) -> Tensor:
    """The load-balancing loss of each sequence alone, averaged over the sequences that hold a token.

    Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2, equations 17 to 20.

    Args:
        scores: `[..., N, E]` from `routing_scores`.
        selected_experts: int64 `[..., N, K]`.
        mask: boolean `[B, T]`, true for tokens.
    """
    num_experts = scores.shape[-1]
    selections = selected_experts.unflatten(-2, mask.shape)  # [..., B, T, K]
    ones = mask.long()[..., None].expand_as(selections)
    load = torch.zeros(*selections.shape[:-2], num_experts, dtype=torch.long, device=scores.device)
    load.scatter_add_(-1, selections.flatten(-2), ones.flatten(-2))
    mean_score = mean_scores(scores.unflatten(-2, mask.shape), mask)  # [..., B, E]
    losses = load_balancing_loss(load_fraction(load, scores.dtype), mean_score)
    # A sequence of padding alone has loss 0 and is not counted.
    return losses.sum(dim=-1) / mask.any(dim=-1).sum().clamp(min=1)


def router_z_loss(router_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the tokens of `logsumexp(logits)^2`: keeps router logits small.

    Source: ST-MoE, arXiv 2202.08906, equation 5.

    Args:
        router_logits: `[..., N, E]`.
        mask: boolean `[N]`, true for tokens.
    """
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    return mean_scores(logits.logsumexp(dim=-1, keepdim=True).square(), mask).squeeze(-1)
