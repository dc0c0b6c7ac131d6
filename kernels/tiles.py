"""Committed tile sizes of the Triton kernels: nothing is tuned at start."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """BQ queries by BK keys, by num_warps warps, with num_stages tiles in flight."""

    BQ: int
    BK: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    forward: Tile
    query_gradient: Tile
    key_value_gradient: Tile


H100 = {
    (2, 64): Tiles(Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(64, 128, 8, 2)),
    (2, 128): Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    (2, 256): Tiles(Tile(64, 64, 4, 1), Tile(64, 64, 8, 1), Tile(32, 64, 8, 1)),
    (4, 64): Tiles(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 64, 4, 1)),
    (4, 128): Tiles(Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
    (4, 256): Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1)),
}


class StateTile(NamedTuple):
    """Tokens in a tile, num_warps warps, num_stages tiles in flight."""

    BT: int
    num_warps: int
    num_stages: int


class StateTiles(NamedTuple):
    sum: StateTile
    query: StateTile
    gradient: StateTile


H100_STATE = {
    2: StateTiles(StateTile(64, 8, 3), StateTile(128, 8, 3), StateTile(64, 4, 3)),
    4: StateTiles(StateTile(32, 8, 1), StateTile(64, 8, 1), StateTile(32, 8, 1)),
}


def state_tiles(dtype: torch.dtype) -> StateTiles:
    return H100_STATE[dtype.itemsize]


def tiles(dtype: torch.dtype, head_dim: int) -> Tiles:
    """The tiles for q, k and v of a dtype and the larger of their head dims."""
    size = torch.finfo(dtype).bits // 8
    return next(tile for (bytes_, most), tile in H100.items() if bytes_ == size and head_dim <= most)
