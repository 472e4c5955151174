"""Evaluates models: bits per byte by domain, tasks, and with several models whether they differ.

python scripts/evaluate_model.py --model runs/small
python scripts/evaluate_model.py --model runs/one runs/other --tasks continuation hellaswag mmlu
accelerate launch scripts/evaluate_model.py --model runs/small
"""

import gc
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

import equipoise
from equipoise.configuration import trained_block_size
from equipoise.data import read_held_out, write_json
from equipoise.evaluation import (
    ModelMeasures,
    Plan,
    compare_models,
    export_to_harness,
    measure_model,
    plan_evaluation,
    plan_tokens,
    report,
    task_names,
    this_process,
)


@dataclass
class EvaluationArguments:
    model: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Models' folders, run directories that hold one as model/, or names on the Hub. Several are "
            "compared with the first.",
            "action": "extend",
        },
    )
    tasks: list[str] = field(
        default_factory=lambda: ["continuation"],
        metadata={"help": f"`continuation`, task files, or some of: {', '.join(task_names())}."},
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "Held-out documents: a file called validation.parquet, or data to train on, of which the held-out "
            "split is taken. Default: validation.parquet of the models' run."
        },
    )
    task_data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NAME=PATH: rows of a task from a local file, or a folder with a file for each split, instead of "
            "the Hub.",
            "action": "extend",
        },
    )
    limit: int | None = field(
        default=None, metadata={"help": "At most so many items of each task, in `continuation` of each domain."}
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "The JSON file to write. Default: evaluation.json in the model's run; with several models also "
            "comparison.json in the first's."
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Sequences in one forward pass."})
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Longest input, in tokens. Default: the block size of the model's run; else 512 for documents "
            "and what the model can read for tasks."
        },
    )
    add_bos_token: bool = field(
        default=True, metadata={"help": "Begin contexts with the bos token, where the tokenizer has one."}
    )
    seed: int = field(default=0, metadata={"help": "Draws items, shots and resamples."})
    allow_code_execution: bool = field(
        default=False, metadata={"help": "Let tasks run, on this machine, programs that the model writes."}
    )
    export_lm_eval: str | None = field(
        default=None,
        metadata={"help": "Write the tasks to this folder for lm-evaluation-harness; --model may then be left out."},
    )


@dataclass(frozen=True)
class Candidate:
    """A model that is to be evaluated."""

    name: str
    """How tables call it."""
    path: str
    """What `from_pretrained` takes."""
    run: Path | None
    """The run directory that it is part of, if it is."""


