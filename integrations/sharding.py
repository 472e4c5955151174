"""FSDP2 and HSDP by torch's own `fully_shard`, which works wherever torch has a process group.

Accelerate's FSDP2 is for accelerators only: on CPUs it gives DDP without a word.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel


def sharding_mesh(device_type: str, shard_size: int | None = None) -> DeviceMesh:
    """The processes as FSDP2 spreads a model over them.

    Args:
        device_type: `cpu`, `cuda`, ...
        shard_size: processes in a group that holds the model once (HSDP); `None`: all of them (FSDP).

    Raises:
        ValueError: there is no process group, or `shard_size` does not divide the number of processes.
    """
    if not dist.is_initialized():
        raise ValueError("sharding must be none in a single process without a launcher; got no process group")
    processes = dist.get_world_size()
    if shard_size is None:
        return init_device_mesh(device_type, (processes,), mesh_dim_names=("dp_shard",))
    if processes % shard_size:
        raise ValueError(f"shard_size must divide the number of processes ({processes}); got {shard_size}")
    shape = (processes // shard_size, shard_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))


def shard(model: PreTrainedModel, mesh: DeviceMesh, *, bf16: bool = False) -> PreTrainedModel:
    """Spread weights, gradients and (built afterwards) optimizer over a mesh: each decoder layer, then the rest.

    Args:
        model: any decoder of Transformers; changed in place. On the CPU it may be larger than a device: it is moved
            there layer by layer.
        mesh: from `sharding_mesh`.
        bf16: compute in bf16; weights stay, and gradients are reduced, in fp32. Outputs are fp32 too: the router's
            logits must not be rounded on their way up.
    """
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
    head = model.get_output_embeddings()
    if bf16 and head is not None:
        # The layers put out fp32, which would meet the head's weights in bf16. It cannot be a group of its own, whose
        # inputs FSDP2 would cast: it may share its matrix with the embedding.
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype), *inputs[1:]))
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or []):
            if bf16:
                # FSDP2 does so too, but before torch 2.13 not where gradient checkpointing computes a layer again.
                module.register_forward_pre_hook(_cast_to_bf16, with_kwargs=True)
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def _cast_to_bf16(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    def cast(value: Any) -> Any:
        return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tree_map(cast, (args, kwargs))


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state_dict(model: nn.Module) -> dict[str, Any]:
    """The model's whole state on the CPU, on the first process; `{}` on the others, all of which must call it.

    The tensors are copies: training may go on while they are written. A tied weight is there once, under its first
    name.
    """
    state: dict[str, Any] = {
        **get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    }
    if dist.is_initialized() and dist.get_rank():
        return {}
    first_names = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first_names
    # cpu_offload gives back what was on the CPU already.
    return {name: value.clone() for name, value in state.items() if name not in tied}


__all__ = ["shard", "sharding_mesh", "whole", "whole_state_dict"]
