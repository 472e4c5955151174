"""Ours and the peer are measured alike, and what is counted is right. No speed is asserted."""

import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from equipoise.configuration import model_size

ROOT = Path(__file__).parents[2]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load(ROOT / "scripts" / "benchmark.py")  # puts benchmarks/ on the path

import tabulate_performance  # noqa: E402
from contestants import OURS, UNBALANCED, Pair, Training, peer_name  # noqa: E402
from experts_speed import experts_flops, random_inputs  # noqa: E402
from measuring import MODELS, spread  # noqa: E402
from memory_account import MemoryAccount, step_memory  # noqa: E402
from rounds import in_rounds  # noqa: E402
from step_speed import step_flops  # noqa: E402

TINY = MODELS["tiny"]


@pytest.fixture(autouse=True, scope="module")
def threads() -> Iterator[None]:
    """The commands run on one thread; what comes after them does not."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def call(*words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmark.py", *words])
        script.main()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every sub-command writes of the tiny model."""
    folder = tmp_path_factory.mktemp("results")
    common = ("--models=tiny", "--device=cpu", "--warmup=1", f"--output={folder}")
    dtypes = ("--dtypes", "float32", "autocast", "bfloat16")
    call("experts", "--rounds=2", *dtypes, *common)
    call("step", "--rounds=2", "--unbalanced", "--profile", *dtypes, *common)
    call("generate", "--rounds=2", "--batch_sizes", "1", "3", "--prompt_length=4", "--new_tokens=3", *common)
    call("scaling", "--rounds=2", "--num_experts", "4", "8", "--sequence_lengths", "8", "16", *common)
    call("losses", "--steps=4", *common)
    return folder


def read(folder: Path, name: str) -> dict[str, Any]:
    result = json.loads((folder / f"{name}_cpu.json").read_text())
    assert result["command"].startswith("python scripts/benchmark.py ")
    assert result["machine"]["threads"] == 1
    assert set(result["versions"]) >= {"torch", "transformers"}
    assert "environment" in result["allocator"]
    assert result["shape"] == TINY.shape()
    return result


def check_ratio(record: dict[str, Any], numerator: list[float], denominator: list[float]) -> None:
    ratios = np.divide(numerator, denominator)
    assert record["ratio"] == pytest.approx(np.median(ratios))
    low, high = record["ratio_quartiles"]
    least, most = record["ratio_interval_95"]
    assert 0 < least <= low <= record["ratio"] <= high <= most < math.inf


def check_performance(result: dict[str, Any], peers: tuple[str, ...], flops: float | None) -> None:
    """Every figure again from the seconds."""
    contestants, tokens = result["contestants"], {}
    assert set(contestants) - {UNBALANCED} == {OURS, *(peer_name(peer) for peer in peers)}
    for name, record in contestants.items():
        assert len(record["seconds"]) == 2
        assert min(record["seconds"]) > 0
        assert record["median_seconds"] == pytest.approx(np.mean(record["seconds"]))
        tokens[name] = record["tokens_per_second"] * record["median_seconds"]
        if flops is not None:
            assert record["gflops"] == pytest.approx(flops / record["median_seconds"] / 1e9)
            assert set(record["fraction_of_peak"]) == set(result["peaks"])
            for peak, fraction in record["fraction_of_peak"].items():
                size, seconds = result["peaks"][peak]["size"], result["peaks"][peak]["seconds"]
                check_ratio(fraction, [flops * s / (2 * size**3) for s in seconds], record["seconds"])
    assert max(tokens.values()) == pytest.approx(min(tokens.values()))
    assert set(result["speedups"]) == {peer_name(peer) for peer in peers}
    for peer, ratio in result["speedups"].items():
        check_ratio(ratio, contestants[peer]["seconds"], contestants[OURS]["seconds"])
    assert result["fastest_peer"] == min(result["speedups"], key=lambda peer: contestants[peer]["median_seconds"])


@pytest.mark.parametrize("dtype", ["float32", "autocast", "bfloat16"])
def test_experts_are_compared_with_every_kind_of_the_peer(results: Path, dtype: str) -> None:
    result = read(results, f"experts_tiny_{dtype}")
    check_performance(result, ("eager", "grouped_mm", "batched_mm"), result["flops"])
    assert ("oneDNN" in result["peaks"]) == (dtype == "float32" and torch.backends.mkldnn.is_available())


