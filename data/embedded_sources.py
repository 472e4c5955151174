"""Where the embedded corpus comes from: what Python and the installed packages brought along.

A domain is a set of *sources* (packages, or task generators), each an iterator of document groups. Sources take
turns, the one that has given fewest bytes next, so that a large package does not drown the small ones.
"""

import sysconfig
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from .cleaning import docstrings, is_written_by_hand, pieces, without_licence_header
from .corpus_files import Group, seeded

_STDLIB = "stdlib"
_OWN_NAME = __name__.partition(".")[0]
_TESTS = {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
_CPP_SUFFIXES = (".h", ".hpp", ".cuh", ".cc", ".cpp", ".cu")
_MARKED_UP = (".json", ".jsonl", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".xml", ".xsl", ".svg")
_TABLE_SUFFIXES = (*_MARKED_UP, ".afm", ".arff", ".dat", ".sav", ".tab", ".types", ".zi")  # fonts, time zones, ...
_PIECE = 16_000  # characters of a table per document
_LARGEST_TABLE = 400_000  # characters: of a larger one, the beginning


@dataclass(frozen=True)
class Domain:
    """One domain of the recipe."""

    description: str
    # seed -> per source, its groups in seeded order
    sources: Callable[["Installation", int], dict[str, Iterator[Group]]]
    # Documents of one template share their long lines whatever they ask: only exact copies are copies.
    templated: bool = False


@dataclass
class Installation:
    """The text files of the standard library and of the installed packages."""

    files: dict[str, list[tuple[str, Path]]] = field(default_factory=dict)
    """Package -> (relative name, path) of each of its files."""
    distributions: dict[str, metadata.Distribution] = field(default_factory=dict)
    skipped_not_utf8: int = 0

    @classmethod
    def here(cls) -> "Installation":
        """The installation of the running interpreter."""
        found = cls()
        paths = sysconfig.get_paths()
        for distribution in metadata.distributions(path=sorted({paths["purelib"], paths["platlib"]})):
            name = distribution.metadata["Name"]
            if name == _OWN_NAME:
                continue  # else the corpus would change with every change of this package
            found.distributions[name] = distribution
            found.files[name] = [
                (f"site-packages/{file.as_posix()}", Path(str(file.locate())))
                for file in distribution.files or []
                if ".." not in file.parts and not _TESTS & set(file.parts)
            ]
        stdlib = Path(paths["stdlib"])
        found.files[_STDLIB] = [
            (f"{_STDLIB}/{file.relative_to(stdlib).as_posix()}", file)
            for file in stdlib.rglob("*.py")
            # _sysconfigdata holds the paths of the machine that Python was compiled on.
            if not _TESTS & set(file.relative_to(stdlib).parts) and not file.name.startswith("_sysconfigdata")
        ]
        return found

    def read(self, path: Path) -> str | None:
        """The file's text; None, and counted, where it is not UTF-8; None where it is gone."""
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            self.skipped_not_utf8 += 1
        except OSError:
            pass  # listed by its package, deleted since
        return None

    def groups(
        self,
        seed: int,
        suffixes: tuple[str, ...],
        texts: Callable[[str], list[str]],
        chosen: Callable[[str], bool] = lambda name: True,
    ) -> dict[str, Iterator[Group]]:
        """Per package the groups that `texts` makes of each file with one of these suffixes."""

        def of_package(package: str, files: list[tuple[str, Path]]) -> Iterator[Group]:
            for name, path in files:
                text = self.read(path)
                if text and (documents := texts(text)):
                    yield Group(name, package, documents)

        sources = {}
        for package, files in sorted(self.files.items()):
            wanted = [(name, path) for name, path in files if path.suffix in suffixes and chosen(name)]
            if wanted:
                sources[package] = of_package(package, sorted(wanted, key=lambda file: seeded(seed, file[0])))
        return sources


def _code(text: str) -> list[str]:
    text = without_licence_header(text).strip() + "\n"
    return [text] if len(text) >= 500 and is_written_by_hand(text) else []


def _gives_code(name: str) -> bool:
    # A Python file gives either its code or its docstrings, so that no sentence stands in two domains.
    return seeded(0, name) % 2 == 0


def _python(installation: Installation, seed: int) -> dict[str, Iterator[Group]]:
    return installation.groups(seed, (".py",), _code, _gives_code)


def _cpp(installation: Installation, seed: int) -> dict[str, Iterator[Group]]:
    return installation.groups(seed, _CPP_SUFFIXES, _code)


def _prose(installation: Installation, seed: int) -> dict[str, Iterator[Group]]:
    def descriptions() -> Iterator[Group]:
        for name, distribution in sorted(installation.distributions.items()):
            text = "".join(distribution.metadata.get_all("Description", []))
            if len(text) > 500:
                yield Group(f"site-packages/{name}/METADATA", name, [text.strip() + "\n"])

    def topics() -> Iterator[Group]:
        from pydoc_data.topics import topics

        for name, text in sorted(topics.items()):
            if len(text) > 500:
                yield Group(f"{_STDLIB}/pydoc_data/topics/{name}", _STDLIB, [text.strip() + "\n"])

    sources = installation.groups(seed, (".py",), docstrings, lambda name: not _gives_code(name))
    return sources | {"descriptions": descriptions(), "topics": topics()}


def _tables(installation: Installation, seed: int) -> dict[str, Iterator[Group]]:
    def texts(text: str) -> list[str]:
        if len(text) < 500 or max(map(len, text.splitlines()), default=0) > 1_000:
            return []
        return pieces(text[:_LARGEST_TABLE], _PIECE)

    def sections(groups: Iterator[Group]) -> Iterator[Group]:
        # A few files hold most of the bytes: held out whole, they would leave the rest out of validation.
        for group in groups:
            for number, section in enumerate(group.texts):
                yield Group(f"{group.source}#{number}", group.package, [section])

    def characters() -> Iterator[Group]:
        for start in range(0, 0x20000, 0x100):
            rows = []
            for code in range(start, start + 0x100):
                name = unicodedata.name(chr(code), "")
                # Ideographs and Hangul syllables are named by their number: a table of nothing.
                if name and not name.startswith(("CJK ", "HANGUL SYLLABLE", "TANGUT IDEOGRAPH", "NUSHU CHARACTER")):
                    c = chr(code)
                    rows.append(
                        f"{code:04X};{name};{unicodedata.category(c)};{unicodedata.combining(c)};"
                        f"{unicodedata.bidirectional(c)};{unicodedata.decomposition(c)};"
                        f"{unicodedata.east_asian_width(c)};{c.encode('utf-8').hex(' ')}\n"
                    )
            if rows:
                yield Group(f"{_STDLIB}/unicodedata/{start:04X}", _STDLIB, ["".join(rows)])

    files = installation.groups(seed, _TABLE_SUFFIXES, texts)
    return {package: sections(groups) for package, groups in files.items()} | {"unicodedata": characters()}


# reasoning-gym's generators that are quick and give the same items whatever PYTHONHASHSEED is.
# fmt: off
MATHS = [
    "complex_arithmetic", "simple_equations", "simple_integration", "polynomial_equations",
    "basic_arithmetic", "bitwise_arithmetic", "calendar_arithmetic", "chain_sum", "count_bits",
    "count_primes", "decimal_arithmetic", "decimal_chain_sum", "dice", "fraction_simplification", "gcd",
    "gsm_symbolic", "lcm", "leg_counting", "number_format", "power_function", "prime_factorization",
    "products", "time_intervals", "base_conversion", "simple_geometry", "advanced_geometry", "aiw",
    "circuit_logic", "knights_knaves", "self_reference", "syllogism", "family_relationships", "coin_flip",
]
_PUZZLES = [
    "maze", "mini_sudoku", "n_queens", "survo", "tower_of_hanoi", "tsumego", "kakurasu", "mahjong_puzzle",
    "course_schedule", "largest_island", "shortest_path", "game_of_life", "rotten_oranges", "rectangle_count",
    "color_cube_rotation", "modulo_grid", "rotate_matrix", "spiral_matrix", "pool_matrix",
    "manipulate_matrix", "binary_matrix", "arc_1d", "rearc", "cryptarithm", "jugs", "string_manipulation",
    "string_synthesis", "palindrome_partitioning", "ab", "binary_alternation",
]
# fmt: on


def _generated(names: list[str]) -> Callable[[Installation, int], dict[str, Iterator[Group]]]:
    def sources(installation: Installation, seed: int) -> dict[str, Iterator[Group]]:
        try:
            import reasoning_gym
        except ImportError as error:
            raise ImportError("this domain is written by reasoning-gym: pip install 'equipoise[corpus]'") from error

        def items(name: str) -> Iterator[Group]:
            dataset = reasoning_gym.create_dataset(name, seed=seed, size=20_000)
            for index in range(len(dataset)):
                item = dataset[index]
                text = f"{item['question'].strip()}\n\nAnswer: {item['answer']}\n"
                yield Group(f"reasoning-gym/{name}/{index}", "reasoning_gym", [text])

        return {name: items(name) for name in names}

    return sources


# Legal English is no domain: the licence texts of an installation hold 0.3 MB of distinct paragraphs.
DOMAINS: dict[str, Domain] = {
    "python": Domain("Python source of the standard library and of installed packages", _python),
    "cpp": Domain("C++ and CUDA headers that installed packages ship, most of them PyTorch's", _cpp),
    "math_logic": Domain("mathematics and logic, questions with answers", _generated(MATHS), templated=True),
    "puzzles": Domain("puzzles, grids and games, questions with answers", _generated(_PUZZLES), templated=True),
    "prose_en": Domain("technical English: docstrings, package descriptions, Python's help topics", _prose),
    "data_tables": Domain("tables and structured data that packages ship, and the Unicode character table", _tables),
}
