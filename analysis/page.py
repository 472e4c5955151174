"""The report as one HTML page that needs nothing else, and its charts as files."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from tqdm.auto import tqdm

from ..configuration import BalancingSettings
from ..data import write_whole
from .balance_charts import (
    CELLS,
    bits_per_byte_figure,
    load_over_time_figure,
    loss_figure,
    violation_figure,
    violation_over_time_figure,
    violations,
)
from .health import HIGH_MAX_VIO, examine, untrained_bits
from .measurement import FAVOURITES, Measurement
from .ordering import domain_order, expert_order
from .palette import DARK, LIGHT
from .router_charts import PAIRED, coactivation_figure, confidence_figure, saturation_figure
from .specialisation import mutual_information
from .specialisation_charts import divergence_figure, heatmap_figure, olmoe_figure, specialisation_figure
from .token_counts import FEWEST
from .vega import UNKNOWN, VEGA_LITE, ReportFigure, evenly, page_spec, rounded, save_figures

TEMPLATES = Path(__file__).with_name("templates")
LAYERS = 12
"""Most layers whose maps, tables and texts a page holds; all layers are in the charts by layer."""
TEXT_TOKENS = 200
"""Tokens of each domain's text, at most."""
TEXT_SELECTIONS = 500_000
"""Selections in all texts of a page: it takes 4 bytes for each."""

ICONS = {"problem": "✖", "warning": "▲", "note": "●"}
# Outlines of Vega's shapes, for legends.
SHAPE_PATHS = {
    "circle": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0",
    "square": "M-3.5,-3.5h7v7h-7z",
    "triangle-up": "M-4.5,3.5h9l-4.5,-8z",
    "diamond": "M0,-5l4.5,5l-4.5,5l-4.5,-5z",
    "cross": "M-1.5,-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "triangle-down": "M-4.5,-3.5h9l-4.5,8z",
    "triangle-right": "M-3.5,-4.5v9l8,-4.5z",
    "triangle-left": "M3.5,-4.5v9l-8,-4.5z",
}


def shown_layers(num_layers: int) -> tuple[int, ...]:
    """The layers whose maps and texts a page holds: all, or `LAYERS` of them evenly, with the first and the last."""
    return tuple(evenly(num_layers, LAYERS))


