"""From a package's files to clean text: a reader for each kind of file that holds text in its own way.

A reader takes a path and gives sections: a name within the file ("" for the whole of it) and its documents. It raises
a UnicodeDecodeError where the file is not UTF-8.
"""

import gzip
import json
import re
import struct
import subprocess
import textwrap
import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from .cleaning import (
    is_written_by_hand,
    paragraph_pieces,
    text_of_html,
    without_licence_comments,
    without_licence_header,
)

Sections = Iterator[tuple[str, list[str]]]
Reader = Callable[[Path], Sections]

_CODE_PIECE = 16_000  # characters of a long source file or page per document
_PIECE = 8_000  # characters of prose, or of records, per document
_PIECES = 4  # documents of a section, at most
_ENDING = re.compile(r"^//# sourceMappingURL=.*$", re.MULTILINE)


def _sections(texts: list[str], name: str = "") -> Sections:
    """The documents of a file, or of a section called so; of a long one, some at a time. Held out as one, it would be
    the whole validation split, or be passed over for its size: that split would then show short files only."""
    if len(texts) <= _PIECES:
        yield name, texts
    else:
        for first in range(0, len(texts), _PIECES):
            yield f"{name}.{first // _PIECES}", texts[first : first + _PIECES]


def _page(text: str) -> Sections:
    """The sections of one file's text; none of one that is too short to say much."""
    if len(text) >= 500:
        yield from _sections(paragraph_pieces(text, _CODE_PIECE))


def code(path: Path) -> Sections:
    """A source file written by hand, without its licence header."""
    text = without_licence_comments(without_licence_header(path.read_text(encoding="utf-8")))
    text = _ENDING.sub("", text).strip() + "\n"
    if is_written_by_hand(text):
        yield from _page(text)


def restructured_text(path: Path) -> Sections:
    """A page of reStructuredText, without its licence line; pages that only include others are left out."""
    text = re.sub(r"\A(?:\s*\.\. (?:SPDX-License|include::)[^\n]*\n)+", "", path.read_text(encoding="utf-8"))
    unseen = r"^(?:\.\. (?:tabularcolumns|raw|only|contents)::|(?:[.:*\- ]*)(?:copyright\b|©|SPDX-License)).*\n"
    yield from _page(re.sub(unseen, "", text, flags=re.MULTILINE | re.IGNORECASE))


def pod(path: Path) -> Sections:
    """A page of Perl's documentation, without entries of the index and notes to other formatters."""
    text = re.sub(r"X<<? ?[^<>]*>?>", "", path.read_text(encoding="utf-8"))
    others = r"^=for .*?(?:\n\n|\Z)|^=begin (\w+).*?^=end \1|^=(?:encoding|cut)\b[^\n]*"
    yield from _page(re.sub(others, "", text, flags=re.MULTILINE | re.DOTALL))


def html_page(path: Path) -> Sections:
    """The words of an HTML page, without its navigation."""
    page = re.sub(r'(?s)<ul class="docnav">.*?</ul>|<p id="title">.*?</p>', "", path.read_text(encoding="utf-8"))
    for number, text in enumerate(paragraph_pieces(text_of_html(page), _PIECE)):
        yield str(number), [text]


def gzipped_book(path: Path) -> Sections:
    """A compressed plain text, indented as a whole."""
    text = textwrap.dedent(gzip.decompress(path.read_bytes()).decode())
    text = re.sub(r"^   (?=\S)", "", text, flags=re.MULTILINE)
    for number, piece in enumerate(paragraph_pieces(text, _PIECE)):
        yield str(number), [piece]


