"""The model: attention, decoder layer, MoEModel and MoEForCausalLM.

`B` sequences, `T` positions, `N = B*T` tokens, `L` MoE layers, `E` experts, `K` experts per token, `D` hidden size,
`V` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeRotaryEmbedding,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..balancing.balancer import Balancer, Observation
from ..balancing.imbalance import expert_gradient_norms
from ..balancing.load import token_mask
from ..configuration.balancing_settings import BalancingSettings
from ..configuration.configuration_moe import MoEConfig
from ..configuration.remote_code import AUTO_MAP
from .adapters import biases_of_adapters, load_biases, read_adapter, return_biases
from .block_causal_attention import BLOCK_CAUSAL
from .experts import MoEExperts
from .experts_interface import NAME as EXPERTS_IMPLEMENTATION
from .fused_head import DecoderRouting, balanced
from .linear import MoELinear, MoEMLP
from .linear_cross_entropy import liger_cross_entropy, liger_is_there, linear_cross_entropy, plain_weight
from .norm import MoERMSNorm
from .rotary import rotate
from .router import KeptSelection, MoERouter

# GLM-4-MoE's parts are the general ones: any RoPE scaling, partial rotary, RMSNorm, gated MLP of any width.


class MoEAttention(nn.Module):
    """Causal grouped-query attention through Transformers' attention interface; to its functions this file adds
    `block_causal`, the faster one for training on CPUs."""

    def __init__(self, config: MoEConfig, layer_idx: int):
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        query_width = config.num_attention_heads * self.head_dim
        key_value_width = config.num_key_value_heads * self.head_dim
        self.q_proj = MoELinear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = MoELinear(config.hidden_size, key_value_width, bias=config.attention_bias)
        self.v_proj = MoELinear(config.hidden_size, key_value_width, bias=config.attention_bias)
        self.o_proj = MoELinear(query_width, config.hidden_size, bias=config.attention_bias)
        norm = (lambda: MoERMSNorm(self.head_dim, eps=config.rms_norm_eps)) if config.use_qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """`[B, T, D]` -> `[B, T, D]`, and the attention weights `[B, heads, T, S]` where the interface gives them."""
        input_shape = hidden_states.shape[:-1]
        heads = (*input_shape, -1, self.head_dim)
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device) and hidden_states.dtype == torch.float32:
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))  # once, not by each projection
        query = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)

        query, key = rotate(query, key, *position_embeddings, training=self.training)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, attention_weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), attention_weights


class MoEBlock(nn.Module):
    """Router, routed experts and shared experts."""

    def __init__(self, config: MoEConfig):
        super().__init__()
        self.gate = MoERouter(config)
        self.experts = MoEExperts(config)
        self.shared_experts = None
        if config.num_shared_experts:
            self.shared_experts = MoEMLP(config, config.num_shared_experts * config.moe_intermediate_size)

    def forward(
        self, hidden_states: Tensor, kept_selection: KeptSelection | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the output `[B, T, D]` and the routing: logits `[N, E]`, experts `[N, K]`."""
        # What the router keeps is the selection; what it returns may have been changed on the way: expert parallelism
        # of Transformers 5.17 numbers a rank's own experts from 0.
        kept_selection = KeptSelection() if kept_selection is None else kept_selection
        router_logits, weights, dispatched = self.gate(hidden_states, kept_selection)
        selected_experts = kept_selection.experts
        assert selected_experts is not None
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = self.experts(flat, dispatched, weights.to(flat.dtype)).view(hidden_states.shape)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)
        return output, router_logits, selected_experts


class MoEDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and experts (or a dense MLP), each added to the residual stream."""

    def __init__(self, config: MoEConfig, layer_idx: int):
        super().__init__()
        self.self_attn = MoEAttention(config, layer_idx)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = MoEMLP(config) if dense else MoEBlock(config)
        self.input_layernorm = MoERMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MoERMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        kept_selection: KeptSelection | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns hidden states `[B, T, D]` and the routing, logits and experts (`None, None` from a dense layer).

        The routing leaves the layer as values of a flat tuple: recomputation under gradient checkpointing counts
        nothing twice, and the reentrant kind, which sees no further than a tuple, keeps the logits' gradient.
        `kept_selection` makes it select as the forward pass did (see `MoERouter`).
        """
        residual = hidden_states
        hidden_states, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        if isinstance(self.mlp, MoEBlock):
            hidden_states, router_logits, selected_experts = self.mlp(hidden_states, kept_selection)
            return residual + hidden_states, router_logits, selected_experts
        return residual + self.mlp(hidden_states), None, None


@dataclass
class MoEModelOutput(MoeModelOutputWithPast):
    """What [`MoEModel`] returns: Transformers' output and, with `output_routing`, the routing.

    Args:
        routing: for each MoE layer, router logits `[N, E]` with their gradient and selected experts `[N, K]`.
    """

    routing: tuple[tuple[Tensor, Tensor], ...] | None = None


