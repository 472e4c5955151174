"""Publishes a model with its tokenizer, its code and a card that tells how it was made: to the Hub, or a folder.

python scripts/publish.py --run runs/mine --repo user/name --license apache-2.0
"""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from equipoise.data import write_whole
from equipoise.hub import (
    PublishingError,
    assemble,
    check_repo,
    contents,
    find_model,
    find_token,
    link_or_copy,
    push,
    symlink,
)


@dataclass
class PublishArguments:
    run: str | None = field(default=None, metadata={"help": "A finished run directory; the card tells of it."})
    model: str | None = field(
        default=None, metadata={"help": "A saved model's folder instead, of which the card tells less."}
    )
    repo: str | None = field(
        default=None, metadata={"help": "The repository to push to, user/name; made if it is not there."}
    )
    output: str | None = field(
        default=None, metadata={"help": "A folder to write instead of pushing; must be new or empty."}
    )
    private: bool = field(default=False, metadata={"help": "Make the repository private; one that is there must be."})
    revision: str | None = field(
        default=None, metadata={"help": "The branch to push to; made from main if it is not there."}
    )
    license: str | None = field(
        default=None, metadata={"help": "The model's licence as the Hub names it, e.g. apache-2.0. Default: none."}
    )
    languages: list[str] = field(
        default_factory=list, metadata={"help": "Languages of the training text as the Hub names them, e.g. en fr."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Say what would be sent; write and send nothing."})


def main() -> None:
    parser = HfArgumentParser(PublishArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        publish(arguments)
    except (ValueError, OSError, PublishingError) as error:
        sys.exit(f"error: {error}")


def publish(arguments: PublishArguments) -> None:
    """Puts the folder together, then pushes it, leaves it, or says what is in it."""
    check_target(arguments)
    run = Path(arguments.run) if arguments.run else None
    model = find_model(run, Path(arguments.model) if arguments.model else None)
    output = Path(arguments.output).absolute() if arguments.output else None
    made_of: dict[str, Any] = {
        "model": model,
        "name": arguments.repo if output is None else output.name,
        "run": run,
        "license": arguments.license,
        "languages": arguments.languages,
        "revision": arguments.revision,
    }
    missing: list[str] = []
    if output is not None and not arguments.dry_run:

        def write(folder: Path) -> None:
            folder.mkdir()
            missing.extend(assemble(folder, place=link_or_copy, **made_of))

        write_whole(output, write)
        print_contents(output)
        print(f"\nwritten to {arguments.output}")
    else:
        token = None if arguments.dry_run else find_token()
        with tempfile.TemporaryDirectory(prefix="equipoise-publish-") as folder:
            missing = assemble(Path(folder), place=symlink, **made_of)
            print_contents(Path(folder))
            print_target(arguments)
            if token is not None:
                assert arguments.repo is not None
                commit = push(
                    Path(folder), arguments.repo, token=token, private=arguments.private, revision=arguments.revision
                )
                print(f"pushed      {commit}")
    if missing:
        print("\nnot in the card:")
    for line in missing:
        print(f"- {line}")


def check_target(arguments: PublishArguments) -> None:
    """
    Raises:
        ValueError: both or neither of --repo and --output are given, or they cannot be published to.
    """
    if (arguments.repo is None) == (arguments.output is None):
        got = "neither" if arguments.repo is None else "both"
        raise ValueError(f"either --repo or --output must be given; got {got}")
    if arguments.repo is not None:
        check_repo(arguments.repo)
        return
    assert arguments.output is not None
    for name in ("private", "revision"):
        if getattr(arguments, name):
            raise ValueError(f"--{name} must go with --repo; got it with --output")
    output = Path(arguments.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output must be new or empty; got {output}")


def print_contents(folder: Path) -> None:
    files = contents(folder)
    width = len(f"{max(files.values()):,}")
    for name, size in files.items():
        print(f"{size:{width},}  {name}")
    print(f"{len(files)} files, {sum(files.values()):,} bytes")


def print_target(arguments: PublishArguments) -> None:
    print(f"\ndry run, nothing is {'sent' if arguments.repo else 'written'}" if arguments.dry_run else "")
    if arguments.repo is None:
        print(f"folder      {arguments.output}")
        return
    print(f"repository  {arguments.repo}")
    print(f"branch      {arguments.revision or 'main'}")
    print(f"visibility  {'private' if arguments.private else 'as it is; where it is new, as the account has it'}")


if __name__ == "__main__":
    main()
