"""Upcycling against the dense models themselves."""

import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stock_models import (
    assert_same_logits,
    assert_same_tensors,
    load,
    saved_tensors,
    stock_model,
)
from torch import Tensor

from equipoise import MoEForCausalLM
from equipoise.hub import convert, upcycle

ROOT = Path(__file__).parents[2]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("model_type", "changes", "experts"),
    [
        ("llama", {}, {"num_experts": 4, "num_experts_per_tok": 2}),
        ("llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": False}, {"scoring_func": "sigmoid"}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 8}, {"first_k_dense_replace": 2}),
        ("qwen2", {}, {}),
        ("qwen2", {"tie_word_embeddings": True}, {"num_experts": 8, "num_experts_per_tok": 4, "granularity": 4}),
        ("qwen3", {}, {"num_experts": 6, "num_experts_per_tok": 3, "granularity": 4, "num_shared_experts": 1}),
        (
            "qwen3",
            {"attention_bias": False, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
            {"num_experts": 9, "num_experts_per_tok": 6, "granularity": 3, "scoring_func": "sigmoid"},
        ),
    ],
)
def test_logits_equal_the_dense_models(
    tmp_path: Path, model_type: str, changes: dict[str, Any], experts: dict[str, Any]
) -> None:
    dense = stock_model(model_type, **changes)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="5KB")
    upcycle(
        tmp_path / "dense",
        tmp_path / "ours",
        **{"num_experts": 4, "num_experts_per_tok": 2} | experts,
        max_shard_size="5KB",
    )
    ours = load(tmp_path / "ours")
    assert isinstance(ours, MoEForCausalLM)
    assert_same_logits(ours, dense)
    ours.save_pretrained(tmp_path / "resaved")
    assert_same_tensors(tmp_path / "ours", tmp_path / "resaved")


@given(data=st.data())
@settings(max_examples=12)
def test_logits_equal_for_any_slices(data: st.DataObject) -> None:
    granularity = data.draw(st.integers(1, 5))
    shared = data.draw(st.integers(0, granularity - 1))
    copies = data.draw(st.integers(1, 4))
    experts = {
        "granularity": granularity,
        "num_shared_experts": shared,
        "num_experts": copies * (granularity - shared),
        "num_experts_per_tok": data.draw(st.integers(1, copies)) * (granularity - shared),
        "scoring_func": data.draw(st.sampled_from(["softmax", "sigmoid"])),
        "seed": data.draw(st.integers(0, 9)),
    }
    dense = stock_model("llama", intermediate_size=granularity * data.draw(st.integers(1, 9)), num_hidden_layers=2)
    with tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(f"{folder}/dense")
        upcycle(f"{folder}/dense", f"{folder}/ours", **experts)
        ours = load(Path(folder, "ours"))
    assert_same_logits(ours, dense)