def fortunes(path: Path) -> Sections:
    """A file of short sayings between lines of `%`."""
    sayings = "\n\n".join(
        saying.strip("\n") for saying in path.read_text(encoding="utf-8").split("\n%\n") if saying.strip("\n%")
    )
    for number, piece in enumerate(paragraph_pieces(sayings, _PIECE // 2)):
        yield str(number), [piece]


def brown(path: Path) -> Sections:
    """A text of the Brown corpus: a sentence a line, the tags of its words cut off."""
    sentences = []
    for line in path.read_text(encoding="utf-8").splitlines():
        words = " ".join(token.rpartition("/")[0] for token in line.split())
        words = words.replace("`` ", '"').replace("``", '"').replace(" ''", '"').replace("''", '"')
        words = re.sub(r" ([.,;:?!)\]%])", r"\1", re.sub(r"([(\[$]) ", r"\1", words))
        # A mark is doubled where it closed both a sentence and a quotation.
        sentences.append(re.sub(r"([;?!])\1+", r"\1", words))
    text = "\n".join(sentence for sentence in sentences if sentence)
    if text:
        yield "", [text]


def bible(path: Path) -> Sections:
    """The chapters of the compressed Bible of the `bible` command.

    The file is a table of offsets, then blocks of compress(1) without their magic number, which gzip reads.
    """
    data = path.read_bytes()
    (count,) = struct.unpack_from(">I", data, 88)
    offsets = [*struct.unpack_from(f">{count}I", data, 92), len(data)]
    text = b"".join(
        subprocess.run(
            ["gzip", "--decompress", "--stdout"],
            input=b"\x1f\x9d\x90" + data[start:end],
            capture_output=True,
            check=True,
        ).stdout
        for start, end in pairwise(offsets)
    ).decode()
    chapters: dict[str, list[str]] = {}
    for book, chapter, verse, words in re.findall(r"^(\d?[A-Za-z]+)(\d+):(\d+) (.*)$", text, flags=re.MULTILINE):
        chapters.setdefault(f"{book} {chapter}", []).append(f"{verse} {words}")
    for name, verses in chapters.items():
        yield name, [name + "\n\n" + "\n".join(verses) + "\n"]


def r_novels(path: Path) -> Sections:
    """The chapters of the novels in an R database: vectors of lines, serialised and compressed one after another."""
    data, position, number = path.read_bytes(), 0, 0
    while position < len(data):
        stream = zlib.decompressobj()
        serialised = stream.decompress(data[position + 4 :])  # its length comes first
        position = len(data) - len(stream.unused_data)
        text = "\n".join(_r_strings(serialised))
        parts = re.split(r"(?im)^(?=(?:chapter|volume) [ivxlc\d]+)", text)
        for part in parts:
            number += 1
            if len(part) > 1_000:
                yield f"{number:03}", paragraph_pieces(part, _PIECE)


def _r_strings(serialised: bytes) -> Iterator[str]:
    """The elements of the first vector of strings in R's XDR serialisation."""
    # Format, three versions, then the name of the native encoding; then the vector: its type, 16, and its length.
    (encoding,) = struct.unpack_from(">i", serialised, 14)
    position = 18 + encoding
    kind, count = struct.unpack_from(">ii", serialised, position)
    if kind & 0xFF != 16:
        raise ValueError(f"the R database must hold vectors of strings (type 16); got type {kind & 0xFF}")
    position += 8
    for _ in range(count):
        _, length = struct.unpack_from(">ii", serialised, position)
        position += 8
        yield serialised[position : position + max(length, 0)].decode()
        position += max(length, 0)


def metamath(path: Path) -> Sections:
    """A Metamath database, by its own section headings; the parts that state nothing are left out."""
    # A heading stands in a comment of its own, between two rules.
    sections = re.split(r"(?m)^(?=\$\(\s*\n(?:####|#\*#\*|=-=-|-\.-\.))", path.read_text(encoding="utf-8"))
    for number, section in enumerate(sections):
        texts = [text for text in paragraph_pieces(section, _PIECE) if " $." in text or "\n$." in text]
        if texts:
            yield from _sections(texts, f"{number:04}")


_NOT_WORDS = re.compile(r" (?:SMILES|InChI|InChIKey) \[| RELATED (?:SMILES|InChI|InChIKey) ")


def obo(path: Path) -> Sections:
    """The terms of an ontology in OBO format: name, definition, synonyms, and the names of related terms."""
    stanzas = path.read_text(encoding="utf-8").split("\n\n[")
    terms = [stanza for stanza in stanzas if stanza.startswith("Term]")]
    names = dict(re.findall(r"^id: (\S+)\nname: (.*)$", "\n".join(terms), flags=re.MULTILINE))
    current: list[str] = []
    number = 0
    for term in terms:
        if "\nis_obsolete: true" not in term and (text := _obo_term(term, names)):
            current.append(text)
        if sum(map(len, current)) >= _PIECE // 2:
            yield f"{number:05}", ["\n".join(current)]
            current, number = [], number + 1
    if current:
        yield f"{number:05}", ["\n".join(current)]


def _obo_term(term: str, names: dict[str, str]) -> str:
    lines = []
    for line in term.splitlines()[1:]:
        key, _, value = line.partition(": ")
        quoted = re.match(r'"((?:[^"\\]|\\.)*)"', value)
        if key in ("def", "synonym") and quoted:
            words = re.sub(r"\\(.)", lambda match: " " if match[1] == "n" else match[1], quoted[1]).strip()
            if words and not _NOT_WORDS.search(value):
                lines.append(f"{'definition' if key == 'def' else key}: {words}")
        elif key in ("name", "comment"):
            lines.append(f"{key}: {value}")
        elif key in ("is_a", "relationship"):
            relation, _, related = (
                value.rpartition(" ! ")[0].rpartition(" ") if " ! " in value else value.rpartition(" ")
            )
            if name := names.get(related):
                lines.append(f"{relation.strip() or 'is_a'}: {name}")
    lines = list(dict.fromkeys(lines))
    return "\n".join(lines) + "\n" if len(lines) >= 3 else ""


def fasta(path: Path) -> Sections:
    """Sequences in FASTA format, compressed or not, wrapped at 60 letters, some of them a document."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    current: list[str] = []
    number = 0
    for record in text.split(">")[1:]:
        header, _, sequence = record.partition("\n")
        title = " ".join(header.split("\t")[:2]).strip()
        current.append(f">{title}\n" + "\n".join(textwrap.wrap("".join(sequence.split()), 60)) + "\n")
        if sum(map(len, current)) >= _PIECE:
            yield f"{number:05}", paragraph_pieces("".join(current), _CODE_PIECE)
            current, number = [], number + 1
    if current:
        yield f"{number:05}", paragraph_pieces("".join(current), _CODE_PIECE)


def french_law(path: Path) -> Sections:
    """The sections of a code or of a collective agreement: the titles that lead to each, then its articles in force.

    Tables, most of them of wages and rates, are left out, and so is what then holds more figures than words.
    """
    root = json.loads(path.read_text(encoding="utf-8"))
    for identity, titles, articles in _law_sections(root, []):
        text = "\n".join(titles) + "\n\n" + "\n\n".join(articles) + "\n"
        if len(text) >= 500 and sum(map(text.count, "0123456789")) < 0.1 * len(text):
            yield from _sections(paragraph_pieces(text, _CODE_PIECE), identity)


def _law_sections(node: dict, titles: list[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    titles = [*titles, " ".join(node["data"].get("title", "").split())]
    articles = []
    for child in node.get("children", []):
        if child["type"] != "article":
            yield from _law_sections(child, titles)
        elif str(child["data"].get("etat") or "VIGUEUR").startswith("VIGUEUR"):
            content = child["data"].get("texteHtml") or child["data"].get("content") or ""
            words = text_of_html(re.sub(r"(?is)<table\b.*?</table>", "", content)).strip()
            if words:
                number = child["data"].get("num")
                articles.append(f"Article {number}\n{words}" if number else words)
    if articles:
        yield str(node["data"].get("id", "")), [title for title in titles if title], articles
