"""The proof that a conversion changed nothing but the mixer.

Two checks. Tensors: every carried tensor holds the bytes of the base's. Logits: with `use_exp`, which puts
softmax back, the new model computes what transformers' own class computes from the base. Then the mixer is
swapped, and the loss before any training is measured.
"""

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from brumby.model import BrumbyForCausalLM

from .checkpoint import Checkpoint
from .errors import ConversionError
from .files import same_values
from .sources import quiet_loading

PARITY_MODES = ("auto", "full", "tensors")
TOLERANCE = 1e-4  # of a float32 logit
MEMORY_FRACTION = 0.8  # of the available memory that one float32 model may take

TEXT = '''\
When in the Course of human events, it becomes necessary for one people to dissolve the political bands \
which have connected them with another, and to assume among the powers of the earth, the separate and equal \
station to which the Laws of Nature and of Nature's God entitle them, a decent respect to the opinions of \
mankind requires that they should declare the causes which impel them to the separation. We hold these \
truths to be self-evident, that all men are created equal, that they are endowed by their Creator with \
certain unalienable Rights, that among these are Life, Liberty and the pursuit of Happiness.

Shall I compare thee to a summer's day? Thou art more lovely and more temperate: Rough winds do shake the \
darling buds of May, And summer's lease hath all too short a date.

def greatest_common_divisor(a: int, b: int) -> int:
    """The largest integer that divides both."""
    while b:
        a, b = b, a % b
    return a
'''


def check_parity(
    base: Checkpoint,
    target: Checkpoint,
    names: set[str],
    cast_to: torch.dtype | None,
    *,
    mode: str,
    device: str,
    text: str | None,
) -> dict[str, Any]:
    """Compare a converted checkpoint with its base.

    Args:
        names: the carried tensors.
        cast_to: the dtype they were cast to, if they were; the base's logits are then computed from rounded
            weights.
        mode, device, text: see `convert`.

    Returns:
        `tensors` and `logits`, the latter with a `skipped` reason where they were not computed.

    Raises:
        ConversionError: a tensor or a logit differs.
    """
    report: dict[str, Any] = {"tensors": compare_tensors(base, target, names)}
    num_bytes = 4 * sum(torch.Size(tensor.shape).numel() for tensor in target.tensors.values())
    available = available_memory(device)
    if mode == "tensors":
        report["logits"] = {"skipped": "as asked"}
    elif mode == "auto" and num_bytes > MEMORY_FRACTION * available:
        sizes = f"a float32 model takes {num_bytes / 1e9:.1f} GB and {available / 1e9:.1f} GB are available"
        report["logits"] = {"skipped": sizes}
    else:
        report["logits"] = compare_logits(base.folder, target.folder, cast_to, device=device, text=text)
    return report


def compare_tensors(base: Checkpoint, target: Checkpoint, names: set[str]) -> dict[str, int]:
    """Hold every carried tensor against the base's.

    Returns:
        How many tensors are the same because they lie in the same file ("same_file"), were compared byte by
        byte ("same_bytes"), or have the bytes of the base's values once these are cast ("cast").

    Raises:
        ConversionError: one differs, or is missing.
    """
    counts = {"same_file": 0, "same_bytes": 0, "cast": 0}
    for name in sorted(names):
        if name not in target.tensors:
            raise ConversionError(f"{name} did not arrive in {target.folder}; do not use it and report this")
        one, other = base.tensors[name], target.tensors[name]
        path, other_path = base.path(one.shard), target.path(other.shard)
        if path.samefile(other_path):
            how, equal = "same_file", replace(one, shard=other.shard) == other
        else:
            how = "same_bytes" if one.dtype == other.dtype else "cast"
            equal = same_values(path, one, other_path, other)
        if not equal:
            raise ConversionError(f"{name} differs from the base's; do not use {target.folder} and report this")
        counts[how] += 1
    return counts


@quiet_loading()
def compare_logits(
    base: Path, target: Path, cast_to: torch.dtype | None, *, device: str, text: str | None
) -> dict[str, Any]:
    """Float32 logits of both checkpoints on the same tokens, one model in memory at a time.

    Returns:
        The largest difference, and the next-token cross-entropy (nats a token) of the base and of the
        untrained retention model.

    Raises:
        ConversionError: the logits differ by more than `TOLERANCE`, or weights of the new model are missing.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if cast_to is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(cast_to).float()
    input_ids, tokens = parity_tokens(base, text or TEXT, model)
    wanted = logits(model, input_ids, device)
    del model
    gc.collect()

    loaded: Any = BrumbyForCausalLM.from_pretrained(
        target, dtype=torch.float32, use_exp=True, output_loading_info=True
    )
    brumby, info = loaded
    if info["missing_keys"]:
        raise ConversionError(f"{target} lacks {sorted(info['missing_keys'])[:3]}; do not use it and report this")
    softmax = logits(brumby, input_ids, device)
    difference = (softmax - wanted).abs().max().item()
    if not difference <= TOLERANCE:  # NaN fails too
        raise ConversionError(
            f"the converted model with softmax attention differs from the base by {difference:.2e} in a "
            f"logit; expected at most {TOLERANCE:.0e}. The base may compute something that its config.json "
            "does not say"
        )
    brumby.config.use_exp = False
    retention = logits(brumby, input_ids, device)
    return {
        "max_abs_difference": difference,
        "tolerance": TOLERANCE,
        "num_tokens": input_ids.shape[1],
        "tokens": tokens,
        "device": device,
        "loss_base": cross_entropy(wanted, input_ids),
        "loss_after_swap": cross_entropy(retention, input_ids),
    }


def parity_tokens(folder: Path, text: str, model: PreTrainedModel) -> tuple[Tensor, str]:
    """input_ids [1, T] of a text, and their kind: by the base's tokenizer, or the bytes if it has none."""
    if any(folder.glob("tokenizer*")):
        try:
            ids, tokens = AutoTokenizer.from_pretrained(folder)(text)["input_ids"], "text"
        except Exception as error:  # a file or a package is missing, ...
            raise ConversionError(
                f"transformers cannot load the tokenizer of {folder} ({type(error).__name__}: {error}); "
                "mend it, or convert with parity=tensors"
            ) from error
    else:
        ids, tokens = [byte % model.config.vocab_size for byte in text.encode()], "bytes (no tokenizer)"
    limit = min(model.config.max_position_embeddings, 1024)
    return torch.tensor([ids[:limit]]), tokens


@torch.no_grad()
def logits(model: PreTrainedModel, input_ids: Tensor, device: str) -> Tensor:
    """Logits [T, vocabulary] on the CPU, of input_ids [1, T]."""
    return model.eval().to(device)(input_ids=input_ids.to(device), use_cache=False).logits[0].float().cpu()


def cross_entropy(logits: Tensor, input_ids: Tensor) -> float:
    """Mean nats a token of logits [T, vocabulary] for the next of input_ids [1, T]."""
    return F.cross_entropy(logits[:-1], input_ids[0, 1:]).item()


def available_memory(device: str) -> int:
    """Bytes that can be taken on `device`: GPU memory, or what the machine and its control group leave."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo, cgroup = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists():
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = 1024 * int(rows["MemAvailable"].split()[0])
    if (cgroup / "memory.max").exists() and (limit := (cgroup / "memory.max").read_text().strip()) != "max":
        available = min(available, int(limit) - int((cgroup / "memory.current").read_text()))
    if torch.device(device).type == "cuda":
        available = min(available, torch.cuda.mem_get_info(device)[0])  # it passes through the host
    return available
