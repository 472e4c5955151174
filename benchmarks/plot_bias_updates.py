"""Draws the results of `bias_updates.py` and prints them as a Markdown table.

python benchmarks/plot_bias_updates.py RESULT.json... benchmarks/results/bias_updates.json docs/bias_updates.png
"""

import json
import sys
from pathlib import Path
from statistics import mean, median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from equipoise.data import write_json, write_whole

# Okabe and Ito's colours, told apart by those who see red and green alike.
COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


def over_layers(values: list[list[float]]) -> np.ndarray:
    return np.asarray(values).mean(axis=1)


def draw(runs: dict[str, dict], path: Path) -> None:
    figure, (batch, held_out) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for (name, run), colour in zip(runs.items(), COLOURS, strict=False):
        # `centred_sign` makes the steps of `sign` and would hide under it: dashes on top show that it is there.
        style = {"color": colour, "linestyle": "--" if name == "centred_sign" else "-", "linewidth": 1.4}
        smooth = np.convolve(over_layers(run["max_vio_batch"]), np.ones(20) / 20, mode="valid")
        batch.plot(np.arange(20, 20 + len(smooth)), smooth, label=name, **style)
        steps = [int(step) for step in run["max_vio_global"]]
        held_out.plot(steps, over_layers(list(run["max_vio_global"].values())), **style)
    batch.set(title="global batch (mean over 20 steps)", xlabel="optimizer step", ylabel="MaxVio, mean over layers")
    held_out.set(title="held-out text", xlabel="optimizer step", xlim=batch.get_xlim())
    for axes in (batch, held_out):
        axes.set_yscale("log", base=2)  # from collapse to balance in one picture
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def main() -> None:
    if len(sys.argv) < 4:
        sys.exit(f"usage: {Path(sys.argv[0]).name} RESULT.json... OUTPUT.json FIGURE.png")
    *sources, output, picture = sys.argv[1:]
    parts = [json.loads(Path(source).read_text()) for source in sources]
    runs = {name: run for part in parts for name, run in part["runs"].items()}
    command = "python benchmarks/bias_updates.py --data CORPUS --output RESULT.json --micro_batch_size 4"
    kept = {name: parts[0][name] for name in ("arguments", "versions", "tokens")}
    kept["arguments"] = {name: value for name, value in kept["arguments"].items() if name != "runs"}
    # Of each batch the mean over layers, which is what is drawn: 14,000 numbers less to keep.
    short = {
        name: run | {"max_vio_batch": np.round(over_layers(run["max_vio_batch"]), 4).tolist()}
        for name, run in runs.items()
    }
    write_json(output, {"command": command, **kept, "runs": short})
    write_whole(Path(picture), lambda path: draw(runs, path))
    print("| rule | rate | batch, steps 51-100 | batch, last 100 | held-out, last 100 | bias range | cross-entropy |")
    print("| --- " * 7 + "|")
    for name, run in runs.items():
        batch = over_layers(run["max_vio_batch"])
        held_out = [mean(values) for step, values in run["max_vio_global"].items() if int(step) > 400]
        row = [
            f"`{name}`",
            f"{run['bias_update_rate']:g}",
            f"{median(batch[50:100]):.2f}",
            f"{median(batch[-100:]):.2f} ({np.quantile(batch[-100:], 0.1):.2f}-{np.quantile(batch[-100:], 0.9):.2f})",
            f"{mean(held_out):.2f}",
            f"{mean(run['bias_range']):.2f}",
            f"{run['lm_loss_end']:.3f}",
        ]
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