def main() -> None:
    parser = HfArgumentParser(EvaluationArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        evaluate_models(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")


def evaluate_models(arguments: EvaluationArguments) -> None:
    """Evaluates, compares, prints and writes."""
    if not arguments.model and arguments.export_lm_eval is None:
        raise ValueError("--model must be given; got none")
    for name, least in (("batch_size", 1), ("block_size", 2)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    candidates = find_models(arguments.model)
    data, documents = find_documents(arguments, candidates)
    find_outputs(arguments, candidates)
    loaded = [load_tokenizer(candidate, arguments.block_size) for candidate in candidates]
    plan = plan_evaluation(
        arguments.tasks,
        documents,
        data=task_paths(arguments.task_data),
        allow_code_execution=arguments.allow_code_execution or not candidates,
        limit=arguments.limit,
        max_length=min((max_length for _, _, max_length in loaded), default=None),
        continuation_items_per_domain=arguments.limit or 100,
        seed=arguments.seed,
    )
    # Whatever does not fit is found before the first model is loaded.
    tokens = [
        plan_tokens(plan, tokenizer, max_length=max_length, add_bos_token=arguments.add_bos_token)
        for tokenizer, _, max_length in loaded
    ]
    state = this_process()
    if arguments.export_lm_eval is not None and state.is_main_process:
        names = export_to_harness(plan.tasks, arguments.export_lm_eval)
        print(f"lm_eval run --include_path {arguments.export_lm_eval} --tasks {','.join(names)}")

    measured: list[ModelMeasures] = []
    settings: dict[str, dict[str, Any]] = {}
    for candidate, (tokenizer, block_size, max_length), of_model in zip(candidates, loaded, tokens, strict=True):
        model = AutoModelForCausalLM.from_pretrained(candidate.path).to(state.device)
        measures = measure_model(
            model,
            tokenizer,
            plan,
            of_model,
            block_size=block_size,
            batch_size=arguments.batch_size,
            allow_code_execution=arguments.allow_code_execution,
        )
        del model
        gc.collect()  # the next model takes its memory
        measured.append(measures)
        settings[candidate.name] = {
            "model": candidate.path,
            "data": None if data is None else str(data),
            "block_size": block_size,
            "max_length": max_length,
            "batch_size": arguments.batch_size,
            "limit": arguments.limit,
            "add_bos_token": arguments.add_bos_token,
            "seed": arguments.seed,
        }
    if state.is_main_process and candidates:
        show_and_write(arguments, candidates, plan, measured, settings)


def show_and_write(
    arguments: EvaluationArguments,
    candidates: list[Candidate],
    plan: Plan,
    measured: list[ModelMeasures],
    settings: dict[str, dict[str, Any]],
) -> None:
    """Prints what was found, and writes it."""
    outputs, comparison_output = find_outputs(arguments, candidates)
    versions = {module.__name__: module.__version__ for module in (equipoise, torch, transformers)}
    reports = {
        name: {**report(plan, measures, seed=arguments.seed), "settings": settings[name], "versions": versions}
        for name, measures in zip(settings, measured, strict=True)
    }
    for name, found in reports.items():
        if len(reports) > 1:
            print(f"\n== {name}")
        print_domains(found["domains"])
        print_tasks(found["tasks"])
    for domain, reason in plan.left_out.items():
        print(f"continuation leaves out {domain}: {reason}")
    first, *others = reports
    comparisons = [
        {
            "first": first,
            "second": name,
            "measures": compare_models(plan, measured[0], measures, seed=arguments.seed),
        }
        for name, measures in zip(others, measured[1:], strict=True)
    ]
    for comparison in comparisons:
        print_comparison(comparison)
    records = {output: reports[name] for name, output in outputs.items()}
    if comparison_output is not None:
        records[comparison_output] = {"models": list(reports), "comparisons": comparisons, "evaluations": reports}
    for output, record in records.items():
        write_json(output, record)
    print(f"\nwritten to {', '.join(map(str, records))}")


def find_models(paths: list[str]) -> list[Candidate]:
    """Where the models are; each gets a name of its own."""
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


def find_documents(arguments: EvaluationArguments, candidates: list[Candidate]) -> tuple[Path | None, Dataset | None]:
    """The held-out documents, the same for all models; None where only tasks of their own are asked."""
    if arguments.data is not None:
        return Path(arguments.data), read_held_out(arguments.data)
    files = [candidate.run / "validation.parquet" for candidate in candidates if candidate.run is not None]
    files = [file for file in files if file.is_file()]
    if not files:
        if "continuation" in arguments.tasks:
            raise ValueError(
                f"--data must be given where no validation.parquet lies beside the model; "
                f"got {' '.join(arguments.model) or 'no model'}"
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


def find_outputs(arguments: EvaluationArguments, candidates: list[Candidate]) -> tuple[dict[str, Path], Path | None]:
    """Where each model's results go, and where the comparison."""
    outputs = {c.name: c.run / "evaluation.json" for c in candidates if c.run is not None}
    if len(candidates) == 1 and arguments.output is not None:
        return {candidates[0].name: Path(arguments.output)}, None
    if candidates and candidates[0].run is None and arguments.output is None:
        raise ValueError(f"--output must be given for a model that is not part of a run; got {candidates[0].path}")
    if len(candidates) < 2:
        return outputs, None
    first = candidates[0].run
    return outputs, Path(arguments.output) if arguments.output else first and first / "comparison.json"


def task_paths(given: list[str]) -> dict[str, Path]:
    """NAME=PATH, read."""
    paths = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not name or not equals or not path:
            raise ValueError(f"--task_data must be NAME=PATH; got {text}")
        paths[name] = Path(path)
    return paths


def load_tokenizer(candidate: Candidate, block_size: int | None) -> tuple[PreTrainedTokenizerBase, int, int]:
    """A model's tokenizer; and how many tokens it reads at once, of documents and in tasks."""
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
    if block_size is None and candidate.run is None:
        documents = trained_block_size(Path(candidate.path))
        return tokenizer, documents, getattr(config, "max_position_embeddings", None) or documents
    block_size = trained_block_size(Path(candidate.path)) if block_size is None else block_size
    return tokenizer, block_size, block_size


def print_domains(results: dict[str, dict[str, Any]]) -> None:
    if results:
        print_table(
            ["domain", "bits/byte", "95% interval", "perplexity", "nats/token", "tokens", "bytes"],
            [
                [
                    domain,
                    f"{result['bits_per_byte']:.4f}",
                    interval(result),
                    f"{result['perplexity']:.2f}",
                    f"{result['nats_per_token']:.4f}",
                    f"{result['num_tokens']:,}",
                    f"{result['num_bytes']:,}",
                ]
                for domain, result in results.items()
            ],
        )


def print_tasks(tasks: dict[str, dict[str, Any]]) -> None:
    if tasks:
        print_table(
            ["task", "domain", "score", "", "95% interval", "chance", "items"],
            [
                [
                    name,
                    domain,
                    task["score"],
                    f"{result['score']:.4f}",
                    interval(result),
                    f"{result['chance']:.4f}" if "chance" in result else "",
                    f"{result['num_items']:,}",
                ]
                for name, task in tasks.items()
                for domain, result in task["domains"].items()
            ],
        )
    for name, task in tasks.items():
        if task["truncated"]:
            print(f"{name}: {task['truncated']} contexts were cut off at their beginning, to fit the model")


def print_comparison(comparison: dict[str, Any]) -> None:
    print(f"\n{comparison['second']} less {comparison['first']}; p paired, and adjusted over a measure's domains")
    print_table(
        ["measure", "domain", "difference", "95% interval", "p", "adjusted"],
        [
            [
                measure,
                domain,
                f"{found['difference']:+.4f}",
                interval(found, "+"),
                f"{found['p_value']:.4f}",
                f"{found['p_value_holm']:.4f}",
            ]
            for measure, domains in comparison["measures"].items()
            for domain, found in domains.items()
        ],
    )


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as they must be; the first two words stand on the left, what follows on the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    named = sum(name in ("task", "measure", "domain") for name in header)
    print()
    for row in (header, *rows):
        cells = [
            text.ljust(width) if place < named else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def interval(result: dict[str, Any], sign: str = "") -> str:
    """A 95% interval; there is none where all is one document."""
    return "" if result["low"] is None else f"{result['low']:{sign}.4f} {result['high']:{sign}.4f}"


if __name__ == "__main__":
    main()
