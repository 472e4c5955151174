"""Loss-free rules: how the selection bias follows the load.

`L` MoE layers, `E` experts.
"""

from torch import Tensor


def sign_update(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """`b_i + u * sign(mean load - load_i)`, then centred.

    Centring changes no selection (all biases move alike) and keeps them from drifting away together, where fp32 and
    bf16 lose their differences.

    Args:
        bias: fp32 `[E]`.
        load: int64 `[E]`, of one global batch, the same on every rank: then so is the result, to the bit.
        rate: `u`, in units of the score.

    Returns:
        fp32 `[E]`, a new tensor.

    Source: Loss-Free Balancing, arXiv 2408.15664, algorithm 1.
    """
    # In integers: sum - E * load has the sign of mean - load, and no rounding decides a tie.
    direction = (load.sum(dim=-1, keepdim=True) - load.shape[-1] * load).sign()
    updated = bias + rate * direction.to(bias.dtype)
    return updated - updated.mean(dim=-1, keepdim=True)


BIAS_UPDATE_RULES = {"sign": sign_update}
"""`bias_update_rule` of `MoEConfig` -> `(bias [E], load [E], rate) -> bias [E]`."""
