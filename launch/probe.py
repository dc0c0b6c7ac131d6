"""What one machine is and has, as a line of JSON: `python -m brumby.launch.probe PATH ...`.

It runs on every host of a launch, over ssh; `brumby.launch.doctor` compares what they say.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "deepspeed", "transformers", "triton", "numpy", "wandb")
GPU_FIELDS = ("name", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total", "driver_version")


def probe(paths: list[str]) -> dict:
    """Facts about this machine.

    Args:
        paths: folders that the run needs; each is described by its free space, its JSON files and its folders'
            manifests: what a model or token shards are known by.
    """
    import torch

    import brumby

    package = Path(brumby.__file__).parent
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "code": _digest(package, _code(package)),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": _available_memory(),
        "compiler": shutil.which("g++"),
        "headers": Path(sysconfig.get_path("include"), "Python.h").exists(),
        "gpus": [_check_gpu(i) for i in range(torch.cuda.device_count())],
        "driver": _nvidia_smi(),
        "paths": {path: _describe(Path(path)) for path in paths},
        "clock": time.time(),  # last: it is compared with the asking machine's at the answer
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _code(package: Path) -> list[Path]:
    """The files of the package's folders: what stands beside them in a checkout is not it."""
    folders = [path for path in package.iterdir() if path.joinpath("__init__.py").is_file()]
    folders = [folder for folder in folders if folder.name != "tests"]
    return [p for folder in folders for kind in ("py", "yaml", "json") for p in folder.rglob(f"*.{kind}")]


def _digest(folder: Path, files: list[Path]) -> str:
    """Of the names and contents of a folder's files; those that vanish meanwhile do not count."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with contextlib.suppress(OSError):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _available_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def _check_gpu(index: int) -> dict:
    """A product of integers that every healthy GPU gets right, and how much memory is free."""
    import torch

    from brumby.kernels.tiles import path_for

    try:
        device = torch.device("cuda", index)
        a = torch.arange(4096, device=device, dtype=torch.float32).remainder(7).view(64, 64)
        right = torch.equal((a @ a).cpu(), a.cpu() @ a.cpu())
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
    except RuntimeError as error:
        return {"name": "GPU", "problem": str(error).splitlines()[0]}
    problem = None if right else "computes a wrong product"
    tiles = path_for(device).stem
    return {"name": name, "free_bytes": free, "total_bytes": total, "tiles": tiles, "problem": problem}


def _nvidia_smi() -> list[dict]:
    """What the driver says of each GPU; nothing without one."""
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
        lines = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(GPU_FIELDS, map(str.strip, line.split(",")), strict=True)) for line in lines]


def _describe(path: Path) -> dict | None:
    """Free bytes on the folder's file system, and a digest of its manifests; None if it is not there."""
    if not path.is_dir():
        return None
    files = [*path.glob("*.json"), *path.glob("*/manifest.json")]
    return {"free_bytes": shutil.disk_usage(path).free, "content": _digest(path, files)}


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1:])))
