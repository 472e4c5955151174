"""The model as a user of Transformers meets it."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from equipoise import MoEConfig, MoEForCausalLM, MoEModel
from equipoise.modeling import MoERouter
from tests.modeling.stock_twins import biased, glm4_moe, qwen3_moe

Make = Callable[..., MoEConfig]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(2, 64, (batch, length))


# --- Against the stock models ---


def test_logits_equal_qwen3_moe(tiny_config: Make) -> None:
    ours = MoEForCausalLM(tiny_config(num_shared_experts=0, first_k_dense_replace=0)).eval()
    ids = tokens()
    torch.testing.assert_close(
        ours(ids).logits, qwen3_moe(ours, Qwen3MoeForCausalLM)(ids).logits, atol=1e-5, rtol=1e-5
    )


def test_logits_equal_glm4_moe(tiny_config: Make) -> None:
    """Sigmoid scores with a bias, groups, shared experts, a dense first layer, partial rotary."""
    config = tiny_config(
        scoring_func="sigmoid",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
        num_shared_experts=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    )
    ours = biased(MoEForCausalLM(config)).eval()
    ids = tokens()
    torch.testing.assert_close(ours(ids).logits, glm4_moe(ours)(ids).logits, atol=1e-5, rtol=1e-5)


# --- Routing ---


def test_router_by_hand(tiny_config: Make) -> None:
    router = MoERouter(tiny_config(scoring_func="sigmoid", routed_scaling_factor=2.0)).double()
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(torch.randn(8))
    hidden = torch.randn(5, 32, dtype=torch.float64)
    logits, weights, experts = router(hidden)
    assert logits.dtype == weights.dtype == torch.float64
    for token in range(5):
        scores = [1 / (1 + torch.exp(-(hidden[token] @ row))).item() for row in router.weight]
        choice = [score + bias for score, bias in zip(scores, router.e_score_correction_bias.tolist(), strict=True)]
        best = sorted(range(8), key=lambda expert: -choice[expert])[:2]
        assert sorted(experts[token].tolist()) == sorted(best)
        chosen = [scores[expert] for expert in experts[token].tolist()]  # the bias enters no weight
        assert weights[token].tolist() == pytest.approx([2 * score / sum(chosen) for score in chosen])


def test_router_stays_in_fp32_under_autocast(tiny_config: Make) -> None:
    router = MoERouter(tiny_config())
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _, _ = router(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, router(hidden)[0])


def test_selection_bias_stays_in_fp32(tiny_config: Make, tmp_path: Path) -> None:
    def check(model: MoEForCausalLM) -> None:
        for bias in model.selection_biases():
            assert bias.dtype == torch.float32
            assert bias[0].item() == pytest.approx(0.5 + 1e-3, abs=1e-7)

    def make() -> MoEForCausalLM:
        model = MoEForCausalLM(tiny_config())
        for bias in model.selection_biases():
            bias.fill_(0.5 + 1e-3)
        return model

    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double()):
        check(cast(make()))
    make().save_pretrained(tmp_path)
    check(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    fresh = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
    assert {bias.dtype for bias in fresh.selection_biases()} == {torch.float32}
    with torch.device("meta"):
        empty = MoEForCausalLM(tiny_config()).to(torch.bfloat16)
    empty.to_empty(device="cpu")
    assert {bias.dtype for bias in empty.selection_biases()} == {torch.float32}


# --- Saving, loading, generating ---


def test_auto_classes_load_what_was_saved(tiny_config: Make, tmp_path: Path) -> None:
    model = biased(MoEForCausalLM(tiny_config(tie_word_embeddings=True))).eval()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MoEConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), MoEModel)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, MoEForCausalLM)
    ids = tokens()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    # Memory-mapped weights are aligned otherwise, and matrix products then round otherwise.
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_cached_generation_equals_forward_passes(tiny_config: Make) -> None:
    model = biased(MoEForCausalLM(tiny_config())).eval()
    ids = tokens(1, 5)
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    by_hand = ids
    while by_hand.shape[1] < generated.shape[1]:
        by_hand = torch.cat([by_hand, model(by_hand, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, by_hand)


def test_left_padding_changes_nothing(tiny_config: Make) -> None:
    model = MoEForCausalLM(tiny_config()).eval()
    ids = tokens(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = padded.ne(0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(
        model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:],
        model(ids).logits,
        atol=1e-5,
        rtol=1e-5,
    )


@torch.no_grad()  # flex attention has no backward pass on CPUs
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_packed_documents_do_not_see_each_other(tiny_config: Make, attention: str, use_cache: bool) -> None:
    model = MoEForCausalLM(tiny_config()).eval()
    model.set_attn_implementation(attention)
    first, second = tokens(1, 5), tokens(1, 7)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = model(torch.cat([first, second], dim=1), position_ids=positions, use_cache=use_cache).logits
    torch.testing.assert_close(packed[:, :5], model(first).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, 5:], model(second).logits, atol=1e-5, rtol=1e-5)


def test_experts_implementations_agree(tiny_config: Make) -> None:
    model = MoEForCausalLM(tiny_config()).eval()
    ids, logits = tokens(), {}
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        logits[implementation] = model(ids).logits
    torch.testing.assert_close(logits["eager"], logits["grouped_mm"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits["eager"], logits["batched_mm"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_every_kind_of_rope_reaches_past_its_positions(tiny_config: Make, rope: dict) -> None:
    plain = MoEForCausalLM(tiny_config(max_position_embeddings=16)).eval()
    scaled = MoEForCausalLM(tiny_config(max_position_embeddings=16, rope_parameters=dict(rope))).eval()
    scaled.load_state_dict(plain.state_dict())
    ids = tokens(1, 24)
    logits = scaled(ids).logits
    assert torch.isfinite(logits).all()
    assert not torch.allclose(logits[:, -1], plain(ids).logits[:, -1], atol=1e-4)


def test_a_pad_token_that_is_also_bos_learns(tiny_config: Make) -> None:
    model = MoEForCausalLM(tiny_config(pad_token_id=1, bos_token_id=1, tie_word_embeddings=False)).train()
    assert model.model.embed_tokens.weight[1].abs().max() > 0
    ids = tokens()
    ids[:, 0] = 1
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad[1].abs().max() > 0


def test_fields_that_were_made_impossible_later_are_refused(tiny_config: Make) -> None:
    config = tiny_config()
    config.num_experts_per_tok = 99
    with pytest.raises(StrictDataclassError, match="num_experts_per_tok must be between 1 and num_experts"):
        MoEForCausalLM(config)


# --- Balancing in the forward pass ---


def test_loss_is_language_model_loss_plus_aux_loss(tiny_config: Make) -> None:
    model = MoEForCausalLM(
        tiny_config(
            router_aux_loss_coef=0.5,
            router_z_loss_coef=0.25,
            complementary_balancing_mode="sequence",
            complementary_aux_loss_coef=0.125,
        )
    ).train()
    ids = tokens()
    outputs = model(ids, labels=ids)
    torch.testing.assert_close(outputs.loss, outputs.lm_loss + outputs.aux_loss)
    terms = outputs.aux_losses
    by_hand = 0.5 * terms["load_balancing_loss"] + 0.125 * terms["complementary_loss"] + 0.25 * terms["router_z_loss"]
    torch.testing.assert_close(outputs.aux_loss.detach(), by_hand)
    without_labels = model(ids, num_items_in_batch=7)  # a loop that takes the labels away and its loss elsewhere
    assert without_labels.loss is None
    assert without_labels.aux_loss.item() > 0
    assert model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=0).loss.item() == 0


@pytest.mark.parametrize("mode", ["none", "micro_batch", "sequence", "global_batch", "loss_free"])
def test_evaluation_counts_nothing_and_adds_nothing(tiny_config: Make, mode: str) -> None:
    model = MoEForCausalLM(tiny_config(balancing_mode=mode, router_z_loss_coef=0.1)).eval()
    ids = tokens()
    outputs = model(ids, labels=ids, output_router_logits=True)
    cross_entropy = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, cross_entropy)
    assert outputs.aux_loss is None
    model.train()
    with torch.no_grad():  # generation in the middle of training
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    model.balancer.after_optimizer_step()
    assert model.balancer.metrics() == {}


def test_counts_are_of_selected_experts_without_padding(tiny_config: Make) -> None:
    model = biased(MoEForCausalLM(tiny_config(balancing_mode="loss_free", scoring_func="sigmoid"))).train()
    ids = tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:], mask[2, 1:] = 0, 0
    outputs = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), output_router_logits=True)
    model.balancer.after_optimizer_step()
    load = model.balancer.metrics()["load"]
    for layer, experts in enumerate(outputs.selected_experts):
        kept = experts[mask.flatten().bool()]
        assert load[layer].tolist() == [(kept == expert).sum().item() for expert in range(8)]
    # Not what unbiased scores would select: the bias is in the selection.
    unbiased = outputs.router_logits[0].topk(2).indices.sort(-1).values
    assert not torch.equal(unbiased, outputs.selected_experts[0].sort(-1).values)


@pytest.mark.parametrize("kind", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_counts_once_and_keeps_the_gradient(tiny_config: Make, kind: dict | None) -> None:
    def gradients(checkpointing: dict | None) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(0)
        # The balancing loss alone: cross-entropy would hide that the router got none of it.
        model = MoEForCausalLM(tiny_config(router_aux_loss_coef=1.0)).train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable(checkpointing)
        ids = tokens()
        outputs = model(ids, labels=ids, use_cache=False)
        outputs.aux_loss.backward(retain_graph=True)
        outputs.loss.backward()
        model.balancer.after_optimizer_step()
        named = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        return named, model.balancer.metrics()["load"]

    expected, load = gradients(None)
    got, load_again = gradients(kind)
    assert torch.equal(load, load_again)
    assert load.sum(-1).tolist() == [2 * 12 * 2] * 2
    assert expected["model.layers.1.mlp.gate.weight"].abs().max() > 0
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


def test_a_micro_batch_without_labels_or_tokens_has_loss_zero(tiny_config: Make) -> None:
    model = MoEForCausalLM(tiny_config()).train()
    ids = tokens()
    outputs = model(ids, labels=torch.full_like(ids, -100))
    assert outputs.lm_loss.item() == 0
    empty = model(ids, attention_mask=torch.zeros_like(ids), labels=torch.full_like(ids, -100))
    empty.loss.backward()
    assert empty.loss.item() == 0
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)


def test_a_copy_balances_its_own_biases(tiny_config: Make) -> None:
    model = MoEForCausalLM(tiny_config(balancing_mode="loss_free", bias_update_rate=0.1)).train()
    twin = copy.deepcopy(model)
    ids = tokens()
    twin(ids, labels=ids)
    twin.balancer.after_optimizer_step()
    assert twin.selection_biases()[0].abs().max() > 0
    assert model.selection_biases()[0].abs().max() == 0


def test_a_model_without_experts_trains(tiny_config: Make) -> None:
    model = MoEForCausalLM(tiny_config(first_k_dense_replace=3)).train()
    ids = tokens()
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    model.balancer.after_optimizer_step()
    assert outputs.aux_loss is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_in_half_precision(tiny_config: Make, dtype: torch.dtype) -> None:
    model = MoEForCausalLM(tiny_config()).to(dtype).train()
    ids = tokens()
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.aux_loss.dtype == torch.float32
    assert model.model.layers[1].mlp.gate.weight.grad.abs().max() > 0


def test_a_cache_given_by_the_user_is_used(tiny_config: Make) -> None:
    model = MoEForCausalLM(tiny_config()).eval()
    ids = tokens(1, 8)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    torch.testing.assert_close(
        model(ids[:, 5:], past_key_values=cache).logits, model(ids).logits[:, 5:], atol=1e-5, rtol=1e-5
    )
