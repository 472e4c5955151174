"""Measures speed on this machine: `python scripts/benchmark.py step --help`.

A sub-command is a dataclass of arguments and a function that takes them, measures, prints and writes: both in a file
of `benchmarks/`, and a line of `COMMANDS`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

# benchmarks/ is no package: its files find each other, and are found, by the folder.
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from balancing_cost import BalancingArguments, benchmark_balancing
from experts_speed import ExpertsArguments, benchmark_experts
from generation_speed import GenerateArguments, benchmark_generation
from loss_agreement import LossesArguments, benchmark_losses
from scaling_speed import ScalingArguments, benchmark_scaling
from step_speed import StepArguments, benchmark_step

COMMANDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "experts": (ExpertsArguments, benchmark_experts),
    "step": (StepArguments, benchmark_step),
    "generate": (GenerateArguments, benchmark_generation),
    "scaling": (ScalingArguments, benchmark_scaling),
    "losses": (LossesArguments, benchmark_losses),
    "balancing": (BalancingArguments, benchmark_balancing),
}


def main() -> None:
    command, *rest = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        print(f"usage: benchmark.py {{{','.join(COMMANDS)}}} [--help]")
        return
    if command not in COMMANDS:
        sys.exit(f"error: the sub-command must be one of {', '.join(COMMANDS)}; got {command or 'none'}")
    kind, benchmark = COMMANDS[command]
    parser = HfArgumentParser(kind, prog=f"benchmark.py {command}", description=kind.__doc__)
    try:
        (arguments,) = parser.parse_args_into_dataclasses(rest)
        benchmark(arguments)
    except StrictDataclassError as error:
        sys.exit(f"error: {error.__cause__ or error}")  # the cause alone says it in one line
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
