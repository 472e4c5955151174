"""The cost of balancing is measured in pairs, for each variant and world size. No speed is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 0,
    "moe_intermediate_size": 8,
    "micro_batch_size": 2,
    "sequence_length": 8,
}
RULES = ("sign", "centred_sign", "proportional", "tanh_momentum", "quantile")
ESTIMATES = ("running", "current", "completed")
VARIANTS = {
    *("none/softmax", "none/sigmoid", "micro_batch", "sequence"),
    *(f"global_batch/{estimate}" for estimate in ESTIMATES),
    *(f"loss_free/{rule}" for rule in RULES),
}
WITH_LOSS = {"micro_batch", "sequence", *(f"global_batch/{estimate}" for estimate in ESTIMATES)}


def benchmark(*arguments: str, folder: Path, **shape: int) -> subprocess.CompletedProcess:
    flags = [f"--{name}={value}" for name, value in (TINY | shape).items()]
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *arguments, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.processes
def test_every_variant_is_paired_with_none_in_one_process_and_in_two(tmp_path: Path) -> None:
    flags = ["--rounds=2", "--warmup=1", "--gradient_accumulation_steps=2", "--device=cpu", "--profile"]
    done = benchmark("balancing", *flags, "--world_sizes", "1", "2", "--output=result.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-6000:]

    result = json.loads((tmp_path / "result.json").read_text())
    assert result["shape"] == TINY
    # Embedding and head; in the layer attention (with half as many key-value heads), norms, router and experts; norm.
    layer = (2 + 1) * 16 * 16 + 2 * 16 + 4 * 16 + 4 * 3 * 8 * 16
    assert result["parameters"] == 2 * 64 * 16 + layer + 16
    assert "benchmark.py balancing --rounds=2" in result["command"]
    assert result["machine"]["cores"] == os.cpu_count()
    assert set(result["versions"]) >= {"torch", "transformers"}
    assert set(result["world_sizes"]) == {"1", "2"}
    for variants in result["world_sizes"].values():
        assert set(variants) == VARIANTS
        for name, found in variants.items():
            none, variant = np.array(found["none_seconds"]), np.array(found["seconds"])
            assert none.shape == variant.shape == (2,)
            assert (none > 0).all()
            assert found["ratio"] == pytest.approx(np.median(variant / none))
            assert found["ratio"] > 0
            low, high = found["ratio_interval_95"]
            assert low <= found["ratio_quartiles"][0] <= found["ratio"] <= found["ratio_quartiles"][1] <= high
            assert (found["step_ms"], found["none_step_ms"]) == pytest.approx(
                (np.mean(variant * 1e3), np.mean(none * 1e3))
            )
            # Each part that the mode has took time, and the loss's backward pass only where there is a loss.
            parts = found["parts_ms"]
            assert min(parts["observe"], parts["loss"], parts["after_optimizer_step"], parts["exchange"]) > 0
            assert (parts["loss_backward"] > 0) == (name in WITH_LOSS)
            assert "aten::scatter_add_" in found["operators_ms"]
            # The all-reduce of the counts is there with other ranks, and only then.
            assert any("allreduce" in operator for operator in found["operators_ms"]) == (
                variants is result["world_sizes"]["2"]
            )
            assert done.stdout.count(f"\n{name} ") >= 2


@pytest.mark.parametrize(
    ("arguments", "shape", "words"),
    [
        (["balancing", "--variants=none"], {}, "variants must be among none/softmax, micro_batch, "),
        (["balancing", "--rounds=0"], {}, "rounds must be at least 1; got 0"),
        (
            ["balancing"],
            {"num_experts_per_tok": 5},
            "num_experts_per_tok must be between 1 and num_experts (4); got 5",
        ),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_measured(
    arguments: list[str], shape: dict[str, int], words: str, tmp_path: Path
) -> None:
    done = benchmark(*arguments, "--output=result.json", folder=tmp_path, **shape)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {words}")
    assert not list(tmp_path.iterdir())
