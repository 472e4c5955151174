"""Evaluates a model on held-out text: bits per byte and perplexity by domain.

python scripts/evaluate_model.py --model runs/small
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import equipoise
from equipoise.configuration import trained_block_size
from equipoise.data import read_held_out, write_json
from equipoise.evaluation import evaluate_domains


@dataclass
class EvaluationArguments:
    model: str = field(metadata={"help": "A model's folder, or a run directory that holds one as model/."})
    data: str | None = field(
        default=None,
        metadata={
            "help": "Held-out documents: a file called validation.parquet, or data to train on, of which the held-out "
            "split is taken. Default: validation.parquet of the model's run."
        },
    )
    output: str | None = field(
        default=None, metadata={"help": "The JSON file to write. Default: evaluation.json in the model's run."}
    )
    batch_size: int = field(default=16, metadata={"help": "Windows in one forward pass."})
    block_size: int | None = field(
        default=None,
        metadata={"help": "Longest window, in tokens. Default: the block size of the model's run, or 512."},
    )


def main() -> None:
    parser = HfArgumentParser(EvaluationArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        evaluate_model(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")


def evaluate_model(arguments: EvaluationArguments) -> None:
    """Evaluates, prints and writes."""
    model_folder, run = find_model(Path(arguments.model))
    data, output = find_files(arguments, run)
    block_size = trained_block_size(model_folder) if arguments.block_size is None else arguments.block_size
    model = AutoModelForCausalLM.from_pretrained(model_folder).to("cuda" if torch.cuda.is_available() else "cpu")
    results = evaluate_domains(
        model,
        AutoTokenizer.from_pretrained(model_folder),
        read_held_out(data),
        block_size=block_size,
        batch_size=arguments.batch_size,
    )
    print_table(results)

    report = {
        "domains": results,
        "settings": {"model": str(model_folder), "data": str(data), "block_size": block_size},
        "versions": {"equipoise": equipoise.__version__, "torch": torch.__version__},
    }
    write_json(output, report)
    print(f"\nwritten to {output}")


def find_model(path: Path) -> tuple[Path, Path | None]:
    """The model's folder, and the run directory that it is part of, if it is."""
    for folder in (path / "model", path):
        if (folder / "config.json").is_file():
            run = folder.parent
            return folder, run if (run / "settings.yaml").is_file() or (run / "validation.parquet").is_file() else None
    raise ValueError(f"--model must be a folder with a config.json, or a run directory that holds model/; got {path}")


def find_files(arguments: EvaluationArguments, run: Path | None) -> tuple[Path, Path]:
    """Where the held-out documents are, and where the results go."""
    data = arguments.data or (run and run / "validation.parquet")
    output = arguments.output or (run and run / "evaluation.json")
    if data is None or (arguments.data is None and not Path(data).is_file()):
        raise ValueError(
            f"--data must be given where no validation.parquet lies beside the model; got {arguments.model}"
        )
    if output is None:
        raise ValueError(f"--output must be given for a model that is not part of a run; got {arguments.model}")
    return Path(data), Path(output)


def print_table(results: dict[str, dict[str, float]]) -> None:
    width = max(map(len, [*results, "domain"]))
    print(
        f"\n{'domain':{width}}  {'bits/byte':>9}  {'perplexity':>10}  {'nats/token':>10}"
        f"  {'tokens':>10}  {'bytes':>11}"
    )
    for domain, result in results.items():
        print(
            f"{domain:{width}}  {result['bits_per_byte']:9.4f}  {result['perplexity']:10.2f}"
            f"  {result['nats_per_token']:10.4f}  {result['num_tokens']:10,}  {result['num_bytes']:11,}"
        )


if __name__ == "__main__":
    main()