@dataclass
class MoECausalLMOutput(MoeCausalLMOutputWithPast):
    """What [`MoEForCausalLM`] returns: Transformers' output and the balancing terms.

    Args:
        loss: `lm_loss`, plus `aux_loss` in training; returned with labels.
        lm_loss: the language-model loss alone, detached: in nats per token, or with `num_items_in_batch` this
            micro-batch's share of it.
        aux_loss: in training, what balancing adds to the loss: terms times coefficients and shares.
        aux_losses: in training, each balancing term without coefficient, detached: `load_balancing_loss` (1 when
            balanced), `complementary_loss`, `router_z_loss`; those that act.
        logits: `[B, T, V]`, or of the positions in `logits_to_keep`; `None` where they are skipped.
        token_losses: with `output_token_losses`, each position's cross-entropy `[B, T]` in nats, detached; 0 where it
            bears none.
        router_logits: with `output_router_logits`, one `[N, E]` per MoE layer.
        selected_experts: with `output_router_logits`, one int64 `[N, K]` per MoE layer.
    """

    selected_experts: tuple[Tensor, ...] | None = None
    lm_loss: Tensor | None = None
    aux_losses: dict[str, Tensor] | None = None
    token_losses: Tensor | None = None


class MoEPreTrainedModel(PreTrainedModel):
    """Weights, loading and saving shared by the models of this family."""

    config: MoEConfig
    config_class = MoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoEDecoderLayer"]  # noqa: RUF012 - declared as plain lists and dicts by Transformers
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True  # in evaluation: in training the Balancer's counting breaks the graph
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(MoERouter, index=0),
        "hidden_states": MoEDecoderLayer,
        "attentions": MoEAttention,
    }
    # Transformers looks for `@use_experts_implementation` in this file's text only, and the experts live in another.
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config: MoEConfig, *inputs: Any, **kwargs: Any) -> None:
        super().__init__(config, *inputs, **kwargs)
        # The generic heads make their decoder through AutoModel, which does not know a configuration that came as
        # remote code.
        AutoModel.register(type(config), MoEModel, exist_ok=True)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As in Transformers, where `grouped_mm` is the default."""
        return super().get_correct_experts_implementation(requested_experts or EXPERTS_IMPLEMENTATION)

    def save_pretrained(self, *arguments: Any, **kwargs: Any) -> None:
        """As in Transformers. The code travels with the weights (`remote_code`)."""
        config, before = self.config, getattr(self.config, "auto_map", None)
        config.auto_map = dict(AUTO_MAP)
        try:
            super().save_pretrained(*arguments, **kwargs)
        finally:
            config.auto_map = before
            if before is None:
                del config.auto_map

    def load_adapter(self, peft_model_id: str | None = None, *arguments: Any, **kwargs: Any) -> Any:
        """As in Transformers. The selection bias of a router under LoRA comes with the adapter (`adapters`)."""
        loaded = super().load_adapter(peft_model_id, *arguments, **kwargs)
        state = kwargs.get("adapter_state_dict")
        if state is None:
            load_config = kwargs.get("load_config")
            asked = kwargs | getattr(load_config, "download_kwargs", {}) | (kwargs.get("adapter_kwargs") or {})
            state = read_adapter(str(peft_model_id), asked)
        load_biases(self, state)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MoERouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, MoEExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


class MoEModel(MoEPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: MoEConfig):
        super().__init__(config)
        config.validate()  # fields may have been set after the configuration was made
        if config.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be an activation that Transformers knows; got {config.hidden_act}")
        self.vocab_size = config.vocab_size
        # No padding_idx: masks keep padding out, and a pad token that is also bos must learn.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([MoEDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = MoERMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Glm4MoeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_routing: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoEModelOutput:
        """As any decoder of Transformers: `input_ids` `[B, T]` or `inputs_embeds` `[B, T, D]`, `position_ids`
        `[B, T]`, a 2-D or 4-D `attention_mask`. With `output_routing` the output also holds the routing.

        Packed documents are kept apart by `position_ids` that restart at 0, when no `attention_mask` is given. (Flash
        attention sees them so with `B = 1` only: this is Transformers' rule for every model.)

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given; got both or neither")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = positions[None] + past
        # The mask comes before a fresh cache is made: with one, Transformers looks for no packed documents.
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        routing = []
        for layer in self.layers:
            output = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                kept_selection=KeptSelection() if self.training else None,
                **kwargs,
            )
            if not isinstance(output, tuple):  # in the place of a layer that another stage of a pipeline holds
                hidden_states = output
                continue
            hidden_states, router_logits, selected_experts = output
            if output_routing and router_logits is not None:
                routing.append((router_logits, selected_experts))
        return MoEModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            routing=tuple(routing) if output_routing else None,
        )


