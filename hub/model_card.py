"""The model card: what a run directory knows about its model, as the `README.md` beside the weights."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.utils import CONFIG_NAME

from ..balancing import Balancer
from ..configuration import BalancingSettings, MoEConfig
from ..configuration.remote_code import AUTO_MAP
from ..data import write_whole
from .reading import read_config
from .run_records import RunRecords
from .shards import Shards

TEMPLATE = Path(__file__).with_name("model_card.md")

_PIPELINE_TAGS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModel": "feature-extraction",
}
_BIAS = "e_score_correction_bias"  # a buffer of the router
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names and torch's
_MODES = {
    "none": "No balancing of the experts' load (`none`).",
    "micro_batch": "A load-balancing loss over each micro-batch by itself (`micro_batch`).",
    "sequence": "A load-balancing loss over each sequence by itself (`sequence`).",
    "global_batch": "A load-balancing loss over the global batch, its load counted over all processes and "
    "accumulation steps (`global_batch`, [arXiv 2501.11873](https://arxiv.org/abs/2501.11873)).",
    "loss_free": "No balancing loss: a bias on the selection of experts moves after each step "
    "(`loss_free`, [arXiv 2408.15664](https://arxiv.org/abs/2408.15664)).",
}


@dataclass(frozen=True)
class ParameterCount:
    """What a model's weight files hold."""

    total: int
    """Parameters, a shared one once. Selection biases are no parameters."""
    active: int
    """Parameters that one token goes through: of the routed experts, `K` of `E`."""
    dtypes: tuple[str, ...]
    """Types of the parameters, the most frequent first."""


def count_parameters(folder: Path, config: MoEConfig) -> ParameterCount:
    """Count from the headers of a model's safetensors files; no weight is read."""
    shards = Shards(folder)
    counts = {name: prod(shape) for name, shape in shards.shapes.items() if not name.endswith(_BIAS)}
    total = sum(counts.values())
    routed = sum(count for name, count in counts.items() if ".mlp.experts." in name)
    by_dtype: Counter[str] = Counter()
    for name, count in counts.items():
        by_dtype[_DTYPES.get(shards.dtypes[name], shards.dtypes[name])] += count
    return ParameterCount(
        total=total,
        active=total - routed + routed * config.num_experts_per_tok // config.num_experts,
        dtypes=tuple(dtype for dtype, _ in by_dtype.most_common()),
    )


def write_model_card(
    folder: Path,
    *,
    name: str,
    run: Path | None = None,
    license: str | None = None,
    languages: Sequence[str] = (),
    revision: str | None = None,
) -> list[str]:
    """Write `README.md`, and the pictures it shows, into the folder of a saved model.

    Args:
        folder: holds `config.json` and the weights.
        name: where the model will be loaded from: `user/name`, or a folder's name.
        run: the run directory the model comes from.
        license: as the Hub names it, e.g. `apache-2.0`.
        languages: as the Hub names them, e.g. `en`.
        revision: the branch it will be loaded from, where that is not `main`.

    Returns:
        What the card could have said and does not, a line each, with how to add it.

    Raises:
        ValueError: the configuration or a record of the run cannot be read, or is of another model.
    """
    config = read_config(MoEConfig, folder)
    records = RunRecords() if run is None else RunRecords.read(run)
    _check_layers(records, config)
    auto = auto_class(config, folder)
    tokenizer = (folder / "tokenizer_config.json").is_file()
    parameters = count_parameters(folder, config)
    missing = _missing(records, run, license, languages)
    arguments = [json.dumps(name, ensure_ascii=False)] + ([f'revision="{revision}"'] if revision else [])
    card = ModelCard.from_template(
        _metadata(records, auto, name, license, languages),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=_escaped(_title(name)),
        summary=_summary(parameters, config, records),
        architecture=_architecture(parameters, config),
        terms="" if license else _terms(folder),
        auto_class=auto,
        address=", ".join(arguments),
        tokenizer=tokenizer,
        generates=tokenizer and auto == "AutoModelForCausalLM",
        data=_data(records),
        recipe=_recipe(records),
        # Without a record, the weights may never have been trained so: converted ones were not.
        balancing_mode=("" if records.training else "For training from here, by its configuration: ")
        + _MODES[config.balancing_mode],
        balancing=yaml.safe_dump(_balancing_fields(config), sort_keys=False).strip(),
        balance=_balance(records, config),
        specialisation=_specialisation(records),
        permutations=f"{records.analysis.get('settings', {}).get('permutations', 0):,}",
        pictures=[picture.name for picture in records.pictures],
        evaluation=_evaluation(records),
        windows=_windows(records),
        limitations=_limitations(parameters, config, records),
        missing=missing,
    )
    write_whole(folder / "README.md", card.save)
    for picture in records.pictures:
        (folder / "analysis").mkdir(exist_ok=True)
        shutil.copyfile(picture, folder / "analysis" / picture.name)
    return missing


