"""The report of an analysis: the numbers as `analysis.json`, and the pictures."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..data import write_json
from .figures import load_figure, save_figure, specialisation_figure
from .load_history import LoadHistory
from .routing_trace import RoutingTrace
from .specialisation import Specialisation, load_by_domain, measure_balance, measure_specialisation


def analyse(
    trace: RoutingTrace,
    *,
    block_size: int | None = None,
    micro_batch_size: int = 8,
    permutations: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All numbers of a trace, named, as plain lists and floats.

    Args:
        block_size: the longest window that the trace was cut with, to be written down.

    Returns:
        `layers`, one entry per MoE layer: `mutual_information_bits` (between domain and expert, all domains weighing
        the same) and `mutual_information_normalised` (0 to 1); `null_mean_bits`, `null_quantile_95_bits` and `p_value`
        (domain labels permuted over documents); `max_vio_global`, `max_vio_micro`; `dead_experts`; `load_entropy`
        (0 to 1); `load` (counts by expert); `load_by_domain` (shares by expert, rows sum to 1);
        `largest_share_by_domain`. `mean_over_layers` holds the first five for the mean over layers. Beside them: what
        was measured (`domains`, `windows`, `documents`, `tokens`), how (`settings`), and with which `versions`.

    Raises:
        ValueError: a setting is not positive.
    """
    found = measure_specialisation(trace, permutations=permutations, seed=seed)
    even = measure_balance(trace, micro_batch_size=micro_batch_size)
    shares = load_by_domain(trace)
    load = trace.load.sum(0)
    layers = [
        {
            "layer": layer,
            **_of_layer(found, layer),
            "max_vio_global": float(even.max_vio_global[layer]),
            "max_vio_micro": float(even.max_vio_micro[layer]),
            "dead_experts": int(even.dead_experts[layer]),
            "load_entropy": float(even.load_entropy[layer]),
            "load": load[layer].tolist(),
            "load_by_domain": dict(zip(trace.domains, shares[:, layer].tolist(), strict=True)),
            "largest_share_by_domain": dict(zip(trace.domains, shares[:, layer].amax(-1).tolist(), strict=True)),
        }
        for layer in range(trace.load.shape[1])
    ]
    return {
        "layers": layers,
        "mean_over_layers": _of_layer(found.mean_over_layers(), 0),
        "num_experts": trace.load.shape[-1],
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
        "settings": {
            "block_size": block_size,
            "micro_batch_size": micro_batch_size,
            "permutations": permutations,
            "seed": seed,
        },
        "versions": {name: version(name) for name in ("equipoise", "torch", "transformers")},
    }


def write_report(
    directory: str | Path,
    trace: RoutingTrace,
    history: LoadHistory | None = None,
    *,
    block_size: int | None = None,
    micro_batch_size: int = 8,
    permutations: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes `analysis.json`, `specialisation.png` and, given the load over training, `load.png`.

    Each file is written under a temporary name and renamed.

    Returns:
        What `analysis.json` holds; see `analyse`.
    """
    directory = Path(directory)
    numbers = analyse(
        trace, block_size=block_size, micro_batch_size=micro_batch_size, permutations=permutations, seed=seed
    )
    titles = [
        f"layer {layer['layer']}\n{layer['mutual_information_bits']:.3f} bits"
        f" (chance {layer['null_mean_bits']:.3f}, p {layer['p_value']:.3f})"
        for layer in numbers["layers"]
    ]
    save_figure(specialisation_figure(load_by_domain(trace), trace.domains, titles), directory / "specialisation.png")
    if history is not None:
        save_figure(load_figure(history), directory / "load.png")
    # The numbers last: where they are, the pictures are theirs.
    write_json(directory / "analysis.json", numbers)
    return numbers


def _of_layer(found: Specialisation, layer: int) -> dict[str, float]:
    return {
        "mutual_information_bits": float(found.bits[layer]),
        "mutual_information_normalised": float(found.normalised[layer]),
        "null_mean_bits": float(found.null_mean[layer]),
        "null_quantile_95_bits": float(found.null_quantile_95[layer]),
        "p_value": float(found.p_value[layer]),
    }
