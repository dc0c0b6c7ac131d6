"""Tile sizes of the Triton kernels: tables in `tables/`, one a GPU. Nothing is tuned when a run starts.

`brumby tune` writes a table for a GPU that has none. Until then an H100's serves other Hopper GPUs, and all else
takes `default.json`: tiles small enough for every GPU that Triton knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

TABLES = Path(__file__).with_name("tables")
WIDTHS = (64, 128, 256)  # head dims that tiles are kept for; others take the next

# What a tile is, by kernel: BQ queries by BK keys, or BT tokens; num_warps warps; num_stages tiles in flight
KERNELS = {
    "forward": ("BQ", "BK", "num_warps", "num_stages"),
    "query_gradient": ("BQ", "BK", "num_warps", "num_stages"),
    "key_value_gradient": ("BQ", "BK", "num_warps", "num_stages"),
    "sum": ("BT", "num_warps", "num_stages"),
    "query": ("BT", "num_warps", "num_stages"),
    "gradient": ("BT", "num_warps", "num_stages"),
}
Table = dict[str, dict[str, list[int]]]  # kernel -> "dtype width" -> tile

_trial: dict[tuple[str, str], list[int]] = {}


def slug(device_name: str) -> str:
    """A GPU's name as a file's: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return device_name.lower().replace(" ", "-").replace("/", "-")


def key(dtype: torch.dtype, head_dim: int) -> str:
    """Of an entry: the dtype of q, k and v, and the width that the larger of their head dims takes."""
    return f"{str(dtype).removeprefix('torch.')} {next(width for width in WIDTHS if head_dim <= width)}"


def tile_sizes(kernel: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> list[int]:
    """The tile of a kernel (see `KERNELS`) for a dtype and the larger of the head dims."""
    entry = key(dtype, head_dim)
    return _trial.get((kernel, entry)) or _table(device)[kernel][entry]


@contextmanager
def trial(kernel: str, entry: str, sizes: list[int]) -> Iterator[None]:
    """Use `sizes` instead of the table's: how a table is made."""
    _trial[kernel, entry] = sizes
    try:
        yield
    finally:
        del _trial[kernel, entry]


def path_for(device: torch.device) -> Path:
    """The table that a device takes."""
    if device.type == "cuda":
        own = TABLES / f"{slug(torch.cuda.get_device_name(device))}.json"
        if own.exists():
            return own
        if torch.cuda.get_device_capability(device)[0] != 9:
            return TABLES / "default.json"
    return TABLES / "nvidia-h100-80gb-hbm3.json"


@lru_cache
def _table(device: torch.device) -> Table:
    return json.loads(path_for(device).read_text())["tiles"]
