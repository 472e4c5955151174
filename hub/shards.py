"""A checkpoint's weights in shards (safetensors), read and written a few tensors at a time."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .reading import check_fields, read_mapping

Shape = tuple[int, ...]
Index = tuple[int | slice, ...]
"""A part of a tensor; `()` is all of it."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Shards:
    """The weights of a saved model, by name. Making one reads the headers of its files only.

    Args:
        folder: with `model.safetensors`, or with shards and their `model.safetensors.index.json`.

    Raises:
        ValueError: there are no such files, or one of them is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, str] = {}
        """In the words of safetensors: `F32`, `BF16`, `F8_E4M3`, ..."""
        for file in weight_files(folder):
            try:
                with safe_open(file, framework="pt") as weights:
                    for name in weights.keys():  # noqa: SIM118 - no dictionary
                        header = weights.get_slice(name)
                        self._files[name] = file
                        self.shapes[name], self.dtypes[name] = tuple(header.get_shape()), header.get_dtype()
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file} must be a whole safetensors file; got {error}") from error
        # Few stay open: what was read of an open file counts as this process's memory.
        self._opened = lru_cache(maxsize=2)(lambda file: safe_open(file, framework="pt"))

    def read(self, name: str, part: Index = ()) -> Tensor:
        """A tensor, or a part of it. Not to be written to: it may be the file itself, mapped into memory."""
        weights = self._opened(self._files[name])
        return weights.get_slice(name)[part] if part else weights.get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model, as Transformers looks for them: one, or the shards that an index names.

    Raises:
        ValueError: there is neither, or the index names none.
    """
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise ValueError(f"the model must be a folder with {SAFE_WEIGHTS_NAME} or its shards; got {folder}")
    weight_map = read_mapping(index).get("weight_map")
    check_fields(weight_map, {"*": str}, f"{index} weight_map")
    if not weight_map:
        raise ValueError(f"{index} weight_map must name the shards; got none")
    return [folder / name for name in sorted(set(weight_map.values()))]


@dataclass(frozen=True)
class Piece:
    """A part of a tensor that is read, and where it stands in the one that is written."""

    source: str
    """Name of the tensor that is read."""
    shape: Shape
    """What its shape must be."""
    part: Index = ()
    """Which part of it is read."""
    place: Index = ()
    """Where that stands in the tensor that is written."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: the pieces it is put together from, or zeros without any, and a last touch."""

    name: str
    shape: Shape
    pieces: tuple[Piece, ...] = ()
    dtype: torch.dtype | None = None
    """Its type whatever is asked for; `None` leaves it to the caller."""
    like: str = ""
    """Without pieces: the tensor that is read whose type it takes."""
    finish: Callable[[Tensor], Any] | None = None
    """Called with the tensor, in memory of its own, to change it in place."""

    def dtype_from(self, shards: Shards, asked: torch.dtype | None) -> torch.dtype:
        """The type it is written in: its own, or the one asked for, or that of what it is read from."""
        fixed = self.dtype or asked
        if fixed is not None:
            return fixed
        sources = [piece.source for piece in self.pieces] or [self.like]
        return reduce(torch.promote_types, {_DTYPES[shards.dtypes[source]] for source in sources})

    def assemble(self, shards: Shards, dtype: torch.dtype) -> Tensor:
        """The tensor, of its shape and of type `dtype`."""
        if len(self.pieces) == 1 and not self.pieces[0].place:
            (piece,) = self.pieces
            return shards.read(piece.source, piece.part).to(dtype).contiguous()
        tensor = (torch.empty if self.pieces else torch.zeros)(self.shape, dtype=dtype)
        for piece in self.pieces:
            tensor[piece.place] = shards.read(piece.source, piece.part).to(dtype)
        if self.finish is not None:
            self.finish(tensor)
        return tensor


def defects(shards: Shards, planned: Iterable[PlannedTensor], left_out: Iterable[str]) -> list[str]:
    """Why the plan cannot be carried out: tensors missing, of another shape or type, or that nobody asks for.

    Args:
        left_out: names of tensors that may be there and are not read.
    """
    needed = {piece.source: piece.shape for tensor in planned for piece in tensor.pieces}
    found = []
    if missing := [name for name in needed if name not in shards.shapes]:
        found.append(f"the weights must hold {some(missing)}; got no such tensor")
    if surplus := sorted(set(shards.shapes) - set(needed) - set(left_out)):
        found.append(f"the weights must hold nothing that the configuration gives no place to; got {some(surplus)}")
    for name in needed.keys() & shards.shapes.keys():
        if shards.shapes[name] != needed[name]:
            found.append(f"{name} must have shape {list(needed[name])}; got {list(shards.shapes[name])}")
        if shards.dtypes[name] not in _DTYPES:
            found.append(f"{name} must be one of {', '.join(_DTYPES)}, not quantised; got {shards.dtypes[name]}")
    return found


def some(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class ShardWriter:
    """Writes planned tensors as the shards and the index that `from_pretrained` reads.

    Args:
        planned: what to write, in order.
        shards: what it is made from.
        dtype: type of the floating-point tensors; `None` keeps each one's own.
        max_shard_size: of a file, like `"5GB"`; about as much is held in memory.

    Raises:
        ValueError: `max_shard_size` has no such form.
    """

    def __init__(
        self, planned: list[PlannedTensor], shards: Shards, *, dtype: torch.dtype | None, max_shard_size: str
    ) -> None:
        self._planned = {tensor.name: tensor for tensor in planned}
        self._shards = shards
        self.dtypes = {tensor.name: tensor.dtype_from(shards, dtype) for tensor in planned}
        """Type that each tensor is written in."""
        self._split = split_state_dict_into_shards_factory(
            self._planned,
            get_storage_size=lambda tensor: prod(tensor.shape) * self.dtypes[tensor.name].itemsize,
            filename_pattern=SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
            max_shard_size=max_shard_size,
        )

    def write(self, folder: Path) -> None:
        """Write the files into a folder that is there."""
        with tqdm(total=len(self._planned), desc="converting", unit="tensor") as progress:
            for file, names in self._split.filename_to_tensors.items():
                tensors = {}
                for name in names:
                    tensors[name] = self._planned[name].assemble(self._shards, self.dtypes[name])
                    progress.update()
                save_file(tensors, folder / file, metadata={"format": "pt"})
        if self._split.is_sharded:
            parameters = sum(prod(tensor.shape) for tensor in self._planned.values())
            index = {
                "metadata": {"total_parameters": parameters, **self._split.metadata},
                "weight_map": self._split.tensor_to_filename,
            }
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
