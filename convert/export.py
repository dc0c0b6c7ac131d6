"""A training checkpoint becomes a Hugging Face model that needs no package of ours to load."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from brumby import kernels, model
from brumby.convert.files import save

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
        checkpoint: a DeepSpeed checkpoint folder of any ZeRO stage, as training writes it. DeepSpeed's
            files are pickles: export none that you did not write.
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
        write_shards(read_weights(checkpoint), config, getattr(torch, dtype), unfinished, max_shard_bytes)
        write_code(unfinished)
        config |= {"dtype": dtype, "auto_map": AUTO_MAP}
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    Console().print(f"{out}: exported {checkpoint.name} in {dtype}")


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Names and float32 tensors, lazily read where ZeRO keeps them in parts."""
    if any(checkpoint.glob("*_optim_states.pt")):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()):
            weights = get_fp32_state_dict_from_zero_checkpoint(checkpoint.parent, checkpoint.name, lazy_mode=True)
    else:  # ZeRO stage 0 keeps the weights whole
        file = checkpoint / "mp_rank_00_model_states.pt"
        weights = torch.load(file, map_location="cpu", mmap=True, weights_only=False)["module"]
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}  # the objective's own name


def expected_shapes(config: dict) -> dict[str, torch.Size]:
    with torch.device("meta"):
        empty = model.BrumbyForCausalLM(model.BrumbyConfig.from_dict(config))
    tied = "lm_head.weight" if config.get("tie_word_embeddings") else ""
    return {name: tensor.shape for name, tensor in empty.state_dict().items() if name != tied}


def write_shards(
    weights: dict[str, Tensor], config: dict, dtype: torch.dtype, folder: Path, max_bytes: int
) -> None:
    """`model-0000i-of-0000n.safetensors` and their index.

    Raises:
        ValueError: a tensor is missing or has another shape than the model's.
    """
    shapes = expected_shapes(config)
    wrong = [
        name for name, shape in shapes.items() if name not in weights or tuple(weights[name].shape) != tuple(shape)
    ]
    if wrong:
        raise ValueError(
            f"the checkpoint does not fit the model: {', '.join(wrong[:5])} missing or of another shape"
        )
    item_bytes = torch.finfo(dtype).bits // 8
    shards = list(plan_shards({name: shape.numel() * item_bytes for name, shape in shapes.items()}, max_bytes))
    weight_map: dict[str, str] = {}
    for i, names in enumerate(track(shards, description="writing shards", transient=True)):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: weights[name].contiguous().to(dtype) for name in names}
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
