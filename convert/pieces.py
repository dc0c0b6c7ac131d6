"""Tensors in pieces: the format of a training checkpoint, the same for every ZeRO stage and number of ranks.

Each rank writes one safetensors file. A tensor in it is called `KIND:PARAMETER:START` and holds the float32
elements of a parameter's flattened weight or moment from START on. Readers ask for any range of any parameter
and need not know who wrote it.
"""

import bisect
import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

BLOCK = 16 << 20  # bytes written, or read to be verified, at a time
SPELLING = {torch.float32: "F32", torch.uint8: "U8"}
MANIFEST = "manifest.json"
KINDS = ("weight", "exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass
class Piece:
    """A range of a parameter and what the optimizer keeps of it; all tensors are [n].

    Attributes:
        name: the parameter's, as in the model's own checkpoint.
        start: of the range in the flattened parameter.
        tensors: by kind: "weight" and AdamW's "exp_avg" and "exp_avg_sq", float32; or "weight" and Muon's
            "momentum_buffer", of the gradients' dtype, or one of these; of a frozen parameter "weight" alone, of
            the model's dtype.
    """

    name: str
    start: int
    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))


def write(path: Path, tensors: Mapping[str, Tensor]) -> dict:
    """Write a safetensors file of float32 and uint8 tensors, on the CPU and contiguous; it is on the disk then.

    Writing and hashing release the interpreter, so that another thread can go on with the training.

    Returns:
        Its size and checksum: `bytes` and `sha256`.

    Raises:
        OSError: the disk is full, or not there.
    """
    header: dict[str, dict] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": SPELLING[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format wants the data aligned
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for block in (len(encoded).to_bytes(8, "little") + encoded, *(t.numpy().data for t in tensors.values())):
            view = memoryview(block).cast("B")  # type: ignore[arg-type]  # arrays have buffers
            while view:
                written = file.write(view[:BLOCK])
                digest.update(view[:written])
                view = view[written:]
        os.fsync(file.fileno())
    return {"bytes": 8 + len(encoded) + end, "sha256": digest.hexdigest()}


def problem(path: Path, expected: dict) -> str | None:
    """What is wrong with a file of a checkpoint, or None. `expected` is its entry in the manifest."""
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path.name} has {size} bytes and should have {expected['bytes']}"
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    return None if digest.hexdigest() == expected["sha256"] else f"{path.name} does not have its checksum"


def manifest(folder: Path) -> dict | None:
    """A checkpoint's manifest; None if it is missing or damaged."""
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None


class PiecesReader:
    """The pieces of a checkpoint folder, by parameter and range.

    Attributes:
        shapes: each parameter's.

    Raises:
        ValueError: the folder holds none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {path: safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))}
        self.found: dict[tuple[str, str], list[tuple[int, int, Path]]] = defaultdict(list)  # start, end, file
        for path, file in self.files.items():
            for key in file.keys():  # noqa: SIM118
                kind, name, start = key.split(":")
                if kind in KINDS:
                    (length,) = file.get_slice(key).get_shape()
                    self.found[kind, name].append((int(start), int(start) + length, path))
        described = manifest(folder)
        if described is None or not self.found:
            raise ValueError(f"{folder} holds no training checkpoint that this version can read")
        self.shapes: dict[str, tuple[int, ...]] = {n: tuple(shape) for n, shape in described["shapes"].items()}
        for ranges in self.found.values():
            ranges.sort()

    def weight(self, name: str) -> Tensor:
        """A whole weight, float32, in its own shape."""
        shape = self.shapes[name]
        return self.read("weight", name, 0, math.prod(shape)).view(shape)

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements `start` to `start + length`, float32 [length].

        Raises:
            ValueError: not all of them are there.
        """
        ranges = self.found.get((kind, name), [])
        out = torch.empty(length)
        at = start
        for first, end, path in ranges[max(0, bisect.bisect_right(ranges, (start, 1 << 62)) - 1) :]:
            if first > at or at >= start + length:
                break
            stop = min(end, start + length)
            if stop > at:
                part = self.files[path].get_slice(f"{kind}:{name}:{first}")
                out[at - start : stop - start] = part[at - first : stop - first]
                at = stop
        if at < start + length:
            raise ValueError(f"{self.folder} has no {kind} of {name} from element {at} on")
        return out

    def extra(self, rank: int, key: str) -> Tensor | None:
        """A tensor that rank `rank` wrote beside its pieces."""
        path = self.folder / file_name(rank)
        return self.files[path].get_tensor(f"{key}::0") if path in self.files else None


def file_name(rank: int) -> str:
    return f"pieces-{rank:05d}.safetensors"
