"""Evaluates models: bits per byte by domain, tasks, and with several models whether they differ.

python scripts/evaluate_model.py --model runs/small
python scripts/evaluate_model.py --model runs/one runs/other --tasks continuation hellaswag mmlu
accelerate launch scripts/evaluate_model.py --model runs/small
"""

import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser

import equipoise  # noqa: F401 (registers the models with the Auto classes)
from equipoise.evaluation import (
    export_to_harness,
    find_documents,
    find_models,
    find_outputs,
    find_task_rows,
    load_reader,
    measure_candidate,
    plan_evaluation,
    plan_tokens,
    results,
    results_lines,
    set_num_threads,
    task_names,
    this_process,
    write_results,
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
    num_threads: int | None = field(
        default=None,
        metadata={
            "help": "Threads of each process on the CPU. Default: what torch and the launcher choose, which differs "
            "with the number of processes; given, no digit does."
        },
    )
    seed: int = field(default=0, metadata={"help": "Draws items, shots and resamples."})
    allow_code_execution: bool = field(
        default=False, metadata={"help": "Let tasks run, on this machine, programs that the model writes."}
    )
    export_lm_eval: str | None = field(
        default=None,
        metadata={"help": "Write the tasks to this folder for lm-evaluation-harness; --model may then be left out."},
    )


def main() -> None:
    parser = HfArgumentParser(EvaluationArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        evaluate_models(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")


def evaluate_models(arguments: EvaluationArguments) -> None:
    """Evaluates, compares, prints and writes."""
    check(arguments)
    candidates = find_models(arguments.model)
    data, documents = find_documents(candidates, arguments.data, needed="continuation" in arguments.tasks)
    outputs = find_outputs(candidates, arguments.output)
    readers = [load_reader(candidate, arguments.block_size) for candidate in candidates]
    plan = plan_evaluation(
        arguments.tasks,
        documents,
        data=find_task_rows(arguments.task_data),
        allow_code_execution=arguments.allow_code_execution or not candidates,
        limit=arguments.limit,
        max_length=min((reader.max_length for reader in readers), default=None),
        continuation_items_per_domain=arguments.limit or 100,
        seed=arguments.seed,
    )
    # Whatever does not fit is found before the first model is loaded.
    tokens = [
        plan_tokens(plan, reader.tokenizer, max_length=reader.max_length, add_bos_token=arguments.add_bos_token)
        for reader in readers
    ]
    state = this_process()
    threads = set_num_threads(arguments.num_threads)
    if arguments.export_lm_eval is not None and state.is_main_process:
        names = export_to_harness(plan.tasks, arguments.export_lm_eval)
        print(
            f"lm_eval run --include_path {arguments.export_lm_eval} --tasks {','.join(names)} "
            "--model hf --model_args pretrained=MODEL,add_bos_token=True,trust_remote_code=True"
        )

    measured, settings = {}, {}
    for candidate, reader, of_model in zip(candidates, readers, tokens, strict=True):
        measured[candidate.name] = measure_candidate(
            candidate,
            reader,
            plan,
            of_model,
            batch_size=arguments.batch_size,
            allow_code_execution=arguments.allow_code_execution,
        )
        settings[candidate.name] = {
            "model": candidate.path,
            "data": None if data is None else str(data),
            "block_size": reader.block_size,
            "max_length": reader.max_length,
            "batch_size": arguments.batch_size,
            "limit": arguments.limit,
            "add_bos_token": arguments.add_bos_token,
            "seed": arguments.seed,
            "num_threads": threads,
        }
    if state.is_main_process and candidates:
        reports, comparisons = results(plan, measured, settings, seed=arguments.seed)
        print("\n".join(results_lines(reports, comparisons)))
        written = write_results(reports, comparisons, *outputs)
        print(f"\nwritten to {', '.join(map(str, written))}")


def check(arguments: EvaluationArguments) -> None:
    """
    Raises:
        ValueError: there is nothing to do, or a number is too small.
    """
    if not arguments.model and arguments.export_lm_eval is None:
        raise ValueError("--model must be given; got none")
    for name, least in (("batch_size", 1), ("block_size", 2), ("num_threads", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


if __name__ == "__main__":
    main()
