"""inspect: how evenly the experts of any model are loaded on a data loader's text, and how far they specialise.

Shapes: B sequences, T positions, L MoE layers, E experts, K experts per token; W sequences in all, G domains.
"""

import inspect as python_inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from ..balancing import dead_experts, load_entropy, max_vio, token_mask
from ..integrations import RoutingRecorder
from ..integrations.stock_routers import causal_language_model
from .routing_trace import RoutingTrace, evaluating, window_load
from .specialisation import Specialisation, measure_specialisation


@dataclass(frozen=True)
class LayerSpecialisation:
    """Mutual information of domain and expert in one layer, in bits, every domain weighing the same."""

    mutual_information: float
    normalised: float
    """Over the largest that there can be, from 0 to 1."""
    standard_error: float | None
    """Over documents; `None` where a domain has one alone."""
    null_mean: float
    """With the domains' names dealt out anew among the documents: what a finite sample shows by chance."""
    null_quantile_95: float
    p_value: float
    """Share of these permutations that reach what was measured, itself included."""


@dataclass(frozen=True)
class InspectedLayer:
    """The load of one router's experts."""

    router: str
    """Its path in the model."""
    load: list[int]
    """`[E]`: tokens that selected each expert."""
    max_vio: float
    """MaxVio of all tokens together, from 0 (even) to E / K - 1."""
    max_vio_micro: float
    """Mean MaxVio of the data loader's batches."""
    load_entropy: float
    """Over its largest, from 0 to 1 (even)."""
    dead_experts: int
    """Experts that no token selected."""
    specialisation: LayerSpecialisation | None
    """`None` without domains, or where there is one."""


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found."""

    model: str
    """Name of the model's class."""
    layers: list[InspectedLayer]
    num_experts: int
    num_experts_per_tok: int
    tokens: int
    sequences: int
    documents: int | None
    """What the nulls take for exchangeable; `None` without domains."""
    domains: dict[str, int]
    """Domain -> its sequences; empty without domains."""
    permutations: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.tokens:,} tokens of {self.sequences:,} sequences; {self.num_experts_per_tok} of "
            f"{self.num_experts} experts per token",
            "",
        ]
        specialised = any(layer.specialisation for layer in self.layers)
        header = ["layer", "MaxVio", "micro", "entropy", "dead"]
        if specialised:
            header += ["MI, bits", "chance", "p"]
            lines[0] += f"; {len(self.domains)} domains"
        rows = [header]
        for number, layer in enumerate(self.layers):
            row = [str(number), f"{layer.max_vio:.3f}", f"{layer.max_vio_micro:.3f}", f"{layer.load_entropy:.4f}"]
            row.append(str(layer.dead_experts))
            if layer.specialisation is not None:
                found = layer.specialisation
                row += [f"{found.mutual_information:.3f}", f"{found.null_mean:.3f}", f"{found.p_value:.4f}"]
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(lines)


