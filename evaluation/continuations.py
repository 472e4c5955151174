"""Continuation items of any corpus: which of four texts goes on from a context, by domain, from held-out documents.

A document is cut into windows of a context and its continuation. An item is one window with the continuations of
three other windows of the domain beside its own, from other documents where there are enough. Nothing is drawn but by
hashes of the seed, and nothing depends on a tokenizer.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from datasets import Dataset

from ..data.corpus_files import seeded
from .items import Item

NUM_CHOICES = 4
FEWEST_ITEMS = 20
"""Of a domain that gives fewer, nothing could be said."""
_LONGEST_WORD = 32  # bytes that a cut moves on to come before a space


@dataclass(frozen=True)
class _Window:
    """Places in a document's UTF-8 bytes: `[start, cut)` is the context, from `cut` on stands the continuation."""

    document: int
    start: int
    cut: int


def continuation_items(
    documents: Dataset,
    *,
    items_per_domain: int = 100,
    context_bytes: int = 384,
    continuation_bytes: int = 96,
    seed: int = 0,
) -> tuple[list[Item], dict[str, str]]:
    """Items of each domain, and why some domains have none.

    Args:
        documents: Columns `text` and `domain`.
        items_per_domain: At most so many; the first windows of as many documents as there are come first.
        context_bytes: Of UTF-8 text before the cut. The cut moves on to come before a space, if one is near.
        continuation_bytes: Most bytes of a choice. All choices of an item have the same number, at least half as
            many, cut between characters.
        seed: Draws windows, the other choices and where the true one stands.

    Returns:
        The items, domain by domain in alphabetical order (`cluster` is the document); and of each domain that is left
        out how many items it could have.

    Raises:
        ValueError: a number is below 1.
    """
    sizes = {
        "items_per_domain": items_per_domain,
        "context_bytes": context_bytes,
        "continuation_bytes": continuation_bytes,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    texts: dict[str, list[bytes]] = defaultdict(list)
    for text, domain in zip(documents["text"][:], documents["domain"][:], strict=True):
        texts[domain].append(text.encode())
    items: list[Item] = []
    left_out = {}
    for domain in sorted(texts):
        of_domain = _domain_items(domain, texts[domain], items_per_domain, context_bytes, continuation_bytes, seed)
        if len(of_domain) >= min(FEWEST_ITEMS, items_per_domain):
            items += of_domain
        else:
            left_out[domain] = (
                f"{len(of_domain)} items could be made of its held-out documents; it takes "
                f"{min(FEWEST_ITEMS, items_per_domain)}"
            )
    return items, left_out


def _domain_items(
    domain: str, texts: Sequence[bytes], most: int, context_bytes: int, continuation_bytes: int, seed: int
) -> list[Item]:
    windows = [
        window
        for document, text in enumerate(texts)
        for window in _windows(document, text, context_bytes, continuation_bytes)
    ]
    windows.sort(key=lambda window: seeded(seed, f"{domain}/{window}"))
    # One window of each document, then a second of each, ...
    turns: dict[int, int] = defaultdict(int)
    order = []
    for place, window in enumerate(windows):
        order.append((turns[window.document], place))
        turns[window.document] += 1
    items: list[Item] = []
    for _, place in sorted(order):
        if len(items) == most:
            break
        if (item := _item(domain, texts, windows, place, continuation_bytes, seed)) is not None:
            items.append(item)
    return items


def _windows(document: int, text: bytes, context_bytes: int, continuation_bytes: int) -> Iterable[_Window]:
    """Windows side by side, as long as the whole continuation is there."""
    start = 0
    while True:
        cut = _before_space(text, _character(text, start + context_bytes))
        if cut + continuation_bytes > len(text):
            return
        if text[cut : cut + continuation_bytes].strip():
            yield _Window(document, start, cut)
        start = _character(text, cut + continuation_bytes)


def _item(
    domain: str, texts: Sequence[bytes], windows: Sequence[_Window], place: int, most_bytes: int, seed: int
) -> Item | None:
    """The item of the window at a place; None where there are too few others, or they cannot be cut alike."""
    window = windows[place]
    drawn = seeded(seed, f"{domain}/others/{window}")
    chosen = [window, *_others(texts, windows, place, drawn % len(windows), most_bytes)]
    # The longest length at which none of them cuts a character.
    length = most_bytes
    while not all(_is_boundary(texts[one.document], one.cut + length) for one in chosen):
        length -= 1
    choices = [texts[one.document][one.cut : one.cut + length].decode() for one in chosen]
    if len(set(choices)) < NUM_CHOICES or 2 * length < most_bytes:
        return None
    answer = seeded(seed, f"{domain}/answer/{window}") % NUM_CHOICES
    choices.insert(answer, choices.pop(0))
    return Item(
        domain=domain,
        cluster=f"{domain}/{window.document}",
        context=texts[window.document][window.start : window.cut].decode(),
        choices=tuple(choices),
        answer=answer,
        row={},
    )


def _others(
    texts: Sequence[bytes], windows: Sequence[_Window], place: int, start: int, most_bytes: int
) -> list[_Window]:
    """Windows whose continuations stand beside the true one: of as many other documents as there are."""

    def following(window: _Window) -> bytes:
        return texts[window.document][window.cut : window.cut + most_bytes]

    own = windows[place]
    seen, documents = {following(own)}, {own.document}
    chosen: list[_Window] = []
    spare: list[_Window] = []
    for window in (*windows[start:], *windows[:start]):
        if len(chosen) == NUM_CHOICES - 1:
            break
        if following(window) in seen:
            continue
        seen.add(following(window))
        (spare if window.document in documents else chosen).append(window)
        documents.add(window.document)
    spare.sort(key=lambda window: window.document == own.document)
    return (chosen + spare)[: NUM_CHOICES - 1]


def _is_boundary(text: bytes, position: int) -> bool:
    """Whether no character is cut at a position."""
    return position >= len(text) or text[position] & 0xC0 != 0x80


def _character(text: bytes, position: int) -> int:
    """The first position from there on between two characters."""
    while not _is_boundary(text, position):
        position += 1
    return position


def _before_space(text: bytes, position: int) -> int:
    """The next position before a space, where one is near: there no tokenizer joins what stands on either side."""
    for near in range(position, min(position + _LONGEST_WORD, len(text))):
        if text[near : near + 1].isspace() and not text[near - 1 : near].isspace():
            return near
    return position
