"""The memory that a training step takes on one device, found without the device.

The step is run on tensors that have a shape and no data: this model, its loss, gradient checkpointing, FSDP and the
exchange of tokens between experts are the real ones, in a process group that only claims to be there. Every storage is
counted while it is alive. What DeepSpeed keeps is not run but added up, by its source.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal
from unittest.mock import patch
from weakref import finalize

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from ..configuration import MoEConfig, TrainingSettings, model_size
from ..integrations import shard, sharding_mesh
from ..modeling import MoEExperts, MoEForCausalLM

AllToAllEP: Any = None
if find_spec("transformers.distributed.expert_parallel"):  # before, it does not send tokens to experts
    AllToAllEP = import_module("transformers.distributed.expert_parallel").AllToAllEP

ZeroStage = Literal[0, 1, 2, 3]

# Depths in MoE layers that are run: a further layer adds to each stretch of the step what the last one added. The
# stretches at either end have two layers, for FSDP gathers one while it computes another.
_FEW, _MORE = 4, 5
# Elements in a bucket of gradients, and of weights that stay gathered, where DeepSpeed is told nothing.
_ZERO_BUCKET, _ZERO_GATHERED = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class StepMemory:
    """Bytes on one device at the fullest moment of a training step."""

    weights: int
    """The device's part of them, as they are kept between steps."""
    gradients: int
    """The device's part of them, all there."""
    optimizer: int
    """AdamW's moments; under DeepSpeed also the fp32 weights."""
    activations: int
    """What the forward pass has left for the backward pass, with the weights that autocast has rounded for it."""
    logits: int
    """Tensors as wide as the vocabulary: the logits of some tokens, and the head's gradient before it is added up."""
    gathered: int
    """Weights gathered from other devices; buckets that gradients are reduced in."""
    working: int
    """What the backward pass makes on its way: layers computed again, gradients not yet reduced or added."""

    @property
    def total(self) -> int:
        """All parts."""
        return sum(getattr(self, part.name) for part in fields(self))

    def fits(self, gigabytes: float) -> bool:
        """Whether a device of so many times 10^9 bytes is large enough, a tenth of it left for what is not counted."""
        return self.total <= 0.9e9 * gigabytes


def layouts(
    config: MoEConfig, training: TrainingSettings, processes: int
) -> dict[str, tuple[TrainingSettings, ZeroStage]]:
    """The ways to spread a model over so many devices, as settings and DeepSpeed's stage: those that its sizes, this
    number and this Transformers allow. A machine is taken to have 8 devices.
    """
    plain = replace(training, sharding="none", shard_size=None, expert_parallel_size=1)
    if processes == 1:
        return {"one device": (plain, 0), "one device, FSDP2": (replace(plain, sharding="fsdp"), 0)}
    found: dict[str, tuple[TrainingSettings, ZeroStage]] = {
        "DDP": (plain, 0),
        "FSDP2": (replace(plain, sharding="fsdp"), 0),
    }
    machine = min(processes, 8)
    if processes > machine and processes % machine == 0:
        found[f"HSDP, {machine} a copy"] = (replace(plain, sharding="hsdp", shard_size=machine), 0)
    if processes % machine == 0 and config.num_experts % machine == 0 and AllToAllEP is not None:
        found[f"experts on {machine}"] = (replace(plain, expert_parallel_size=machine), 0)
    if training.mixed_precision == "bf16":
        found |= {"ZeRO-1": (plain, 1), "ZeRO-2": (plain, 2), "ZeRO-3": (plain, 3)}
    return found


