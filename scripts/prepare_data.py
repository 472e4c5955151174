"""Builds the embedded corpus: python scripts/prepare_data.py --output corpus"""

import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from equipoise.data import build_embedded_corpus


@dataclass
class PrepareDataArguments:
    """What to build, and where."""

    output: str = field(default="corpus", metadata={"help": "Folder to write; must be new or empty."})
    max_bytes_per_domain: int = field(
        default=5_000_000, metadata={"help": "Most bytes of UTF-8 text in a domain's train split."}
    )
    min_bytes_per_domain: int = field(
        default=2_000_000, metadata={"help": "Fewest bytes; a domain with less is an error that names it."}
    )
    validation_bytes_per_domain: int = field(
        default=150_000, metadata={"help": "Most bytes of UTF-8 text in a domain's validation split."}
    )
    seed: int = field(default=0, metadata={"help": "Which files and items are taken, and which are held out."})


def main() -> None:
    (arguments,) = HfArgumentParser(PrepareDataArguments).parse_args_into_dataclasses()
    try:
        manifest = build_embedded_corpus(**vars(arguments))
    except (ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"\n{'domain':<12} {'train':>9} {'documents':>10} {'validation':>11} {'documents':>10}")
    for domain, entry in manifest["domains"].items():
        train, validation = entry["train"], entry["validation"]
        print(
            f"{domain:<12} {train['bytes'] / 1e6:>6.2f} MB {train['documents']:>10,}"
            f" {validation['bytes'] / 1e3:>8.0f} kB {validation['documents']:>10,}"
        )
    print(f"\n{arguments.output}/manifest.json names every source, version and licence.")


if __name__ == "__main__":
    main()