@pytest.mark.parametrize("dtype", ["float32", "autocast", "bfloat16"])
def test_steps_are_compared_in_time_and_memory(results: Path, dtype: str) -> None:
    result = read(results, f"step_tiny_{dtype}")
    check_performance(result, ("eager", "grouped_mm"), result["flops_per_step"])
    contestants = result["contestants"]
    check_ratio(result["balancing"], contestants[OURS]["seconds"], contestants[UNBALANCED]["seconds"])
    assert set(result["memory"]) == set(contestants)
    width = 2 if dtype == "bfloat16" else 4
    for name, memory in result["memory"].items():
        assert memory["gradients"] == width * result["parameters"]
        # Two moments; fused AdamW also keeps each tensor's step.
        assert 2 * memory["gradients"] <= memory["optimizer"] <= 2 * memory["gradients"] + 4 * 100
        assert memory["peak"] == sum(memory[part] for part in memory if part != "peak")
        # The peer's logits, at the least, as they are and in fp32.
        if name not in (OURS, UNBALANCED):
            assert memory["activations"] > 32 * 64 * 4
    ours, peer = (result["memory"][name]["activations"] for name in (OURS, result["fastest_peer"]))
    assert result["activations_ratio"] == ours / peer
    for rows in result["operators"].values():
        assert rows == sorted(rows, key=lambda row: -row["share"])
        assert 0 < sum(row["share"] for row in rows) <= 1


def test_generation_is_compared_at_every_batch_size(results: Path) -> None:
    result = read(results, "generate_tiny_float32")
    assert set(result["batch_sizes"]) == {"1", "3"}
    for size, found in result["batch_sizes"].items():
        check_performance(found, ("eager", "grouped_mm", "batched_mm"), None)
        ours = found["contestants"][OURS]
        assert ours["tokens_per_second"] * ours["median_seconds"] == pytest.approx(3 * int(size))
        assert found["same_tokens"] == 1


@pytest.mark.processes
def test_steps_scale_along_every_axis(results: Path) -> None:
    for axis, sizes in (("num_experts", "4 8"), ("sequence_length", "8 16"), ("world_size", "1 2")):
        result = read(results, f"scaling_{axis}_tiny_float32")
        assert result["axis"] == axis
        assert list(result["sizes"]) == sizes.split()
        first = next(iter(result["sizes"].values()))
        for size, found in result["sizes"].items():
            assert found["tokens"] == 32 * (int(size) if axis == "world_size" else 1)
            contestants = found["contestants"]
            for name, record in contestants.items():
                rates, before = (
                    [1 / (seconds / tokens) for seconds in of["contestants"][name]["seconds"]]
                    for of, tokens in ((found, found["tokens"]), (first, first["tokens"]))
                )
                assert record["tokens_per_second"] == pytest.approx(np.median(rates))
                check_ratio(record["of_first"], rates, before)
            peer = contestants[peer_name("grouped_mm")]
            check_ratio(found["speedup"], peer["seconds"], contestants[OURS]["seconds"])


def test_losses_are_those_of_the_peer(results: Path) -> None:
    result = read(results, "losses_tiny_float32")
    names = [OURS, peer_name("eager"), peer_name("grouped_mm")]
    assert list(result["losses"]) == names
    pairs = result["largest_differences"]
    assert [(pair["of"], pair["and"]) for pair in pairs] == list(combinations(names, 2))
    for pair in pairs:
        one, other = (result["losses"][pair[name]] for name in ("of", "and"))
        assert len(one) == len(other) == 4
        differences = np.abs(np.divide(one, other) - 1)
        assert pair["relative"] == pytest.approx(differences.max())
        assert pair["at_step"] == 1 + differences.argmax()
        assert pair["relative"] < 1e-5
    assert len(set(result["losses"][OURS])) == 4