def experts_of(folder: Path, layer: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """`gate_up_proj` `[E, 2F, D]`, `down_proj` `[E, D, F]` and the router `[E, D]` of a layer."""
    tensors = saved_tensors(folder)
    names = ("experts.gate_up_proj", "experts.down_proj", "gate.weight")
    gate_up, down, router = (tensors[f"model.layers.{layer}.mlp.{name}"] for name in names)
    return gate_up, down, router


def test_experts_are_slices_to_the_bit_and_routers_are_drawn(tmp_path: Path) -> None:
    dense = stock_model("llama", hidden_size=64, initializer_range=0.05).to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    sizes = {"num_experts": 24, "num_experts_per_tok": 3, "granularity": 4, "num_shared_experts": 1}
    upcycle(tmp_path / "dense", tmp_path / "ours", **sizes)
    mlp = dense.model.layers[1].mlp
    gate_up, down, router = experts_of(tmp_path / "ours", layer=1)
    assert gate_up.dtype == router.dtype == torch.bfloat16
    for expert in range(24):
        rows = slice(6 * (1 + expert % 3), 6 * (2 + expert % 3))
        assert torch.equal(gate_up[expert], torch.cat([mlp.gate_proj.weight[rows], mlp.up_proj.weight[rows]]))
        assert torch.equal(down[expert], mlp.down_proj.weight[:, rows])
        assert torch.equal(router[expert], router[3 * (expert // 3)])  # or a token selects parts of several copies
    copies = router[::3].float()
    assert copies.std().item() == pytest.approx(0.05, rel=0.1)
    assert torch.pdist(copies).min() > 0.1
    other_layer = experts_of(tmp_path / "ours", layer=0)[2]
    assert (other_layer - router).abs().max() > 0.05


def test_a_seed_draws_the_same_however_it_is_written(tmp_path: Path) -> None:
    stock_model("llama").save_pretrained(tmp_path / "dense")
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "noise": 0.1}
    for name, changes in (("one", {}), ("same", {"max_shard_size": "3KB"}), ("other", {"seed": 1})):
        upcycle(tmp_path / "dense", tmp_path / name, **sizes, **changes)
    assert_same_tensors(tmp_path / "one", tmp_path / "same")
    one, other = (experts_of(tmp_path / name) for name in ("one", "other"))
    assert not any(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))


def test_noise_sets_the_experts_apart_by_what_was_asked(tmp_path: Path) -> None:
    dense = stock_model("llama", hidden_size=64, intermediate_size=96)
    dense.save_pretrained(tmp_path / "dense")
    notes = upcycle(tmp_path / "dense", tmp_path / "ours", num_experts=3, num_experts_per_tok=2, noise=0.2)
    assert notes == ["noise is 0.2: the logits are not those of the dense model"]
    mlp = dense.model.layers[0].mlp
    gate_up, down, _ = experts_of(tmp_path / "ours")
    for expert in range(3):
        for noisy, weight in zip(
            (*gate_up[expert].chunk(2), down[expert]), (mlp.gate_proj, mlp.up_proj, mlp.down_proj), strict=True
        ):
            added = noisy - weight.weight
            assert added.std().item() == pytest.approx(0.2 * weight.weight.std().item(), rel=0.05)
            assert abs(added.mean().item()) < 0.01
    assert torch.pdist(gate_up.flatten(1)).min() > 1
    with pytest.raises(AssertionError):
        assert_same_logits(load(tmp_path / "ours"), dense)


@pytest.mark.parametrize(
    ("experts", "reaches_routers"),
    [
        # Whole copies give the same whichever is selected: the language model has no preference yet.
        ({"num_experts": 4, "num_experts_per_tok": 2}, False),
        # Slices of a copy do not.
        ({"num_experts": 8, "num_experts_per_tok": 4, "granularity": 4}, True),
    ],
)
def test_training_sets_the_experts_apart(tmp_path: Path, experts: dict[str, Any], reaches_routers: bool) -> None:
    torch.manual_seed(0)
    stock_model("qwen3").save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "ours", **experts, config_overrides={"router_aux_loss_coef": 0.1})
    model = load(tmp_path / "ours").train()
    routers = [layer.mlp.gate.weight for layer in model.model.layers]
    ids = torch.randint(3, 48, (4, 16))

    def gradients(balanced: bool) -> Tensor:
        """Norm of each router's gradient, from the language-model loss alone or with balancing."""
        model.zero_grad()
        outputs = model(input_ids=ids, labels=ids)
        (outputs.loss if balanced else outputs.loss - outputs.aux_loss).backward()
        return torch.stack([router.grad.norm() for router in routers])

    assert bool((gradients(balanced=False) > 1e-4).all()) == reaches_routers
    assert bool((gradients(balanced=False) > 1e-4).any()) == reaches_routers
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert (gradients(balanced=True) > 1e-4).all()
    optimizer.step()
    model.balancer.after_optimizer_step()
    for layer in model.model.layers:
        for weight in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            copies = weight.detach().unflatten(0, (-1, experts.get("granularity", 1)))
            assert torch.pdist(copies.flatten(1)).min() > 1e-3
    assert (gradients(balanced=False) > 1e-4).all()


def test_an_upcycled_model_leaves_for_the_stock_class(tmp_path: Path) -> None:
    """Copies of a Qwen3 are a Qwen3-MoE, whose class then computes what the dense one did."""
    dense = stock_model("qwen3")
    dense.save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "ours", num_experts=4, num_experts_per_tok=2, first_k_dense_replace=1)
    convert(tmp_path / "ours", tmp_path / "stock", to="qwen3_moe")
    assert_same_logits(load(tmp_path / "stock"), dense)


# --- What is refused, before anything is written ---


