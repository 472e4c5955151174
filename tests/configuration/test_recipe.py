"""Recipes: what the shipped ones hold, and every error by file, domain, field and value."""

from pathlib import Path

import pytest

from equipoise.configuration import DomainSource, parse_recipe

ROOT = Path(__file__).parents[2]


def recipe(folder: Path, text: str) -> Path:
    file = folder / "mix.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("file", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_valid(file: Path) -> None:
    assert len(parse_recipe(file).domains) >= 4


def test_fields_are_read_and_paths_are_the_recipes(tmp_path: Path) -> None:
    read = parse_recipe(
        recipe(
            tmp_path,
            """
package_folder: somewhere
domains:
  b: {hub: user/name, config: 20231101.de, data_files: "data/*", streaming: true, weight: 1e-3, revision: abc,
      max_train_bytes: 1e6, validation_split: test, text_column: body}
  a: {files: [x.txt, /abs/*.jsonl], weight: 2, validation_files: held/out.txt}
""",
        )
    )
    assert list(read.domains) == ["a", "b"]
    assert read.package_folder == Path("somewhere")
    assert read.domains["a"] == DomainSource(
        files=(str(tmp_path / "x.txt"), "/abs/*.jsonl"), weight=2.0, validation_files=(str(tmp_path / "held/out.txt"),)
    )
    assert read.domains["b"] == DomainSource(
        hub="user/name",
        config="20231101.de",
        data_files=("data/*",),
        streaming=True,
        weight=0.001,
        revision="abc",
        max_train_bytes=1_000_000,
        validation_split="test",
        text_column="body",
    )
    assert read.domains["a"].described() == {
        "files": [str(tmp_path / "x.txt"), "/abs/*.jsonl"],
        "weight": 2.0,
        "validation_files": [str(tmp_path / "held/out.txt")],
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("domains: [1", "the recipe must be YAML"),
        ("3", "the recipe must be a mapping"),
        ("domains: {}", "domains must be a mapping"),
        ("domians: {}", "keys must be among domains, package_folder; got 'domians'"),
        ("domains: {no: {files: a}}", r"name must be a text.*; got False"),
        ("domains: {a: {files: x}, a: {files: y}}", "the key a twice"),
        ("domains: {a: x}", "domain a: the domain must be a mapping.*got 'x'"),
        ("domains: {a: {file: x}}", "domain a: a field must be one of hub, .*; got 'file'"),
        ("domains: {a: {weight: 1}}", "domain a: the source must be exactly one of hub, files, package; got None"),
        ("domains: {a: {hub: x, files: y}}", r"exactly one of .*; got \['hub', 'files'\]"),
        ("domains: {a: {files: x, split: y}}", "domain a: split must be given only with hub; got 'split with files'"),
        ("domains: {a: {package: x, streaming: true}}", "streaming must be given only with hub or files"),
        ("domains: {a: {files: []}}", r"files must be a path, a glob, or a list of these; got \[\]"),
        ("domains: {a: {hub: x, config: 3.5}}", "config must be a text .*; got 3.5"),
        ("domains: {a: {files: x, streaming: 1}}", "streaming must be true or false; got 1"),
        ("domains: {a: {files: x, weight: 0}}", "weight must be above 0 and finite; got 0"),
        ("domains: {a: {files: x, weight: .inf}}", "weight must be above 0 and finite; got inf"),
        ("domains: {a: {files: x, weight: true}}", "weight must be above 0 and finite; got True"),
        ("domains: {a: {files: x, max_train_bytes: 1.5}}", "max_train_bytes must be a whole number .*; got 1.5"),
        ("domains: {a: {files: x, validation_fraction: 1}}", "validation_fraction must be between 0 and 1.*; got 1"),
        (
            "domains: {a: {files: x, validation_fraction: 0.1, validation_files: y}}",
            r"held-out part must be given in one way; got \['validation_fraction', 'validation_files'\]",
        ),
        ("domains: {a: {files: x, weight: 1}, b: {files: y}}", "domain b: weight must be given, since a has one"),
        ("domains: {a: {files: x, streaming: true}}", "domain a: weight must be given, .* it streams"),
    ],
)
def test_errors_name_file_domain_field_and_value(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)mix\.yaml: .*{words}"):
        parse_recipe(recipe(tmp_path, text))


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the recipe must be a file; got .*nowhere\.yaml"):
        parse_recipe(tmp_path / "nowhere.yaml")