def step_memory(
    config: MoEConfig, block_size: int, training: TrainingSettings, processes: int, *, zero_stage: ZeroStage = 0
) -> StepMemory:
    """What a step takes on each of `processes` devices, laid out as the settings say; DDP where they say nothing.

    Taken for granted: packed documents, so that attention has a mask; gradients that are all there at the fullest
    moment, as when they are accumulated; under expert parallelism, devices that receive as many tokens as they send.
    Attention is torch's fused one; `block_causal`, which training takes on CPUs, keeps less.

    Not counted: what an allocator loses in rounding and fragments, the communication library's buffers, kernels'
    workspaces, the device's own context.

    Args:
        block_size: positions of a sequence, `T`.
        training: of it `micro_batch_size`, `mixed_precision`, `gradient_checkpointing`, `sharding`, `shard_size` (8
            where hsdp has none) and `expert_parallel_size` matter.
        zero_stage: under DeepSpeed, which keeps weights in bf16.

    Raises:
        ValueError: a size does not fit the processes, or this Transformers has no such expert parallelism.
        RuntimeError: a process group is there already.
    """
    layout = _Layout(block_size, training, processes, zero_stage)
    if config.num_moe_layers <= _MORE:
        stretches = layout.measure(config)
    else:
        few, more = (
            layout.measure(MoEConfig.from_dict(config.to_dict() | {"num_hidden_layers": depth}))
            for depth in (config.first_k_dense_replace + _FEW, config.first_k_dense_replace + _MORE)
        )
        deeper = config.num_moe_layers - _MORE
        stretches = {name: _extended(few[name], more[name], deeper) for name in few}
    fullest = max(stretches.values(), key=lambda memory: memory.total)
    return layout.complete(fullest, model_size(config).total)


def _extended(few: StepMemory, more: StepMemory, times: int) -> StepMemory:
    values = {part.name: (getattr(few, part.name), getattr(more, part.name)) for part in fields(StepMemory)}
    return StepMemory(**{name: after + times * (after - before) for name, (before, after) in values.items()})


