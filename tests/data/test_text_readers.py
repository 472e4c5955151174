"""Readers, each on a file small enough to read."""

import gzip
import json
import struct
import zlib
from pathlib import Path

import pytest

from equipoise.data import text_readers as read


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_code_is_cut_into_groups_of_pieces_without_licence(tmp_path: Path) -> None:
    body = "".join(f"int function_{'abcdefghij'[n % 10] * 30}_{n}();\n\n" for n in range(2_000))
    file = write(tmp_path / "a.h", "// Copyright Someone\n" + body + "//# sourceMappingURL=a.map")
    sections = list(read.code(file))
    assert len(sections) > 1
    assert all(len(texts) <= 4 for _, texts in sections)
    assert len({name for name, _ in sections}) == len(sections)
    assert "".join(text for _, texts in sections for text in texts).strip() == body.strip()
    assert list(read.code(write(tmp_path / "b.h", "// do not edit\n" + body[:2_000]))) == []
    with pytest.raises(UnicodeDecodeError):
        list(read.code(write(tmp_path / "c.h", "é".encode("latin-1") * 600)))


def test_pages_of_documentation_keep_their_words(tmp_path: Path) -> None:
    words = "A sentence of documentation.\n" * 30
    page = f".. SPDX-License-Identifier: GPL-2.0\n.. include:: <isonum.txt>\n\nTitle\n=====\n\n{words}"
    ((_, (text,)),) = read.restructured_text(write(tmp_path / "a.rst.txt", page))
    assert text.strip() == f"Title\n=====\n\n{words}".strip()
    notes = "=begin html\n\n<p>\n\n=end html\n\n=for me note\n\n"
    page = f"=encoding utf8\n\n=head1 NAME X<name>\n\n{words}\n{notes}End.\n"
    ((_, (text,)),) = read.pod(write(tmp_path / "a.pod", page))
    assert text.split() == f"=head1 NAME {words} End.".split()


def test_prose_loses_its_markup(tmp_path: Path) -> None:
    page = '<body><ul class="docnav"><li>Next</li></ul><p>One <i>word</i>.</p></body>'
    assert list(read.html_page(write(tmp_path / "a.html", page))) == [("0", ["One word.\n"])]
    sayings = "First\nsaying.\n%\nSecond\t-- Someone\n%\n"
    assert list(read.fortunes(write(tmp_path / "f", sayings))) == [("0", ["First\nsaying.\n\nSecond\t-- Someone"])]
    book = gzip.compress(b"   A line\n   and another.\n")
    assert list(read.gzipped_book(write(tmp_path / "j.txt.gz", book))) == [("0", ["A line\nand another.\n"])]
    tagged = "\n\n\tThe/at County/nn-tl ``/`` said/vbd ''/'' ,/, yes/rb (/( no/rb )/) ./.\n\n\n\tGo/vb !/. !/.\n"
    assert list(read.brown(write(tmp_path / "ca01", tagged))) == [("", ['The County "said", yes (no).\nGo!'])]


def lzw(data: bytes) -> bytes:
    """What compress(1) could write, without its magic number: 9 bits for each byte, the table left unused."""
    assert len(data) < 255, "codes then grow to 10 bits"
    bits = "".join(f"{byte:09b}"[::-1] for byte in data)
    return bytes(int(bits[start : start + 8][::-1], 2) for start in range(0, len(bits), 8))


def test_bible_is_read_by_chapters(tmp_path: Path) -> None:
    packed = [lzw(b"Holy Bible\nGe1:1 In the\nGe1:2 And "), lzw(b"the\n1Ki22:3 Know ye\n")]
    start = 92 + 4 * len(packed)
    table = struct.pack(">3I", len(packed), start, start + len(packed[0]))
    data = bytes(88) + table + b"".join(packed)
    assert list(read.bible(write(tmp_path / "bible.data", data))) == [
        ("Ge 1", ["Ge 1\n\n1 In the\n2 And the\n"]),
        ("1Ki 22", ["1Ki 22\n\n3 Know ye\n"]),
    ]


