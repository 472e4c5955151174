"""Puts the results of `load_estimates.py` into one file and prints them as a Markdown table.

python benchmarks/tabulate_estimates.py RESULT.json... benchmarks/results/load_estimates.json
"""

import json
import sys
from pathlib import Path
from statistics import mean

from equipoise.data import write_json

TITLES = {
    "running": "`running`",
    "completed": "`completed`",
    "current": "`current`",
    "micro_batch": "micro-batch's own",
}


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(f"usage: {Path(sys.argv[0]).name} RESULT.json... OUTPUT.json")
    *sources, output = sys.argv[1:]
    runs = [json.loads(Path(source).read_text()) for source in sources]
    write_json(output, {"command": "bash benchmarks/load_estimates.sh CORPUS OUTPUT", "runs": runs})
    print("| ranks x accumulation | micro-batches | step | " + " | ".join(TITLES.values()) + " |")
    print("| --- " * (3 + len(TITLES)) + "|")
    for layout in ("1x8", "2x4", "2x16"):
        for run in runs:
            for step, found in run["steps"].items():
                if layout not in found[0]:
                    continue
                cells = []
                for estimate in TITLES:
                    values = [batch[layout][estimate] for batch in found]
                    cells.append(
                        " · ".join(
                            f"{mean(value[part]['cosine'] for value in values):.2f} / "
                            f"{mean(value[part]['norm_ratio'] for value in values):.2f}"
                            for part in ("router", "all_weights")
                        )
                    )
                row = [layout, run["arguments"]["micro_batch_domains"], step, *cells]
                print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
