"""Everything that is measured of one model on its held-out text, in one pass over it.

Shapes: L MoE layers, E experts, K experts per token; G domains.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..configuration import BalancingFields
from ..data import evaluation_windows
from .architecture import Architecture, load_model, new_model
from .coactivation import CoActivation
from .router_confidence import RouterConfidence
from .router_saturation import Saturation, measure_saturation
from .routing_trace import RoutingTrace, trace_windows
from .run_record import RunRecord
from .specialisation import Balance, Specialisation, load_by_domain, measure_balance, measure_specialisation
from .text_sample import SampledText, TextSample, token_name
from .token_counts import TokenCounts

FAVOURITES = 10
"""Favourite tokens that are kept of each expert."""


@dataclass(frozen=True)
class RunInput:
    """A model to measure, and the text to measure it on."""

    name: str
    """What the run is called in the report."""
    model: Path
    """A folder for `from_pretrained`, with its tokenizer."""
    documents: Dataset
    """Held-out documents, columns `text` and `domain`."""
    block_size: int
    """The longest window, in tokens."""
    record: RunRecord = field(default_factory=RunRecord)
    """What is known of its training."""
    data: Path | None = None
    """Where the documents were read, if from a file."""


@dataclass(frozen=True)
class MeasurementSettings:
    """How a model is measured."""

    batch_size: int = 16
    """Windows in one forward pass; does not change the result."""
    micro_batch_size: int = 8
    """Windows of one domain over which micro MaxVio is taken on held-out text."""
    permutations: int = 1000
    """Permutations of the domain labels."""
    seed: int = 0
    """Seeds the permutations and the untrained model."""
    untrained: bool = True
    """Also measure the same architecture, freshly initialised."""


@dataclass(frozen=True)
class Measurement:
    """What was found of one run."""

    name: str
    model: Path
    data: Path | None
    architecture: Architecture
    record: RunRecord
    block_size: int
    settings: MeasurementSettings
    trace: RoutingTrace
    specialisation: Specialisation
    balance: Balance
    token_identity: Tensor
    """`[G, L, E]` float64: each domain's shares if token identity alone decided."""
    tokens_covered: float
    """Share of the text whose tokens were counted by themselves."""
    vocabulary_specialisation: Tensor
    """`[L]` float64, OLMoE's."""
    favourites: dict[int, list[list[tuple[str, float]]]]
    """Layer shown -> for each of E experts its favourite tokens, each with the share of its occurrences for which it
    selects the expert."""
    coactivation: CoActivation
    confidence: RouterConfidence
    texts: list[SampledText]
    """One of each domain."""
    text_layers: tuple[int, ...]
    """The layers that `favourites` and `texts` hold."""
    untrained: RoutingTrace | None
    saturation: Saturation | None

    @property
    def shares(self) -> Tensor:
        """`[G, L, E]` float64: share of each domain's selections by expert."""
        return load_by_domain(self.trace)

    @property
    def num_layers(self) -> int:
        return self.trace.load.shape[1]

    @property
    def num_experts(self) -> int:
        return self.trace.load.shape[2]


class Measurer:
    """Measures runs one after the other; an untrained model that several would share is measured once.

    Args:
        layers: the layers whose tokens are kept; those that a model lacks are passed over.
        num_tokens: tokens of the text that is kept of each domain.
    """

    def __init__(self, settings: MeasurementSettings, *, layers: Sequence[int], num_tokens: int) -> None:
        self.settings, self.layers, self.num_tokens = settings, tuple(layers), num_tokens
        self._untrained: dict[str, RoutingTrace] = {}

    def measure(self, run: RunInput) -> Measurement:
        """One pass over the held-out text for the model, one for its untrained twin, and one over a sample of it for
        each earlier checkpoint.

        Raises:
            ValueError: a setting is not positive, the documents hold no text, or the model has no routers.
        """
        settings = self.settings
        tokenizer = AutoTokenizer.from_pretrained(run.model)
        windows = evaluation_windows(run.documents, tokenizer, run.block_size)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(run.model).to(device)
        shape = Architecture.of(model)
        layers = tuple(layer for layer in self.layers if layer < shape.num_moe_layers)
        sizes = {"num_layers": shape.num_moe_layers, "num_experts": shape.num_experts}
        tokens, pairs = TokenCounts(windows, **sizes), CoActivation(**sizes)
        confidence = RouterConfidence(windows, num_layers=shape.num_moe_layers)
        sample = TextSample(windows, num_tokens=self.num_tokens, layers=layers)
        trace = trace_windows(
            model,
            windows,
            batch_size=settings.batch_size,
            observers=[tokens, pairs, confidence, sample],
            description=f"{run.name}: tracing",
        )
        saturation = None
        if run.record.checkpoints:
            saturation = measure_saturation(model, run.record.checkpoints, windows, batch_size=settings.batch_size)
        return Measurement(
            name=run.name,
            model=run.model,
            data=run.data,
            architecture=shape,
            record=run.record,
            block_size=run.block_size,
            settings=settings,
            trace=trace,
            specialisation=measure_specialisation(trace, permutations=settings.permutations, seed=settings.seed),
            balance=measure_balance(trace, micro_batch_size=settings.micro_batch_size),
            token_identity=tokens.predicted_load_by_domain(),
            tokens_covered=tokens.covered,
            vocabulary_specialisation=tokens.vocabulary_specialisation(),
            favourites={layer: _named(tokens.favourites(layer, FAVOURITES), tokenizer) for layer in layers},
            coactivation=pairs,
            confidence=confidence,
            texts=sample.texts(run.documents, tokenizer),
            text_layers=layers,
            untrained=self._trace_untrained(model.config, windows, run.name, device) if settings.untrained else None,
            saturation=saturation,
        )

    def _trace_untrained(self, config: PreTrainedConfig, windows: Dataset, name: str, device: str) -> RoutingTrace:
        key = _initial_routing(config) + _content(windows)
        if key not in self._untrained:
            with torch.random.fork_rng():
                torch.manual_seed(self.settings.seed)
                model = new_model(copy.deepcopy(config)).to(device)
            self._untrained[key] = trace_windows(
                model, windows, batch_size=self.settings.batch_size, description=f"{name}: untrained"
            )
        return self._untrained[key]


def _named(favourites: list[list[tuple[int, float]]], tokenizer: PreTrainedTokenizerBase) -> list:
    return [[(token_name(tokenizer, token), share) for token, share in expert] for expert in favourites]


def _initial_routing(config: PreTrainedConfig) -> str:
    """What of a configuration decides over the routing of an untrained model."""
    fields = json.loads(config.to_json_string(use_diff=False))
    balancing = [field.name for field in dataclass_fields(BalancingFields)]
    for name in (*balancing, "transformers_version", "_name_or_path", "auto_map"):
        fields.pop(name, None)
    return json.dumps(fields, sort_keys=True)


def _content(windows: Dataset) -> str:
    """A key of the windows' tokens."""
    digest = hashlib.sha256()
    for batch in windows.select_columns(["input_ids"]).with_format("arrow").iter(10_000):
        column = batch["input_ids"].combine_chunks()
        digest.update(np.asarray(column.value_lengths()).tobytes())
        digest.update(column.flatten().to_numpy().tobytes())
    return digest.hexdigest()


__all__ = ["Measurement", "MeasurementSettings", "Measurer", "RunInput"]