def test_novels_are_read_by_chapters(tmp_path: Path) -> None:
    def serialised(lines: list[str]) -> bytes:
        head = b"X\n" + struct.pack(">4i", 3, 0x040201, 0x030500, 5) + b"UTF-8" + struct.pack(">ii", 16, len(lines))
        return head + b"".join(struct.pack(">ii", 0x40009, len(line.encode())) + line.encode() for line in lines)

    novels = [["EMMA", "CHAPTER I", "é" * 1_200 + " one", "Chapter 2", "b" * 1_200], ["PERSUASION", "c" * 1_100]]
    data = b"".join(struct.pack(">I", len(serialised(novel))) + zlib.compress(serialised(novel)) for novel in novels)
    chapters = [texts for _, texts in read.r_novels(write(tmp_path / "Rdata.rdb", data))]
    assert [text.split("\n")[0] for texts in chapters for text in texts] == ["CHAPTER I", "Chapter 2", "PERSUASION"]
    assert chapters[0][0].split() == ["CHAPTER", "I", "é" * 1_200, "one"]


def test_metamath_is_cut_at_its_headings(tmp_path: Path) -> None:
    rule = "=-" * 39
    heading = "$(\n{0}\n  {1}\n{0}\n$)\n"
    text = "$( About this file. $)\n\n" + "".join(
        heading.format(rule, name) + f"\n{name} $a |- ph $.\n" for name in ("one", "two")
    )
    sections = list(read.metamath(write(tmp_path / "a.mm", text)))
    assert [name for name, _ in sections] == ["0001", "0002"], "what states nothing is left out"
    assert sections[1][1][0].endswith("two $a |- ph $.\n")


def test_terms_of_an_ontology_name_their_relations(tmp_path: Path) -> None:
    ontology = r"""format-version: 1.2

[Term]
id: A:1
name: whole
def: "All of it, \"whole\"." [ref:1]
synonym: "entire" EXACT []
synonym: "CCO" RELATED SMILES [ChEBI:]

[Term]
id: A:2
name: part
comment: A part.
is_a: A:1
relationship: part_of A:1 ! whole
xref: B:2

[Term]
id: A:3
name: gone
def: "No." []
comment: No more.
is_obsolete: true

[Typedef]
id: part_of
name: part of
"""
    ((_, (text,)),) = read.obo(write(tmp_path / "a.obo", ontology))
    assert text == (
        'name: whole\ndefinition: All of it, "whole".\nsynonym: entire\n'
        "\nname: part\ncomment: A part.\nis_a: whole\npart_of: whole\n"
    )


def test_sequences_are_wrapped(tmp_path: Path) -> None:
    fasta = ">a first\tof two\tmore\n" + "A" * 100 + "\nCC\n>b\nGG\n"
    expected = ">a first of two\n" + "A" * 60 + "\n" + "A" * 40 + "CC\n>b\nGG\n"
    assert list(read.fasta(write(tmp_path / "a.fasta", fasta))) == [("00000", [expected])]
    assert list(read.fasta(write(tmp_path / "a.fasta.gz", gzip.compress(fasta.encode())))) == [("00000", [expected])]


def test_law_is_read_by_sections_in_force(tmp_path: Path) -> None:
    words = "Les dispositions du présent livre sont applicables. " * 12

    def article(number: str | None, state: str, content: str) -> dict:
        return {"type": "article", "data": {"num": number, "etat": state, "texteHtml": content}}

    section = {
        "type": "section",
        "data": {"id": "S1", "title": "Titre  Ier :\r\n Champ "},
        "children": [
            article("L1", "VIGUEUR", f"<p>{words}</p><table><tr><td>1 2 3</td></tr></table>"),
            article(None, "VIGUEUR_ETEN", "<p>Sans <br/>numéro.</p>"),
            article("L3", "ABROGE", "<p>Abrogé</p>"),
        ],
    }
    wages = {
        "type": "section",
        "data": {"id": "S2", "title": "Salaires"},
        "children": [article("1", "VIGUEUR", "<p>" + "1 234,56 euros " * 60 + "</p>")],
    }
    code = {"type": "code", "data": {"id": "C", "title": "Code"}, "children": [section, wages]}
    ((name, (text,)),) = read.french_law(write(tmp_path / "LEGI.json", json.dumps(code)))
    assert name == "S1"
    assert text == f"Code\nTitre Ier : Champ\n\nArticle L1\n{words.strip()}\n\nSans\nnuméro.\n"
