"""A training checkpoint becomes a Hugging Face model that needs no package of ours to load."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from brumby import kernels, model
from brumby.convert.files import save
from brumby.convert.pieces import PiecesReader

# Files that `trust_remote_code` loads from the model's folder, where they lie side by side.
CODE = {
    "configuration_brumby.py": Path(model.__file__).with_name("configuration_brumby.py"),
    "modeling_brumby.py": Path(model.__file__).with_name("modeling_brumby.py"),
    "power_retention.py": Path(kernels.__file__).with_name("power_retention.py"),
}
AUTO_MAP = {
    "AutoConfig": "configuration_brumby.BrumbyConfig",
    "AutoModel": "modeling_brumby.BrumbyModel",
    "AutoModelForCausalLM": "modeling_brumby.BrumbyForCausalLM",
}
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "conversion.json", "config.json")


def export(
    checkpoint: Path, start: Path, out: Path, dtype: str = "bfloat16", max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write `checkpoint`'s weights with the config, tokenizer and code that belong to them.

    Memory: the checkpoint's float32 weights are mapped, not read; at most one shard is held.

    Args:
        checkpoint: a folder of `checkpoints/`, as training writes it.
        start: the converted checkpoint that the run began with: config and tokenizer.
        out: the model's folder; made under a temporary name, then renamed.
        dtype: "bfloat16" or "float32".

    Raises:
        ValueError: `out` exists, the checkpoint is not there, or its tensors are not the model's.
    """
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype is {dtype!r}; expected 'bfloat16' or 'float32'")
    if out.exists():
        raise ValueError(f"{out} exists; remove it or choose another folder")
    if not checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is no checkpoint folder")
    config = json.loads((start / "config.json").read_text())
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        shutil.copytree(start, unfinished, ignore=shutil.ignore_patterns(*WEIGHTS))
        write_shards(PiecesReader(checkpoint), config, getattr(torch, dtype), unfinished, max_shard_bytes)
        write_code(unfinished)
        config |= {"dtype": dtype, "auto_map": AUTO_MAP}
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    Console().print(f"{out}: exported {checkpoint.name} in {dtype}")


def expected_shapes(config: dict) -> dict[str, torch.Size]:
    with torch.device("meta"):
        empty = model.BrumbyForCausalLM(model.BrumbyConfig.from_dict(config))
    tied = "lm_head.weight" if config.get("tie_word_embeddings") else ""
    return {name: tensor.shape for name, tensor in empty.state_dict().items() if name != tied}


def write_shards(weights: PiecesReader, config: dict, dtype: torch.dtype, folder: Path, max_bytes: int) -> None:
    """`model-0000i-of-0000n.safetensors` and their index.

    Raises:
        ValueError: a tensor is missing or has another shape than the model's.
    """
    shapes = expected_shapes(config)
    wrong = [name for name, shape in shapes.items() if weights.shapes.get(name) != tuple(shape)]
    if wrong:
        raise ValueError(
            f"the checkpoint does not fit the model: {', '.join(wrong[:5])} missing or of another shape"
        )
    item_bytes = torch.finfo(dtype).bits // 8
    shards = list(plan_shards({name: shape.numel() * item_bytes for name, shape in shapes.items()}, max_bytes))
    weight_map: dict[str, str] = {}
    for i, names in enumerate(track(shards, description="writing shards", transient=True)):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: weights.weight(name).to(dtype) for name in names}
        save(tensors, folder / file)
        weight_map |= dict.fromkeys(names, file)
    total = sum(shape.numel() * item_bytes for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def plan_shards(sizes: dict[str, int], max_bytes: int) -> Iterator[list[str]]:
    """Names in order, grouped so that no group of several exceeds `max_bytes`."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > max_bytes:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    if names:
        yield names


def write_code(folder: Path) -> None:
    """The model's own source, its one absolute import made relative."""
    for name, source in CODE.items():
        text = source.read_text().replace("from brumby.kernels import", "from .power_retention import")
        (folder / name).write_text(text)
