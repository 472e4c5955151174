"""Expert parallelism through Transformers' `DistributedConfig`: whole experts on different ranks."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers.distributed import DistributedConfig

from ..configuration import MoEConfig
from ..modeling import MoEForCausalLM
from .parallelism import data_parallel_group


def shard_experts(model: MoEForCausalLM, expert_parallel_size: int, *, bf16: bool = False) -> MoEForCausalLM:
    """A model with the same weights whose experts are shared out over `expert_parallel_size` neighbouring ranks.

    Where Transformers can send tokens to experts (5.23), each rank has tokens of its own: everything but the experts
    is sharded by FSDP2 over all ranks, which average gradients, and groups of `expert_parallel_size` ranks hold the
    experts, copies of a group being sharded and averaged likewise. Before (5.17), all ranks hold the same tokens and
    everything but the experts whole; each computes its own experts, and an all-reduce adds up their outputs.

    The balancer's group is set to the ranks whose tokens differ (`data_parallel_group(model)`), one micro-batch being
    that of one such rank. Make the optimizer of the result, clip with `clip_grad_norm_` from here, and let Accelerate
    prepare neither. `save_pretrained`, called by every rank, writes whole weights.

    Args:
        model: whole, and the same on every rank; left as it is. Every rank calls this.
        expert_parallel_size: ranks that hold one set of experts, a divisor of `num_experts` and of the number of
            processes.
        bf16: compute in bf16; weights stay, and gradients are reduced, in fp32. With Transformers 5.17 use autocast.

    Raises:
        ValueError: a size that cannot be, or `bf16` where there is none.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    num_experts = model.config.num_experts
    if expert_parallel_size < 1 or num_experts % expert_parallel_size:
        raise ValueError(f"expert_parallel_size must divide num_experts ({num_experts}); got {expert_parallel_size}")
    if world_size % expert_parallel_size:
        raise ValueError(
            f"expert_parallel_size must divide the number of processes ({world_size}); got {expert_parallel_size}"
        )
    if "ep_dispatch_experts" in MoEConfig.base_model_ep_plan.values():
        distributed = DistributedConfig(fsdp_size=world_size, ep_size=expert_parallel_size, fsdp_mixed_precision=bf16)
    elif bf16:
        raise ValueError(f"bf16 must be False with Transformers {transformers.__version__}: use autocast; got True")
    elif expert_parallel_size == world_size:
        distributed = DistributedConfig(tp_size=world_size, enable_expert_parallel=True)
    else:
        raise ValueError(
            f"expert_parallel_size must be the number of processes ({world_size}), as Transformers "
            f"{transformers.__version__} cannot send tokens to experts; got {expert_parallel_size}"
        )
    sharded: Any = type(model).from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype=model.dtype, distributed_config=distributed
    )
    for ours, theirs in zip(sharded.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    sharded.balancer.synchronizer.process_group = data_parallel_group(sharded)
    return sharded.train(model.training)


def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` over gradients that are sharded in different ways, or not at all.

    Every rank calls it; a gradient that all ranks hold whole counts once.

    Args:
        max_norm: `inf` clips nothing.

    Returns:
        The norm of all gradients before clipping, a scalar: the same on each rank.
    """
    by_mesh: dict[Any, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh[parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None].append(parameter)
    norms = [
        get_total_norm([parameter.grad for parameter in alike if parameter.grad is not None])
        for alike in by_mesh.values()
    ]
    norm = torch.linalg.vector_norm(torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]))
    for alike in by_mesh.values():
        clip_grads_with_norm_(alike, max_norm, norm)
    return norm
