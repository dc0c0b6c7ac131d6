"""Where a base comes from: a folder, a hub repository or a GGUF file; each ends as a folder of
safetensors."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from .checkpoint import INDEX_FILE, SINGLE_FILE
from .errors import ConversionError
from .files import save

# Carried over beside the weights: what tokenizes, what generates, and the licence that goes with the weights.
CARRIED_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_source(source: str | Path, workspace: Path, *, revision: str | None, dtype: torch.dtype | None) -> Path:
    """The folder that holds `source`.

    Args:
        source: a folder, a GGUF file, a folder with one GGUF file, or a hub id such as Qwen/Qwen3-14B-Base.
        workspace: where a GGUF is unpacked.
        revision: branch, tag or commit of a hub repository.
        dtype: of an unpacked GGUF; bfloat16 by default.

    Raises:
        ConversionError: nothing there, an adapter, several GGUFs, or the hub does not give it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConversionError(f"{path} is a file; expected the checkpoint's folder, a .gguf file or a hub id")
        return unpack_gguf(path, workspace / "source", dtype or torch.bfloat16)
    if not path.is_dir():
        if not HUB_ID.fullmatch(str(source)):
            raise ConversionError(
                f"{path} does not exist; expected a folder, a .gguf file or a hub id (owner/name)"
            )
        path = download(str(source), revision)
    if (path / "adapter_config.json").exists():
        raise ConversionError(
            f"{source} is an adapter (it has adapter_config.json); merge it into its base with peft's "
            "merge_and_unload, save that and convert it"
        )
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and not list(path.glob("*.safetensors")):
        if len(ggufs) > 1:
            raise ConversionError(f"{path} has {len(ggufs)} GGUF files; name the one to convert")
        return unpack_gguf(ggufs[0], workspace / "source", dtype or torch.bfloat16)
    return path


def download(repo: str, revision: str | None) -> Path:
    """The snapshot of a hub repository in the local cache: what its top folder has that is carried."""
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", *CARRIED_FILES],
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # offline, no such repository, gated, revision unknown, ...
        raise ConversionError(
            f"{repo} is no local folder, and the hub did not give it ({type(error).__name__}: {error}). "
            "Check the name and the revision; for a gated model log in with `hf auth login`"
        ) from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' bars for weights, which take no time here."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


@quiet_loading()
def unpack_gguf(path: Path, folder: Path, dtype: torch.dtype) -> Path:
    """Dequantize a GGUF into an ordinary checkpoint in `folder`.

    Host memory: the whole model, once in `dtype` and at worst once more in float32.

    Raises:
        ConversionError: transformers cannot read it.
    """
    folder.mkdir()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # an unknown architecture or quantization, a broken file, no gguf package, ...
        raise ConversionError(f"transformers cannot load {path} ({type(error).__name__}: {error})") from error
    # save_pretrained refuses a model that it takes for quantized; its weights are plain by now.
    state = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    plan = split_torch_state_dict_into_shards(state)
    for shard, names in plan.filename_to_tensors.items():
        save({name: state[name] for name in names}, folder / shard)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index))
    else:
        assert list(plan.filename_to_tensors) == [SINGLE_FILE]
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, default=str))
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
