"""The experts implementation `equipoise`: equal to a loop over experts, for any shape, type and part of it.

`N` tokens, `E` experts, `K` experts per token, `D` hidden size, `F` expert width.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DeepseekV3Config, OlmoeConfig, Qwen3MoeConfig
from transformers.integrations import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.modeling import MoEExperts, expert_products
from equipoise.modeling.matrix_products import product

Make = Callable[..., MoEConfig]
TYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
PARTS = ("hidden", "weights", "gate_up", "down")


def experts_layer(
    num_experts: int, hidden_size: int, width: int, dtype: torch.dtype = torch.float64, **changes: Any
) -> MoEExperts:
    sizes = {"hidden_size": hidden_size, "num_attention_heads": 1, "head_dim": 2, "num_experts_per_tok": 1}
    layer = MoEExperts(MoEConfig(**sizes, num_experts=num_experts, moe_intermediate_size=width, **changes))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=hidden_size**-0.5)
    return layer.to(dtype)


def routed(num_tokens: int, top_k: int, layer: Any, dtype: torch.dtype, held: int = 0) -> list[Tensor]:
    """Hidden states, selected experts and their weights; experts from `held` on, where above 0, are elsewhere."""
    hidden = torch.randn(num_tokens, layer.down_proj.shape[2 if layer.is_transposed else 1])
    # Some experts are selected often, some never.
    scores = torch.rand(num_tokens, layer.num_experts) + torch.rand(layer.num_experts)
    weights, experts = scores.topk(top_k)
    if held:
        elsewhere = experts >= held
        experts, weights = experts.masked_fill(elsewhere, layer.num_experts), weights.masked_fill(elsewhere, 0.0)
    return [hidden.to(dtype), experts, weights.to(dtype)]


def computed(layer: Any, implementation: str, routing: list[Tensor], needed: tuple[str, ...] = PARTS) -> list[Tensor]:
    """Output and gradients, in double."""
    hidden, experts, weights = routing
    hidden, weights = hidden.clone(), weights.clone()
    parts = dict(zip(PARTS, (hidden, weights, getattr(layer, "gate_up_proj", None), layer.down_proj), strict=True))
    layer.config._experts_implementation = implementation
    for name, part in parts.items():
        if part is not None:
            part.requires_grad_(name in needed)
    output = layer(hidden, experts, weights)
    # The loop leaves what no token reaches out of the graph.
    reached = functional(output) + sum(0 * parts[name].double().sum() for name in needed)
    gradients = torch.autograd.grad(reached, [parts[name] for name in needed])
    assert all(gradient.dtype == parts[name].dtype for name, gradient in zip(needed, gradients, strict=True))
    assert output.dtype == hidden.dtype
    return [tensor.double() for tensor in (output.detach(), *gradients)]


def functional(output: Tensor) -> Tensor:
    """A scalar whose gradient is not the same for any two numbers."""
    return (output.double() * torch.arange(output.numel()).view_as(output).cos()).sum()


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = max(other.abs().max().item(), 1e-3) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


DECODED = {"hidden_size": 32, "width": 16, "block": 512, "needed": {"hidden"}, "elsewhere": True}


# As in decoding: one token, and in bf16 about as many as experts.
@example(num_tokens=1, num_experts=4, top_k=2, dtype=torch.float32, **DECODED)
@example(num_tokens=1, num_experts=4, top_k=4, dtype=torch.bfloat16, **DECODED)
@example(num_tokens=12, num_experts=6, top_k=3, dtype=torch.bfloat16, **DECODED)
@settings(max_examples=80)
@given(
    num_tokens=st.integers(1, 90),
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    hidden_size=st.integers(1, 37).map(lambda size: 2 * size) | st.sampled_from([16, 32]),
    width=st.integers(1, 40) | st.sampled_from([16, 32]),
    dtype=st.sampled_from(list(TYPES)),
    block=st.sampled_from([16, 32, 512]),
    elsewhere=st.booleans(),
    needed=st.sets(st.sampled_from(PARTS), min_size=1),
)
def test_any_shape_equals_the_loop_over_experts(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    width: int,
    dtype: torch.dtype,
    block: int,
    elsewhere: bool,
    needed: set[str],
) -> None:
    """Against the loop in double on the same rounded numbers: experts without tokens, with one, with several blocks;
    selections held elsewhere; gradients of what needs them."""
    torch.manual_seed(num_tokens)
    layer = experts_layer(num_experts, hidden_size, width, dtype)
    held = (num_experts + 1) // 2 if elsewhere else 0
    routing = routed(num_tokens, min(top_k, num_experts), layer, dtype, held)
    exact = copy.deepcopy(layer).double()
    wanted = tuple(part for part in PARTS if part in needed)
    expected = computed(exact, "eager", [routing[0].double(), routing[1], routing[2].double()], wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_products, "BLOCK", block)
        close(computed(layer, "equipoise", routing, wanted), expected, TYPES[dtype])
        with torch.no_grad():
            for mode in (layer.train(), layer.eval()):
                close([mode(*routing).double()], expected[:1], TYPES[dtype])


@pytest.mark.parametrize("held", [0, 1])
def test_without_a_token_every_gradient_is_zero(held: int) -> None:
    """None came to this rank, or none of them selected an expert that it holds."""
    layer = experts_layer(3, 8, 4)
    hidden, experts, weights = routed(5 * held, 2, layer, torch.float64)
    output, *gradients = computed(layer, "equipoise", [hidden, torch.full_like(experts, 3), weights])
    assert output.shape == hidden.shape
    with torch.no_grad():
        decoded = layer.eval()(hidden[:1], torch.full_like(experts[:1], 3), weights[:1])
    for tensor in (output, decoded, *gradients):
        assert torch.count_nonzero(tensor) == 0


@settings(max_examples=40)
@given(
    sizes=st.tuples(*[st.integers(1, 70)] * 3),
    dtype=st.sampled_from(list(TYPES)),
    turned=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_a_product_is_exact_to_its_type(
    sizes: tuple[int, int, int], dtype: torch.dtype, turned: tuple[bool, bool, bool]
) -> None:
    """Whichever library computes it, and however the matrices lie."""
    m, k, n = sizes
    a, b, out = (
        torch.randn(size[::-1]).to(dtype).T if transposed else torch.randn(size).to(dtype)
        for size, transposed in zip(((m, k), (k, n), (m, n)), turned, strict=True)
    )
    expected = [a.double() @ b.double()]
    close([product(a, b).double()], expected, TYPES[dtype])
    assert product(a, b, out=out) is out
    close([out.double()], expected, TYPES[dtype])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_each_time(threads: int) -> None:
    """And without gradients: the routing of a prepass, or of reentrant checkpointing, is that of the step."""
    layer = experts_layer(8, 64, 48, torch.float32)
    routing = routed(600, 4, layer, torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, second = (computed(layer, "equipoise", routing) for _ in range(2))
        with torch.no_grad():
            assert torch.equal(layer(*routing).double(), first[0])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_only_the_projections_are_kept() -> None:
    """One tensor of `[N * K, 2F]`, and indices: the peer keeps as much again for each step from input to output."""
    layer = experts_layer(8, 64, 32, torch.float32)
    hidden, experts, weights = routed(256, 4, layer, torch.float32)
    hidden.requires_grad_()
    weights.requires_grad_()
    given = {tensor.data_ptr() for tensor in (hidden, experts, weights, *layer.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    layer.config._experts_implementation = "equipoise"
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden, experts, weights).sum()
    extra = sum(size for pointer, size in kept.items() if pointer not in given)
    projections, indices = 4 * (256 * 4 + expert_products.ROWS) * 2 * 32, 8 * (256 * 4 + 8)
    assert extra <= projections + indices


@pytest.mark.parametrize("hidden_act", ["silu", "gelu"])
def test_autocast_computes_in_its_type(hidden_act: str) -> None:
    """torch's grouped products know nothing of autocast, and would compute in fp32 at half the speed."""
    layer = experts_layer(4, 32, 16, torch.float32, hidden_act=hidden_act)
    hidden, experts, weights = routed(70, 2, layer, torch.float32)
    layer.config._experts_implementation = "equipoise"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(hidden, experts, weights)
        with torch.no_grad():
            decoded = copy.deepcopy(layer).eval()(hidden, experts, weights)
    assert found.dtype == decoded.dtype == torch.float32
    rounded = copy.deepcopy(layer).bfloat16()
    in_bf16 = rounded(hidden.bfloat16(), experts, weights if hidden_act == "silu" else weights.bfloat16()).float()
    exact = layer(hidden, experts, weights)
    for output in (found, decoded):
        torch.testing.assert_close(output, in_bf16, rtol=2e-2, atol=2e-2 * exact.abs().max().item())
        difference = (output - exact).abs().max()
        assert difference > 1e-3 * exact.abs().max()  # of fp32 it would be 1e-6


