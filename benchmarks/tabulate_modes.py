"""Turns the runs of `balancing_modes.sh` into one JSON file and a Markdown table.

python benchmarks/tabulate_modes.py OUTPUT benchmarks/results/balancing_modes.json
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

from equipoise.data import write_json

MODES = ("none", "micro_batch", "global_batch", "loss_free")


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(f"usage: {Path(sys.argv[0]).name} RUNS RESULT.json")
    runs = {mode: json.loads((Path(sys.argv[1]) / mode / "summary.json").read_text()) for mode in MODES}
    command = "bash benchmarks/balancing_modes.sh CORPUS OUTPUT"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    device = f"{os.cpu_count()} CPU cores"
    write_json(sys.argv[2], {"command": command, "commit": commit, "device": device, "runs": runs})
    print("| " + " | ".join(["", *MODES]) + " |\n|" + " --- |" * (len(MODES) + 1))
    rows = {
        "bits per byte, all domains": lambda run: f"{run['bits_per_byte']['all']:.3f}",
        "MaxVio, held-out text": lambda run: f"{mean(run['max_vio_global']):.2f}",
        "MaxVio, global batch": lambda run: f"{mean(run['max_vio_batch']):.2f}",
        "MaxVio, micro-batch": lambda run: f"{mean(run['max_vio_micro']):.2f}",
        "dead experts": lambda run: str(sum(run["dead_experts"])),
        "mutual information of domain and expert, bits": lambda run: f"{mean(run['mutual_information_bits']):.3f}",
        "the same by chance": lambda run: f"{mean(run['mutual_information_null_bits']):.3f}",
    }
    for title, cell in rows.items():
        print("| " + " | ".join([title, *(cell(runs[mode]) for mode in MODES)]) + " |")
    for domain in runs["none"]["domains"]:
        bits = [f"{runs[mode]['bits_per_byte'][domain]:.3f}" for mode in MODES]
        print("| " + " | ".join([f"bits per byte, {domain}", *bits]) + " |")


if __name__ == "__main__":
    main()