class MoEForCausalLM(MoEPreTrainedModel, GenerationMixin):
    """A Mixture-of-Experts language model that balances its experts as its configuration says.

    Balancing acts in training with gradients, and only then: `balancer` counts the selections of each forward pass,
    and each step of an optimizer that holds its parameters closes a global batch (see [`Balancer`]). Evaluation and
    generation count nothing and add nothing.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: MoEConfig):
        super().__init__(config)
        self.model = MoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.decoder_routing: DecoderRouting | None = None
        """There once a forward with a fused LM head has taken the place of this class's."""
        self.balancer = Balancer(
            num_experts=config.num_experts,
            scoring_func=config.scoring_func,
            biases=self.selection_biases,
            trained=self.trained_routers,
            parameters=self.parameters,
            **vars(BalancingSettings.of(config)),
        )
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        # TRL's trainers put a forward of their own there.
        super().__setattr__(name, balanced(self, value) if name == "forward" else value)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: bias for name, bias in biases_of_adapters(self).items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], *args: Any) -> None:
        return_biases(state_dict)
        super()._load_from_state_dict(state_dict, *args)

    def selection_biases(self) -> list[Tensor]:
        """The routers' selection biases, fp32 `[E]` each, in layer order."""
        return [_unwrapped(block.gate).e_score_correction_bias for block in self._moe_blocks()]

    def trained_routers(self) -> list[bool]:
        """Whether each layer's router is being trained, in layer order: a frozen one is not balanced either."""
        return [any(weight.requires_grad for weight in block.gate.parameters()) for block in self._moe_blocks()]

    def expert_gradient_norms(self) -> Tensor | None:
        """Norm of the gradient that each expert's parameters hold, `[L, E]`; `None` where they hold none.

        Read it between the backward pass and `zero_grad`, on parameters that are whole (not under FSDP).
        """
        norms = []
        for block in self._moe_blocks():
            experts = _unwrapped(block.experts)
            gradients = experts.gate_up_proj.grad, experts.down_proj.grad
            if gradients[0] is None or gradients[1] is None:
                return None
            norms.append(expert_gradient_norms(*gradients))
        return torch.stack([norm.to(norms[0].device) for norm in norms]) if norms else None

    def _moe_blocks(self) -> list[MoEBlock]:
        blocks = (getattr(layer, "mlp", None) for layer in self.model.layers)
        return [block for block in blocks if isinstance(block, MoEBlock)]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        output_token_losses: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoECausalLMOutput:
        """As any causal language model of Transformers.

        Args:
            labels: int64 `[B, T]`, shifted here; -100 bears no loss.
            output_router_logits: return `router_logits` and `selected_experts`.
            num_items_in_batch: positions that bear loss in the whole global batch. Given, the losses are sums over it,
                to be added over ranks and accumulation steps; otherwise means (see `Balancer.loss`).
            skip_logits: return no logits, and where the head is a plain one make but a few at a time. `None`: as the
                configuration's `skip_logits_in_training` says, in training with labels.
            output_token_losses: return `token_losses`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds` are given; logits are to be skipped, or
                losses of tokens returned, without labels; in training, `attention_mask` has neither 2 nor 4
                dimensions, or no labels are given to balance by.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        labelled = labels is not None or kwargs.get("shift_labels") is not None
        if not labelled and (skip_logits or output_token_losses):
            name = "skip_logits" if skip_logits else "output_token_losses"
            raise ValueError(f"{name} must be False without labels; got True")
        if skip_logits is None:
            skip_logits = labelled and self.training and self.config.skip_logits_in_training
        balancing = (self.training and torch.is_grad_enabled()) or self.balancer.in_prepass
        outputs: MoEModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_routing=balancing or output_router_logits,
            **kwargs,
        )
        router_logits, selected_experts = tuple(zip(*outputs.routing, strict=True)) if outputs.routing else ((), ())
        bears_loss = self.positions_with_loss(labels, kwargs.get("shift_labels"))
        num_labels = None if bears_loss is None else bears_loss.sum()

        observed = None
        if balancing:
            observed = self.observe(outputs, attention_mask, bears_loss)

        items = None
        if num_labels is not None:
            # Divided by a count rather than averaged: a micro-batch that bears no loss has loss 0, not NaN.
            items = (num_labels if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)).clamp(min=1)
        logits, lm_loss, token_losses = self._head(
            outputs.last_hidden_state,
            labels,
            items,
            logits_to_keep=logits_to_keep,
            skip_logits=skip_logits,
            output_token_losses=output_token_losses,
            **kwargs,
        )

        loss, balancing_loss = lm_loss, None
        if observed is not None:
            # Without labels there is no share of the labels to take: the loop takes the loss elsewhere, as a mean.
            balancing_loss = self.balancer.loss(observed, None if num_labels is None else num_items_in_batch)
            if lm_loss is not None:
                loss = lm_loss + balancing_loss.total.to(lm_loss.device)
        return MoECausalLMOutput(
            loss=loss,
            lm_loss=None if lm_loss is None else lm_loss.detach(),
            aux_loss=None if balancing_loss is None else balancing_loss.total,
            aux_losses=None if balancing_loss is None else balancing_loss.terms,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=router_logits if output_router_logits else None,
            selected_experts=selected_experts if output_router_logits else None,
            token_losses=token_losses,
        )

    def _head(
        self,
        hidden_states: Tensor,
        labels: Tensor | None,
        num_items: Tensor | None,
        *,
        logits_to_keep: int | Tensor,
        skip_logits: bool,
        output_token_losses: bool,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """From hidden states `[B, T, D]`: logits, the language-model loss and each position's, as far as asked for."""
        shape, shift_labels = hidden_states.shape[:2], kwargs.get("shift_labels")
        weight = plain_weight(self.lm_head) if skip_logits and self.loss_function is ForCausalLMLoss else None
        if weight is not None:
            assert num_items is not None
            states = hidden_states.flatten(0, 1)
            targets = self.targets(labels, shift_labels).flatten().to(states.device)
            if liger_is_there(states.device) and not output_token_losses:
                return None, liger_cross_entropy(states, weight, targets, num_items), None
            lm_loss, token_losses = linear_cross_entropy(states, weight, targets, num_items=num_items)
            return None, lm_loss, token_losses.view(shape) if output_token_losses else None

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept, :])
        lm_loss = token_losses = None
        if output_token_losses:
            assert num_items is not None
            targets = self.targets(labels, shift_labels).flatten().to(logits.device)
            exact = torch.promote_types(logits.dtype, torch.float32)
            losses = nn.functional.cross_entropy(logits.to(exact).flatten(0, 1), targets, reduction="none")
            lm_loss, token_losses = losses.sum() / num_items, losses.detach().view(shape)
        elif num_items is not None:
            lm_loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.vocab_size, num_items_in_batch=num_items, **kwargs
            )
        return None if skip_logits else logits, lm_loss, token_losses

    def observe(
        self, decoded: MoEModelOutput, attention_mask: Tensor | None, bears_loss: Tensor | None
    ) -> Observation | None:
        """Hand the Balancer what the decoder routed; `None` if it has no MoE layer.

        Args:
            decoded: from the decoder, with `output_routing`.
            attention_mask: as in `forward`.
            bears_loss: boolean `[B, T]`, or `None` without labels.
        """
        if not decoded.routing:
            return None
        router_logits, selected_experts = zip(*decoded.routing, strict=True)
        batch_size, length = decoded.last_hidden_state.shape[:2]
        mask = token_mask(attention_mask, batch_size, length)
        if self.balancer.settings.balanced_positions == "labels":
            if bears_loss is None:
                raise ValueError("labels must be given when balanced_positions is labels; got none")
            mask = bears_loss if mask is None else mask & bears_loss
        return self.balancer.observe(
            router_logits,
            selected_experts,
            batch_size=batch_size,
            mask=mask,
            num_labels=0 if bears_loss is None else bears_loss.sum(),
        )

    @staticmethod
    def targets(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor:
        """What each position `[B, T]` is to predict, -100 where it bears no loss."""
        if shift_labels is not None:
            return shift_labels
        assert labels is not None
        return nn.functional.pad(labels[..., 1:], (0, 1), value=-100)

    @staticmethod
    def positions_with_loss(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
        """Which positions `[B, T]` bear loss, as the loss function will see them; `None` without labels."""
        if labels is None and shift_labels is None:
            return None
        return MoEForCausalLM.targets(labels, shift_labels).ne(-100)


class MoEForSequenceClassification(GenericForSequenceClassification, MoEPreTrainedModel):
    """The decoder with a classifier of sequences. Nothing is balanced here: only [`MoEForCausalLM`] does that."""


class MoEForTokenClassification(GenericForTokenClassification, MoEPreTrainedModel):
    """The decoder with a classifier of tokens; likewise."""


class MoEForQuestionAnswering(GenericForQuestionAnswering, MoEPreTrainedModel):
    """The decoder with a span classifier; likewise."""


def _unwrapped(module: nn.Module) -> Any:
    """The module itself, where PEFT has put a wrapper for adapters of its parameters in its place."""
    unwrap: Any = getattr(module, "get_base_layer", None)
    return module if unwrap is None else unwrap()


__all__ = [
    "BLOCK_CAUSAL",
    "MoEForCausalLM",
    "MoEForQuestionAnswering",
    "MoEForSequenceClassification",
    "MoEForTokenClassification",
    "MoEModel",
    "MoEPreTrainedModel",
]
