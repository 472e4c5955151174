"""Writes the tables of docs/performance.md anew, and its picture, from what `scripts/benchmark.py` wrote.

python benchmarks/tabulate_performance.py [RESULTS [DOCUMENT.md]]
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from contestants import OURS, UNBALANCED
from measuring import DTYPES, MODELS

from equipoise.data import write_whole

ROOT = Path(__file__).parents[1]
NUMBERS = {"float32": "fp32", "autocast": "bf16 autocast", "bfloat16": "bf16"}
AXES = {"num_experts": "experts", "sequence_length": "sequence length", "world_size": "processes"}
# Okabe and Ito's colours, told apart by those who see red and green alike.
OUR_COLOUR, PEER_COLOUR = "#0072B2", "#E69F00"

Result = dict[str, Any]


def read(folder: Path, kind: str) -> list[Result]:
    """The results of a sub-command, in the order of devices, models and dtypes."""
    orders = list(AXES), list(MODELS), list(DTYPES)
    found = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob(f"{kind}_*.json")]

    def key(result: Result) -> tuple[Any, ...]:
        values = result.get("axis", orders[0][0]), result["model"], result["dtype"]
        places = (order.index(value) for order, value in zip(orders, values, strict=True))
        return result["machine"]["device"], *places

    return sorted(found, key=key)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Markdown; the first column is text, the others are figures."""
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def named(result: Result) -> str:
    device = result["machine"]["device"]
    return f"{result['model']}, {NUMBERS[result['dtype']]}" + ("" if device == "cpu" else f", {device}")


def times(ratio: Result) -> str:
    """A median ratio with its quartiles."""
    low, high = ratio["ratio_quartiles"]
    return f"{ratio['ratio']:.2f} ({low:.2f}-{high:.2f})"


def shares(record: Result) -> str:
    """Of each peak."""
    return " / ".join(f"{100 * share['ratio']:.0f}%" for share in record["fraction_of_peak"].values())


def peaks(result: Result) -> str:
    return " / ".join(f"{peak['gflops']:.0f}" for peak in result["peaks"].values())


def short(peer: str) -> str:
    """`grouped_mm` of `Qwen3-MoE, grouped_mm`."""
    return f"`{peer.rpartition(' ')[2]}`"


def step_table(folder: Path) -> str:
    """Time of a training step."""
    head = ["", "peer's experts", "tokens/s, peer", "ours", "times the peer", "GFLOP/s, ours", "of the peaks", "peer"]
    rows = []
    for result in read(folder, "step"):
        peer, ours = (result["contestants"][name] for name in (result["fastest_peer"], OURS))
        row = [named(result), short(result["fastest_peer"])]
        row += [f"{record['tokens_per_second']:,.0f}" for record in (peer, ours)]
        row += [
            f"**{times(result['speedups'][result['fastest_peer']])}**",
            f"{ours['gflops']:,.0f} of {peaks(result)}",
        ]
        rows.append([*row, shares(ours), shares(peer)])
    return table(head, rows)


def memory_table(folder: Path) -> str:
    """Memory of a training step."""
    head = ["", "weights, gradients, optimizer", "activations, peer", "ours", "of the peer's"]
    rows = []
    for result in read(folder, "step"):
        if not result["memory"]:
            continue
        peer, ours = (result["memory"][name] for name in (result["fastest_peer"], OURS))
        staying = sum(ours[part] for part in ("parameters", "gradients", "optimizer"))
        figures = [f"{number / 1e6:,.0f} MB" for number in (staying, peer["activations"], ours["activations"])]
        rows.append([named(result), *figures, f"**{result['activations_ratio']:.2f}**"])
    return table(head, rows)


def balancing_table(folder: Path) -> str:
    """What balancing costs in ours."""
    rows = [
        [named(result), f"{result['contestants'][UNBALANCED]['tokens_per_second']:,.0f}", times(result["balancing"])]
        for result in read(folder, "step")
        if "balancing" in result
    ]
    return table(["", "tokens/s, ours without balancing", "seconds with it, times those without"], rows)


