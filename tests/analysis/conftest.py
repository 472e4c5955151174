import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.data import train_tokenizer


@pytest.fixture(scope="session")
def documents() -> Dataset:
    """Documents of several lengths, some longer than a window, with characters of one to four bytes."""
    rows = []
    for number in range(1, 7):
        rows.append({"text": f"def f{number}(x):\n    return x + {number}\n" * number, "domain": "code"})
        rows.append({"text": "Où est la loi numéro " + "é" * number + " ? Nul ne le sait.", "domain": "law"})
        rows.append({"text": "数は" + "三" * (5 * number) + "である🙂", "domain": "ja"})
    return Dataset.from_list(rows)


@pytest.fixture(scope="session")
def tokenizer(documents: Dataset) -> PreTrainedTokenizerBase:
    return train_tokenizer(documents["text"][:], vocab_size=300)


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerBase) -> MoEForCausalLM:
    torch.manual_seed(0)
    config = MoEConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        first_k_dense_replace=1,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        initializer_range=0.2,
    )
    return MoEForCausalLM(config)