@torch.no_grad()
def inspect(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    domains: str | None = None,
    *,
    documents: str | None = None,
    permutations: int = 1000,
    seed: int = 0,
) -> Inspection:
    """Looks which experts a model selects on the batches of a data loader, in evaluation mode and without gradient.

    Under several processes each brings its own batches, and all of them get the same result, over all batches; what a
    data loader prepared by Accelerate repeats, so that every process has as much, counts once.

    Args:
        model: a causal language model with routers, ours or any of Transformers, whatever wraps it. It is put back
            into the modes that it was in.
        dataloader: batches as the model takes them, with `input_ids` `[B, T]` and, where there is padding,
            `attention_mask`; other columns are left aside, labels too.
        domains: the column that holds each sequence's domain, names or integers, with which specialisation is
            measured too.
        documents: the column that says from which document each sequence was cut, where several were cut from one:
            the permutation null then deals out documents. `None`: each sequence is one.
        permutations: of the domains' names.
        seed: of the permutations.

    Raises:
        ValueError: the model has no routers; there are no batches; a column is missing, or a document has two domains.
    """
    causal = causal_language_model(model)
    recorder = RoutingRecorder(causal)
    num_experts = recorder.routers[0].num_experts
    # DDP would broadcast buffers in each forward pass, and wait for ranks that have fewer.
    called = model.module if isinstance(model, DistributedDataParallel) else model
    taken = {"input_ids", "attention_mask", *python_inspect.signature(type(causal).forward).parameters}
    taken -= {"labels", "use_cache"}
    device = next(causal.parameters()).device
    loads: list[Tensor] = []
    tokens: list[Tensor] = []
    columns: dict[str, list[str]] = {name: [] for name in (domains, documents) if name is not None}
    micro = torch.zeros(len(recorder.routers) + 1, dtype=torch.float64)  # and the number of batches
    try:
        with evaluating(model):
            for batch in tqdm(dataloader, desc="inspecting", unit="batch", disable=None if _rank() == 0 else True):
                for name in ("input_ids", *columns):
                    if name not in batch:
                        raise ValueError(f"the batches must hold a column {name}; got {', '.join(batch)}")
                inputs = {name: value for name, value in batch.items() if name in taken}
                inputs = {name: value.to(device) for name, value in inputs.items() if isinstance(value, Tensor)}
                batch_size, length = inputs["input_ids"].shape
                with recorder.forward() as routing:
                    called(**inputs, use_cache=False)
                _, selected_experts = routing.layers(batch_size * length)
                mask = token_mask(inputs.get("attention_mask"), batch_size, length)
                if mask is None:
                    mask = torch.ones(batch_size, length, dtype=torch.bool, device=device)
                load = window_load(tuple(selected_experts), num_experts, mask).cpu()
                kept = slice(0, _not_repeated(dataloader, batch_size))
                if len(load[kept]) == 0:
                    continue
                loads.append(load[kept].int() if domains is not None else load[kept].sum(0, keepdim=True))
                tokens.append(mask.sum(-1).cpu()[kept])
                micro += torch.cat([max_vio(load[kept].sum(0)).double(), torch.ones(1, dtype=torch.float64)])
                for name, values in columns.items():
                    values += [str(value) for value in _values(batch[name])][kept]
    finally:
        recorder.remove()
    parts = _gathered((loads, tokens, columns, micro))
    all_loads = [load for part in parts for load in part[0]]
    if not all_loads:
        raise ValueError("dataloader must hold at least one batch; got none")
    load = torch.cat(all_loads)  # [W, L, E], or without domains a row a batch
    num_tokens = torch.cat([count for part in parts for count in part[1]])
    micro = sum((part[3] for part in parts), torch.zeros_like(micro))
    names = {name: [value for part in parts for value in part[2][name]] for name in columns}
    specialisation, counted, number = None, {}, None
    if domains is not None:
        trace = _trace(load, num_tokens, names[domains], names[documents] if documents is not None else None)
        counted = {name: int((trace.domain == index).sum()) for index, name in enumerate(trace.domains)}
        number = len(trace.document.unique())
        if len(trace.domains) > 1:
            specialisation = measure_specialisation(trace, permutations=permutations, seed=seed)
    total = load.long().sum(0)
    even, dead, vio = load_entropy(total), dead_experts(total), max_vio(total)
    return Inspection(
        model=type(causal).__name__,
        layers=[
            InspectedLayer(
                router=router.path,
                load=total[layer].tolist(),
                max_vio=float(vio[layer]),
                max_vio_micro=float(micro[layer] / micro[-1]),
                load_entropy=float(even[layer]),
                dead_experts=int(dead[layer]),
                specialisation=None if specialisation is None else _of_layer(specialisation, layer),
            )
            for layer, router in enumerate(recorder.routers)
        ],
        num_experts=num_experts,
        num_experts_per_tok=recorder.routers[0].num_experts_per_tok,
        tokens=int(num_tokens.sum()),
        sequences=len(num_tokens),
        documents=number,
        domains=counted,
        permutations=0 if specialisation is None else permutations,
    )


def _trace(load: Tensor, num_tokens: Tensor, domains: list[str], documents: list[str] | None) -> RoutingTrace:
    """Sequences without a token are left out: they say nothing of their domain."""
    kept = [row for row, count in enumerate(num_tokens.tolist()) if count]
    names = tuple(sorted({domains[row] for row in kept}))
    if documents is None:
        documents = [str(row) for row in range(len(domains))]
    of_document: dict[str, str] = {}
    for row in kept:
        if of_document.setdefault(documents[row], domains[row]) != domains[row]:
            raise ValueError(
                f"each document must be of one domain; got {of_document[documents[row]]} and {domains[row]} for "
                f"{documents[row]}"
            )
    number = {document: place for place, document in enumerate(of_document)}
    return RoutingTrace(
        load=load[kept],
        num_tokens=num_tokens[kept],
        domain=torch.tensor([names.index(domains[row]) for row in kept]),
        document=torch.tensor([number[documents[row]] for row in kept]),
        domains=names,
    )


def _of_layer(found: Specialisation, layer: int) -> LayerSpecialisation:
    error = float(found.standard_error[layer])
    return LayerSpecialisation(
        mutual_information=float(found.bits[layer]),
        normalised=float(found.normalised[layer]),
        standard_error=None if math.isnan(error) else error,
        null_mean=float(found.null_mean[layer]),
        null_quantile_95=float(found.null_quantile_95[layer]),
        p_value=float(found.p_value[layer]),
    )


def _values(column: Any) -> list[Any]:
    return column.tolist() if isinstance(column, Tensor) else list(column)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gathered(part: Any) -> list[Any]:
    """What each process found, in their order."""
    if not dist.is_initialized():
        return [part]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


def _not_repeated(dataloader: Any, batch_size: int) -> int:
    """How many sequences of a batch are no repetition: Accelerate fills its last batches up from the beginning."""
    state = getattr(dataloader, "gradient_state", None)
    if state is None or not state.end_of_dataloader or state.remainder <= 0:
        return batch_size
    return min(batch_size, max(0, state.remainder - _rank() * batch_size))


__all__ = ["InspectedLayer", "Inspection", "LayerSpecialisation", "inspect"]