def experts_table(folder: Path) -> str:
    """The experts alone."""
    head = ["", "fastest peer", "GFLOP/s, peer", "ours", "times the peer", "peaks", "of the peaks", "peer"]
    rows = []
    for result in read(folder, "experts"):
        peer, ours = (result["contestants"][name] for name in (result["fastest_peer"], OURS))
        row = [named(result), short(result["fastest_peer"]), f"{peer['gflops']:,.0f}", f"{ours['gflops']:,.0f}"]
        row += [f"**{times(result['speedups'][result['fastest_peer']])}**", peaks(result)]
        rows.append([*row, shares(ours), shares(peer)])
    return table(head, rows)


def generate_table(folder: Path) -> str:
    """Decoding."""
    rows = []
    for result in read(folder, "generate"):
        for size, found in result["batch_sizes"].items():
            peer, ours = (found["contestants"][name] for name in (found["fastest_peer"], OURS))
            row = [f"{named(result)}, batch of {size}", short(found["fastest_peer"])]
            row += [f"{record['tokens_per_second']:,.0f}" for record in (peer, ours)]
            rows.append([*row, f"**{times(found['speedups'][found['fastest_peer']])}**"])
    return table(["", "fastest peer", "tokens/s, peer", "ours", "times the peer"], rows)


def scaling_table(folder: Path) -> str:
    """Tokens/s as something grows."""
    head = ["", "peer", "of its first", "ours", "of its first", "times the peer"]
    rows = []
    for result in read(folder, "scaling"):
        for size, found in result["sizes"].items():
            row = [f"{named(result)}, {AXES[result['axis']]}: {size}"]
            for name in sorted(found["contestants"], key=lambda name: name == OURS):
                record = found["contestants"][name]
                row += [f"{record['tokens_per_second']:,.0f}", f"{record['of_first']['ratio']:.2f}"]
            rows.append([*row, f"**{times(found['speedup'])}**"])
    return table(head, rows)


def losses_table(folder: Path) -> str:
    """Agreement of the losses."""
    rows = []
    for result in read(folder, "losses"):
        losses = result["losses"][OURS]
        for pair in result["largest_differences"]:
            one, other = (name if name == OURS else short(name) for name in (pair["of"], pair["and"]))
            difference = f"**{pair['relative']:.1e}**" if one == OURS else f"{pair['relative']:.1e}"
            row = [f"{named(result)}: {one} and {other}", str(len(losses)), f"{losses[0]:.3f}", f"{losses[-1]:.3f}"]
            rows.append([*row, difference, str(pair["at_step"])])
    return table(["", "steps", "our first loss", "last", "largest relative difference", "at step"], rows)


def operators_table(folder: Path) -> str:
    """Where steps spend their time."""
    rows = []
    for result in read(folder, "step"):
        for name, operators in result.get("operators", {}).items():
            spent = ", ".join(f"`{row['operator']}` {100 * row['share']:.0f}%" for row in operators[:8])
            rows.append([f"{named(result)}: {name}", spent])
    return table(["", "operators"], rows).replace("| --- | ---: |", "| --- | --- |")


