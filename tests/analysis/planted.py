"""Models whose routing is known: tokens are letters, and a table says which expert each letter goes to.

Layers after the first do nothing to the hidden states, so every layer routes alike unless its table differs.
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.data import train_tokenizer

DOMAINS = ("ash", "beech", "cedar", "damson")
ALPHABETS = ("abcdef", "ghijkl", "mnopqr", "stuvwx")
EXPERTS = 4


def planted_documents(documents: int = 10, length: int = 120, seed: int = 0) -> Dataset:
    """Random letters; each domain has six of its own."""
    choose = random.Random(seed)
    rows = [
        {"text": "".join(choose.choices(alphabet, k=length)), "domain": domain}
        for domain, alphabet in zip(DOMAINS, ALPHABETS, strict=True)
        for _ in range(documents)
    ]
    return Dataset.from_list(rows)


def planted_tokenizer() -> PreTrainedTokenizerBase:
    """A byte a token: with 257 places nothing is merged."""
    return train_tokenizer(["".join(ALPHABETS)], vocab_size=257)


def by_domain(letter: str) -> int:
    """One expert for each domain."""
    return next(place for place, alphabet in enumerate(ALPHABETS) if letter in alphabet)


def evenly(letter: str) -> int:
    """The same three experts for every domain: two of its six letters to each."""
    return (ord(letter) - ord("a")) % 3


def planted_model(
    tokenizer: PreTrainedTokenizerBase, tables: Sequence[Callable[[str], int]], *, logit: float = 4.0
) -> MoEForCausalLM:
    """A model of as many layers as there are tables, with one of four experts for each token; other tokens go to 0."""
    config = MoEConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=16, num_hidden_layers=len(tables),
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=EXPERTS, num_experts_per_tok=1,
        num_shared_experts=0, moe_intermediate_size=8, max_position_embeddings=256, balancing_mode="none",
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MoEForCausalLM(config)
    letters = {tokenizer.encode(letter)[0]: letter for letter in "".join(ALPHABETS)}
    assert EXPERTS * len(tables) <= config.hidden_size
    embedding = torch.zeros(len(tokenizer), config.hidden_size)
    for token in range(len(tokenizer)):
        for layer, table in enumerate(tables):
            expert = table(letters[token]) if token in letters else 0
            embedding[token, EXPERTS * layer + expert] = 1.0
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedding)
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
            router = torch.zeros(EXPERTS, config.hidden_size)
            router[:, EXPERTS * number : EXPERTS * (number + 1)] = logit * torch.eye(EXPERTS)
            layer.mlp.gate.weight.copy_(router)
    return model.eval()


def save_planted_run(folder: Path, tables: Sequence[Callable[[str], int]], documents: Dataset | None = None) -> Path:
    """What of a run directory the analysis needs."""
    tokenizer = planted_tokenizer()
    planted_model(tokenizer, tables).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (planted_documents() if documents is None else documents).to_parquet(folder / "validation.parquet")
    return folder


def write_records(run: Path, *, steps: int = 40, layers: int = 2, seed: int = 0) -> None:
    """What a training of `steps` would have left of itself, with a line every other step."""
    draw = random.Random(seed)
    metrics, loads = [], []
    for step in range(2, steps + 1, 2):
        load = [[draw.randint(80, 120) for _ in range(EXPERTS)] for _ in range(layers)]
        violation = [max(of_layer) / (sum(of_layer) / EXPERTS) - 1 for of_layer in load]
        loads.append({"step": step, "load": load})
        metrics.append(
            {
                "step": step, "tokens": 1024 * step, "lm_loss": 2 + 4 / step, "max_vio_batch": violation,
                "max_vio_micro": [2 * value for value in violation],
                "load_balancing_loss_batch": [1.0 + value / 10 for value in violation],
                "domain_loss": dict.fromkeys(DOMAINS, 2 + 4 / step), "grad_norm": 1.0, "learning_rate": 1e-3,
                "tokens_per_second": 1e4, "step_seconds": {"forward": 1.0, "backward": 2.0},
            }
        )  # fmt: skip
    for name, lines in (("metrics", metrics), ("load", loads)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = {
        "training": {
            "world_size": 2, "gradient_accumulation_steps": 4, "steps": steps, "skipped_steps": 0,
            "tokens": 1024 * steps, "seconds": 90.0, "tokens_per_second": 1e4, "lm_loss_start": 4.0,
            "lm_loss_end": 2 + 4 / steps, "domains": list(DOMAINS),
        },
        "data": {
            name: {"source": {"data": "files"}, "key": name, "weight": None, "documents": 100, "bytes": 12_000}
            for name in DOMAINS
        },
        "status": {"state": "finished", "step": steps, "reason": None},
        "evaluation": {
            "domains": {name: {"bits_per_byte": 2.5 + place} for place, name in enumerate((*DOMAINS, "all"))}
        },
    }  # fmt: skip
    for name, record in records.items():
        (run / f"{name}.json").write_text(json.dumps(record))
    settings = {
        "block_size": 64, "micro_batch_size": 2, "global_batch_size": 16, "micro_batch_domains": "single",
        "learning_rate": 1e-3, "learning_rate_schedule": "cosine", "warmup_steps": 4, "seed": seed,
    }  # fmt: skip
    (run / "settings.yaml").write_text(json.dumps(settings))  # JSON is YAML