def _check_layers(records: RunRecords, config: MoEConfig) -> None:
    counts = {
        "analysis/analysis.json": records.analysis.get("layers"),
        "training.json": records.training.get("max_vio_batch"),
    }
    for name, layers in counts.items():
        if layers is not None and len(layers) != config.num_moe_layers:
            raise ValueError(
                f"{name} must be of this model, with {config.num_moe_layers} MoE layers; got {len(layers)} layers"
            )


def auto_class(config: MoEConfig, folder: Path) -> str:
    """The Auto class that loads the model saved in `folder` with its head.

    Raises:
        ValueError: there is none for its `architectures`.
    """
    saved = config.architectures or ["MoEForCausalLM"]
    known = {AUTO_MAP[auto].rpartition(".")[2]: auto for auto in _PIPELINE_TAGS}
    if not isinstance(saved, list) or saved[0] not in known:
        raise ValueError(f"{folder / CONFIG_NAME} architectures must be one of {', '.join(known)}; got {saved}")
    return known[saved[0]]


def _title(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _metadata(
    records: RunRecords, auto: str, name: str, license: str | None, languages: Sequence[str]
) -> ModelCardData:
    hub_datasets = [domain["source"].get("hub") for domain in records.data.values()]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=_PIPELINE_TAGS[auto],
        license=license,
        language=list(languages) or None,
        tags=["mixture-of-experts", "equipoise"],
        datasets=sorted({dataset for dataset in hub_datasets if dataset}) or None,
        model_name=_title(name),
        eval_results=_eval_results(records) or None,
    )


def _eval_results(records: RunRecords) -> list[EvalResult]:
    metrics = {"bits_per_byte": "bits per UTF-8 byte", "perplexity": "perplexity per token of this tokenizer"}
    return [
        EvalResult(
            task_type="text-generation",
            # Not the id of a data set of the Hub, even where the text came from one: the documents were chosen here.
            dataset_type="held-out",
            dataset_config=_printable(domain),
            dataset_name=f"held-out documents: {_printable(domain)}",
            metric_type=metric,
            metric_name=title,
            metric_value=result[metric],
        )
        for domain, result in records.evaluation.get("domains", {}).items()
        for metric, title in metrics.items()
    ]


def _summary(parameters: ParameterCount, config: MoEConfig, records: RunRecords) -> str:
    dense, sparse = config.first_k_dense_replace, config.num_moe_layers
    where = "each layer" if not dense else "the last layer" if sparse == 1 else f"each of the last {sparse} layers"
    text = (
        f"A Mixture-of-Experts language model of {_short(parameters.total)} parameters, of which a token goes through "
        f"{_short(parameters.active)}: {config.num_experts_per_tok} of {config.num_experts} experts in {where}"
    )
    if records.training:
        domains = len(records.training["domains"])
        text += (
            f". Trained with equipoise on {_short(records.training['tokens'])} tokens of {_plural(domains, 'domain')}"
        )
    return text + "."


