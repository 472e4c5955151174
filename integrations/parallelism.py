"""Which ranks hold different tokens: the data-parallel group of an Accelerator, a sharded model or a mesh."""

from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel


def data_parallel_group(parallel: Accelerator | PreTrainedModel | DeviceMesh) -> dist.ProcessGroup | None:
    """The ranks whose tokens differ from one another: data-parallel times context- and sequence-parallel.

    Tensor-parallel peers hold the same tokens, and would count them again. Expert-parallel peers hold the same tokens
    where they are tensor-parallel peers too, and different ones otherwise.

    Args:
        parallel: an Accelerator, whose `ParallelismConfig` made the mesh; a model loaded with a `DistributedConfig`,
            which made one too; or such a mesh: dimensions named `dp`, `dp_replicate`, `dp_shard`, `fsdp`, `cp` or `sp`
            are taken, others are not.

    Returns:
        The group to give a Balancer: of this rank alone where the mesh has none of these dimensions; `None`, the
        default group of all ranks, where there is no mesh. Every rank must call it, it may make groups.
    """
    mesh: Any = parallel
    if isinstance(parallel, PreTrainedModel):
        # Transformers' public mesh leaves replicas out; before 5.23 there are none, and it is all there is.
        manager = getattr(parallel, "_mesh_manager", None)
        mesh = manager.get_mesh(("dp_replicate", "fsdp", "tp")) if manager is not None else parallel._device_mesh
    elif not isinstance(parallel, DeviceMesh):
        mesh = getattr(parallel, "torch_device_mesh", None)
    if mesh is None:
        return None
    names = mesh.mesh_dim_names or ()
    different = tuple(name for name in names if name in ("dp", "dp_replicate", "dp_shard", "fsdp", "cp", "sp"))
    if not different:
        return dist.new_subgroups(group_size=1)[0]
    if len(different) == 1:
        return mesh[different[0]].get_group()
    return mesh[different]._flatten().get_group()
