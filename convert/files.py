"""Bytes on disk: a folder that appears whole or not at all, and shards that are shared instead of copied."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import DTYPES, TensorInfo
from .errors import ConversionError

BLOCK = 16 << 20  # bytes read at a time
FICLONE = 0x40049409  # linux/fs.h: share the extents of another file, on btrfs, XFS and the like

Advance = Callable[[int], None]  # told how many more bytes are done


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`; its subfolder `target` becomes `out` if the block succeeds.

    Whatever ends the block otherwise, an interrupt too, removes everything.

    Raises:
        ConversionError: `out` exists, before or after, or the file system refuses.
    """
    if os.path.lexists(out):
        raise ConversionError(f"{out} exists already; name another folder or remove it")
    folder = out.with_name(f"{out.name}.partial-{os.getpid()}")
    new_parents = [parent for parent in out.parents if not parent.exists()]
    try:
        (folder / "target").mkdir(parents=True)
        yield folder
        if os.path.lexists(out):
            raise ConversionError(f"{out} was made by someone else in the meantime; name another folder")
        os.rename(folder / "target", out)
        sync(out.parent)
    except OSError as error:  # the disk is full, a folder may not be written, ...
        raise ConversionError(f"{out} could not be made: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # `out` is in it
                parent.rmdir()


def share(source: Path, target: Path, *, link: bool, advance: Advance) -> str:
    """Make `target` hold the bytes of `source` as cheaply as the file system can.

    A hard link costs nothing and is the same file under two names: what writes into one writes into both,
    and older releases of safetensors do when they save over it (0.8 makes a new file).

    Returns:
        How: "linked", "reflinked" (own file, shared blocks until one is edited) or "copied".
    """
    if link:
        try:
            os.link(source, target)
            return "linked"
        except OSError:
            pass  # another file system, or one that refuses: try the next
        try:
            with source.open("rb") as read, target.open("xb") as write:
                fcntl.ioctl(write, FICLONE, read.fileno())
            return "reflinked"
        except OSError:
            target.unlink(missing_ok=True)
    with source.open("rb") as read, target.open("xb") as write:
        while block := read.read(BLOCK):
            write.write(block)
            advance(len(block))
        write.flush()
        os.fsync(write.fileno())
    return "copied"


def cast(
    source: Path,
    target: Path,
    tensors: Mapping[str, TensorInfo],
    names: set[str],
    dtype: torch.dtype,
    advance: Advance,
) -> None:
    """Write the safetensors file `source` again with those of its `tensors` in `names` cast to `dtype`.

    Rounding is by element, so a block at a time is enough and no tensor is ever whole in memory.

    Raises:
        ConversionError: a value becomes infinite or is not a number.
    """
    spelling = {torch_dtype: name for name, torch_dtype in DTYPES.items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, spelled, num_bytes = end, tensor.dtype, tensor.num_bytes
        if name in names:
            spelled = spelling[dtype]
            num_bytes = num_bytes // DTYPES[tensor.dtype].itemsize * dtype.itemsize
        end = start + num_bytes
        header[name] = {"dtype": spelled, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format wants the data aligned
    with source.open("rb") as read, target.open("xb") as write:
        write.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors.items():
            read.seek(tensor.start)
            for i in range(0, tensor.num_bytes, BLOCK):
                block = read.read(min(BLOCK, tensor.num_bytes - i))
                advance(len(block))
                if name in names:
                    values = from_bytes(block, tensor.dtype).to(dtype)
                    if not values.isfinite().all():
                        raise ConversionError(f"{name} has values that {dtype} cannot hold; use another dtype")
                    block = to_bytes(values)
                write.write(block)
        write.flush()
        os.fsync(write.fileno())


def same_values(one: Path, tensor: TensorInfo, other: Path, other_tensor: TensorInfo) -> bool:
    """Whether the other tensor has the bytes of this one, or of this one cast to the other's dtype."""
    dtype = DTYPES[other_tensor.dtype]
    with one.open("rb") as read, other.open("rb") as read_other:
        read.seek(tensor.start)
        read_other.seek(other_tensor.start)
        for i in range(0, tensor.num_bytes, BLOCK):
            block = read.read(min(BLOCK, tensor.num_bytes - i))
            if DTYPES[tensor.dtype] != dtype:
                block = to_bytes(from_bytes(block, tensor.dtype).to(dtype))
            if block != read_other.read(len(block)):
                return False
    return tensor.shape == other_tensor.shape


def from_bytes(block: bytes, dtype: str) -> Tensor:
    return torch.frombuffer(bytearray(block), dtype=DTYPES[dtype])


def to_bytes(values: Tensor) -> bytes:
    return values.view(torch.uint8).numpy().tobytes()


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file that everyone may read: some releases leave it to its owner alone."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(0o644)
    sync(path)


def sync(path: Path) -> None:
    """Have a file, or a folder's entries, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