def test_the_document_gets_its_tables_and_its_picture(results: Path, tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    places = [
        f"<!-- {name}: written by benchmarks/tabulate_performance.py -->\nold\n<!-- end -->"
        for name in tabulate_performance.TABLES
    ]
    document.write_text("# Head\n\n" + "\n\nbetween\n\n".join(places) + "\n\ntail\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tabulate_performance.py", str(results), str(document)])
        tabulate_performance.main()
        text = document.read_text()
        tabulate_performance.main()
    assert document.read_text() == text
    assert "old" not in text
    assert text.startswith("# Head\n")
    assert text.endswith("\n\ntail\n")
    assert text.count("\nbetween\n") == len(places) - 1
    step = read(results, "step_tiny_float32")
    ratio = step["speedups"][step["fastest_peer"]]
    assert f"**{ratio['ratio']:.2f} ({ratio['ratio_quartiles'][0]:.2f}-{ratio['ratio_quartiles'][1]:.2f})**" in text
    assert f"**{step['activations_ratio']:.2f}**" in text
    assert len(re.findall(r"^\| tiny, bf16 autocast \|", text, re.MULTILINE)) == 4  # step, memory, balancing, experts
    assert document.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair(TINY, seed=0, dtype="float32", device="cpu") as pair:
        yield pair


def test_both_models_compute_the_same(pair: Pair) -> None:
    tokens = TINY.micro_batch(torch.Generator().manual_seed(1))
    ours, peer = pair.ours("eager", None).eval(), pair.peer("eager").eval()
    assert ours.num_parameters() == peer.num_parameters()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, peer(tokens).logits)