@pytest.mark.parametrize(
    ("model_type", "changes", "experts", "match"),
    [
        ("llama", {"is_causal": False}, {}, "is_causal must be true: .*; got False"),
        ("llama", {"mlp_bias": True}, {}, "mlp_bias must be false: experts have no biases; got True"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            {},
            r"sliding_window must be null, .*; got 8",
        ),
        (
            "llama",
            {},
            {"granularity": 5},
            r"granularity must be at least 1 and divide interm.* \(24\); got 5",
        ),
        ("llama", {}, {"granularity": 0}, "granularity must be at least 1 .*; got 0"),
        ("llama", {}, {"num_shared_experts": 1}, r"num_shared_experts must be at least 0 and below .* \(1\).*; got 1"),
        ("llama", {}, {"granularity": 3}, r"num_experts must be a multiple of granu.* \(3\): a token sel.*; got 4"),
        (
            "llama",
            {},
            {"granularity": 4, "num_experts_per_tok": 2},
            r"num_experts_per_tok must be a multiple of .* \(4\).*; got 2",
        ),
        ("llama", {}, {"noise": -0.1}, "noise must be at least 0 and finite; got -0.1"),
        (
            "llama",
            {},
            {"num_experts_per_tok": 5},
            r"num_experts_per_tok must be between 1 and .*\(4\); got 5",
        ),
        ("llama", {}, {"config_overrides": {"scoring_func": "sigmoid"}}, "config_overrides must be of balancing"),
        ("qwen3_moe", {}, {}, r"the model's type must be llama or qwen2 or qwen3; got qwen3_moe"),
    ],
)
def test_what_would_not_be_the_same_is_refused(
    tmp_path: Path, model_type: str, changes: dict[str, Any], experts: dict[str, Any], match: str
) -> None:
    stock_model(model_type, **changes).save_pretrained(tmp_path / "dense")
    with pytest.raises((ValueError, StrictDataclassError), match=match):
        upcycle(tmp_path / "dense", tmp_path / "ours", **{"num_experts": 4, "num_experts_per_tok": 2} | experts)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_bias_that_is_missing_is_not_taken_for_zeros(tmp_path: Path) -> None:
    """Qwen2 has no bias on its attention's output; a Llama that should have one has lost it."""
    stock_model("llama").save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.bias"]
    save_file(tensors, tmp_path / "dense" / "model.safetensors")
    with pytest.raises(ValueError, match=r"must hold model.layers.1.self_attn.o_proj.bias; got no such tensor"):
        upcycle(tmp_path / "dense", tmp_path / "ours", num_experts=4, num_experts_per_tok=2)


def test_buffers_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    """Llamas were once saved with the frequencies of their rotary embedding; Transformers passes over them."""
    dense = stock_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
        tmp_path / "dense" / "model.safetensors",
    )
    upcycle(tmp_path / "dense", tmp_path / "ours", num_experts=4, num_experts_per_tok=2)
    assert_same_logits(load(tmp_path / "ours"), dense)


def test_the_script_upcycles_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["upcycle.py", *arguments])
        runpy.run_path(str(ROOT / "scripts" / "upcycle.py"), run_name="__main__")

    monkeypatch.chdir(tmp_path)
    dense = stock_model("qwen2")
    dense.save_pretrained("dense")
    sizes = ("--num_experts=6", "--num_experts_per_tok=2", "--granularity=2", "--scoring_func=sigmoid")
    script("--model=dense", "--output=ours", *sizes, "--config_overrides={balancing_mode: loss_free}")
    assert capsys.readouterr().out == "written: ours\n"
    ours = load(tmp_path / "ours")
    assert (ours.config.balancing_mode, ours.config.moe_intermediate_size) == ("loss_free", 12)
    assert "auto_map" in json.loads((tmp_path / "ours" / "config.json").read_text())
    assert_same_logits(ours, dense)

    with pytest.raises(SystemExit) as refusal:
        script("--model=dense", "--output=more", "--num_experts=7", "--num_experts_per_tok=1", "--granularity=2")
    assert "error: dense cannot be converted:" in str(refusal.value.code)
    assert "- num_experts must be a multiple of granularity - num_shared_experts (2)" in str(refusal.value.code)
    assert "- num_experts_per_tok must be" in str(refusal.value.code)
    assert not (tmp_path / "more").exists()
