"""The processes of an evaluation: batches are formed from all of it, then dealt out, then what they gave is gathered.

Which sequences are computed together, and padded to which length, does not depend on the number of processes, and so
no digit of a result does, if each process computes with the same number of threads (`set_num_threads`) on weights that
lie alike in memory (`load_model`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from tqdm.auto import tqdm
from transformers import PreTrainedModel

T = TypeVar("T")


def this_process() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started, with its device."""
    # Accelerate joins processes on the CPU only if it is told to use the CPU.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu)


def set_num_threads(number: int | None) -> int | None:
    """Sets with how many threads this process computes on the CPU.

    A matrix product is cut into parts by threads, and their number changes how it is rounded. Left alone, a process by
    itself has a thread for each core; among several, Accelerate and its launcher divide the cores.

    Args:
        number: None leaves it as it is.

    Returns:
        With how many it computes; None where it does so on another device.
    """
    on_cpu = this_process().device.type == "cpu"  # Accelerate sets threads when it is first asked for this
    if number is not None:
        torch.set_num_threads(number)
    return torch.get_num_threads() if on_cpu else None


def batches_by_length(lengths: Sequence[int], sequences: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of items of like length, so that little is padding; the longest first, so that memory only falls.

    Args:
        lengths: Of each item, its tokens.
        sequences: Of each item, how many sequences it makes.
        batch_size: Most sequences in a batch; an item that makes more is a batch by itself.

    Returns:
        The items of each batch, by their index.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if sequences[index] > room:
            batches.append([])
            room = batch_size
        batches[-1].append(index)
        room -= sequences[index]
    return batches


def share(batches: Sequence[T]) -> Sequence[T]:
    """Those of all batches that this process computes."""
    state = this_process()
    return batches[state.process_index :: state.num_processes]


def gather(found: list[tuple[int, Any]], number: int) -> list[Any]:
    """On every process, what all of them found for items `0 ... number - 1`, in their order."""
    of_all = dict(gather_object(found))
    return [of_all[index] for index in range(number)]


def progress(batches: Sequence[T], description: str) -> Iterator[T]:
    """The batches, with a bar on the main process."""
    return tqdm(batches, desc=description, unit="batch", disable=None if this_process().is_main_process else True)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in evaluation mode and keeps no gradients; afterwards it is as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