@dataclass(frozen=True)
class _Layout:
    block_size: int
    training: TrainingSettings
    processes: int
    zero_stage: ZeroStage

    def measure(self, config: MoEConfig) -> dict[str, StepMemory]:
        """The fullest moment of each stretch of the step, in a model of few layers that is trained as the loop does;
        without what `complete` knows.
        """
        training, bf16 = self.training, self.training.mixed_precision == "bf16"
        tokens = training.micro_batch_size * self.block_size
        with ExitStack() as stack:
            meshes = self._meshes(stack)
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            live = stack.enter_context(
                _LiveStorages(
                    vocab_size=config.vocab_size,
                    exchanged=tokens * config.num_experts_per_tok // training.expert_parallel_size,
                )
            )
            stack.enter_context(live.sharding())
            with torch.device("cpu"):
                dtype = torch.bfloat16 if self.zero_stage else torch.float32
                # As on a GPU: what takes the place of this on CPUs needs less.
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="grouped_mm")
                model.train()
            if training.expert_parallel_size > 1:
                _shard_experts(model, *meshes, bf16=bf16)
            elif training.sharding != "none":
                shard(model, *meshes, bf16=bf16)
            elif bf16 and not self.zero_stage:
                forward: Any = torch.autocast("cpu", torch.bfloat16)(model.forward)
                model.forward = convert_outputs_to_fp32(forward)
            if training.gradient_checkpointing:
                model.gradient_checkpointing_enable()
            for number, layer in enumerate(model.model.layers):
                first, last = config.first_k_dense_replace, config.num_hidden_layers - 1
                stretch = "last layers" if number >= last - 1 else "first layers" if number <= first + 1 else "layers"
                layer.register_forward_hook(live.backward_reaches(stretch))
            self._step(model, live)
            weights = _local_bytes(model.parameters())
            gradients = _local_bytes(weight.grad for weight in model.parameters())
        return {
            stretch: StepMemory(
                weights=weights,
                gradients=gradients,
                optimizer=2 * weights,
                activations=alive["forward"],
                logits=alive["logits"],
                gathered=alive["gathered"],
                working=alive["backward"] - gradients,
            )
            for stretch, alive in live.fullest.items()
            if stretch != "layers"  # between what is before and what is after it
        }

    def _meshes(self, stack: ExitStack) -> list[DeviceMesh]:
        """Made before tensors lose their data: a mesh is a tensor of ranks."""
        training = self.training
        if not training.sharded:
            return []
        stack.enter_context(_claimed_processes(self.processes))
        if training.sharding == "fsdp":
            return [sharding_mesh("cpu")]
        if training.sharding == "hsdp":
            return [sharding_mesh("cpu", training.shard_size or 8)]
        size = training.expert_parallel_size
        if self.processes % size:
            raise ValueError(
                f"expert_parallel_size must divide the number of processes ({self.processes}); got {size}"
            )
        if AllToAllEP is None:
            raise ValueError(f"expert_parallel_size must be 1 with a Transformers before 5.23; got {size}")
        everyone = init_device_mesh("cpu", (self.processes, 1), mesh_dim_names=("fsdp", "tp"))
        by_expert = init_device_mesh("cpu", (self.processes // size, size), mesh_dim_names=("efsdp", "ep"))
        return [everyone["fsdp"], everyone["tp"], by_expert["efsdp"], by_expert["ep"]]

    def _step(self, model: MoEForCausalLM, live: "_LiveStorages") -> None:
        """Two micro-batches, of which the second finds gradients."""
        shape = (self.training.micro_batch_size, self.block_size)
        with torch.device("cpu"):
            ids = torch.zeros(shape, dtype=torch.long)
            positions = torch.arange(self.block_size).expand(shape)
            mask = torch.ones(shape[0], 1, self.block_size, self.block_size, dtype=torch.bool)
        for _ in range(2):
            live.fullest.clear()
            live.phase = live.stretch = "forward"
            inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "labels": ids}
            loss = model(**inputs, use_cache=False, skip_logits=True, output_token_losses=True).loss
            live.phase, live.stretch = "backward", "loss"
            loss.backward()

    def complete(self, memory: StepMemory, parameters: int) -> StepMemory:
        """With what is there once for all layers: DDP's buckets, or all that DeepSpeed keeps.

        DeepSpeed as in its 0.19.6: bf16_optimizer.py (stage 1), stage_1_and_2.py and stage3.py with
        `grad_accum_dtype: fp32`, as `configure_zero` sets it.
        """
        share, bucket = -(-parameters // self.processes), 2 * min(parameters, _ZERO_BUCKET)
        values = vars(memory)
        if self.zero_stage:
            values = values | {
                # fp32 weights and two moments
                "optimizer": 12 * share,
                "weights": 2 * (share if self.zero_stage == 3 else parameters),
                # stage 1 adds up in fp32 beside the bf16 gradients; stage 2 adds a partition to a partition
                "gradients": {1: 6 * parameters, 2: 8 * share, 3: 4 * share}[self.zero_stage],
                "gathered": {1: 0, 2: bucket, 3: bucket + 2 * min(parameters, _ZERO_GATHERED)}[self.zero_stage],
            }
        elif not self.training.sharded and self.processes > 1:
            values = values | {"gathered": 4 * parameters}
        return StepMemory(**values)


def _shard_experts(
    model: MoEForCausalLM,
    everyone: DeviceMesh,
    alone: DeviceMesh,
    copies: DeviceMesh,
    owners: DeviceMesh,
    *,
    bf16: bool,
) -> None:
    """What `integrations.shard_experts` has Transformers do, to a model whose weights are not there to be loaded."""
    policy: dict[str, Any] = {}
    if bf16:
        policy["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, MoEExperts):
            module.num_experts //= owners.size()
            for name, weight in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(weight.detach()[: module.num_experts].clone()))
            module.forward = AllToAllEP(module, owners, alone)  # type: ignore[method-assign]
            fully_shard(module, mesh=copies, **policy)
    if not model.config.tie_word_embeddings:
        fully_shard(model.model.embed_tokens, mesh=everyone, **policy)
    for layer in model.model.layers:
        fully_shard(layer, mesh=everyone, **policy)
    fully_shard(model, mesh=everyone, **policy)


def _local_bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors if t is not None)


@contextmanager
def _claimed_processes(number: int) -> Iterator[None]:
    """A process group of so many, of which this is the first and the others are not there."""
    if dist.is_initialized():
        raise RuntimeError("an estimate of a sharded layout must be made outside of a process group; got one")
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _LiveStorages(TorchDispatchMode):
    """Adds up the storages that are alive, by what they are for.

    Args:
        vocab_size: a tensor that ends in it is one of `logits`.
        exchanged: tokens that a device sends to, and receives from, other devices in a layer: the one number that
            the model asks of data.

    Attributes:
        phase: what new storages are for.
        stretch: of the step.
        fullest: bytes by what they are for, when most were alive in each stretch.
    """

    def __init__(self, *, vocab_size: int, exchanged: int) -> None:
        super().__init__()
        self._vocab_size, self._exchanged = vocab_size, exchanged
        self._storages: dict[int, tuple[int, str]] = {}
        self._alive: Counter[str] = Counter()
        self.fullest: dict[str, Counter[str]] = {}
        self.phase = self.stretch = "setting up"

    def backward_reaches(self, stretch: str) -> Callable[..., None]:
        """A forward hook of a layer: a stretch begins where the backward pass comes to the layer."""

        def begin(gradient: Tensor) -> None:
            self.stretch = stretch

        def watch(layer: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
            if outputs[0].requires_grad:
                outputs[0].register_hook(begin)

        return watch

    @contextmanager
    def sharding(self) -> Iterator[None]:
        """Inside, what FSDP gathers is counted, and it finds its ranks among tensors without data."""
        resize: Any = torch.UntypedStorage.resize_
        slice_mesh: Any = DeviceMesh.__getitem__

        def counted(storage: torch.UntypedStorage, size: int) -> None:
            # No operation that is dispatched: FSDP gives weights back, and gathers them, by their storage's size.
            resize(storage, size)
            self._count(storage, "gathered")

        def with_data(mesh: DeviceMesh, names: Any) -> DeviceMesh:
            with _disable_current_modes():
                return slice_mesh(mesh, names)

        with (
            patch.object(torch.UntypedStorage, "resize_", counted),
            patch.object(DeviceMesh, "__getitem__", with_data),
        ):
            yield

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return self._exchanged
        if function is torch.ops.aten.nonzero.default:  # of the labels: all tokens bear loss
            function, args, kwargs = torch.ops.aten.new_empty.default, (args[0], [args[0].numel(), args[0].dim()]), {}
            kwargs["dtype"] = torch.int64
        if function is torch.ops.aten._grouped_mm.default:  # its own shapes are for bf16 alone
            result = _grouped_mm_shape(*args, **(kwargs or {}))
        else:
            result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, DTensor):
                tensor = tensor.to_local()
            if isinstance(tensor, Tensor):
                logits = tensor.dim() > 1 and tensor.shape[-1] == self._vocab_size
                self._count(tensor.untyped_storage(), "logits" if logits else self.phase)
        return result

    def _count(self, storage: torch.UntypedStorage, part: str) -> None:
        key = storage._cdata
        before, known = self._storages.get(key, (0, None))
        if known is None:
            finalize(storage, self._forget, key).atexit = False
        elif storage.nbytes() == before:
            return
        elif part == "gathered":
            self._alive[known] -= before
            before = 0
        else:
            part = known
        self._storages[key] = storage.nbytes(), part
        self._alive[part] += storage.nbytes() - before
        # What was set up stays, and is counted otherwise.
        if self._alive.total() - self._alive["setting up"] > self.fullest.get(self.stretch, Counter()).total():
            self.fullest[self.stretch] = Counter(
                {part: size for part, size in self._alive.items() if part != "setting up"}
            )

    def _forget(self, key: int) -> None:
        size, part = self._storages.pop(key)
        self._alive[part] -= size


def _grouped_mm_shape(left: Tensor, right: Tensor, offs: Tensor, *_: Any, **__: Any) -> Tensor:
    """Rows in groups times a matrix each; or, for the matrices' gradients, columns in groups times rows in groups."""
    if right.dim() == 3:
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(len(offs), left.shape[0], right.shape[1])


__all__ = ["StepMemory", "ZeroStage", "layouts", "step_memory"]
