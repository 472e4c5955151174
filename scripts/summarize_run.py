"""Puts what training, evaluation and analysis found about a run into one file: `summary.json`, and a table.

python scripts/summarize_run.py runs/demo
"""

import json
import sys
from pathlib import Path
from typing import Any

from equipoise.data import write_json

PARTS = {"training": "training.json", "evaluation": "evaluation.json", "analysis": "analysis/analysis.json"}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {Path(sys.argv[0]).name} RUN")
    run = Path(sys.argv[1])
    missing = [name for name in PARTS.values() if not (run / name).is_file()]
    if missing:
        sys.exit(f"error: the run must have been trained, evaluated and analysed; {run} has no {', '.join(missing)}")
    summary = summarize(**{part: json.loads((run / name).read_text()) for part, name in PARTS.items()})
    write_json(run / "summary.json", summary)
    print_summary(summary)
    print(f"\nwhere the experts went: {run / 'analysis' / 'specialisation.png'}")
    print(f"load over training:     {run / 'analysis' / 'load.png'}")
    print(f"all of this:            {run / 'summary.json'}")


def summarize(training: dict[str, Any], evaluation: dict[str, Any], analysis: dict[str, Any]) -> dict[str, Any]:
    """One flat record of a run; values of a layer are lists over the MoE layers."""
    layers = analysis["layers"]
    return {
        **training,
        "bits_per_byte": {name: result["bits_per_byte"] for name, result in evaluation["domains"].items()},
        "perplexity": {name: result["perplexity"] for name, result in evaluation["domains"].items()},
        "max_vio_global": [layer["max_vio_global"] for layer in layers],
        "max_vio_batch": training["max_vio_batch"],
        "max_vio_micro": training["max_vio_micro"],
        "dead_experts": [layer["dead_experts"] for layer in layers],
        "mutual_information_bits": [layer["mutual_information_bits"] for layer in layers],
        "mutual_information_null_bits": [layer["null_mean_bits"] for layer in layers],
        "mutual_information_p_value": [layer["p_value"] for layer in layers],
    }


def print_summary(summary: dict[str, Any]) -> None:
    print(
        f"\n{summary['parameters'] / 1e6:.1f} M parameters, {summary['balancing_mode']}, "
        f"{summary['world_size']} processes, {summary['steps']} steps, {summary['tokens'] / 1e6:.1f} M tokens "
        f"at {summary['tokens_per_second']:,.0f} tokens/s; "
        f"loss {summary['lm_loss_start']:.2f} -> {summary['lm_loss_end']:.2f}"
    )
    width = max(map(len, summary["bits_per_byte"]))
    print(f"\n{'domain':{width}}  bits per byte  perplexity")
    for domain, bits in summary["bits_per_byte"].items():
        print(f"{domain:{width}}  {bits:13.3f}  {summary['perplexity'][domain]:10.1f}")
    rows = {
        "MaxVio, held-out text": "max_vio_global",
        "MaxVio, global batch": "max_vio_batch",
        "MaxVio, micro-batch": "max_vio_micro",
        "dead experts": "dead_experts",
        "mutual information, bits": "mutual_information_bits",
        "  the same by chance": "mutual_information_null_bits",
    }
    print(f"\n{'by MoE layer':26}" + "".join(f"{layer:8}" for layer in range(len(summary["dead_experts"]))))
    for title, name in rows.items():
        print(f"{title:26}" + "".join(f"{value:8.3f}" if value % 1 else f"{value:8.0f}" for value in summary[name]))


if __name__ == "__main__":
    main()
