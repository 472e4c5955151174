"""What a command line names: models, their runs, the text that these held out, and where results go."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration import trained_block_size
from ..data import read_held_out
from .processes import this_process
from .runner import ModelMeasures, Plan, measure_model


@dataclass(frozen=True)
class Candidate:
    """A model that is to be evaluated."""

    name: str
    """How tables call it."""
    path: str
    """What `from_pretrained` takes."""
    run: Path | None
    """The run directory that it is part of, if it is."""


@dataclass(frozen=True)
class Reader:
    """How a model reads."""

    tokenizer: PreTrainedTokenizerBase
    block_size: int
    """Most tokens of a document at once."""
    max_length: int
    """Most tokens of a task at once."""


def find_models(paths: Sequence[str]) -> list[Candidate]:
    """Where the models are; each gets a name of its own.

    Args:
        paths: Models' folders, run directories that hold one as `model/`, or names on the Hub. What is named twice
            counts once.

    Raises:
        ValueError: a path is none of these.
    """
    found = []
    for text in dict.fromkeys(paths):
        path = Path(text)
        folders = [folder for folder in (path / "model", path) if (folder / "config.json").is_file()]
        if folders:
            run = folders[0].parent
            in_run = (run / "settings.yaml").is_file() or (run / "validation.parquet").is_file()
            name = (run if in_run else folders[0]).resolve().name
            found.append(Candidate(name, str(folders[0]), run if in_run else None))
        elif not path.exists() and text.count("/") == 1:
            found.append(Candidate(text, text, None))
        else:
            raise ValueError(
                f"--model must be a folder with a config.json, or a run directory that holds model/; got {path}"
            )
    names = [candidate.name for candidate in found]
    return [
        candidate if names.count(candidate.name) == 1 else Candidate(candidate.path, candidate.path, candidate.run)
        for candidate in found
    ]


def find_documents(
    candidates: Sequence[Candidate], data: str | None, *, needed: bool
) -> tuple[Path | None, Dataset | None]:
    """The held-out documents, the same for all models, and the file that they are in.

    Args:
        data: What is given instead of the runs' own `validation.parquet`.
        needed: Whether there must be some; else there may be none, and None is returned for both.

    Raises:
        ValueError: there are none and must be, or the models' runs held out different ones.
    """
    if data is not None:
        return Path(data), read_held_out(data)
    files = [candidate.run / "validation.parquet" for candidate in candidates if candidate.run is not None]
    files = [file for file in files if file.is_file()]
    if not files:
        if needed:
            raise ValueError(
                f"--data must be given where no validation.parquet lies beside the model; "
                f"got {' '.join(candidate.path for candidate in candidates) or 'no model'}"
            )
        return None, None
    documents = read_held_out(files[0])
    for file in files[1:]:
        other = read_held_out(file)
        if other["text"][:] != documents["text"][:] or other["domain"][:] != documents["domain"][:]:
            raise ValueError(
                f"--data must be given for models whose runs held out different documents; got {files[0]} and {file}"
            )
    return files[0], documents


def find_outputs(candidates: Sequence[Candidate], output: str | None) -> tuple[dict[str, Path], Path | None]:
    """Where each model's results go, by its name, and where the comparison of several.

    Args:
        output: The file that was asked for: of the one model, or of the comparison.

    Raises:
        ValueError: none was asked for, and there is no run to write to.
    """
    outputs = {c.name: c.run / "evaluation.json" for c in candidates if c.run is not None}
    if len(candidates) == 1 and output is not None:
        return {candidates[0].name: Path(output)}, None
    if candidates and candidates[0].run is None and output is None:
        raise ValueError(f"--output must be given for a model that is not part of a run; got {candidates[0].path}")
    if len(candidates) < 2:
        return outputs, None
    first = candidates[0].run
    return outputs, Path(output) if output else first and first / "comparison.json"


def find_task_rows(given: Sequence[str]) -> dict[str, Path]:
    """`NAME=PATH`, each, read: a task's name and its local rows.

    Raises:
        ValueError: one has another form.
    """
    paths = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not name or not equals or not path:
            raise ValueError(f"--task_data must be NAME=PATH; got {text}")
        paths[name] = Path(path)
    return paths


def load_reader(candidate: Candidate, block_size: int | None) -> Reader:
    """A model's tokenizer, and how much the model reads at once.

    Args:
        block_size: Most tokens, of documents and in tasks; None is the block size of the model's run. A model of no
            run reads documents in windows of 512 tokens, and of tasks as much as its positions allow.

    Raises:
        ValueError: there is no model or no tokenizer, or the tokenizer has more entries than the model.
    """
    try:
        config = AutoConfig.from_pretrained(candidate.path).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(candidate.path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--model must hold a model and its tokenizer; got {candidate.path}: {reason}") from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer must have at most the model's vocab_size ({config.vocab_size}) entries; "
            f"got {len(tokenizer)} in {candidate.path}"
        )
    read = trained_block_size(Path(candidate.path)) if block_size is None else block_size
    in_tasks = getattr(config, "max_position_embeddings", None) if block_size is None and not candidate.run else None
    return Reader(tokenizer, block_size=read, max_length=in_tasks or read)


def load_model(candidate: Candidate) -> PreTrainedModel:
    """The model, on the device of its process, in memory of its own.

    Weights that are mapped from a file lie wherever they lie in it, and a matrix product on the CPU is rounded by
    where its operands begin. Transformers maps them in a process by itself and copies them in one of several.
    """
    model = AutoModelForCausalLM.from_pretrained(candidate.path).to(this_process().device)
    if model.device.type == "cpu":
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    return model


def measure_candidate(
    candidate: Candidate, reader: Reader, plan: Plan, tokens: Sequence[Any], **options: Any
) -> ModelMeasures:
    """Loads a model, puts all that is planned to it (see `measure_model`) and lets go of it."""
    model = load_model(candidate)
    measures = measure_model(model, reader.tokenizer, plan, tokens, block_size=reader.block_size, **options)
    del model
    gc.collect()  # the next model takes its memory
    return measures
