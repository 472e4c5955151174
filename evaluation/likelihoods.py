"""Log-likelihoods of choices after their contexts, in batches over all processes; a context is computed once.

Shapes: B items, S sequences (all choices of the items), T positions, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .processes import batches_by_length, evaluating, gather, progress, share
from .requests import ChoiceRequest


def choice_log_likelihoods(
    model: PreTrainedModel, requests: Sequence[ChoiceRequest], *, batch_size: int = 16, description: str = "scoring"
) -> list[list[float]]:
    """The log-likelihood of each choice of each item, in nats: the sum over its tokens.

    The choices of an item share the keys and values of its context, if all of the model's layers attend to keys and
    values; in other models (with recurrent layers, say) each choice is computed with its context.

    Args:
        model: On the device of its process. It is left as it was.
        batch_size: Most sequences in one forward pass. It changes speed and memory; of the result only how matrix
            products are rounded. The number of processes changes nothing.

    Returns:
        On every process, for each request its choices' log-likelihoods.

    Raises:
        ValueError: `batch_size` is below 1, or a log-likelihood is not finite.
    """
    if not requests:
        return []
    batches = batches_by_length(
        [request.length for request in requests], [len(request.continuations) for request in requests], batch_size
    )
    found: list[tuple[int, list[float]]] = []
    with evaluating(model):
        score = _after_cached_contexts if _caches_keys_and_values(model) else _whole_sequences
        for batch in progress(share(batches), description):
            found += zip(batch, score(model, [requests[index] for index in batch]), strict=True)
    log_likelihoods = gather(found, len(requests))
    for number, of_item in enumerate(log_likelihoods):
        if not all(map(isfinite, of_item)):
            raise ValueError(f"the model's log-likelihoods must be finite; got {of_item} for item {number}")
    return log_likelihoods


def _after_cached_contexts(model: PreTrainedModel, requests: Sequence[ChoiceRequest]) -> list[list[float]]:
    """Contexts once, padded on the left as in generation; then, after their keys and values, the choices."""
    contexts = [torch.tensor(request.context) for request in requests]
    input_ids = pad_sequence(contexts, batch_first=True, padding_side="left").to(model.device)
    context_mask = _left_mask([len(context) for context in contexts], model.device)
    outputs = _forward(model, input_ids, context_mask, _positions(context_mask), use_cache=True, logits_to_keep=1)
    first = outputs.logits[:, -1].float().log_softmax(-1)

    owners = [index for index, request in enumerate(requests) for _ in request.continuations]
    continuations = [tokens for request in requests for tokens in request.continuations]
    found = [first[owner, tokens[0]].double() for owner, tokens in zip(owners, continuations, strict=True)]
    # Of a choice of one token nothing is left to compute.
    longer = [sequence for sequence, tokens in enumerate(continuations) if len(tokens) > 1]
    if longer:
        rows = torch.tensor([owners[sequence] for sequence in longer], device=model.device)
        cache = outputs.past_key_values
        cache.batch_select_indices(rows)
        tokens = [torch.tensor(continuations[sequence]) for sequence in longer]
        inputs = pad_sequence([one[:-1] for one in tokens], batch_first=True).to(model.device)
        mask = torch.arange(inputs.shape[1]) < torch.tensor([len(one) - 1 for one in tokens])[:, None]
        mask = torch.cat([context_mask[rows], mask.long().to(model.device)], dim=1)
        positions = _positions(mask)[:, -inputs.shape[1] :]
        logits = _forward(model, inputs, mask, positions, use_cache=True, past_key_values=cache).logits
        for sequence, row_logits, one in zip(longer, logits, tokens, strict=True):
            found[sequence] = found[sequence] + _log_likelihood(row_logits[: len(one) - 1], one[1:])
    return _by_item(found, requests)


def _whole_sequences(model: PreTrainedModel, requests: Sequence[ChoiceRequest]) -> list[list[float]]:
    """Each choice with its context, padded on the right."""
    sequences = [torch.tensor(request.context + tokens) for request in requests for tokens in request.continuations]
    inputs = pad_sequence([sequence[:-1] for sequence in sequences], batch_first=True).to(model.device)
    mask = torch.arange(inputs.shape[1]) < torch.tensor([len(sequence) - 1 for sequence in sequences])[:, None]
    mask = mask.long().to(model.device)
    logits = _forward(model, inputs, mask, _positions(mask), use_cache=False).logits
    starts = [len(request.context) for request in requests for _ in request.continuations]
    found = [
        _log_likelihood(row_logits[start - 1 : len(sequence) - 1], sequence[start:])
        for row_logits, sequence, start in zip(logits, sequences, starts, strict=True)
    ]
    return _by_item(found, requests)


def _log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of `tokens` [T], each predicted by its row of `logits` [T, V]: the sum, in float64."""
    return -F.cross_entropy(logits.float(), tokens.to(logits.device), reduction="none").sum(dtype=torch.float64)


def _by_item(found: Sequence[Tensor], requests: Sequence[ChoiceRequest]) -> list[list[float]]:
    # The logarithm of a probability near 1 can be rounded to a little above 0.
    values = iter(torch.stack(list(found)).clamp(max=0).tolist())
    return [[next(values) for _ in request.continuations] for request in requests]


def _left_mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    longest = max(lengths)
    return (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long().to(device)


def _positions(mask: Tensor) -> Tensor:
    """Positions [S, T] of the tokens that a mask leaves, counted from 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _caches_keys_and_values(model: PreTrainedModel) -> bool:
    """Whether every layer's cache is keys and values alone, so that choices can go on from a context's."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    cache = model(input_ids=token, use_cache=True).get("past_key_values")
    return isinstance(cache, DynamicCache) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
    )


def _forward(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **options: Any
) -> Any:
    """A forward pass with what of this the model knows: some find positions themselves, some keep all logits."""
    known = inspect.signature(model.forward).parameters
    options |= {"attention_mask": attention_mask, "position_ids": position_ids}
    return model(input_ids=input_ids, **{name: value for name, value in options.items() if name in known})
