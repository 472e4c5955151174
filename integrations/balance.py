"""balance: the balancing of this package on a stock model of Transformers, whatever loop trains it.

`B` sequences, `T` positions, `N = B*T` tokens, `L` MoE layers, `E` experts.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..balancing import Balancer, Observation
from ..balancing.load import token_mask
from ..configuration.balancing_settings import BalancingMode
from .optimizer_steps import follow
from .parallelism import data_parallel_group
from .stock_routers import (
    Routing,
    RoutingRecorder,
    causal_language_model,
    copy_with_model,
    remove_hooks,
    resolve,
    unwrapped,
)


def balance(
    model: nn.Module,
    balancing_mode: BalancingMode = "global_batch",
    *,
    optimizer: Any = None,
    process_group: dist.ProcessGroup | None = None,
    **settings: Any,
) -> "StockBalancer":
    """Balance the experts of a stock model: one line, before or after anything wraps it, for any loop.

    From then on, in training, the model's own auxiliary loss is off and the balancing loss is in `outputs.loss`, at
    the scale of the loop that asks for it (see `Balancer.loss`), and by itself in `outputs.aux_loss`; in `loss_free`,
    the routers' correction biases move at each optimizer step. Evaluation counts nothing and adds nothing. A frozen
    router is not balanced.

    Args:
        model: a causal language model of Transformers with routers (`find_routers`), vision-language models among
            them; or DDP, FSDP, PEFT or `torch.compile` around one. `docs/stock_models.md` lists the families.
        balancing_mode: as in `MoEConfig`.
        optimizer: followed by its own step hook. Not needed: torch tells of the step of any optimizer that holds
            parameters of the model. DeepSpeed's is refused with what to do instead.
        process_group: the ranks whose tokens differ; `None`: those of the mesh with which the model was loaded, or
            all.
        **settings: the other balancing fields of `MoEConfig`.

    Returns:
        The model's balancer, also there as `model.balancer`; `detach()` undoes everything.

    Raises:
        ValueError: a setting that cannot be; a model without routers, or that balances itself already; `loss_free`
            for routers without a correction bias.
        TypeError: an optimizer that cannot be followed.
    """
    return StockBalancer(model, balancing_mode, optimizer=optimizer, process_group=process_group, **settings)


@dataclass
class ForwardPass:
    """A forward pass of the model under way."""

    routing: Routing
    balancing: bool
    """Whether it is in training with gradients, or counted beforehand; otherwise only router logits were asked for."""
    batch: dict[str, Any]
    """The arguments of the model's forward, by name."""
    wants_router_logits: bool
    deferred: dict[int, Tensor] = field(default_factory=dict)
    """By layer, a leaf in the place of logits that reentrant checkpointing computes without gradient: the balancing
    loss leaves its gradient there, and it goes on from the logits when they are computed again."""
    checkpointed: set[int] = field(default_factory=set)
    """Layers that ran under reentrant checkpointing."""
    gone_by: set[int] = field(default_factory=set)
    """Of these, the layers whose backward pass found no gradient at the leaf."""
    observed: Observation | None = None


