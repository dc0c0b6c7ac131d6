"""Heads of twice the size: the same function with softmax, more numbers for retention to tell keys apart by.

The square of q . k singles out one of many random keys by a factor of head_dim. In heads of 64, widened to 128,
a converted model recovers further (docs/recovery.md), with twice the attention's parameters and a state eight
times as large.

Pair i of the rotation, entries i and i + D / 2 of a head, becomes pair 2 i, which turns at the same rate in a head
of 2 D; the pairs between are new. New entries are random in queries and values, zero in keys and in what o_proj
takes. Softmax divides by the root of the head's size: so the queries grow by that of 2.
"""

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from brumby.model import BrumbyConfig

from .checkpoint import INDEX_FILE, Checkpoint
from .errors import ConversionError
from .files import save
from .sources import CARRIED_FILES

WIDE = 128  # for which the state form has kernels
ROTATIONS = ("default", "linear", "llama3")  # what a pair turns by depends on its share of the head alone


def _check(config: BrumbyConfig) -> None:
    D = config.head_dim
    if 2 * D > WIDE:
        raise ConversionError(
            f"wide_heads doubles heads of {WIDE // 2} or less; here head_dim is {D}: leave it out"
        )
    if config.qk_norm:
        raise ConversionError("wide_heads is not for a model with QK norms, which would count the new entries")
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    if kind not in ROTATIONS:
        raise ConversionError(f"wide_heads is not for the rotation {kind!r}; it is for {', '.join(ROTATIONS)}")


def widen(base: Checkpoint, config: BrumbyConfig, folder: Path) -> None:
    """Write the base with heads of twice the size to a new folder, shard by shard.

    Raises:
        ConversionError: its heads cannot be widened.
    """
    _check(config)
    folder.mkdir()
    D, random = config.head_dim, torch.Generator().manual_seed(0)
    for shard in base.shards:
        with safe_open(base.path(shard), "pt") as file:
            tensors = {name: _widened(name, file.get_tensor(name), D, random) for name in base.tensors_of(shard)}
        save(tensors, folder / shard)
    if len(base.shards) > 1:
        weight_map = {name: tensor.shard for name, tensor in base.tensors.items()}
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}) + "\n")
    for path in (path for pattern in CARRIED_FILES for path in base.folder.glob(pattern)):
        shutil.copyfile(path, folder / path.name)
    raw = json.loads((base.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"head_dim": 2 * D}, indent=2) + "\n")


def _widened(name: str, tensor: Tensor, D: int, random: torch.Generator) -> Tensor:
    """A tensor of the base, with entries 0, 2, 4, ... of each head for the old ones if it has heads."""
    part = next((part for part in ("q", "k", "v", "o") if f".{part}_proj." in name), None)
    if part is None or (part == "o" and tensor.dim() == 1):
        return tensor
    old = (tensor.T if part == "o" else tensor).unflatten(0, (-1, D))  # [heads, D] or [heads, D, E]
    new = old.new_zeros(old.shape[0], 2 * D, *old.shape[2:])
    if part in ("q", "v") and tensor.dim() == 2:
        values = torch.randn(old.shape, generator=random) * old.float().std()
        new[:, 1::2] = values.to(old.dtype)
    new[:, ::2] = old * math.sqrt(2) if part == "q" else old
    new = new.flatten(0, 1)
    return (new.T if part == "o" else new).contiguous()
