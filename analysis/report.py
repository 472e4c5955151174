"""The report of one run as files: the numbers as `analysis.json`, and the pictures."""

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data import write_json
from .figures import load_figure, save_figure, specialisation_figure
from .measurement import Measurement
from .router_confidence import MEASURES
from .specialisation import (
    Specialisation,
    domain_divergence,
    effective_experts,
    load_by_domain,
    mutual_information,
)
from .training_curves import training_figure


def analyse(run: Measurement) -> dict[str, Any]:
    """All numbers of a run, named, as plain lists and floats; `null` where one is not defined.

    Returns:
        `layers`, one entry per MoE layer. Of specialisation, all domains weighing the same:
        `mutual_information_bits` (between domain and expert) with its `standard_error_bits` (jackknife over
        documents) and `mutual_information_normalised` (0 to 1); against it `null_mean_bits`, `null_quantile_95_bits`
        and `p_value` (domain labels permuted over documents), `token_identity_bits` (what token identity alone gives)
        and `untrained_bits` (the same architecture, freshly initialised); `divergence_bits` (Jensen-Shannon, of each
        pair of domains, in the order of `domains`); `load_by_domain` (shares by expert, rows sum to 1),
        `largest_share_by_domain`, `effective_experts_by_domain`; OLMoE's `domain_specialisation` (the largest share of
        a domain's tokens that select one expert, mean over domains) and `vocabulary_specialisation`. Of balance:
        `load` (counts by expert), `max_vio_global`, `max_vio_micro` (groups of windows of one domain),
        `dead_experts`, `load_entropy` (0 to 1), `largest_coactivation` (the largest share of one expert's tokens that
        also select a certain other). Of confidence: the means of `router_confidence.MEASURES`, and
        `overruled_share`.

        `mean_over_layers` holds specialisation against its nulls for the mean over layers. Beside them:
        `router_saturation` (by checkpoint and layer; `null` without earlier checkpoints), what was measured
        (`domains`, `windows`, `documents`, `tokens`), how (`settings`), and with which `versions`.
    """
    trace, found, even, shares = run.trace, run.specialisation, run.balance, run.shares
    token_identity = mutual_information(run.token_identity)
    untrained = None if run.untrained is None else mutual_information(load_by_domain(run.untrained))
    divergence, effective = domain_divergence(shares), effective_experts(shares)
    together = run.coactivation.conditional().amax((1, 2))
    confidence, overruled = run.confidence.mean(), run.confidence.overruled_share()
    load = trace.load.sum(0)
    largest = shares.amax(-1)  # [G, L]
    layers = [
        {
            "layer": layer,
            **_against_nulls(found, token_identity, untrained, layer),
            "max_vio_global": float(even.max_vio_global[layer]),
            "max_vio_micro": float(even.max_vio_micro[layer]),
            "dead_experts": int(even.dead_experts[layer]),
            "load_entropy": float(even.load_entropy[layer]),
            "load": load[layer].tolist(),
            "load_by_domain": dict(zip(trace.domains, shares[:, layer].tolist(), strict=True)),
            "largest_share_by_domain": dict(zip(trace.domains, largest[:, layer].tolist(), strict=True)),
            "effective_experts_by_domain": dict(zip(trace.domains, effective[:, layer].tolist(), strict=True)),
            "divergence_bits": divergence[layer].tolist(),
            "domain_specialisation": float(largest[:, layer].mean() * trace.num_experts_per_tok),
            "vocabulary_specialisation": _number(run.vocabulary_specialisation[layer]),
            "largest_coactivation": float(together[layer]),
            **{name: float(values[layer]) for name, values in zip(MEASURES, confidence, strict=True)},
            "overruled_share": float(overruled[layer]),
        }
        for layer in range(run.num_layers)
    ]
    mean = found.mean_over_layers()
    return {
        "layers": layers,
        "mean_over_layers": _against_nulls(
            mean,
            token_identity.mean(0, keepdim=True),
            None if untrained is None else untrained.mean(0, keepdim=True),
            0,
        ),
        "router_saturation": None
        if run.saturation is None
        else {
            "steps": list(run.saturation.steps),
            "share": run.saturation.share.tolist(),
            "tokens": run.saturation.tokens,
        },
        "num_experts": run.num_experts,
        "num_experts_per_tok": trace.num_experts_per_tok,
        "domains": {
            name: {
                "windows": int((trace.domain == index).sum()),
                "documents": len(trace.document[trace.domain == index].unique()),
                "tokens": int(trace.num_tokens[trace.domain == index].sum()),
            }
            for index, name in enumerate(trace.domains)
        },
        "windows": len(trace.load),
        "documents": len(trace.document.unique()),
        "tokens": int(trace.num_tokens.sum()),
        "tokens_covered": run.tokens_covered,
        "settings": {
            "model": str(run.model),
            "data": None if run.data is None else str(run.data),
            "block_size": run.block_size,
            "micro_batch_size": run.settings.micro_batch_size,
            "permutations": run.settings.permutations,
            "seed": run.settings.seed,
        },
        "versions": {name: version(name) for name in ("equipoise", "torch", "transformers")},
    }


def write_files(directory: str | Path, run: Measurement) -> dict[str, Any]:
    """Writes `analysis.json` and, as PNG and SVG, `specialisation`, `load` (given the load over training) and
    `training` (given the lines of the log).

    Each file is written under a temporary name and renamed.

    Returns:
        What `analysis.json` holds; see `analyse`.
    """
    directory = Path(directory)
    numbers = analyse(run)
    titles = [
        f"layer {layer['layer']}\n{layer['mutual_information_bits']:.3f} bits"
        f" (chance {layer['null_mean_bits']:.3f}, p {layer['p_value']:.3f})"
        for layer in numbers["layers"]
    ]
    figures = {"specialisation": specialisation_figure(run.shares, run.trace.domains, titles)}
    if run.record.load is not None:
        figures["load"] = load_figure(run.record.load)
    if run.record.metrics:
        figures["training"] = training_figure(run.record.metrics)
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            save_figure(figure, directory / f"{name}.{kind}")
    # The numbers last: where they are, the pictures are theirs.
    write_json(directory / "analysis.json", numbers)
    return numbers


def _against_nulls(
    found: Specialisation, token_identity: Tensor, untrained: Tensor | None, layer: int
) -> dict[str, float | None]:
    return {
        "mutual_information_bits": float(found.bits[layer]),
        "standard_error_bits": _number(found.standard_error[layer]),
        "mutual_information_normalised": float(found.normalised[layer]),
        "null_mean_bits": float(found.null_mean[layer]),
        "null_quantile_95_bits": float(found.null_quantile_95[layer]),
        "p_value": float(found.p_value[layer]),
        "token_identity_bits": float(token_identity[layer]),
        "untrained_bits": None if untrained is None else float(untrained[layer]),
    }


def _number(value: Tensor) -> float | None:
    """A number, or null where there is none: JSON knows no NaN."""
    return None if math.isnan(value) else float(value)


__all__ = ["analyse", "write_files"]
