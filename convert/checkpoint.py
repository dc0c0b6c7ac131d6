"""A folder of safetensors, known by its headers: nothing here reads a tensor's data.

The format is 8 bytes of header length (little endian), a JSON header, then the tensors' bytes.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import ConversionError
from .families import Shapes

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `num_bytes` from byte `start` of the file `shard`."""

    shard: str
    dtype: str  # as safetensors spells it: F32, BF16, ...
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """The shards of a folder, in the index's order, and every tensor in them."""

    folder: Path
    shards: tuple[str, ...]
    tensors: Mapping[str, TensorInfo]

    def path(self, shard: str) -> Path:
        """The file itself, behind the symbolic links that a hub cache is made of."""
        return (self.folder / shard).resolve()

    def tensors_of(self, shard: str) -> dict[str, TensorInfo]:
        return {name: tensor for name, tensor in self.tensors.items() if tensor.shard == shard}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConversionError: no such file, or no JSON object in it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist; a checkpoint needs it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{path} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, from its header and its length.

    Raises:
        ConversionError: the file is missing, is not safetensors, or is shorter or longer than its header
            says.
    """
    if not path.is_file():
        raise ConversionError(f"{path} does not exist though the checkpoint names it; fetch it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        data_start = 8 + int.from_bytes(file.read(8), "little")
        if not 10 <= data_start <= size:
            raise ConversionError(
                f"{path} is truncated or not safetensors: a header of {data_start - 8} bytes in {size}; "
                "fetch it again"
            )
        try:
            header = json.loads(file.read(data_start - 8))
            header.pop("__metadata__", None)
            tensors = {
                name: TensorInfo(
                    path.name,
                    row["dtype"],
                    tuple(row["shape"]),
                    data_start + row["data_offsets"][0],
                    row["data_offsets"][1] - row["data_offsets"][0],
                )
                for name, row in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ConversionError(f"{path} has no readable safetensors header; fetch it again") from None
    expected = max((tensor.start + tensor.num_bytes for tensor in tensors.values()), default=data_start)
    if size != expected:
        raise ConversionError(
            f"{path} has {size} bytes where its header says {expected}: truncated? Fetch it again"
        )
    return tensors


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`: an index with its shards, or a single file.

    Raises:
        ConversionError: no safetensors, a shard that is missing or broken, or an index that disagrees with
            them.
    """
    index_path = folder / INDEX_FILE
    weight_map: dict[str, str] = {}
    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map", {})
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{index_path} has no weight_map; fetch it again")
        shards = tuple(dict.fromkeys(weight_map.values()))
    elif (folder / SINGLE_FILE).is_file():
        shards = (SINGLE_FILE,)
    else:
        raise ConversionError(no_safetensors(folder))
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise ConversionError(f"{index_path} names the shard {shard!r}; expected a file in the same folder")
        for name, tensor in read_header(folder / shard).items():
            if name in tensors:
                raise ConversionError(
                    f"{name} is both in {tensors[name].shard} and in {shard}; expected one of them"
                )
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].shard != shard:
            raise ConversionError(
                f"{index_path} places {name} in {shard}, which does not hold it; fetch both again"
            )
    return Checkpoint(folder, shards, tensors)


def no_safetensors(folder: Path) -> str:
    """Why there is nothing to convert in `folder`."""
    wanted = f"{folder} has neither {INDEX_FILE} nor {SINGLE_FILE}"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return (
            f"{wanted}, but pickled PyTorch weights: unpickling can run any code and holds everything in "
            "memory. Load the model with transformers once and save it with save_pretrained: that writes "
            "safetensors"
        )
    return f"{wanted}; expected a checkpoint in safetensors"


def check_tensors(checkpoint: Checkpoint, expected: Shapes, redundant: set[str]) -> None:
    """Hold the tensors found against the family's table.

    Raises:
        ConversionError: tensors missing, unexpected, of another shape, or of a dtype that is not plain
            floating point.
    """
    found = {name: t for name, t in checkpoint.tensors.items() if name not in redundant}
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    if missing or unexpected:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ConversionError(
            f"{checkpoint.folder} does not hold the tensors that its config.json describes: {' and '.join(parts)}"
        )
    for name, tensor in found.items():
        if tensor.dtype not in DTYPES:
            raise ConversionError(
                f"{name} has dtype {tensor.dtype}; expected one of {', '.join(DTYPES)}. "
                "Convert the original or a dequantized copy"
            )
        if tensor.shape != expected[name]:
            raise ConversionError(
                f"{name} has shape {list(tensor.shape)} where config.json describes {list(expected[name])}"
            )
        if tensor.num_bytes != DTYPES[tensor.dtype].itemsize * torch.Size(tensor.shape).numel():
            raise ConversionError(
                f"{name} has {tensor.num_bytes} bytes, too few or too many for its shape; fetch it again"
            )


def main_dtype(checkpoint: Checkpoint, names: Shapes) -> str:
    """The dtype that holds most of the bytes of `names`, as safetensors spells it."""
    num_bytes: Counter[str] = Counter()
    for name in names:
        num_bytes[checkpoint.tensors[name].dtype] += checkpoint.tensors[name].num_bytes
    return num_bytes.most_common(1)[0][0]