def text_tokens(runs: int, domains: int, layers: int, experts_per_tok: int) -> int:
    """Tokens of each domain's text, so that a page of several runs holds `TEXT_SELECTIONS` selections."""
    return max(16, min(TEXT_TOKENS, TEXT_SELECTIONS // (runs * domains * layers * experts_per_tok)))


def write_page(folder: str | Path, runs: Sequence[Measurement], notes: Sequence[str] = ()) -> Path:
    """Writes `report.html`, and its charts as PNG and SVG into `figures/`.

    Args:
        runs: at most `palette.RUNS`, of different names.
        notes: what a reader must know before comparing them.

    Returns:
        The page. Each file is written under a temporary name and renamed.
    """
    folder = Path(folder)
    figures = report_figures(runs)
    page = render(runs, figures, notes)
    for figure in tqdm([figure for figure in figures.values() if figure], desc="figures", unit="figure", disable=None):
        save_figures(figure, folder / "figures")
    return write_whole(folder / "report.html", lambda file: file.write_text(page, encoding="utf-8"))


def report_figures(runs: Sequence[Measurement]) -> dict[str, ReportFigure | None]:
    """All charts of the report by name; None where the runs do not hold what it shows."""
    layers = _layers(runs)
    order = _domain_orders(runs)
    return {
        "loss": loss_figure(runs),
        "bits_per_byte": bits_per_byte_figure(runs),
        "max_vio": violation_figure(runs),
        "max_vio_over_time": violation_over_time_figure(runs, layers),
        "load_over_time": load_over_time_figure(runs, layers),
        "specialisation": specialisation_figure(runs),
        "experts_by_domain": heatmap_figure(runs, order, layers),
        "domain_divergence": divergence_figure(runs, order, layers),
        "olmoe_specialisation": olmoe_figure(runs),
        "coactivation": coactivation_figure(runs, order, layers),
        "router_confidence": confidence_figure(runs),
        "router_saturation": saturation_figure(runs),
    }


def render(runs: Sequence[Measurement], figures: Mapping[str, ReportFigure | None], notes: Sequence[str] = ()) -> str:
    """The page."""
    layers = _layers(runs)
    start = _start_layer(runs, layers)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = environment.get_template("report.css").render(light=Markup(_variables(LIGHT)), dark=Markup(_variables(DARK)))
    names = ", ".join(run.name for run in runs)
    return environment.get_template("report.html").render(
        title=f"Routing report: {names}",
        lead=_lead(runs),
        css=Markup(css),
        script=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
        vega=Markup(_vega()),
        data=Markup(_as_json(_page_data(runs, figures, layers, start))),
        contents=[
            ("glance", "At a glance"),
            ("health", "What is unhealthy"),
            ("trained", "What was trained"),
            ("load", "Load"),
            ("specialisation-section", "Specialisation"),
            ("experts", "Experts"),
            ("router", "Router"),
            ("tokens", "Text, token by token"),
            ("method", "Method"),
        ],
        runs=[{"name": run.name, "findings": examine(run)} for run in runs],
        icons=ICONS,
        limits={"max_vio": f"{HIGH_MAX_VIO:g}"},
        shapes=SHAPE_PATHS,
        notes=notes,
        glance=_glance(runs),
        compared=_compared(runs),
        facts=_facts(runs),
        figures=figures,
        layers=layers,
        start_layer=start,
        num_layers=max(run.num_layers for run in runs),
        chosen=" or ".join(sorted({str(run.trace.num_experts_per_tok) for run in runs})),
        most_bits=" or ".join(
            sorted({f"{np.log2(min(len(run.trace.domains), run.num_experts)):.2f}" for run in runs})
        ),
        permutations=f"{runs[0].settings.permutations:,}",
        fewest=FEWEST,
        method=_method(runs),
        bounds=_bounds(runs, layers),
        versions={
            **{name: version(name) for name in ("equipoise", "torch", "transformers")},
            "vega": vl_convert.get_vega_version(),
            "vega_lite": VEGA_LITE,
        },
    )


@dataclass(frozen=True)
class Cell:
    """One value of a table, over `span` columns."""

    text: str
    span: int = 1


@dataclass(frozen=True)
class Fact:
    """One row about how the runs were trained."""

    name: str
    values: Sequence[str]

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1

    @property
    def shown(self) -> list[Cell]:
        """The values; those that are alike in neighbouring runs once."""
        return [Cell(text, len(list(same))) for text, same in groupby(self.values)]


def _lead(runs: Sequence[Measurement]) -> str:
    trace = runs[0].trace
    tokens, documents = int(trace.num_tokens.sum()), len(trace.document.unique())
    what = (
        f"{tokens:,} tokens of {documents:,} held-out documents in {len(trace.domains)} domains"
        if len({(int(run.trace.num_tokens.sum()), run.trace.domains) for run in runs}) == 1
        else "held-out text of each run"
    )
    who = "one Mixture-of-Experts model" if len(runs) == 1 else f"{len(runs)} Mixture-of-Experts models side by side"
    return f"Which experts {who} {'sends' if len(runs) == 1 else 'send'} text to, measured on {what}."


def _glance(runs: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    header = [
        "run", "balancing", "loss, nats", "bits per byte", "MI, bits", "token identity", "untrained", "chance",
        "MaxVio global", "batch", "micro", "dead experts",
    ]  # fmt: skip
    rows = []
    for run in runs:
        mean = run.specialisation.mean_over_layers()
        error = float(mean.standard_error)
        scopes = [float(np.mean(values)) if values else None for values in violations(run).values()]
        rows.append(
            [
                run.name,
                UNKNOWN if run.architecture.balancing is None else run.architecture.balancing.balancing_mode,
                _decimal(run.record.training.get("lm_loss_end")),
                _decimal(_bits_per_byte(run)),
                f"{float(mean.bits):.3f}" + (f" ± {error:.3f}" if error == error else ""),
                _decimal(float(mutual_information(run.token_identity).mean())),
                _decimal(float(np.mean(untrained_bits(run))) if run.untrained is not None else None),
                _decimal(float(mean.null_mean)),
                *(_decimal(value, 2) for value in scopes),
                f"{int(run.balance.dead_experts.sum())} of {run.num_layers * run.num_experts}",
            ]
        )
    return header, rows


def _compared(runs: Sequence[Measurement]) -> list[str]:
    """From least to most, in words; nothing for a run by itself."""
    if len(runs) == 1:
        return []
    measures = {
        "Specialisation (MI, bits)": [float(run.specialisation.mean_over_layers().bits) for run in runs],
        "What of it token identity alone does not explain (bits)": [
            float((run.specialisation.bits - mutual_information(run.token_identity)).mean()) for run in runs
        ],
        "MaxVio over the held-out text": [float(run.balance.max_vio_global.mean()) for run in runs],
    }
    evaluated = [_bits_per_byte(run) for run in runs]
    if None not in evaluated:
        measures["Bits per byte over all held-out text"] = [value for value in evaluated if value is not None]
    return [
        f"{title}, from least to most: "
        + ", ".join(f"{runs[place].name} {values[place]:.3f}" for place in np.argsort(values, kind="stable"))
        + "."
        for title, values in measures.items()
    ]


def _bits_per_byte(run: Measurement) -> float | None:
    return run.record.evaluation.get("domains", {}).get("all", {}).get("bits_per_byte")


def _facts(runs: Sequence[Measurement]) -> list[Fact]:
    of_runs = [_facts_of(run) for run in runs]
    return [
        Fact(name, [facts.get(name, UNKNOWN) for facts in of_runs])
        for name in of_runs[0]
        if any(facts.get(name, UNKNOWN) != UNKNOWN for facts in of_runs)
    ]


def _facts_of(run: Measurement) -> dict[str, str]:
    shape, settings, training, data = run.architecture, run.record.settings, run.record.training, run.record.data
    active = f", of which {_short(shape.active_parameters)} act on a token" if shape.active_parameters else ""
    shared = f", {shape.num_shared_experts} shared" if shape.num_shared_experts else ""
    width = f"width {shape.moe_intermediate_size:,}; " if shape.moe_intermediate_size else ""
    blocks = settings.get("global_batch_size")
    accumulation, processes = training.get("gradient_accumulation_steps"), training.get("world_size")
    start, end = training.get("lm_loss_start"), training.get("lm_loss_end")
    documents = sum(domain.get("documents") or 0 for domain in data.values())
    weight = sum(domain.get("bytes") or 0 for domain in data.values())
    return {
        "Model": shape.family,
        "Parameters": f"{_short(shape.parameters)}{active}",
        "Layers": f"{shape.num_hidden_layers}, {shape.num_moe_layers} with experts; hidden size {shape.hidden_size:,}",
        "Experts in a layer": f"{shape.num_experts}, {shape.num_experts_per_tok} per token{shared}; {width}"
        f"{shape.scoring_func} scores",
        "Balancing": UNKNOWN if shape.balancing is None else _balancing(shape.balancing),
        "Domains": ", ".join(data) if data else ", ".join(training.get("domains", [])) or UNKNOWN,
        "Training text": f"{documents:,} documents, {weight / 1e6:,.1f} MB" if documents else UNKNOWN,
        "Vocabulary": f"{shape.vocab_size:,} tokens",
        "Steps": _count(training.get("steps", run.record.status.get("step"))),
        "Tokens seen": _count(training.get("tokens")),
        "Global batch": f"{blocks} blocks of {settings['block_size']} tokens: {processes} processes x "
        f"{accumulation} accumulation steps x micro-batches of {settings['micro_batch_size']}, "
        f"{'one domain each' if settings.get('micro_batch_domains') == 'single' else 'domains mixed'}"
        if blocks and processes
        else UNKNOWN,
        "Learning rate": f"{settings['learning_rate']:g}, "
        f"{settings.get('learning_rate_schedule', 'schedule unknown')}, "
        f"{settings.get('warmup_steps', 0):,} steps of warm-up"
        if "learning_rate" in settings
        else UNKNOWN,
        "Seed": str(settings.get("seed", UNKNOWN)),
        "Loss, first to last": f"{start:.3f} to {end:.3f} nats per token" if start and end else UNKNOWN,
        "Bits per byte, held out": _decimal(_bits_per_byte(run)),
        "Time": f"{training['seconds'] / 60:,.0f} minutes, {training['tokens_per_second']:,.0f} tokens a second"
        if training
        else UNKNOWN,
        "State": str(run.record.status.get("state", UNKNOWN)),
    }


def _balancing(balancing: BalancingSettings) -> str:
    mode = balancing.balancing_mode
    if mode == "none":
        return "none"
    if mode == "loss_free":
        rate = "default" if balancing.bias_update_rate is None else f"{balancing.bias_update_rate:g}"
        text = f"loss_free: bias updates by {balancing.bias_update_rule}, rate {rate}"
    else:
        text = f"{mode}: loss with coefficient {balancing.router_aux_loss_coef:g}"
        if mode == "global_batch":
            text += f", load estimate {balancing.load_estimate}"
    if balancing.complementary_balancing_mode != "none":
        text += f"; beside it {balancing.complementary_balancing_mode} with {balancing.complementary_aux_loss_coef:g}"
    return text + ("; changed by a schedule" if balancing.balancing_schedule else "")


def _method(runs: Sequence[Measurement]) -> str:
    run = runs[0]
    return (
        "Each model read the held-out documents once, in windows of at most "
        f"{' or '.join(sorted({str(run.block_size) for run in runs}))} tokens, and the experts it selected were "
        "counted as integers; padding is not counted. All domains weigh the same in measures of specialisation, "
        "however much text they have. Documents are dealt out to five parts; what token identity says of a document "
        "is learned from the other four, never from itself. Micro MaxVio of analysis.json is over "
        f"{run.settings.micro_batch_size} windows of one domain. "
        "The numbers of each run are in its analysis.json."
    )


def _bounds(runs: Sequence[Measurement], layers: Sequence[int]) -> list[str]:
    most = max(run.num_layers for run in runs)
    tokens = max(len(text.pieces) for run in runs for text in run.texts)
    bounds = [
        "Maps, tables and texts: "
        + (f"{len(layers)} of {most} layers, evenly." if len(layers) < most else "all layers."),
        f"Text: one window of each domain, its first {tokens} tokens. The window is the middle one of those long "
        "enough, whatever the routing.",
        f"Favourite tokens: at most {FAVOURITES} of each expert, of tokens that occur {FEWEST} times or more.",
    ]
    covered = min(run.tokens_covered for run in runs)
    if covered < 1:
        bounds.append(
            f"Token identity: {covered:.1%} of the text are tokens counted by themselves; the rarest share one row."
        )
    if any(run.trace.num_experts_per_tok > 1 and run.num_experts > PAIRED for run in runs):
        bounds.append(f"Experts selected together: of the {PAIRED} with the strongest ties.")
    bounds.append(f"Load over training: at most {CELLS:,} cells; of longer logs, lines are left out evenly.")
    return bounds


def _layers(runs: Sequence[Measurement]) -> tuple[int, ...]:
    return shown_layers(max(run.num_layers for run in runs))


def _start_layer(runs: Sequence[Measurement], layers: Sequence[int]) -> int:
    """The layer in which the runs together are furthest beyond chance: there is most to see."""
    excess = {
        layer: sum(
            float(run.specialisation.bits[layer] - run.specialisation.null_mean[layer])
            for run in runs
            if layer < run.num_layers
        )
        for layer in layers
    }
    return max(excess, key=lambda layer: excess[layer])


def _domain_orders(runs: Sequence[Measurement]) -> dict[str, list[str]]:
    """Each run's domains in the order in which they are shown: one order for all runs with the same domains."""
    orders = {}
    for run in runs:
        alike = [other.shares for other in runs if other.trace.domains == run.trace.domains]
        orders[run.name] = [run.trace.domains[place] for place in domain_order(alike)]
    return orders


def _page_data(
    runs: Sequence[Measurement], figures: Mapping[str, ReportFigure | None], layers: Sequence[int], start: int
) -> dict[str, Any]:
    """What the script draws from."""
    panels = {}
    for figure in figures.values():
        for index, panel in enumerate(figure.panels if figure else ()):
            layered = None not in panel.columns
            panels[f"{figure.name}-{index}"] = {  # type: ignore[union-attr]
                "spec": page_spec(panel),
                "layered": layered,
                "columns": {"" if layer is None else str(layer): values for layer, values in panel.columns.items()},
            }
    orders = _domain_orders(runs)
    return {"start": start, "panels": panels, "runs": [_run_data(run, orders[run.name], layers) for run in runs]}


def _run_data(run: Measurement, domains: Sequence[str], layers: Sequence[int]) -> dict[str, Any]:
    own = [layer for layer in layers if layer < run.num_layers]
    shares = run.shares[[run.trace.domains.index(name) for name in domains]]  # [G, L, E]
    load = run.trace.load.sum(0).double()
    relative = load / load.mean(-1, keepdim=True)
    return {
        "name": run.name,
        "experts": run.num_experts,
        "chosen": run.trace.num_experts_per_tok,
        "order": {layer: expert_order(shares[:, layer]).tolist() for layer in own},
        "experts_of": {
            layer: {
                "load": [rounded(value) for value in relative[layer].tolist()],
                "domains": [_top_domains(shares[:, layer, expert], domains) for expert in range(run.num_experts)],
                "tokens": [
                    [(token, round(share, 3)) for token, share in tokens] for tokens in run.favourites.get(layer, [])
                ],
            }
            for layer in own
        },
        "text_layers": list(run.text_layers),
        "texts": [
            {
                "domain": text.domain,
                "pieces": text.pieces,
                "experts": _base64(text.experts.numpy().astype("<u2")),
                "weights": _base64(text.weights.numpy()),
            }
            for text in sorted(run.texts, key=lambda text: domains.index(text.domain))
        ],
    }


def _top_domains(shares: torch.Tensor, domains: Sequence[str]) -> list[tuple[str, float]]:
    """The three domains that make up most of an expert's tokens, were all domains alike large."""
    if not shares.sum():
        return []
    share = shares / shares.sum()
    best = share.topk(min(3, len(domains)))
    return [
        (domains[place], round(value, 3))
        for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")


def _as_json(data: Mapping[str, Any]) -> str:
    """JSON that nothing in it can end the script element that holds it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def _vega() -> str:
    """Vega, Vega-Lite and vega-embed as one script, which leaves `vegaEmbed` behind."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    assert "</script" not in bundle
    assert "<!--" not in bundle
    return f"(() => {{{bundle}}})();"


def _variables(colours: Mapping[str, str]) -> str:
    return "\n".join(f"  --{name}: {colour};" for name, colour in colours.items())


def _decimal(value: float | None, digits: int = 3) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _short(count: int) -> str:
    """12_345_678 -> 12.3 M"""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return str(count)


__all__ = ["report_figures", "shown_layers", "text_tokens", "write_page"]
