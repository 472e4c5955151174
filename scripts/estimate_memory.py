"""Estimates the memory of a training step on one device, for every layout: no device is needed, and no data.

python scripts/estimate_memory.py hub_configs/global_batch_3.4b_a0.6b/train.yaml --processes 16 [--flags of train.py]
"""

import sys
from dataclasses import dataclass, field, fields, replace

from huggingface_hub.errors import StrictDataclassError
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from equipoise.configuration import model_size, parse_run_settings
from equipoise.training.memory import StepMemory, layouts, step_memory
from equipoise.training.prepare import read_config

DEVICES = (80, 141)  # GB of an H100 and an H200


@dataclass
class EstimateArguments:
    processes: int = field(default=8, metadata={"help": "Devices, of which 8 are taken to be in one machine."})


def main() -> None:
    parser = HfArgumentParser(EstimateArguments, description=__doc__.splitlines()[0])
    arguments, others = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    try:
        estimate_memory(arguments.processes, others)
    except (ValueError, StrictDataclassError) as error:
        sys.exit(f"error: {error}")


def estimate_memory(processes: int, flags: list[str]) -> None:
    """Prints the table; the layout that the settings choose comes first."""
    if processes < 1:
        raise ValueError(f"processes must be at least 1; got {processes}")
    model, data, training = parse_run_settings(flags)
    config = read_config(model)
    training.micro_batches_per_step(processes)
    rows = {"as set": (training, 0)}
    for name, (settings, stage) in layouts(config, training, processes).items():
        for recomputed in (False, True):
            settings = replace(settings, gradient_checkpointing=recomputed)
            rows[f"{name}, layers computed again" if recomputed else name] = (settings, stage)

    size = model_size(config)
    print(
        f"{model.preset}: {size.total:,} parameters, {size.active:,} active; "
        f"{training.micro_batch_size} x {data.block_size} tokens at a time on each of {processes} devices, "
        f"mixed_precision {training.mixed_precision}\n"
    )
    estimates = {
        name: step_memory(config, data.block_size, settings, processes, zero_stage=stage)
        for name, (settings, stage) in tqdm(rows.items(), desc="layouts", leave=False)
    }
    parts = [part.name for part in fields(StepMemory)]
    print(f"{'GB on one device':38}" + "".join(f"{name:>12}" for name in [*parts, "total", "fits"]))
    for name, memory in estimates.items():
        figures = "".join(f"{getattr(memory, part) / 1e9:12.2f}" for part in [*parts, "total"])
        print(f"{name:38}{figures}{fits(memory):>12}")
    print(
        "\nA layout fits a device if it takes no more than nine tenths of it: fragments, communication buffers,"
        "\nworkspaces of kernels and the device's own context are not counted."
    )


def fits(memory: StepMemory) -> str:
    """The smallest device that is large enough."""
    return next((f"{device} GB" for device in DEVICES if memory.fits(device)), "none")


if __name__ == "__main__":
    main()
