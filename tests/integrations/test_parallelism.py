"""Which ranks count as data-parallel: four processes, two of them tensor-parallel peers of the other two."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from torch.distributed.device_mesh import init_device_mesh

from equipoise.balancing import Balancer
from equipoise.integrations import data_parallel_group


def load_on_a_rank(rank: int, world_size: int, shape: tuple[int, ...], names: tuple[str, ...]) -> dict[str, Any]:
    """Every rank routes as many tokens as its data-parallel coordinate, plus one, all to one expert."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    group = data_parallel_group(mesh)
    different = [mesh.get_local_rank(name) for name in names if name != "tp"]
    tokens = 1 + sum(coordinate * 2**place for place, coordinate in enumerate(different))
    routing = [torch.zeros(tokens, 2)], [torch.zeros(tokens, 1, dtype=torch.long)]
    loads, shares = [], []
    for mode, estimate in (("global_batch", "running"), ("global_batch", "exact"), ("loss_free", "running")):
        balancer = Balancer(
            mode, num_experts=2, process_group=group, load_estimate=estimate, biases=lambda: [torch.zeros(2)]
        )
        assert copy.deepcopy(balancer).synchronizer.process_group is group  # a model is copied for averaging
        assert pickle.loads(pickle.dumps(balancer.synchronizer)).process_group is None
        if estimate == "exact":
            with balancer.prepass():
                balancer.observe(*routing, batch_size=1)
        share = balancer.loss(balancer.observe(*routing, batch_size=1)).total / 0.01
        balancer.after_optimizer_step()
        loads.append(balancer.metrics()["load"].tolist())
        shares.append(share.item())  # LBL is 1: what remains is R * T_m / T_sync
    return {"size": dist.get_world_size(group), "loads": loads, "shares": shares, "tokens": tokens}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("shape", "names", "size", "total"),
    [
        ((4,), ("dp_shard",), 4, 1 + 2 + 3 + 4),
        ((2, 2), ("dp_replicate", "tp"), 2, 1 + 2),
        ((2, 2), ("dp_replicate", "dp_shard"), 4, 1 + 2 + 3 + 4),
        ((2, 2), ("dp_shard", "cp"), 4, 1 + 2 + 3 + 4),
        ((4,), ("tp",), 1, 1),
    ],
)
def test_peers_that_hold_the_same_tokens_are_counted_once(
    run_processes: Callable[..., list[Any]], shape: tuple, names: tuple, size: int, total: int
) -> None:
    for rank in run_processes(4, load_on_a_rank, shape, names):
        assert rank["size"] == size
        assert rank["loads"] == [[[total, 0]]] * 3
        share = size * rank["tokens"] / total
        assert rank["shares"] == pytest.approx([share, share, 0], rel=1e-5)


def group_of_a_parallelism_config(rank: int, world_size: int) -> list[int]:
    # The mesh an Accelerator would hold; the Accelerator itself takes a ParallelismConfig on accelerators only.
    mesh = ParallelismConfig(dp_shard_size=2, tp_size=2).build_device_mesh("cpu")
    return dist.get_process_group_ranks(data_parallel_group(mesh))


@pytest.mark.processes
def test_the_mesh_of_a_parallelism_config_is_understood(run_processes: Callable[..., list[Any]]) -> None:
    assert run_processes(4, group_of_a_parallelism_config) == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_without_a_mesh_it_is_the_default_group() -> None:
    assert data_parallel_group(Accelerator(cpu=True)) is None