class StockBalancer(Balancer):
    """The balancer of a stock model: hooks that watch its routers, and the loss and the biases of a `Balancer`.

    Args: as for `balance`.
    """

    def __init__(
        self,
        model: nn.Module,
        balancing_mode: BalancingMode = "global_batch",
        *,
        optimizer: Any = None,
        process_group: dist.ProcessGroup | None = None,
        **settings: Any,
    ) -> None:
        self.model: Any = causal_language_model(model)
        name = type(self.model).__name__
        if getattr(self.model, "balancer", None) is not None:
            raise ValueError(f"model must not have a balancer yet: detach() it first; got {name} with one")
        self._arguments = list(inspect.signature(type(self.model).forward).parameters)[1:]
        if "labels" not in self._arguments:
            raise ValueError(f"model must make a loss of labels, as a causal language model does; got {name}")
        self.recorder = RoutingRecorder(model)
        routers = self.recorder.routers
        schedule = settings.get("balancing_schedule") or []
        loss_free = "loss_free" in [balancing_mode, *(change.get("balancing_mode") for change in schedule)]
        has_biases = all(router.bias is not None for router in routers)
        if loss_free and not has_biases:
            raise ValueError(
                f"balancing_mode loss_free needs routers with a correction bias, which {routers[0].kind} has not: use "
                "global_batch, or convert the model to one that has with scripts/convert.py; got loss_free"
            )
        if settings.get("bias_update_rule") == "quantile" and not all(router.scores_take_bias for router in routers):
            raise ValueError(
                "bias_update_rule must not be quantile where experts are selected by something else than the largest "
                f"sums of score and bias (groups, a bias on logits); got quantile for {routers[0].kind}"
            )
        if not all(router.as_logits is None for router in routers) and (
            settings.get("router_z_loss_coef") or any(change.get("router_z_loss_coef") for change in schedule)
        ):
            raise ValueError(
                f"router_z_loss_coef must be 0 for {routers[0].kind}, which does not show its logits; got "
                f"{settings.get('router_z_loss_coef')}"
            )
        if process_group is None:
            process_group = data_parallel_group(self.model)
        super().__init__(
            balancing_mode,
            num_experts=routers[0].num_experts,
            scoring_func=routers[0].scoring_func,
            biases=self.selection_biases if has_biases else None,
            trained=self.trained_routers,
            parameters=self._model_parameters,
            process_group=process_group,
            **settings,
        )
        self._forward: ForwardPass | None = None
        self._checkpointing = [module for module in self.model.modules() if hasattr(module, "gradient_checkpointing")]
        if has_biases:
            self.selection_biases()  # made fp32 now, before an optimizer or a sharding meets them
        self._hooks = [_Before(self), _After(self), _AfterDecoder(self)]
        before, after, after_decoder = self._hooks
        self._following = None if optimizer is None else follow(self, optimizer)
        self.model.register_forward_pre_hook(before, with_kwargs=True)
        self.model.register_forward_hook(after)
        self.model.get_decoder().register_forward_hook(after_decoder)
        # PEFT calls the model's forward past its hooks.
        self._replaced_forward = vars(self.model).get("forward")
        self.model.forward = MethodType(_balanced_forward(self.model), self.model)
        self.recorder.install()
        self.model.balancer = self

    def detach(self) -> None:
        """Take the balancing off: hooks and forward are as they were before. The biases keep what they have learnt."""
        if getattr(self.model, "balancer", None) is not self:
            return
        self._forward = None
        self.recorder.remove()
        for module in (self.model, self.model.get_decoder()):
            remove_hooks(module, self._hooks)
        for module in self._checkpointing:
            tagged = vars(module).get("_gradient_checkpointing_func")
            if isinstance(tagged, _Checkpoint) and tagged.balancer is self:
                module._gradient_checkpointing_func = tagged.function
        # Where another has wrapped it, it stays, and does nothing.
        forward = getattr(vars(self.model).get("forward"), "__func__", None)
        if forward is not None and getattr(forward, "balanced_forward", None) is forward:
            del self.model.forward
            if self._replaced_forward is not None:
                self.model.forward = self._replaced_forward
        if self._following is not None:
            self._following.remove()
        del self.model.balancer

    @property
    def attached(self) -> bool:
        """Whether the model is being balanced."""
        return getattr(self.model, "balancer", None) is self

    def _model_parameters(self) -> Iterator[Tensor]:
        return self.model.parameters() if self.attached else iter(())

    def trained_routers(self) -> list[bool]:
        """Whether each layer's router is being trained, in layer order."""
        return [
            any(weight.requires_grad for weight in resolve(self.model, router.path).parameters())
            for router in self.recorder.routers
        ]

    def selection_biases(self) -> list[Tensor]:
        """The routers' correction biases, fp32 `[E]` each, in layer order.

        In bf16 a bias of 0.5 does not see an update of 0.001: one that is not fp32 is made so where it is.
        """
        return [_whole(bias).view(-1) for bias in self._biases_in_place()]

    @torch.no_grad()
    def _biases_in_place(self) -> list[Tensor]:
        biases = []
        for router in self.recorder.routers:
            assert router.bias is not None
            path, name = router.bias
            holder: Any = unwrapped(resolve(self.model, path))
            bias = getattr(holder, name)
            if bias.dtype != torch.float32 and not bias.is_meta:
                if isinstance(bias, DTensor):
                    raise ValueError(f"{path}.{name} must be fp32 before the model is sharded; got {bias.dtype}")
                if isinstance(bias, nn.Parameter):
                    bias.data = bias.data.float()
                else:
                    setattr(holder, name, bias.float())
                    bias = getattr(holder, name)
            biases.append(bias)
        return biases

    def _move_biases(self, load: Tensor, gathered: Tensor | None) -> None:
        biases = self._biases_in_place()
        if not any(isinstance(bias, DTensor) for bias in biases):
            super()._move_biases(load, gathered)
            return
        # A sharded parameter: the whole is moved on every rank, which keeps its part.
        wholes = [_whole(bias).view(-1) for bias in biases]
        given, self._biases = self._biases, lambda: wholes
        try:
            super()._move_biases(load, gathered)
        finally:
            self._biases = given
        for bias, moved in zip(biases, wholes, strict=True):
            if isinstance(bias, DTensor):
                bias.copy_(distribute_tensor(moved.view(bias.shape), bias.device_mesh, bias.placements))

    # A forward pass, in the order in which it happens.

    @torch.compiler.disable
    def begin(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A forward pass of the model begins; returns the keyword arguments that it is to have."""
        self._forward = self.recorder.routing = None  # a forward pass that failed may have left its own
        wanted: Any = False
        if "output_router_logits" in self._arguments:
            # With it the model would compute its own auxiliary loss.
            wanted = kwargs.get("output_router_logits")
            if wanted is None:
                wanted = _outputs_router_logits(self.model.config)
            kwargs = kwargs | {"output_router_logits": False}
        balancing = (self.model.training and torch.is_grad_enabled()) or self.in_prepass
        if balancing or wanted:
            if balancing and self._biases is not None:
                self._biases_in_place()
            batch = dict(zip(self._arguments, args, strict=False)) | kwargs
            self._forward = ForwardPass(self.recorder.blank(), balancing, batch, bool(wanted))
            self.recorder.install()
            self.recorder.routing = self._forward.routing
            for module in self._checkpointing:
                self._tag_checkpointing(module)
        return kwargs

    def _tag_checkpointing(self, module: Any) -> None:
        function = vars(module).get("_gradient_checkpointing_func")
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant"):
            module._gradient_checkpointing_func = _Checkpoint(self, function)

    @torch.compiler.disable
    def decoded(self) -> None:
        """The last router has run: the ranks' counts are added up while the head computes."""
        forward = self._forward
        if forward is not None and forward.balancing and forward.observed is None:
            self._observe(forward)

    def _observe(self, forward: ForwardPass) -> None:
        tokens = forward.batch.get("input_ids")
        if tokens is None:
            tokens = forward.batch["inputs_embeds"]
        batch_size, length = tokens.shape[:2]
        router_logits, selected_experts = forward.routing.layers(batch_size * length)
        if torch.is_grad_enabled():
            trained = self.trained_routers()
            for layer, logits in enumerate(router_logits):
                if logits.requires_grad or not trained[layer]:
                    continue
                if layer not in forward.checkpointed:
                    raise RuntimeError(
                        "router logits must have a gradient: reentrant checkpointing must be Transformers' own "
                        f"(gradient_checkpointing_enable); got none in {self.recorder.routers[layer].path}"
                    )
                router_logits[layer] = forward.deferred[layer] = logits.detach().requires_grad_()
                router_logits[layer].register_hook(functools.partial(_refuse_late, forward.gone_by, layer))
        attention_mask = forward.batch.get("attention_mask")
        if isinstance(attention_mask, dict):
            attention_mask = attention_mask.get("full_attention")
        mask = token_mask(attention_mask, batch_size, length)
        bears_loss = positions_with_loss(forward.batch)
        if self.settings.balanced_positions == "labels":
            if bears_loss is None:
                raise ValueError("labels must be given when balanced_positions is labels; got none")
            mask = bears_loss if mask is None else mask & bears_loss
        forward.observed = self.observe(
            router_logits,
            selected_experts,
            batch_size=batch_size,
            mask=mask,
            num_labels=0 if bears_loss is None else bears_loss.sum(),
        )

    @torch.compiler.disable
    def end(self, outputs: Any) -> Any:
        """The forward pass is over: its outputs, with the balancing loss."""
        forward, self._forward = self._forward, None
        self.recorder.routing = None
        if forward is None:
            return outputs
        if forward.wants_router_logits and not isinstance(outputs, tuple):
            outputs.router_logits = tuple(forward.routing.logits[layer] for layer in sorted(forward.routing.logits))
        if not forward.balancing:
            return outputs
        if forward.observed is None:
            self._observe(forward)
        assert forward.observed is not None
        bears_loss = positions_with_loss(forward.batch)
        items = None if bears_loss is None else forward.batch.get("num_items_in_batch")
        added = self.loss(forward.observed, items)
        if isinstance(outputs, tuple):
            if bears_loss is not None and not self.in_prepass:
                outputs = (outputs[0] + added.total.to(outputs[0].device), *outputs[1:])
            return outputs
        if outputs.get("loss") is not None and not self.in_prepass:
            outputs.loss = outputs.loss + added.total.to(outputs.loss.device)
        outputs.aux_loss, outputs.aux_losses = added.total, added.terms
        return outputs

    @contextmanager
    def _recording(self, routing: Routing) -> Iterator[None]:
        before, self.recorder.routing = self.recorder.routing, routing
        try:
            yield
        finally:
            self.recorder.routing = before


def positions_with_loss(batch: dict[str, Any]) -> Tensor | None:
    """Which positions `[B, T]` bear loss, as Transformers' loss functions see them; `None` without labels."""
    if batch.get("shift_labels") is not None:
        return batch["shift_labels"].ne(-100)
    if batch.get("labels") is None:
        return None
    return nn.functional.pad(batch["labels"][..., 1:].ne(-100), (0, 1))


def _outputs_router_logits(config: Any) -> bool:
    """Whether a configuration, or that of its language part, asks for router logits."""
    return any(getattr(each, "output_router_logits", False) for each in (config, config.get_text_config(decoder=True)))


def _whole(bias: Tensor) -> Tensor:
    return bias.full_tensor() if isinstance(bias, DTensor) else bias


class _Part:
    """Something of a balancer's that sits in the model: an object, so that it can be found again, and copied with the
    model."""

    def __init__(self, balancer: StockBalancer) -> None:
        self.balancer = balancer

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy_with_model(self, self.balancer.model, memo)


class _Before(_Part):
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, self.balancer.begin(args, kwargs)


class _AfterDecoder(_Part):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.balancer.decoded()


class _After(_Part):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.balancer.end(output)


def _balanced_forward(model: Any) -> Callable:
    """The model's forward, for who calls it past the hooks. A plain function, to be bound as a method, as compilers
    expect and others who wrap or unwrap it; its balancer is that of the model, which may be a copy."""
    before = model.forward
    function = before.__func__ if isinstance(before, MethodType) else _as_method(before)

    @functools.wraps(function)
    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        balancer = getattr(model, "balancer", None)
        if balancer is None:
            return function(model, *args, **kwargs)
        if balancer._forward is not None:
            try:
                return function(model, *args, **kwargs)
            except BaseException:
                balancer._forward = None
                raise
        try:
            kwargs = balancer.begin(args, kwargs)
            return balancer.end(function(model, *args, **kwargs))
        finally:
            balancer._forward = balancer.recorder.routing = None

    forward.balanced_forward = forward  # type: ignore[attr-defined] # not of a wrapper that has copied its attributes
    return forward


def _as_method(function: Callable) -> Callable:
    def method(model: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    functools.update_wrapper(method, function)
    signature = inspect.signature(function)
    model = inspect.Parameter("model", inspect.Parameter.POSITIONAL_ONLY)
    with_model = signature.replace(parameters=[model, *signature.parameters.values()])
    method.__signature__ = with_model  # type: ignore[attr-defined]
    return method


class _Checkpoint(_Part):
    """Reentrant checkpointing of a layer: the balancing loss reaches its router when the layer is computed again."""

    def __init__(self, balancer: StockBalancer, function: functools.partial) -> None:
        super().__init__(balancer)
        self.function = function

    def __call__(self, layer: Callable, *args: Any) -> Any:
        balancer, forward = self.balancer, self.balancer._forward
        if forward is None:
            return self.function(layer, *args)

        def run(*inputs: Any) -> Any:
            if not torch.is_grad_enabled():
                known = set(forward.routing.logits)
                output = layer(*inputs)
                forward.checkpointed |= set(forward.routing.logits) - known
                return output
            again = balancer.recorder.blank()
            with balancer._recording(again):
                output = layer(*inputs)
            deferred = [number for number in again.logits if number in forward.deferred]
            if not deferred:
                return output
            first = output[0] if isinstance(output, tuple) else output
            first = _GoOn.apply(first, forward, deferred, *[again.logits[number] for number in deferred])
            return (first, *output[1:]) if isinstance(output, tuple) else first

        return self.function(run, *args)


class _GoOn(torch.autograd.Function):
    """The identity of a layer's output. Backwards, the gradients that arrived at the leaves go on from the logits.

    They have arrived: of what is ready, autograd takes what was computed last first, and the balancing loss is
    computed after every layer.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, forward: ForwardPass, layers: list[int], *logits: Tensor) -> Tensor:
        ctx.forward_pass, ctx.layers = forward, layers
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradients = []
        for layer in ctx.layers:
            leaf = ctx.forward_pass.deferred[layer]
            gradients.append(leaf.grad)
            if leaf.grad is None:
                ctx.forward_pass.gone_by.add(layer)
            leaf.grad = None
        return (gradient, None, None, *gradients)


def _refuse_late(gone_by: set[int], layer: int, gradient: Tensor) -> None:
    """Raises RuntimeError where the order that `_GoOn` relies on was not kept: the gradient would be lost."""
    if layer in gone_by:
        raise RuntimeError(
            "the balancing loss must be back-propagated with the model's loss, or before it, under reentrant "
            "checkpointing; got it afterwards. Use checkpointing with use_reentrant=False."
        )


__all__ = ["StockBalancer", "balance"]
