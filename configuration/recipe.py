"""Recipe: the domains of a mixture and where the text of each comes from, read from a YAML file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

_SOURCES = ("hub", "files", "package")
# field -> the sources that can have it; the other fields go with every source
_ONLY_WITH = {
    "config": ("hub",),
    "split": ("hub",),
    "revision": ("hub",),
    "data_files": ("hub",),
    "validation_split": ("hub",),
    "validation_files": ("files",),
    "validation_fraction": ("hub", "files"),
    "streaming": ("hub", "files"),
}


@dataclass(frozen=True, kw_only=True)
class DomainSource:
    """Where the text of one domain comes from: exactly one of `hub`, `files` and `package`."""

    hub: str | None = None
    """A data set of the Hub, e.g. `wikimedia/wikipedia`."""
    config: str | None = None
    """Its configuration, e.g. `20231101.de`."""
    split: str = "train"
    """Its split."""
    revision: str | None = None
    """Its commit, branch or tag; None is the newest."""
    data_files: tuple[str, ...] = ()
    """Paths or globs within it, e.g. `data/python/*.parquet`; none means what its configuration says."""
    files: tuple[str, ...] = ()
    """Files, folders or globs: parquet, jsonl, json, txt. In a recipe relative to it, here absolute."""
    package: str | None = None
    """A domain of the core corpus, made of packages of public registries."""
    streaming: bool = False
    """Whether documents are read as they are needed, for text larger than the disk."""
    text_column: str | None = None
    """The column with the documents' text; None is the settings' `text_column`."""
    weight: float | None = None
    """Share of the blocks drawn, relative to the other domains'; None is in proportion to the domain's blocks."""
    max_train_bytes: int | None = None
    """Most bytes of training text; None is the settings' `max_train_bytes_per_domain`."""
    max_validation_bytes: int | None = None
    """Most bytes of held-out text; None is the settings' `max_validation_bytes_per_domain`."""
    validation_fraction: float | None = None
    """Share of the documents held out; None is the settings', where the source brings no held-out part."""
    validation_split: str | None = None
    """The split of the data set that is held out."""
    validation_files: tuple[str, ...] = ()
    """The files, folders or globs that are held out."""

    def described(self) -> dict[str, Any]:
        """The fields that were given, JSON-able."""
        given = asdict(self)
        unset = {setting.name: setting.default for setting in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in given.items()
            if value != unset[name]
        }


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A mixture of domains."""

    path: Path
    """The file it was read from; errors name it."""
    domains: dict[str, DomainSource] = field(default_factory=dict)
    """Name of the domain -> where its text comes from, sorted by name."""
    package_folder: Path = Path("corpus/core")
    """Where the domains that are a `package` are, or shall be built: `<package_folder>/<domain>/train.parquet`.
    Relative to the working directory, like every output."""


def parse_recipe(path: str | Path) -> Recipe:
    """Reads a recipe.

    ```yaml
    domains:
      german: {hub: wikimedia/wikipedia, config: 20231101.de, streaming: true, weight: 2}
      letters: {files: letters/*.txt, weight: 1}
    ```

    Raises:
        ValueError: the file is missing or no mapping; a field does not exist, is of the wrong kind, out of its range,
            or does not go with the domain's source; weights are given for some domains only, or not for one that
            streams. The message names the file, the domain, the field, what it must be and what it got.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the recipe must be a file; got {path}, which is none")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: the recipe must be YAML; got {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: the recipe must be a mapping with the key domains; got {values!r}")
    for name in values:
        if name not in ("domains", "package_folder"):
            raise ValueError(f"{path}: a recipe's keys must be among domains, package_folder; got {name!r}")
    domains = values.get("domains")
    if not isinstance(domains, dict) or not domains:
        raise ValueError(
            f"{path}: domains must be a mapping of at least one domain's name to its source; got {domains!r}"
        )
    for name in domains:
        # YAML reads the names `no` and `1` as False and 1
        if not isinstance(name, str) or not name or "/" in name:
            raise ValueError(
                f"{path}: a domain's name must be a text without a slash (put it in quotes); got {name!r}"
            )
    folder = values.get("package_folder", Recipe.package_folder.as_posix())
    if not isinstance(folder, str):
        raise ValueError(f"{path}: package_folder must be a path; got {folder!r}")

    sources = {name: _source(path, name, domains[name]) for name in sorted(domains)}
    weighted = [name for name, source in sources.items() if source.weight is not None]
    for name, source in sources.items():
        if source.weight is None and (weighted or source.streaming):
            reason = f"{weighted[0]} has one" if weighted else "its number of blocks is not known, for it streams"
            raise ValueError(f"{path}: domain {name}: weight must be given, since {reason}; got none")
    return Recipe(path=path, domains=sources, package_folder=Path(folder))


def _source(path: Path, domain: str, values: Any) -> DomainSource:
    def must(name: str, rule: str, got: Any) -> ValueError:
        return ValueError(f"{path}: domain {domain}: {name} must be {rule}; got {got!r}")

    if not isinstance(values, Mapping):
        raise must("the domain", "a mapping of fields to values", values)
    known = [setting.name for setting in fields(DomainSource)]
    for name in values:
        if name not in known:
            raise must("a field", f"one of {', '.join(known)}", name)
    values = {name: value for name, value in values.items() if value is not None}
    kinds = [name for name in _SOURCES if name in values]
    if len(kinds) != 1:
        raise must("the source", f"exactly one of {', '.join(_SOURCES)}", kinds or None)
    kind = kinds[0]
    for name, allowed in _ONLY_WITH.items():
        if name in values and kind not in allowed:
            raise must(name, f"given only with {' or '.join(allowed)}", f"{name} with {kind}")
    held_out = [name for name in values if name in ("validation_fraction", "validation_split", "validation_files")]
    if len(held_out) > 1:
        raise must("the held-out part", "given in one way", held_out)

    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("hub", "config", "split", "revision", "package", "text_column", "validation_split"):
            if not isinstance(value, str) or not value:
                raise must(name, "a text (put it in quotes)", value)
            checked[name] = value
        elif name in ("files", "validation_files", "data_files"):
            names = [value] if isinstance(value, str) else value
            if not isinstance(names, Sequence) or not names or not all(isinstance(n, str) and n for n in names):
                raise must(name, "a path, a glob, or a list of these", value)
            # An absolute path stays what it is.
            checked[name] = tuple(n if name == "data_files" else str(path.absolute().parent / n) for n in names)
        elif name == "streaming":
            if not isinstance(value, bool):
                raise must(name, "true or false", value)
            checked[name] = value
        else:
            number = _number(value)
            if name == "validation_fraction" and not 0 < number < 1:
                raise must(name, "between 0 and 1, both exclusive", value)
            if name == "weight" and not 0 < number < math.inf:
                raise must(name, "above 0 and finite", value)
            if name.startswith("max_") and not (number >= 1 and number == int(number)):
                raise must(name, "a whole number of at least 1", value)
            checked[name] = int(number) if name.startswith("max_") else number
    return DomainSource(**checked)


def _number(value: Any) -> float:
    """The value as a number; NaN, which no range holds, where it is none. YAML 1.1 reads `1e6` as text."""
    if isinstance(value, bool):
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) else math.nan


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key given twice, of which YAML would drop the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if name in seen and name != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {name} twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)
