"""Runs side by side: what of them can be compared, and what is said where it cannot."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from datasets import Dataset
from transformers import AutoTokenizer

from .architecture import Architecture
from .measurement import RunInput
from .palette import RUNS


def comparable(runs: Sequence[RunInput]) -> tuple[list[RunInput], list[str]]:
    """The runs as they are to be measured, and what a reader must know before comparing them.

    Runs whose domains differ are measured on those that all of them have, where these are two or more: mutual
    information depends on the choice of domains. Where they have fewer in common each is measured on its own.

    Returns:
        The runs, with documents of other domains left out, and sentences; none for a run by itself.

    Raises:
        ValueError: no run, more than can be told apart, or two of the same name.
    """
    if not 1 <= len(runs) <= RUNS:
        raise ValueError(f"run must name between 1 and {RUNS} runs; got {len(runs)}")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"run must name folders of different names; got {', '.join(names)}")
    if len(runs) == 1:
        return list(runs), []
    domains = [set(run.documents.unique("domain")) for run in runs]
    common, every = set.intersection(*domains), set.union(*domains)
    notes = []
    if common == every:
        compared = list(runs)
    elif len(common) >= 2:
        compared = [replace(run, documents=_of(run.documents, common)) for run in runs]
        notes.append(
            f"The runs have different domains. Measured are the {len(common)} that all of them have "
            f"({', '.join(sorted(common))}); left out are {', '.join(sorted(every - common))}."
        )
    else:
        compared = list(runs)
        notes.append(
            "The runs have fewer than two domains in common, so each is measured on its own. Balance, loss and router "
            "confidence are shown side by side; specialisation and the maps of domains cannot be compared."
        )
    if len({_key(run.documents) for run in compared}) > 1:
        notes.append(
            "The held-out text differs between runs: differences in specialisation, balance and confidence are those "
            "of the text as well. With --data all runs are measured on the same."
        )
    else:
        notes.append(f"All runs are measured on the same {len(compared[0].documents):,} held-out documents.")
    return compared, notes + _differences(compared)


def _differences(runs: Sequence[RunInput]) -> list[str]:
    notes = []
    shapes = [Architecture.read(run.model) for run in runs]
    vocabularies = {_vocabulary(run) for run in runs}
    if len(vocabularies) > 1:
        notes.append(
            "The tokenizers differ: loss per token and vocabulary specialisation are not comparable between runs, and "
            "the texts are cut into other tokens. Bits per byte are comparable."
        )
    for name, words in {
        "num_moe_layers": "number of MoE layers",
        "num_experts": "number of experts",
        "num_experts_per_tok": "experts of a token",
    }.items():
        values = [getattr(shape, name) for shape in shapes]
        if len(set(values)) > 1:
            notes.append(
                f"The {words} differs ({_by_run(runs, values)}): MaxVio, entropy and bits have other largest values."
            )
    scoring = [shape.scoring_func for shape in shapes]
    if len(set(scoring)) > 1:
        notes.append(
            f"The routers score differently ({_by_run(runs, scoring)}). Scores are divided by their sum before their "
            "entropy is taken; sigmoids stay flatter even so, and router confidence is not comparable between the two."
        )
    if len({run.block_size for run in runs}) > 1:
        notes.append(
            f"The windows differ in length ({_by_run(runs, [run.block_size for run in runs])} tokens): each run is "
            "measured at the context it was trained at."
        )
    tokens = [run.record.training.get("tokens") for run in runs]
    if len(set(tokens)) > 1:
        notes.append(f"The runs saw different amounts of text ({_by_run(runs, tokens)} tokens).")
    keys = [tuple(sorted(domain["key"] for domain in run.record.data.values())) for run in runs if run.record.data]
    if len(set(keys)) > 1:
        notes.append("The runs were trained on different text.")
    return notes


def _by_run(runs: Sequence[RunInput], values: Sequence[object]) -> str:
    return ", ".join(
        f"{run.name} {'unknown' if value is None else f'{value:,}' if isinstance(value, int) else value}"
        for run, value in zip(runs, values, strict=True)
    )


def _of(documents: Dataset, domains: set[str]) -> Dataset:
    names = documents["domain"][:]
    return documents.select([row for row, name in enumerate(names) if name in domains])


def _key(documents: Dataset) -> str:
    digest = hashlib.sha256()
    for domain, text in zip(documents["domain"][:], documents["text"][:], strict=True):
        digest.update(f"{len(domain)} {len(text)} {domain} {text}".encode())
    return digest.hexdigest()


def _vocabulary(run: RunInput) -> str:
    return hashlib.sha256(AutoTokenizer.from_pretrained(run.model).backend_tokenizer.to_str().encode()).hexdigest()


__all__ = ["comparable"]