def _architecture(parameters: ParameterCount, config: MoEConfig) -> str:
    dense = config.first_k_dense_replace
    shared = f" and {config.num_shared_experts} shared" if config.num_shared_experts else ""
    groups = f", from {config.topk_group} of {config.n_group} groups" if config.n_group > 1 else ""
    return _facts(
        {
            "parameters": f"{parameters.total:,}",
            "active parameters": f"{parameters.active:,}: all but those of the experts that a token does not select",
            "type of the weights": ", ".join(parameters.dtypes),
            "layers": f"{config.num_hidden_layers}" + (f", the first {dense} without experts" if dense else ""),
            "hidden size": f"{config.hidden_size:,}",
            "attention": f"{_plural(config.num_attention_heads, 'query head')}, "
            f"{_plural(config.num_key_value_heads or 0, 'key and value head')}, width {config.head_dim}",
            "experts in a layer": f"{config.num_experts} routed{shared}, width {config.moe_intermediate_size:,}",
            "experts of a token": f"{config.num_experts_per_tok}, by {config.scoring_func} scores{groups}",
            "vocabulary": f"{config.vocab_size:,}",
            "positions": f"{config.max_position_embeddings:,}",
        }
    )


def _terms(folder: Path) -> str:
    """What there is to say of the licence where the metadata do not name one."""
    files = sorted(file.name for pattern in ("LICENSE*", "NOTICE*") for file in folder.glob(pattern))
    return f"Its terms: {', '.join(map(_escaped, files))}." if files else "No licence was given with it."


def _data(records: RunRecords) -> str:
    if not records.data:
        return ""
    weighted = any(domain.get("weight") is not None for domain in records.data.values())
    amount = "weight" if weighted else "bytes"  # without weights, blocks are drawn in proportion to the text
    whole = sum(domain.get(amount) or 0 for domain in records.data.values())
    rows = [
        [
            name,
            _source(domain["source"]),
            f"{domain[amount] / whole:.1%}" if domain.get(amount) and whole else None,
            _count(domain.get("documents")),
            _count(domain.get("bytes")),
            _decimal(records.training.get("epochs", {}).get(name), 2),
            _count(domain.get("held_out_documents")),
            _count(domain.get("held_out_bytes")),
        ]
        for name, domain in records.data.items()
    ]
    share = "share of the blocks drawn" if weighted else "share of the text"
    header = ["domain", "source", share, "documents", "bytes", "passes", "held-out documents", "held-out bytes"]
    return _table(header, rows, words=2)


def _source(source: dict[str, Any]) -> str:
    """Where a domain's text came from; of files, whose paths are nobody's business, no more than that."""
    if "hub" in source:
        parts = [f"{source['hub']} (Hub)"]
        parts += [f"{name} {source[name]}" for name in ("config", "split", "revision") if name in source]
        parts += [f"files {', '.join(source['data_files'])}"] if "data_files" in source else []
        return ", ".join(parts)
    if "package" in source:
        return f"{source['package']} of equipoise's core corpus, made of packages"
    return "local files"


def _recipe(records: RunRecords) -> str:
    training, settings = records.training, records.settings
    if not training or not settings:
        return ""
    blocks = settings["global_batch_size"] or settings["micro_batch_size"] * training["world_size"]
    schedule = settings["learning_rate_schedule"]
    falling = f", down to {settings['min_learning_rate_ratio']:g} of the peak" if schedule != "constant" else ""
    skipped = f", {training['skipped_steps']:,} skipped" if training.get("skipped_steps") else ""
    hours = training["seconds"] / 3600
    versions = training.get("versions", {})
    return _facts(
        {
            "steps": f"{training['steps']:,}{skipped}",
            "tokens": f"{training['tokens']:,}",
            "global batch": f"{blocks:,} blocks of {settings['block_size']:,} tokens",
            "micro-batch": f"{_plural(settings['micro_batch_size'], 'block')} of "
            f"{'one domain' if settings['micro_batch_domains'] == 'single' else 'mixed domains'}; "
            f"{_plural(training['gradient_accumulation_steps'], 'accumulation step')}",
            "optimizer": f"AdamW, betas {settings['adam_beta1']:g} and {settings['adam_beta2']:g}, "
            f"weight decay {settings['weight_decay']:g}, gradient norm at most {settings['max_grad_norm']:g}",
            "learning rate": f"{settings['learning_rate']:g} after {settings['warmup_steps']:,} steps of warm-up, "
            f"{schedule}{falling}",
            "precision": {"no": "float32", "bf16": "bfloat16 products, float32 weights"}.get(
                settings["mixed_precision"]
            ),
            "seed": f"{settings['seed']}",
            "processes": f"{training['world_size']}, the first on {training['device']}",
            "time": f"{hours:.2f} hours, {training['tokens_per_second']:,.0f} tokens a second",
            "loss": f"{training['lm_loss_start']:.3f} at first, {training['lm_loss_end']:.3f} at the end, "
            "nats per token"
            if training.get("lm_loss_end") is not None
            else None,
            "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or None,
        }
    )