@pytest.mark.parametrize("needed", [PARTS, ("gate_up",)])
def test_autocast_has_the_gradients_of_its_type(needed: tuple[str, ...]) -> None:
    layer = experts_layer(4, 32, 16, torch.float32)
    routing = routed(200, 2, layer, torch.float32)
    expected = computed(layer, "eager", routing, needed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(computed(layer, "equipoise", routing, needed), expected, 3e-2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    layer = experts_layer(4, 32, 16, torch.float64)
    routing = routed(90, 2, layer, torch.float64)
    expected = computed(layer, "eager", routing)
    hidden, weights = routing[0].requires_grad_(), routing[2].requires_grad_()
    layer.config._experts_implementation = "equipoise"
    output = checkpoint(layer, hidden, routing[1], weights, use_reentrant=reentrant)
    functional(output).backward()
    gradients = [tensor.grad for tensor in (hidden, weights, layer.gate_up_proj, layer.down_proj)]
    close([output.detach(), *gradients], expected, 1e-12)


def test_one_graph_under_torch_compile() -> None:
    """Training and evaluation, with another number of tokens too."""
    torch.compiler.reset()
    layer = experts_layer(4, 32, 16, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (40, 90):
        routing = routed(num_tokens, 2, layer, torch.float32)
        expected = computed(layer, "eager", routing)
        layer.config._experts_implementation = "equipoise"
        hidden, weights = routing[0].requires_grad_(), routing[2].requires_grad_()
        output = compiled(hidden, routing[1], weights)
        gradients = torch.autograd.grad(functional(output), [hidden, weights, layer.gate_up_proj, layer.down_proj])
        close([output.detach().double(), *(gradient.double() for gradient in gradients)], expected, 1e-5)
        with torch.no_grad():
            close([compiled(*routing).double()], expected[:1], 1e-5)


@torch.no_grad()
def test_other_activations_evaluate_in_one_graph() -> None:
    torch.compiler.reset()
    layer = experts_layer(4, 32, 16, torch.float32, hidden_act="gelu").eval()
    routing = routed(40, 2, layer, torch.float32)
    layer.config._experts_implementation = "eager"
    expected = layer(*routing)
    layer.config._experts_implementation = "equipoise"
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(*routing), expected)


def test_a_second_derivative_is_refused() -> None:
    """It would otherwise be 0, without a word."""
    layer = experts_layer(4, 8, 4)
    hidden, experts, weights = routed(9, 2, layer, torch.float64)
    layer.config._experts_implementation = "equipoise"
    (gradient,) = torch.autograd.grad(
        layer(hidden.requires_grad_(), experts, weights).sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


@use_experts_implementation(is_transposed=True)
class TransposedExperts(nn.Module):
    """As Aria's in Transformers 5.23; in 5.17 those have no interface."""

    def __init__(self, config: Any):
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = nn.Parameter(torch.empty(4, config.hidden_size, 2 * config.intermediate_size))
        self.down_proj = nn.Parameter(torch.empty(4, config.intermediate_size, config.hidden_size))
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("nd,edf->enf", hidden, self.gate_up_proj).chunk(2, dim=-1)
        outputs = torch.einsum("enf,efd->ned", self.act_fn(gate) * up, self.down_proj)
        return (outputs.gather(1, experts[..., None].expand(-1, -1, outputs.shape[-1])) * weights[..., None]).sum(1)


SIZES = {"hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16}
OTHERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "gated": (MixtralExperts, {"num_local_experts": 4, "hidden_act": "silu"}),
    "gated by another": (MixtralExperts, {"num_local_experts": 4, "hidden_act": "gelu"}),
    "transposed": (TransposedExperts, {}),
    "interleaved, with biases": (GptOssExperts, {"num_local_experts": 4, "swiglu_alpha": 1.7, "swiglu_limit": 2.0}),
    "ungated": (NemotronHExperts, {"n_routed_experts": 4, "moe_latent_size": None, "mlp_hidden_act": "relu2"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [16, 6])
@pytest.mark.parametrize("name", OTHERS)
def test_other_experts_modules_equal_their_own_loop(name: str, width: int, dtype: torch.dtype) -> None:
    """Those that `grouped_mm` does not take, too: double, and rows that are no multiple of 16 bytes."""
    make, fields = OTHERS[name]
    widths = {"intermediate_size": width, "moe_intermediate_size": width}
    layer: Any = make(SimpleNamespace(**SIZES | fields | widths, _experts_implementation="eager"))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    layer = layer.to(dtype)
    routing = routed(60, 2, layer, dtype)
    needed = ("hidden", "weights", "down") if name == "ungated" else PARTS
    close(computed(layer, "equipoise", routing, needed), computed(layer, "eager", routing, needed), 1e-5)


COMMON = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
STOCK = {
    "Qwen3-MoE": Qwen3MoeConfig(**COMMON, num_experts=8, moe_intermediate_size=12, head_dim=8, num_key_value_heads=2),
    "OLMoE": OlmoeConfig(**COMMON, num_experts=8, intermediate_size=12),
    "DeepSeek-V3": DeepseekV3Config(
        **COMMON, **{"n_routed_experts": 8, "moe_intermediate_size": 12, "first_k_dense_replace": 1, "n_group": 1},
        **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        topk_group=1, intermediate_size=24, num_key_value_heads=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STOCK)
def test_stock_models_have_the_same_logits_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(STOCK[name], experts_implementation="equipoise").double()
    assert model.config._experts_implementation == "equipoise"
    ids, found = torch.randint(64, (2, 48)), {}
    for implementation in ("equipoise", "eager"):
        model.set_experts_implementation(implementation)
        output = model(ids, labels=ids)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found[implementation] = [output.logits.detach(), *torch.autograd.grad(output.loss, trained)]
    close(found["equipoise"], found["eager"], 1e-9)


def test_it_is_the_default_and_no_more(tiny_config: Make, tmp_path: Path) -> None:
    """Asking for another is heard, at each place where Transformers takes it; configurations on disk say nothing."""
    model = MoEForCausalLM(tiny_config())
    assert model.config._experts_implementation == "equipoise"
    model.save_pretrained(tmp_path)
    assert "experts_implementation" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert MoEForCausalLM.from_pretrained(tmp_path).config._experts_implementation == "equipoise"
    for name in ("eager", "grouped_mm"):
        loaded = MoEForCausalLM.from_pretrained(tmp_path, experts_implementation=name)
        assert loaded.config._experts_implementation == name
        assert MoEForCausalLM(tiny_config(experts_implementation=name)).config._experts_implementation == name


def test_lora_on_experts_has_the_same_gradients(tiny_config: Make) -> None:
    """The matrices are then sums, made anew at each forward pass; the experts' own are frozen."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], target_modules=[]
    )
    model = get_peft_model(MoEForCausalLM(tiny_config(balancing_mode="none")).double(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    ids, found = torch.randint(2, 64, (2, 24)), {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for implementation in ("eager", "equipoise"):
        model.base_model.model.set_experts_implementation(implementation)
        found[implementation] = [*torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained)]
    assert trained
    close(found["equipoise"], found["eager"], 1e-9)
