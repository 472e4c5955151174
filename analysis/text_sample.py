"""A sample of held-out text, token by token, with the experts that each token selected.

Shapes: B sequences, T positions, L MoE layers, E experts, K experts per token; G domains, N tokens of a text.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..data.encoding import encode
from .routing_trace import RoutedBatch

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


@dataclass(frozen=True)
class SampledText:
    """The first tokens of one window."""

    domain: str
    pieces: tuple[str, ...]
    """N strings that join to the text. A character that several tokens share stands with the first of them, and the
    others are empty. What cannot be seen is written out, as `visible` does."""
    experts: Tensor
    """int16 `[N, L, K]`, those of the largest weight first."""
    weights: Tensor
    """uint8 `[N, L, K]`: score over the sum of the K selected ones, in units of 1 / 255."""


class TextSample:
    """Keeps the experts of the first tokens of one window of each domain: an observer of `trace_windows`.

    The window is the middle one of those long enough, or the longest: chosen by what the text is, not by the routing,
    and so the same for every run.

    Args:
        windows: from `evaluation_windows`.
        num_tokens: most tokens of a window.
        layers: the layers that are kept.
    """

    def __init__(self, windows: Dataset, *, num_tokens: int, layers: Sequence[int]) -> None:
        self.num_tokens, self.layers = num_tokens, tuple(layers)
        names = np.array(windows["domain"][:])
        lengths = np.array([len(ids) for ids in windows["input_ids"]])
        self.rows = {
            str(domain): _middle(np.flatnonzero(names == domain), lengths, num_tokens) for domain in np.unique(names)
        }
        """Domain -> window."""
        self._windows = windows
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(self, batch: RoutedBatch) -> None:
        length = batch.mask.shape[1]
        wanted = set(self.rows.values())
        for place, row in enumerate(batch.rows.tolist()):
            if row not in wanted:
                continue
            real = min(int(batch.mask[place].sum()), self.num_tokens)
            tokens = slice(place * length, place * length + real)
            experts, weights = [], []
            for layer in self.layers:
                selected = batch.selected_experts[layer][tokens]
                chosen = batch.scores(layer)[tokens].gather(-1, selected)
                chosen, order = chosen.sort(dim=-1, descending=True, stable=True)
                experts.append(selected.gather(-1, order).short().cpu())
                weights.append((chosen / chosen.sum(-1, keepdim=True).clamp_min(1e-20) * 255).round().byte().cpu())
            self._kept[row] = torch.stack(experts, 1), torch.stack(weights, 1)

    def texts(self, documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[SampledText]:
        """The sampled texts, by domain in alphabetical order.

        Args:
            documents: those that the windows were cut from.
        """
        texts = []
        for domain, row in self.rows.items():
            experts, weights = self._kept[row]
            window = self._windows[row]
            # How many tokens of the document stand in windows before this one; each begins with the last of them.
            before = self._tokens_before(row)
            pieces = token_pieces(tokenizer, documents[window["document"]]["text"], before, len(experts))
            texts.append(SampledText(domain=domain, pieces=tuple(pieces), experts=experts, weights=weights))
        return texts

    def _tokens_before(self, row: int) -> int:
        document = self._windows[row]["document"]
        before = 0
        while row > 0 and self._windows[row - 1]["document"] == document:
            row -= 1
            before += len(self._windows[row]["input_ids"]) - 1
        return before


def token_pieces(tokenizer: PreTrainedTokenizerBase, text: str, start: int, number: int) -> list[str]:
    """The text of tokens `start` to `start + number` of a document that one token opens, as `SampledText.pieces`.

    Token 0 is the one that opens the document; it is written as the tokenizer writes it.
    """
    [ids] = encode(tokenizer, [text])  # which also has the tokenizer take special tokens' names for text
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    assert encoding.ids == ids
    pieces = [] if start else [visible(tokenizer.bos_token or tokenizer.eos_token)]
    first = max(start - 1, 0)
    covered = encoding.offsets[first - 1][1] if first else 0
    for _, end in encoding.offsets[first : start + number - 1]:
        # A tokenizer of bytes cuts characters: each part has the whole character's place, and the first shows it.
        pieces.append(visible(text[covered:end]))
        covered = max(covered, end)
    return pieces


def token_name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token by itself: its text with blanks seen, or the bytes of one that is no whole character."""
    text = tokenizer.decode([token])
    if "\ufffd" in text:
        written = tokenizer.convert_ids_to_tokens(token)
        if all(character in _BYTES for character in written):
            return " ".join(f"0x{_BYTES[character]:02X}" for character in written)
    return visible(text).replace(" ", "␣").replace("\n", "").replace("\t", "⇥")


def visible(text: str) -> str:
    """Text in which line ends are marked, and control characters and such written out: `\\x00`, `\\u202e`."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t" or character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return character.encode("unicode_escape").decode("ascii")


def _middle(rows: np.ndarray, lengths: np.ndarray, num_tokens: int) -> int:
    long_enough = rows[lengths[rows] >= min(num_tokens, lengths[rows].max())]
    return int(long_enough[len(long_enough) // 2])


__all__ = ["SampledText", "TextSample", "token_name", "token_pieces", "visible"]