def _balancing_fields(config: MoEConfig) -> dict[str, Any]:
    """The fields of balancing that act, from the start or by the schedule; the bias's rate as its rule has it."""
    settings = BalancingSettings.of(config)
    stages = [replace(settings, balancing_schedule=None)]
    for change in settings.balancing_schedule or []:
        stages.append(stages[-1].changed(change))
    acting = set().union(*map(_acting, stages)) | ({"balancing_schedule"} if settings.balancing_schedule else set())
    values = vars(settings)
    if settings.bias_update_rate is None:
        values["bias_update_rate"] = Balancer(num_experts=config.num_experts, biases=list, **values).bias_update_rate
    return {name: value for name, value in values.items() if name in acting}


def _acting(settings: BalancingSettings) -> set[str]:
    """Names of the fields that act while these settings, which have no schedule, are in force."""
    names = {"balancing_mode"}
    modes = {settings.balancing_mode, settings.complementary_balancing_mode}
    if settings.balancing_mode == "loss_free":
        names |= {"bias_update_rule", "bias_update_rate", "bias_update_rate_decay"}
        if settings.bias_update_rule == "tanh_momentum":
            names |= {"bias_update_kappa", "bias_update_momentum"}
    elif settings.balancing_mode != "none":
        names |= {"router_aux_loss_coef"}
    if settings.complementary_balancing_mode != "none":
        names |= {"complementary_balancing_mode", "complementary_aux_loss_coef"}
    if "global_batch" in modes:
        names |= {"load_estimate"}
    if settings.router_z_loss_coef > 0:
        names |= {"router_z_loss_coef"}
    if modes != {"none"} or settings.router_z_loss_coef > 0:
        names |= {"balanced_positions"}
    return names


def _balance(records: RunRecords, config: MoEConfig) -> str:
    """By layer, what is known of the balance: on held-out text from the analysis, at the end of training from it."""
    layers = records.analysis.get("layers", [])
    columns = {
        "MaxVio, held-out text": [_decimal(layer["max_vio_global"]) for layer in layers],
        "MaxVio, last global batch": [_decimal(value) for value in records.training.get("max_vio_batch") or []],
        "MaxVio, its micro-batches": [_decimal(value) for value in records.training.get("max_vio_micro") or []],
        "dead experts, held-out text": [_count(layer["dead_experts"]) for layer in layers],
        "entropy of the load, held-out text": [_decimal(layer["load_entropy"]) for layer in layers],
    }
    columns = {title: values for title, values in columns.items() if values}
    if not columns:
        return ""
    rows = [[str(layer), *values] for layer, values in enumerate(zip(*columns.values(), strict=True))]
    return _table(["MoE layer", *columns], rows)


def _specialisation(records: RunRecords) -> str:
    if not records.analysis:
        return ""
    rows = [
        [
            name,
            _decimal(found["mutual_information_bits"]),
            _decimal(found["null_mean_bits"]),
            _decimal(found["null_quantile_95_bits"]),
            _decimal(found["p_value"], 4),
            _decimal(found["mutual_information_normalised"]),
        ]
        for name, found in [
            *((str(layer["layer"]), layer) for layer in records.analysis["layers"]),
            ("mean", records.analysis["mean_over_layers"]),
        ]
    ]
    return _table(["MoE layer", "bits", "by chance, mean", "by chance, 95%", "p", "normalised"], rows)


