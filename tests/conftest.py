"""Shared by all rooms' tests: a tiny model, and real gloo processes."""

import os

# Before any import of these libraries, which read the environment once: no test asks the Hub for anything.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_environment import make_bare_environment
from datasets import Dataset
from gloo_processes import Processes
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from training_runs import write_corpus
from transformers import PreTrainedTokenizerBase

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.data import train_tokenizer

# A busy machine is no fault of the code: no example has a deadline. And the same examples everywhere, so that a
# near-tie that a rounding decides does not come and go between runs of CI.
hypothesis_settings.register_profile(
    "any machine", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("any machine")


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., MoEConfig]:
    """A function that makes a configuration small enough for any test; fields can be changed by keyword."""

    def make(**changes: Any) -> MoEConfig:
        fields = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "use_qk_norm": True,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 16,
            "max_position_embeddings": 128,
            # Large enough that routers differ between tokens from the start.
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 1,
        }
        return MoEConfig(**fields | changes)

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains, code and prose, for `training_runs.settings`."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


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
def model(tokenizer: PreTrainedTokenizerBase, tiny_config: Callable[..., MoEConfig]) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(tiny_config(vocab_size=len(tokenizer), use_qk_norm=False, num_shared_experts=0))


@pytest.fixture(scope="module")
def saved_run(
    tmp_path_factory: pytest.TempPathFactory,
    model: MoEForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    documents: Dataset,
) -> Path:
    """What of a run directory evaluation and analysis read: the model, its tokenizer, held-out documents."""
    folder = tmp_path_factory.mktemp("run")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    documents.to_parquet(folder / "validation.parquet")
    return folder


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment with torch and Transformers, where equipoise is not installed."""
    return make_bare_environment(tmp_path_factory.mktemp("bare") / "venv")


@pytest.fixture(scope="session")
def run_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """A function that runs `work(rank, world_size, *arguments)` in gloo processes and returns what each returned.

    `work` must be importable; what it returns are tensors, numbers and strings in lists and dictionaries.
    """
    pools: dict[int, Processes] = {}

    def run(world_size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        if world_size not in pools:
            pools[world_size] = Processes(world_size, tmp_path_factory.mktemp("processes"))
        try:
            return pools[world_size].run(work, arguments)
        except BaseException:
            # The others may be waiting for the rank that failed.
            pools.pop(world_size).stop()
            raise

    yield run
    for pool in pools.values():
        pool.stop()
