"""From an item's text to tokens: what a model reads, and which of its tokens are scored.

A context and each choice are encoded together, as the model met text in training. Scored are the tokens from the first
place on at which the encoding of one of the choices leaves that of the context alone, white space at the end of the
context not counted to it: then all choices are scored from the same place in the text, also where a token reaches over
the boundary. Where none does, these are the tokens that lm-evaluation-harness scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..data.encoding import encode, first_token_id
from .items import Item


@dataclass(frozen=True)
class ChoiceRequest:
    """The tokens of an item with choices."""

    context: list[int]
    """Shared by all choices, at least one."""
    continuations: list[list[int]]
    """By choice, at least one each."""
    truncated: int
    """How many tokens of the context were cut off at its beginning."""

    @property
    def length(self) -> int:
        """Tokens of the longest sequence that the model reads; the last of a continuation is only predicted."""
        return len(self.context) + max(map(len, self.continuations)) - 1


@dataclass(frozen=True)
class Prompt:
    """The tokens that a text is generated after."""

    tokens: list[int]
    truncated: int


def choice_requests(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], *, max_length: int, add_bos_token: bool = True
) -> list[ChoiceRequest]:
    """The tokens of items with choices, contexts cut off at their beginning where they are too long.

    Args:
        max_length: Most tokens that the model reads at once.
        add_bos_token: Whether a context begins with the bos token, where the tokenizer has one.

    Raises:
        ValueError: a choice alone is longer than `max_length`, or a context is empty and the tokenizer has neither a
            bos nor an eos token to stand for it.
    """
    contexts = encode(tokenizer, [item.context.rstrip() for item in items])
    wholes = iter(encode(tokenizer, [item.context + item.delimiter + text for item in items for text in item.choices]))
    requests = []
    for number, (item, context) in enumerate(zip(items, contexts, strict=True)):
        sequences = [next(wholes) for _ in item.choices]
        # No sequence is all context: something of each must be left to be scored.
        boundary = _common_start([context, *(sequence[:-1] for sequence in sequences)])
        first = _first_tokens(tokenizer, add_bos_token, empty=boundary == 0)
        sequences = [first + sequence for sequence in sequences]
        boundary += len(first)
        longest = max(map(len, sequences)) - boundary
        if longest > max_length:
            raise ValueError(
                f"choices must have at most max_length ({max_length}) tokens; got {longest} in item {number}"
            )
        truncated = max(0, boundary + longest - 1 - max_length)
        requests.append(
            ChoiceRequest(
                context=sequences[0][truncated:boundary],
                continuations=[sequence[boundary:] for sequence in sequences],
                truncated=truncated,
            )
        )
    return requests


def prompts(
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    max_length: int,
    max_new_tokens: int,
    add_bos_token: bool = True,
) -> list[Prompt]:
    """The tokens of items whose answer is generated, cut off at their beginning where no room would be left.

    Raises:
        ValueError: `max_new_tokens` leaves no room for a prompt, or a prompt is empty and the tokenizer has neither a
            bos nor an eos token to stand for it.
    """
    room = max_length - max_new_tokens
    if room < 1:
        raise ValueError(f"max_new_tokens must be below max_length ({max_length}); got {max_new_tokens}")
    made = []
    for tokens in encode(tokenizer, [item.context for item in items]):
        tokens = _first_tokens(tokenizer, add_bos_token, empty=not tokens) + tokens
        truncated = max(0, len(tokens) - room)
        made.append(Prompt(tokens[truncated:], truncated))
    return made


def _common_start(sequences: Sequence[list[int]]) -> int:
    """How many tokens all sequences begin with alike."""
    same = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        same += 1
    return same


def _first_tokens(tokenizer: PreTrainedTokenizerBase, add_bos_token: bool, empty: bool) -> list[int]:
    """What a text begins with: a text without tokens needs something to be predicted from."""
    if add_bos_token and tokenizer.bos_token_id is not None:
        return [tokenizer.bos_token_id]
    if empty:
        if first_token_id(tokenizer) is None:
            raise ValueError("tokenizer must have a bos or an eos token to stand before an empty context; got neither")
        return [first_token_id(tokenizer)]
    return []