def _evaluation(records: RunRecords) -> str:
    if not records.evaluation:
        return ""
    rows = [
        [
            domain,
            _decimal(result["bits_per_byte"], 4),
            _decimal(result["perplexity"], 2),
            _count(result["num_tokens"]),
            _count(result["num_bytes"]),
        ]
        for domain, result in records.evaluation["domains"].items()
    ]
    return _table(["domain", "bits per byte", "perplexity", "tokens", "bytes"], rows)


def _windows(records: RunRecords) -> str:
    block_size = records.evaluation.get("settings", {}).get("block_size")
    return f", in windows of at most {block_size:,} tokens" if block_size else ""


def _limitations(parameters: ParameterCount, config: MoEConfig, records: RunRecords) -> list[str]:
    if not records.training:
        return ["How it was trained, on what text, and what it is good for is not recorded here."]
    tokens = records.training["tokens"]
    block_size = records.settings.get("block_size")
    lines = [
        f"It was trained on {tokens:,} tokens, {tokens / parameters.total:.1f} for each of its parameters.",
        "It continues text. It was not tuned to follow instructions, to hold a conversation or to refuse one, and "
        "nothing keeps it from writing what is false or harmful.",
        "Nothing is known of it on domains and languages other than those of its training text.",
    ]
    if block_size and block_size < config.max_position_embeddings:
        lines.append(f"It was trained on blocks of {block_size:,} tokens: longer texts were not tried.")
    if records.evaluation:
        lines.append(
            "The held-out documents come from the sources of the training text: the figures say how well such text is "
            "predicted, not how well the model does at tasks."
        )
    return lines


def _missing(records: RunRecords, run: Path | None, license: str | None, languages: Sequence[str]) -> list[str]:
    lines = []
    if run is None:
        lines.append("Training, evaluation and analysis: `--run RUN`, the run directory.")
    if run is not None and not records.training:
        lines.append("Training: the run's `training.json`, which it writes when it finishes.")
    if records.other_evaluation:
        lines.append(
            "Bits per byte by domain: `evaluation.json` is of another model or other documents than those of the run; "
            "`python scripts/evaluate_model.py --model RUN` writes it for these."
        )
    elif run is not None and not records.evaluation:
        lines.append("Bits per byte by domain: `python scripts/evaluate_model.py --model RUN`.")
    if records.other_analysis:
        lines.append(
            "Specialisation, and balance on held-out text: `analysis/` is of another model or other documents than "
            "those of the run; `python scripts/analyze.py --run RUN` writes it for these."
        )
    elif run is not None and not records.analysis:
        lines.append("Specialisation, and balance on held-out text: `python scripts/analyze.py --run RUN`.")
    if not license:
        lines.append("The licence: `--license`, e.g. `--license apache-2.0`.")
    if not languages:
        lines.append("The languages: `--languages`, e.g. `--languages en fr`.")
    return lines


def _facts(facts: dict[str, str | None]) -> str:
    """A table of names and values, without those that are not known."""
    return _table(["", ""], [[name, value] for name, value in facts.items() if value is not None], words=2)


def _table(header: Sequence[str], rows: Iterable[Sequence[str | None]], *, words: int = 1) -> str:
    """A Markdown table: first columns of words, then of numbers. A cell shows its text as it is, whatever it holds."""
    lines = [[*map(_escaped, header)], [*(["---"] * words), *(["---:"] * (len(header) - words))]]
    lines += [["" if cell is None else _escaped(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Text that Markdown, HTML in it, and the Hub's formulas show as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|&#~$])", r"\\\1", _printable(text))


def _printable(text: str) -> str:
    """Text on one line: line breaks and other characters that are not seen, written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _short(count: int) -> str:
    """12_345_678 -> 12.3 M"""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return str(count)


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _decimal(value: float | None, digits: int = 3) -> str | None:
    return None if value is None else f"{value:,.{digits}f}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


__all__ = ["ParameterCount", "RunRecords", "count_parameters", "write_model_card"]
