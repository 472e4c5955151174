"""Writes the tables of hub_configs/README.md anew: the presets' sizes, and the memory that they take.

python scripts/tabulate_presets.py
"""

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm.auto import tqdm
from transformers import AutoConfig

from equipoise.configuration import RunSettings, model_size, parse_run_settings
from equipoise.data import write_whole
from equipoise.training.memory import StepMemory, ZeroStage, layouts, step_memory

PRESETS = Path(__file__).parents[1] / "hub_configs"
LAYOUTS = {  # column -> devices, and the name of the layout
    "1 device": (1, "one device, FSDP2"),
    "DDP, 8": (8, "DDP"),
    "FSDP2, 8": (8, "FSDP2"),
    "HSDP, 2 x 8": (16, "HSDP, 8 a copy"),
    "experts on 8": (8, "experts on 8"),
    "ZeRO-1, 8": (8, "ZeRO-1"),
    "ZeRO-2, 8": (8, "ZeRO-2"),
    "ZeRO-3, 8": (8, "ZeRO-3"),
}


@dataclass(frozen=True)
class Launch:
    """A command in the head of a recipe, and the devices it is meant for."""

    preset: str
    processes: int
    gigabytes: int
    command: str

    def settings(self) -> tuple[RunSettings, ZeroStage]:
        """What the command trains with."""
        words = shlex.split(self.command)
        stage = re.search(r"launch_configs/zero(\d)\.yaml", self.command)
        file = next(number for number, word in enumerate(words) if word.endswith("train.yaml"))
        return parse_run_settings(words[file:]), int(stage[1]) if stage else 0  # type: ignore[return-value]

    def memory(self) -> StepMemory:
        """What it takes on each device."""
        (_, data, training), stage = self.settings()
        config = AutoConfig.from_pretrained(PRESETS / self.preset)
        return step_memory(config, data.block_size, training, self.processes, zero_stage=stage)


def presets() -> list[Path]:
    """By size."""
    folders = [file.parent for file in PRESETS.glob("*/config.json")]
    return sorted(folders, key=lambda folder: model_size(AutoConfig.from_pretrained(folder)).total)


def launches(preset: Path) -> Iterator[Launch]:
    """The commands of a recipe's head that follow a line like `# 8 x 80 GB: ...`."""
    processes = gigabytes = None
    for line in (preset / "train.yaml").read_text(encoding="utf-8").splitlines():
        devices = re.match(r"# (\d+) x (\d+) GB", line)
        if devices:
            processes, gigabytes = int(devices[1]), int(devices[2])
        elif line.startswith("#   ") and processes is not None and gigabytes is not None:
            yield Launch(preset.name, processes, gigabytes, line.removeprefix("#   "))


def sizes_table() -> str:
    """Parameters of each preset, exact."""
    lines = [
        "| preset | total | active | without embeddings: total | active |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for preset in presets():
        size = model_size(AutoConfig.from_pretrained(preset))
        figures = (size.total, size.active, size.total - size.embeddings, size.active_without_embeddings)
        lines.append(f"| `{preset.name}` | " + " | ".join(f"{figure:,}" for figure in figures) + " |")
    return "\n".join(lines)


def layouts_table() -> str:
    """What a step of each preset's recipe takes in each layout, in bf16."""
    lines = [
        f"| preset | sequences | {' | '.join(LAYOUTS)} |",
        "| --- | --- |" + " ---: |" * len(LAYOUTS),
    ]
    for preset in tqdm(presets(), desc="layouts"):
        _, data, training = parse_run_settings([str(preset / "train.yaml")])
        config = AutoConfig.from_pretrained(preset)
        cells = [f"`{preset.name}`", f"{training.micro_batch_size} x {data.block_size}"]
        for processes, name in LAYOUTS.values():
            settings, stage = layouts(config, replace(training, mixed_precision="bf16"), processes)[name]
            kept, recomputed = (
                step_memory(
                    config,
                    data.block_size,
                    replace(settings, gradient_checkpointing=checkpointing),
                    processes,
                    zero_stage=stage,
                )
                for checkpointing in (False, True)
            )
            cells.append(f"{cell(kept)} / {cell(recomputed)}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(memory: StepMemory) -> str:
    """Bold where a device of 80 GB is enough, plain where one of 141 GB is, else struck through."""
    figure = f"{memory.total / 1e9:.1f}"
    return f"**{figure}**" if memory.fits(80) else figure if memory.fits(141) else f"~~{figure}~~"


def launches_table() -> str:
    """The commands of the recipes and what each takes."""
    lines = ["| devices | command | GB on each |", "| --- | --- | ---: |"]
    for launch in tqdm([launch for preset in presets() for launch in launches(preset)], desc="commands"):
        figure = f"{launch.memory().total / 1e9:.1f}"
        lines.append(f"| {launch.processes} x {launch.gigabytes} GB | `{launch.command}` | {figure} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"sizes": sizes_table, "layouts": layouts_table, "launches": launches_table}


def marked(name: str) -> re.Pattern[str]:
    """Where a table stands."""
    return re.compile(rf"(<!-- {name}: written by scripts/tabulate_presets.py -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def main() -> None:
    readme = PRESETS / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        place = marked(name).search(text)
        assert place is not None, f"{readme} has no place for {name}"
        text = f"{text[: place.end(1)]}{table()}\n{text[place.start(3) :]}"
    write_whole(readme, lambda file: file.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    main()
