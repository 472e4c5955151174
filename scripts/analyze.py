"""Analyses the routing of a model on held-out text: specialisation by domain and balance, as numbers and pictures.

python scripts/analyze.py --run runs/small
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import equipoise  # noqa: F401 (registers the models with the Auto classes)
from equipoise.analysis import LoadHistory, read_metrics, save_figure, trace_routing, training_figure, write_report
from equipoise.configuration import trained_block_size
from equipoise.data import read_held_out, write_whole


@dataclass
class AnalysisArguments:
    run: str | None = field(
        default=None,
        metadata={
            "help": "A run directory: its model/, validation.parquet, load.jsonl and metrics.jsonl are read, "
            "and analysis/ is written into it."
        },
    )
    model: str | None = field(default=None, metadata={"help": "A model's folder. Default: model/ of the run."})
    data: str | None = field(
        default=None,
        metadata={
            "help": "Held-out documents: a file called validation.parquet, or data to train on, of which the held-out "
            "split is taken. Default: validation.parquet of the run."
        },
    )
    output: str | None = field(default=None, metadata={"help": "The folder to write. Default: analysis/ in the run."})
    batch_size: int = field(default=16, metadata={"help": "Windows in one forward pass; does not change the result."})
    block_size: int | None = field(
        default=None,
        metadata={"help": "Longest window, in tokens. Default: the block size of the model's run, or 512."},
    )
    micro_batch_size: int = field(
        default=8, metadata={"help": "Windows of one domain over which micro MaxVio is taken."}
    )
    permutations: int = field(default=1000, metadata={"help": "Permutations of the domain labels."})
    seed: int = field(default=0, metadata={"help": "Seeds the permutations."})
    save_trace: bool = field(default=False, metadata={"help": "Also write the counts, as trace.safetensors."})


def main() -> None:
    parser = HfArgumentParser(AnalysisArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        analyze(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")


def analyze(arguments: AnalysisArguments) -> None:
    """Traces, writes the report and prints its table."""
    model_folder, data, output = find_files(arguments)
    block_size = trained_block_size(model_folder) if arguments.block_size is None else arguments.block_size
    history = None
    if arguments.run and (Path(arguments.run) / "load.jsonl").is_file():
        history = LoadHistory.from_run(arguments.run)
    records = []
    if arguments.run and (Path(arguments.run) / "metrics.jsonl").is_file():
        records = read_metrics(arguments.run)
    model = AutoModelForCausalLM.from_pretrained(model_folder).to("cuda" if torch.cuda.is_available() else "cpu")
    trace = trace_routing(
        model,
        AutoTokenizer.from_pretrained(model_folder),
        read_held_out(data),
        block_size=block_size,
        batch_size=arguments.batch_size,
    )
    numbers = write_report(
        output,
        trace,
        history,
        block_size=block_size,
        micro_batch_size=arguments.micro_batch_size,
        permutations=arguments.permutations,
        seed=arguments.seed,
    )
    if records:
        save_figure(training_figure(records), output / "training.png")
    if arguments.save_trace:
        write_whole(output / "trace.safetensors", trace.save)
    print_table(numbers)
    print(f"\nspecialisation by domain: {output / 'specialisation.png'}")
    if history is not None:
        print(f"load over training:       {output / 'load.png'}")
    if records:
        print(f"loss over training:       {output / 'training.png'}")
    print(f"all numbers:              {output / 'analysis.json'}")


def find_files(arguments: AnalysisArguments) -> tuple[Path, Path, Path]:
    """The model's folder, the held-out documents, and the folder to write."""
    if arguments.run is None:
        missing = [name for name in ("model", "data", "output") if getattr(arguments, name) is None]
        if missing:
            raise ValueError(f"--run, or --model, --data and --output, must be given; got no {', '.join(missing)}")
    run = Path(arguments.run or "")
    model_folder = Path(arguments.model or run / "model")
    data = Path(arguments.data or run / "validation.parquet")
    if not (model_folder / "config.json").is_file():
        raise ValueError(f"the model must be a folder with a config.json; got {model_folder}")
    if arguments.data is None and not data.is_file():
        raise ValueError(f"--data must be given for a run without validation.parquet; got none in {run}")
    return model_folder, data, Path(arguments.output or run / "analysis")


def print_table(numbers: dict[str, Any]) -> None:
    """By layer: mutual information of domain and expert, its null, and the balance."""
    print(
        f"\n{numbers['tokens']:,} tokens of {numbers['documents']:,} documents in {len(numbers['domains'])} domains;"
        f" {numbers['num_experts_per_tok']} of {numbers['num_experts']} experts per token\n"
    )
    print("       domain and expert, bits                MaxVio          dead")
    print("layer     MI  normalised  by chance       p   global   micro  experts  entropy")
    for layer in numbers["layers"]:
        print(
            f"{layer['layer']:5}  {_specialisation(layer)}  {layer['max_vio_global']:7.3f}"
            f" {layer['max_vio_micro']:7.3f}  {layer['dead_experts']:7}  {layer['load_entropy']:7.4f}"
        )
    print(f" mean  {_specialisation(numbers['mean_over_layers'])}")


def _specialisation(layer: dict[str, float]) -> str:
    return (
        f"{layer['mutual_information_bits']:5.3f}  {layer['mutual_information_normalised']:10.3f}"
        f"  {layer['null_mean_bits']:9.3f}  {layer['p_value']:6.4f}"
    )


if __name__ == "__main__":
    main()