def commands_table(folder: Path) -> str:
    """Which command made which file, on what."""
    rows = []
    for file in sorted(folder.glob("*_*_*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if "allocator" in result and "model" in result:
            versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers"))
            machine = result["machine"]
            device = machine["cpu"] if machine["device"] == "cpu" else machine["device"]
            settings = " ".join(f"{name}={value}" for name, value in result["allocator"]["environment"].items())
            rows.append(
                [f"`{file.name}`", f"`{settings + ' ' * bool(settings)}{result['command']}`", device, versions]
            )
    head = ["file", "command", "machine", "versions"]
    return table(head, rows).replace(" ---: |", " --- |")


TABLES: dict[str, Callable[[Path], str]] = {
    "step": step_table,
    "memory": memory_table,
    "balancing": balancing_table,
    "experts": experts_table,
    "generate": generate_table,
    "scaling": scaling_table,
    "losses": losses_table,
    "operators": operators_table,
    "commands": commands_table,
}


def marked(name: str) -> re.Pattern[str]:
    """Where a table stands."""
    return re.compile(
        rf"(<!-- {name}: written by benchmarks/tabulate_performance.py -->\n)(.*?)(<!-- end -->)", re.DOTALL
    )


def draw(folder: Path, path: Path) -> None:
    """How many times the peer's speed, with quartiles; the activations' share; tokens/s by number of experts."""
    steps, experts = read(folder, "step"), read(folder, "experts")
    figure, (speed, memory, scaling) = plt.subplots(
        1, 3, figsize=(12, 3.8), layout="constrained", width_ratios=(1.5, 1, 1.1)
    )
    bars = [(f"step: {named(result)}", result) for result in steps]
    bars += [(f"experts: {named(result)}", result) for result in experts]
    ratios = [result["speedups"][result["fastest_peer"]] for _, result in bars]
    errors = [[r["ratio"] - r["ratio_quartiles"][0], r["ratio_quartiles"][1] - r["ratio"]] for r in ratios]
    drawn = speed.barh(
        range(len(bars)),
        [ratio["ratio"] for ratio in ratios],
        xerr=list(zip(*errors, strict=True)) if errors else None,
        color=OUR_COLOUR,
        ecolor="#444444",
        height=0.6,
    )
    speed.bar_label(drawn, [f"{ratio['ratio']:.2f}" for ratio in ratios], padding=4)
    speed.margins(x=0.15)
    speed.axvline(1, color=PEER_COLOUR, linewidth=2)
    speed.set(title="times the peer's speed", yticks=range(len(bars)), yticklabels=[name for name, _ in bars])
    speed.invert_yaxis()

    accounts = [result for result in steps if result["memory"]]
    drawn = memory.barh(
        range(len(accounts)), [result["activations_ratio"] for result in accounts], color=OUR_COLOUR, height=0.6
    )
    memory.bar_label(drawn, [f"{r['activations_ratio']:.2f}" for r in accounts], label_type="center", color="white")
    memory.axvline(1, color=PEER_COLOUR, linewidth=2)
    memory.set(
        title="times the peer's activations", yticks=range(len(accounts)), yticklabels=[named(r) for r in accounts]
    )
    memory.invert_yaxis()

    grown = [result for result in read(folder, "scaling") if result["axis"] == "num_experts"][:1]
    for result in grown:
        sizes = list(result["sizes"].values())
        for name in sizes[0]["contestants"]:
            rates = [size["contestants"][name]["tokens_per_second"] for size in sizes]
            colour = OUR_COLOUR if name == OURS else PEER_COLOUR
            scaling.plot([int(size) for size in result["sizes"]], rates, "o-", color=colour, label=name)
        scaling.set(title=f"tokens/s of a step, {named(result)}", xlabel="experts in each layer", xscale="log", ylim=0)
        scaling.set_xticks([int(size) for size in result["sizes"]], list(result["sizes"]))
        scaling.minorticks_off()
        scaling.grid(alpha=0.25)
        scaling.legend(frameon=False)
    scaling.set_visible(bool(grown))
    for axes in (speed, memory, scaling):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def main() -> None:
    given = [Path(word) for word in sys.argv[1:]]
    folder, document = (*given, *(ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md")[len(given) :])
    text = document.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        place = marked(name).search(text)
        if place is None:
            sys.exit(f"error: {document} has no place for {name}")
        text = f"{text[: place.end(1)]}{make(folder)}\n{text[place.start(3) :]}"
    write_whole(document, lambda file: file.write_text(text, encoding="utf-8"))
    write_whole(document.with_suffix(".png"), lambda file: draw(folder, file))


if __name__ == "__main__":
    main()
