"""Texts that a model generates greedily after prompts, in batches over all processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from .processes import batches_by_length, evaluating, gather, progress, share
from .requests import Prompt


@dataclass(frozen=True)
class Stopping:
    """When a text ends, beside the eos token."""

    strings: tuple[str, ...]
    """Before the first of these."""
    max_new_tokens: int


def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    stopping: Stopping,
    *,
    batch_size: int = 16,
    description: str = "generating",
) -> list[str]:
    """What the model writes after each prompt, the most likely token each time.

    Args:
        model: On the device of its process. It is left as it was.
        prompts: Padded on the left in their batches.
        batch_size: Prompts in one batch.

    Returns:
        On every process, for each prompt the text up to where it stops.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if not prompts:
        return []
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=stopping.max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    batches = batches_by_length([len(prompt.tokens) for prompt in prompts], [1] * len(prompts), batch_size)
    found: list[tuple[int, str]] = []
    with evaluating(model):
        for batch in progress(share(batches), description):
            tokens = [torch.tensor(prompts[index].tokens) for index in batch]
            input_ids = pad_sequence(tokens, batch_first=True, padding_side="left", padding_value=pad)
            lengths = torch.tensor([len(one) for one in tokens])
            mask = (torch.arange(input_ids.shape[1]) >= input_ids.shape[1] - lengths[:, None]).long()
            written = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                stopping_criteria=[_WroteOneOf(stopping.strings, tokenizer, input_ids.shape[1])],
            )[:, input_ids.shape[1] :]
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            found += [(index, _before(text, stopping.strings)) for index, text in zip(batch, texts, strict=True)]
    return gather(found, len(prompts))


class _WroteOneOf(StoppingCriteria):
    """Ends a text once it holds one of some strings. (Transformers' own criterion raises for a string that the
    tokenizer's entries cannot spell, and would be there for good.)"""

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt_length: int) -> None:
        self.strings, self.tokenizer, self.prompt_length = strings, tokenizer, prompt_length
        # A token is a byte at least, so a string that has just been completed lies within so many.
        self.tail = max((len(string.encode()) for string in strings), default=0) + 1

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        written = input_ids[:, self.prompt_length :][:, -self.tail :]
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        found = [any(string in text for string in self.strings) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]


def _before(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text
