"""Analyses the routing of one model or several on held-out text, and writes a report that can be looked at.

python scripts/analyze.py --run runs/small
python scripts/analyze.py --run runs/micro_batch --run runs/global_batch --output comparison
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

import equipoise  # noqa: F401 (registers the models with the Auto classes)
from equipoise.analysis import (
    Architecture,
    Measurement,
    MeasurementSettings,
    Measurer,
    RunInput,
    RunRecord,
    comparable,
    write_files,
)
from equipoise.analysis.page import shown_layers, text_tokens, write_page
from equipoise.configuration import trained_block_size
from equipoise.data import read_held_out, write_whole


@dataclass
class AnalysisArguments:
    run: list[str] | None = field(
        default=None,
        metadata={
            "help": "A run directory: its model/, validation.parquet, logs and checkpoints are read. Several are "
            "compared.",
            "action": "extend",
        },
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "The folder of a model with routers, ours or any that Transformers has, with its "
            "tokenizer. Default: model/ of the run. Not for several runs."
        },
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "Held-out documents: a file called validation.parquet, or data to train on, of which the held-out "
            "split is taken. Default: validation.parquet of each run."
        },
    )
    output: str | None = field(
        default=None, metadata={"help": "The folder to write. Default, for one run: analysis/ in the run."}
    )
    batch_size: int = field(default=16, metadata={"help": "Windows in one forward pass; does not change the result."})
    block_size: int | None = field(
        default=None,
        metadata={"help": "Longest window, in tokens. Default: the block size of the model's run, or 512."},
    )
    micro_batch_size: int = field(
        default=8, metadata={"help": "Windows of one domain over which micro MaxVio is taken on held-out text."}
    )
    permutations: int = field(default=1000, metadata={"help": "Permutations of the domain labels."})
    seed: int = field(default=0, metadata={"help": "Seeds the permutations and the untrained model."})
    untrained: bool = field(
        default=True, metadata={"help": "Also measure the same architecture, freshly initialised: a second pass."}
    )
    save_trace: bool = field(default=False, metadata={"help": "Also write the counts, as trace.safetensors."})


def main() -> None:
    parser = HfArgumentParser(AnalysisArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        analyze(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")


def analyze(arguments: AnalysisArguments) -> None:
    """Measures every run, writes its numbers and pictures and the report of all, and prints a table of each."""
    output = find_output(arguments)
    runs, notes = comparable(find_runs(arguments))
    shapes = [Architecture.read(run.model) for run in runs]
    layers = shown_layers(max(shape.num_moe_layers for shape in shapes))
    measurer = Measurer(
        MeasurementSettings(
            batch_size=arguments.batch_size,
            micro_batch_size=arguments.micro_batch_size,
            permutations=arguments.permutations,
            seed=arguments.seed,
            untrained=arguments.untrained,
        ),
        layers=layers,
        num_tokens=text_tokens(
            len(runs),
            max(len(run.documents.unique("domain")) for run in runs),
            len(layers),
            max(shape.num_experts_per_tok for shape in shapes),
        ),
    )
    found = []
    for run in runs:
        folder = output if len(runs) == 1 else output / run.name
        found.append(measurer.measure(run))
        print_table(found[-1], write_files(folder, found[-1]))
        if arguments.save_trace:
            write_whole(folder / "trace.safetensors", found[-1].trace.save)
        print(f"\nnumbers and pictures of {run.name}: {folder / 'analysis.json'} and beside it")
    page = write_page(output, found, notes)
    print(f"\nreport: {page}\nits charts as PNG and SVG: {output / 'figures'}")


def find_output(arguments: AnalysisArguments) -> Path:
    """The folder to write."""
    if arguments.run is None:
        missing = [name for name in ("model", "data", "output") if getattr(arguments, name) is None]
        if missing:
            raise ValueError(f"--run, or --model, --data and --output, must be given; got no {', '.join(missing)}")
    elif len(arguments.run) > 1:
        if arguments.output is None:
            raise ValueError("--output must be given for several runs; got none")
        if arguments.model is not None:
            raise ValueError(f"--model must not be given for several runs; got {arguments.model}")
    elif arguments.output is None:
        return Path(arguments.run[0]) / "analysis"
    return Path(arguments.output or "")


def find_runs(arguments: AnalysisArguments) -> list[RunInput]:
    """The models to measure and the text to measure them on, which must be there before anything is measured."""
    runs = []
    folders: list[str | None] = [None] if arguments.run is None else [*arguments.run]
    for folder in folders:
        model = Path(arguments.model or f"{folder}/model")
        data = Path(arguments.data or f"{folder}/validation.parquet")
        if not (model / "config.json").is_file():
            raise ValueError(f"the model must be a folder with a config.json; got {model}")
        if arguments.data is None and not data.is_file():
            raise ValueError(f"--data must be given for a run without validation.parquet; got none in {folder}")
        runs.append(
            RunInput(
                name=Path(folder or model).resolve().name,
                model=model,
                documents=read_held_out(data),
                block_size=trained_block_size(model) if arguments.block_size is None else arguments.block_size,
                record=RunRecord() if folder is None else RunRecord.read(Path(folder)),
                data=data,
            )
        )
    return runs


def print_table(run: Measurement, numbers: dict[str, Any]) -> None:
    """By layer: mutual information of domain and expert, its nulls, and the balance."""
    print(
        f"\n{run.name}: {numbers['tokens']:,} tokens of {numbers['documents']:,} documents in "
        f"{len(numbers['domains'])} domains; {numbers['num_experts_per_tok']} of {numbers['num_experts']} experts per "
        "token\n"
    )
    print("       domain and expert, bits                            MaxVio          dead")
    print("layer     MI  by token  untrained  by chance       p   global   micro  experts  entropy")
    for layer in numbers["layers"]:
        print(
            f"{layer['layer']:5}  {_specialisation(layer)}  {layer['max_vio_global']:7.3f}"
            f" {layer['max_vio_micro']:7.3f}  {layer['dead_experts']:7}  {layer['load_entropy']:7.4f}"
        )
    print(f" mean  {_specialisation(numbers['mean_over_layers'])}")


def _specialisation(layer: dict[str, Any]) -> str:
    untrained = "-" if layer["untrained_bits"] is None else f"{layer['untrained_bits']:.3f}"
    return (
        f"{layer['mutual_information_bits']:5.3f}  {layer['token_identity_bits']:8.3f}  {untrained:>9}"
        f"  {layer['null_mean_bits']:9.3f}  {layer['p_value']:6.4f}"
    )


if __name__ == "__main__":
    main()
