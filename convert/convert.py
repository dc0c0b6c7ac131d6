"""Attention checkpoint in, Brumby checkpoint out.

Every tensor of the base is carried over under its own name; the gates are new and lie in a shard of their
own, so that the base's shards need not be written again.
"""

import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from safetensors import safe_open

from brumby import __version__
from brumby.model import BrumbyConfig

from .checkpoint import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    check_tensors,
    main_dtype,
    open_checkpoint,
    read_json,
)
from .errors import ConversionError
from .families import Shapes, brumby_config, carried_tensors, is_redundant
from .files import cast, save, share, workspace
from .gates import check_gate_init, gate_tensors, layer_sinks, norm_tensors
from .heads import widen
from .parity import PARITY_MODES, check_parity
from .report import print_report
from .sources import CARRIED_FILES, open_source

GATES_FILE = "model-gates.safetensors"
REPORT_FILE = "conversion.json"
SINK = 20.0  # docs/recovery.md
PACKAGES = ("torch", "transformers", "safetensors")


def convert(
    source: str | Path,
    out: str | Path,
    *,
    gate_init: str = "spread",
    gate_bias: bool = True,
    seed: int = 0,
    p: int = 2,
    add_qk_norm: bool = True,
    wide_heads: bool = False,
    sink: float | None = None,
    dtype: str | None = None,
    link: bool = True,
    revision: str | None = None,
    parity: str = "auto",
    device: str = "cpu",
    text: str | None = None,
    verbose: bool = True,
) -> dict[str, Any]:
    """Turn an attention checkpoint into a Brumby checkpoint in a new folder.

    `out` appears whole, with its report, or not at all. Host memory stays below one shard and 1 GB, but for
    the logits of the parity check, which loads each model in float32 if that fits, for a GGUF, which is
    loaded whole, and for wide heads, where it holds a shard as it is and as it becomes.

    Args:
        source: a folder of safetensors with config.json and tokenizer, a hub id, a GGUF file or its folder.
        out: the folder to make.
        gate_init: where the gates start, a name in `GATE_INITS`: spread, constant or normal.
        gate_bias: a bias on the gate projection. An addition to the published format, which has one only
            where `attention_bias` is true; without it gates start at 0.5, and only gate_init="normal" is
            left.
        seed: of random gate weights.
        p: the even power of the similarity.
        add_qk_norm: where the base has no QK norms, give them to retention; softmax goes without.
        wide_heads: double heads of 64 or less: with softmax the same function but for the queries' rounding.
        sink: a weight beside those of the tokens, whose value is zero, in units of what it is on average for
            random keys that are normalised: the config has it times the size of each layer's norms. By default
            20 where retention has QK norms and `p` is 2, else 0, as published.
        dtype: cast the floating point tensors to float32, bfloat16 or float16; by default they keep theirs.
        link: hard-link shards that do not change, where the file system can. The base and the new checkpoint
            then share those files: what writes into one writes into both. `False` copies them.
        revision: branch, tag or commit of a hub repository.
        parity: "full" compares tensors and logits with the base, "tensors" leaves the logits out, "auto" is
            full where a float32 model fits into memory.
        device: where the logits are computed.
        text: what the logits are compared on, instead of the packaged text.
        verbose: show progress and a table.

    Returns:
        The report, which is also `out`/conversion.json.

    Raises:
        ConversionError: an option, a source or a result that is not as it must be.
    """
    started = time.perf_counter()
    out = Path(out).expanduser().absolute()
    to_dtype = check_options(gate_init, gate_bias, sink, dtype, parity, device)
    with workspace(out) as work:
        folder = open_source(source, work, revision=revision, dtype=to_dtype)
        revision = folder.name if folder.parent.name == "snapshots" else revision
        plan = make_plan(folder, to_dtype, gate_bias=gate_bias, p=p)
        if wide_heads:
            narrow, folder = plan, work / "wide"
            widen(narrow.base, narrow.config, folder)
            plan = make_plan(folder, to_dtype, gate_bias=gate_bias, p=p)
            plan.notes.append(
                f"heads of {narrow.config.head_dim} are widened to {plan.config.head_dim}; tensors and logits are "
                "compared with the base so widened"
            )
        if add_qk_norm and not plan.config.qk_norm:
            plan.config.qk_norm = "retention"
            plan.notes.append("retention has QK norms, which the base has not: use_exp leaves them out")
        plan.config.sink = sinks(plan, sink)

        target = work / "target"
        # What was unpacked or widened is in the workspace, where nobody else has it: it can always be linked.
        link = link or folder.is_relative_to(work)
        files = carry_shards(plan, target, link=link, verbose=verbose)
        new = gate_tensors(plan.config, gate_init, dtype=plan.dtype, seed=seed)
        new |= norm_tensors(plan.config, dtype=plan.dtype)
        save(new, target / GATES_FILE)
        files.append({"file": GATES_FILE, "bytes": (target / GATES_FILE).stat().st_size, "how": "new"})
        write_index(plan.base, new, target)
        plan.config.save_pretrained(target)
        for path in chain.from_iterable(folder.glob(pattern) for pattern in CARRIED_FILES):
            if path.is_file():
                shutil.copyfile(path, target / path.name)

        num_carried = sum(torch.Size(shape).numel() for shape in plan.carried.values())
        num_new = sum(tensor.numel() for tensor in new.values())
        comparison = check_parity(
            plan.base,
            open_checkpoint(target),
            set(plan.carried),
            to_dtype,
            mode=parity,
            device=device,
            text=text,
        )
        report: dict[str, Any] = {
            "source": str(source),
            "revision": revision,
            "family": plan.model_type,
            "dtype": dtype_name(plan.dtype),
            "gates": {"init": gate_init, "bias": gate_bias, "seed": seed},
            "sink": plan.config.sink,
            "parameters": {"total": num_carried + num_new, "carried": num_carried, "new": num_new},
            "files": files,
            "parity": comparison,
            "notes": plan.notes,
            "versions": {"open-brumby": __version__} | {name: version(name) for name in PACKAGES},
            "seconds": round(time.perf_counter() - started, 3),
        }
        (target / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
    if verbose:
        print_report(report, out)
    return report


def check_options(
    gate_init: str, gate_bias: bool, sink: float | None, dtype: str | None, parity: str, device: str
) -> torch.dtype | None:
    """Raise ConversionError for an option that cannot be; otherwise the dtype of that name."""
    check_gate_init(gate_init, gate_bias)
    if sink is not None and (type(sink) not in (int, float) or not 0 <= sink < math.inf):
        raise ConversionError(f"sink is {sink!r}; expected a finite number, 0 or more")
    dtypes = {dtype_name(known): known for known in DTYPES.values()}
    if dtype is not None and dtype not in dtypes:
        raise ConversionError(
            f"dtype is {dtype!r}; expected one of {', '.join(dtypes)}, or none to keep the base's"
        )
    if parity not in PARITY_MODES:
        raise ConversionError(f"parity is {parity!r}; expected one of {', '.join(PARITY_MODES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConversionError(f"device is {device!r}, which cannot be used here: {error}") from error
    return dtypes[dtype] if dtype is not None else None


@dataclass(frozen=True)
class Plan:
    """A source that has been found convertible."""

    model_type: str
    config: BrumbyConfig
    base: Checkpoint
    carried: Shapes
    dtype: torch.dtype  # of the new checkpoint, or of most of it
    cast_to: torch.dtype | None
    notes: list[str]


def make_plan(folder: Path, cast_to: torch.dtype | None, *, gate_bias: bool, p: int) -> Plan:
    """Check a base by its config and its headers.

    Raises:
        ConversionError: anything that would stop the conversion.
    """
    raw = read_json(folder / "config.json")
    config = brumby_config(raw, gate_bias=gate_bias, p=p)
    base, carried = open_checkpoint(folder), carried_tensors(config)
    redundant = sorted(name for name in base.tensors if is_redundant(name, config))
    check_tensors(base, carried, set(redundant))
    names = [new_name(shard) for shard in base.shards] + [GATES_FILE]
    if len(set(names)) < len(names):
        raise ConversionError(f"{folder} has a shard named as a new one will be ({GATES_FILE}); rename it")
    found = DTYPES[main_dtype(base, carried)]
    dtype = config.dtype = cast_to or found
    notes = [f"{name} is not needed by the model; carried as it is" for name in redundant[:1]]
    said = raw.get("dtype", raw.get("torch_dtype"))
    if cast_to is None and said not in (None, dtype_name(found)):
        notes.append(
            f"config.json says {said} but the tensors are {dtype_name(found)}; carried as found "
            f"(dtype={said} would cast)"
        )
    dtypes = sorted({dtype_name(DTYPES[base.tensors[name].dtype]) for name in carried})
    if cast_to is None and len(dtypes) > 1:
        notes.append(f"the tensors have several dtypes, {' and '.join(dtypes)}; carried as found")
    return Plan(raw["model_type"], config, base, carried, dtype, cast_to, notes)


def sinks(plan: Plan, sink: float | None) -> float | list[float]:
    """The config's `sink` for `convert`'s.

    Raises:
        ConversionError: a sink for retention without QK norms.
    """
    config = plan.config
    if sink is None:
        sink = SINK if config.qk_norm and config.p == 2 else 0.0
    if sink and not config.qk_norm:
        raise ConversionError(
            f"sink is {sink}, but retention has no QK norms here, without which weights may have any size; "
            "use sink=0 or add_qk_norm=true"
        )
    if not sink or config.qk_norm == "retention":  # new norms are ones
        return float(sink)
    layers = range(config.num_hidden_layers)
    q, k = ([read(plan.base, f"model.layers.{i}.self_attn.{x}_norm.weight") for i in layers] for x in "qk")
    return layer_sinks(sink, zip(q, k, strict=True), config.p)


def read(base: Checkpoint, name: str) -> torch.Tensor:
    with safe_open(base.path(base.tensors[name].shard), "pt") as file:
        return file.get_tensor(name)


def carry_shards(plan: Plan, target: Path, *, link: bool, verbose: bool) -> list[dict[str, Any]]:
    """Bring the base's shards into `target`: shared where no tensor changes, cast elsewhere.

    Returns:
        A row a shard: file, bytes, how.
    """
    base, files = plan.base, []
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True, disable=not verbose) as progress:
        task = progress.add_task("", total=sum(base.path(shard).stat().st_size for shard in base.shards))
        advance = partial(progress.advance, task)
        for shard in base.shards:
            progress.update(task, description=shard)
            path, new, tensors = base.path(shard), target / new_name(shard), base.tensors_of(shard)
            changed = {
                name
                for name, tensor in tensors.items()
                if name in plan.carried and plan.cast_to not in (None, DTYPES[tensor.dtype])
            }
            if changed and plan.cast_to is not None:
                cast(path, new, tensors, changed, plan.cast_to, advance)
                how = "cast"
            else:
                how = share(path, new, link=link, advance=advance)
            files.append({"file": new.name, "bytes": new.stat().st_size, "how": how})
    return files


def write_index(base: Checkpoint, gates: Mapping[str, torch.Tensor], target: Path) -> None:
    """model.safetensors.index.json over the base's shards and the gates."""
    shards = {name: new_name(tensor.shard) for name, tensor in base.tensors.items()}
    shards |= dict.fromkeys(gates, GATES_FILE)
    total_size = sum((target / shard).stat().st_size for shard in set(shards.values()))
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(shards.items()))}
    (target / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def new_name(shard: str) -> str:
    """A shard's name in the new checkpoint: beside a model.safetensors transformers reads no index."""
    return "model-base.safetensors" if shard == SINGLE_FILE else shard


def dtype_name(dtype: torch.dtype) -> str:
    """As config.json spells it: bfloat16."""
    return str(dtype).removeprefix("torch.")