def test_flops_are_those_that_torch_counts(pair: Pair) -> None:
    """Torch counts products of whole matrices: attention without its mask, which eager attention multiplies."""
    peer, ours = pair.peer("eager"), pair.ours("eager", None)
    peer.set_attn_implementation("eager")
    tokens = TINY.micro_batch(torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counter:
        Training(lambda: peer, dtype="float32", device="cpu", skip_logits=False).backward(tokens)
    # Transformers 5.17 makes the angles of positions by a product, once a pass.
    angles = sum(counter.get_flop_counts().get("Qwen3MoeForCausalLM.model.rotary_emb", {}).values())
    assert angles < 1000
    length, keys = TINY.sequence_length, (TINY.sequence_length + 1) // 2
    masked = 12 * TINY.num_hidden_layers * TINY.num_attention_heads * TINY.head_dim * (length - keys) * tokens.numel()
    assert step_flops(ours, length, tokens.numel()) == counter.get_total_flops() - angles - masked


def test_flops_of_experts_are_those_that_torch_counts(pair: Pair) -> None:
    experts = pair.peer("eager").model.layers[0].mlp.experts
    hidden_states, selected, weights, gradient = random_inputs(TINY, torch.float32, "cpu", seed=0)
    with FlopCounterMode(display=False) as counter:
        experts(hidden_states, selected, weights).backward(gradient)
    assert experts_flops(TINY) == counter.get_total_flops()


def test_memory_is_the_largest_sum_of_what_is_allocated_and_not_given_back() -> None:
    before = torch.empty(1_000_000)
    with MemoryAccount("cpu") as account:
        kept = torch.empty(1000)
        torch.empty(500_000)  # given back, and outside
        with account.measured():
            block = torch.empty(2000)
            del block, before  # what was there before is none of the account's
            blocks = [torch.empty(1500), torch.empty(500, dtype=torch.float64)]
            del blocks
            torch.empty(10)
        torch.empty(600_000)
    assert kept.numel() == 1000
    assert account.peak == 4 * 1000 + 4 * 1500 + 8 * 500


def test_what_a_step_keeps_for_the_next_one_is_activations_too() -> None:
    """A workspace that outlives a step would be invisible to one who looks at the growth within a step."""
    workspace: list[torch.Tensor] = []

    model = nn.Linear(100, 10, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def micro_batch() -> None:
        if not workspace:
            workspace.append(torch.empty(1_000_000))
        passing = torch.empty(2_000_000)
        model.weight.sum().backward()
        del passing

    memory = step_memory(model, optimizer, micro_batch, "cpu")
    assert memory["parameters"] == memory["gradients"] == 4000
    assert memory["optimizer"] == 2 * 4000 + 4
    assert 12_000_000 <= memory["activations"] < 12_000_000 + 20_000
    assert memory["peak"] == sum(memory[part] for part in memory if part != "peak")


def test_rounds_measure_each_contestant_once_a_round_in_changing_order() -> None:
    calls: list[str] = []

    def contestant(name: str, seconds: float) -> Callable[[], float]:
        def run() -> float:
            calls.append(name)
            return seconds + len(calls)

        return run

    contestants = {"ours": contestant("ours", 1e6), "quick": contestant("quick", 0), "slow": contestant("slow", 1000)}
    rounds = in_rounds(contestants, rounds=20, warmup=2, seed=0, peers=["quick", "slow"], hopeless=2, show=False)
    assert sorted(calls[:6]) == sorted(2 * ["ours", "quick", "slow"])
    later = [tuple(calls[start : start + 2]) for start in range(6, 46, 2)]
    assert {("ours", "quick"), ("quick", "ours")} == set(later)
    assert {name: len(seconds) for name, seconds in rounds.seconds.items()} == {"ours": 20, "quick": 20}
    assert list(rounds.left_out) == ["slow"]
    # Call 7 is the first that counts.
    assert min(rounds.seconds["quick"]) >= 7


def test_no_peer_is_left_out_unless_it_is_asked_for() -> None:
    contestants = {"ours": lambda: 1.0, "quick": lambda: 1.0, "slow": lambda: 100.0}
    rounds = in_rounds(contestants, rounds=2, warmup=1, seed=0, peers=["quick", "slow"], show=False)
    assert rounds.seconds == {"ours": [1.0, 1.0], "quick": [1.0, 1.0], "slow": [100.0, 100.0]}


def test_the_spread_is_that_of_the_ratios() -> None:
    found = spread(np.arange(1, 102), seed=0)
    assert found["ratio"] == 51
    assert found["ratio_quartiles"] == [26, 76]
    # The median of 101 numbers lies within 10 places of its own 95 times of 100.
    low, high = found["ratio_interval_95"]
    assert 36 <= low < 51 < high <= 66


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step", "--models", "XXL"], "models must be among S, M, L, tiny; got XXL"),
        (["step", "--dtypes", "float8"], "dtypes must be among float32, autocast, bfloat16; got float8"),
        (["experts", "--peer_implementations", "magic"], "peer_implementations must be among eager, grouped_mm"),
        (
            ["step", "--device", "cpu", "--peer_implementations", "sonicmoe"],
            "peer_implementations may have sonicmoe on a GPU and with kernels installed",
        ),
        (["experts", "--hopeless", "0.5"], "hopeless must be 0 or at least 1; got 0.5"),
        (["generate", "--batch_sizes", "0"], "batch_sizes must be at least 1; got 0"),
        (["generate", "--rounds", "0"], "rounds must be at least 1; got 0"),
        (["scaling", "--axes", "depth"], "axes must be among num_experts, sequence_length, world_size; got depth"),
        (["scaling", "--models", "tiny", "--num_experts", "1"], "num_experts_per_tok must be between 1 and"),
        (
            ["scaling", "--models", "tiny", "--sequence_lengths", "5"],
            "sequence_lengths must divide the tokens of a micro-batch (32); got 5",
        ),
        (["losses", "--steps", "0"], "steps must be at least 1; got 0"),
        (["losses", "--learning_rate", "-1"], "learning_rate must be above 0; got -1.0"),
        (["step", "--device", "tpu"], "device must be cpu, or cuda where there is a GPU; got tpu"),
        (["speed"], "the sub-command must be one of experts, step, generate, scaling, losses, balancing; got speed"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    output = [] if words == ["speed"] else [f"--output={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        call(*words, *output)
    assert str(ended.value).startswith(f"error: {message}")
    assert "\n" not in str(ended.value)
    assert not list(tmp_path.iterdir())


def test_the_models_are_those_that_the_figures_are_about() -> None:
    """Their shapes stand in the document, and L is said to be of 0.92 B parameters."""
    assert MODELS["S"].micro_batch_size * MODELS["S"].sequence_length == 4096
    assert MODELS["M"].micro_batch_size * MODELS["M"].sequence_length == 2048
    size = model_size(MODELS["L"].config(use_qk_norm=True))
    assert round(size.total / 1e9, 2) == 0.92
    assert round(size.active / 1e9, 2) == 0.22
