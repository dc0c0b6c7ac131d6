"""What the machines of a run have and lack: each is asked, and compared with the first."""

import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from brumby.launch.hosts import ssh

if TYPE_CHECKING:
    from brumby.launch.cluster import LaunchConfig

CLOCK_SECONDS = 5.0  # tolerated; the answer's way here counts as well
FREE_BYTES = 10**9  # for logs, metrics and wandb's files; checkpoints are checked by their own size
BYTES_PER_PARAMETER = 18  # bf16 weight and gradient, float32 master and moments, and two for activations


@dataclass
class Finding:
    """One line of the table. `advice` is empty where all is well."""

    host: str
    subject: str
    found: str
    advice: str = ""


def examine(config: "LaunchConfig", paths: list[str]) -> list[Finding]:
    """Ask every host what it has, and compare them with the first.

    Args:
        paths: folders that every host must see alike: the model, the token shards, the runs.
    """
    slots = config.slots | config.spares
    hosts = ["localhost"] if config.launcher == "torchrun" else list(slots)
    with ThreadPoolExecutor(max_workers=32) as pool:
        answers = list(pool.map(lambda host: _ask(config, host, paths), hosts))
    have_gpus = any(answer["gpus"] for answer in answers if not isinstance(answer, str))
    findings: list[Finding] = []
    first: dict | None = None
    for host, answer in zip(hosts, answers, strict=True):
        if isinstance(answer, str):
            findings.append(
                Finding(host, "answer", answer, "see that ssh, directory, Python and brumby are there")
            )
            continue
        first = first or answer
        findings += _own(host, answer, slots.get(host, 1) if have_gpus else 0)
        findings += _compared(host, answer, first)
    return findings


def _ask(config: "LaunchConfig", host: str, paths: list[str]) -> dict | str:
    """A host's answer with the seconds its clock is `ahead`, or why there is none."""
    argv = [sys.executable, "-P", "-m", "brumby.launch.probe", *paths]
    if config.multi_host:
        argv = [*ssh(host), f"cd {shlex.quote(os.getcwd())} && {shlex.join(argv)}"]
    elif config.launcher == "slurm":
        argv = ["srun", "--nodes=1", "--ntasks=1", f"--nodelist={host}", "--overlap", "--cpu-bind=none", *argv]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return "no answer within 300 s"
    now = time.time()
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return answer | {"ahead": answer["clock"] - now}


def _own(host: str, answer: dict, num_ranks: int) -> list[Finding]:
    """What can be said of one host alone. `num_ranks` is 0 where no host has GPUs."""
    findings = []

    def add(subject: str, found: str, is_well: bool, advice: str) -> None:
        findings.append(Finding(host, subject, found, "" if is_well else advice))

    gpus = answer["gpus"]
    if gpus:
        enough = len(gpus) >= num_ranks
        add("GPUs", f"{len(gpus)} x {gpus[0]['name']}", enough, f"{num_ranks} are needed; lower slots")
        for i, gpu in enumerate(gpus):
            if gpu["problem"]:
                add(f"GPU {i}", gpu["problem"], False, "take the host out, reset or replace the GPU")
            elif gpu["free_bytes"] < 0.9 * gpu["total_bytes"]:
                used = (gpu["total_bytes"] - gpu["free_bytes"]) / 1e9
                add(f"GPU {i}", f"{used:.1f} GB in use", False, "another process is there: nvidia-smi names it")
        for i, gpu in enumerate(answer["driver"]):
            errors = gpu["ecc.errors.uncorrected.volatile.total"]
            if errors.isdigit() and int(errors):
                add(f"GPU {i}", f"{errors} uncorrected memory errors", False, "reset the GPU or take the host out")
        tables = sorted({gpu["tiles"] for gpu in gpus if not gpu["problem"]})
        untuned = " (not tuned for this GPU; `brumby tune` writes its table)" if "default" in tables else ""
        add("tiles", ", ".join(tables) + untuned, True, "")
    elif answer["driver"]:
        add("GPUs", "the driver sees them and PyTorch does not", False, "install PyTorch for this CUDA version")
    elif num_ranks:
        add("GPUs", "none", False, "other hosts have some; see what `nvidia-smi` says there")
    else:
        add("GPUs", f"none; trains on {answer['cores']} CPU cores", True, "")
    memory = sum(gpu.get("free_bytes", 0) for gpu in gpus) or answer["memory_bytes"]
    parameters = memory / BYTES_PER_PARAMETER
    where = "free GPU memory" if gpus else "free memory"
    add("memory", f"{memory / 1e9:.0f} GB {where}: about {parameters / 1e9:.2g}B parameters", True, "")
    add("compiler", answer["compiler"] or "no g++", bool(answer["compiler"]), "apt-get install g++")
    add("Python.h", "found" if answer["headers"] else "missing", answer["headers"], "apt-get install python3-dev")
    return findings


def _compared(host: str, answer: dict, first: dict) -> list[Finding]:
    """What must be the same on every host, or as it is on the first."""
    findings = []

    def same(subject: str, found, expected, advice: str) -> None:
        findings.append(Finding(host, subject, str(found), "" if found == expected else advice))

    same("Python", answer["python"], first["python"], f"{first['host']} has {first['python']}; install it")
    wrong = {n: v for n, v in answer["versions"].items() if v != first["versions"][n]}
    expected = ", ".join(f"{name} {first['versions'][name]}" for name in wrong)
    shown = ", ".join(f"{name} {version}" for name, version in (wrong or answer["versions"]).items() if version)
    findings.append(Finding(host, "packages", shown, f"{first['host']} has {expected}" if wrong else ""))
    same("code", answer["code"], first["code"], f"another checkout than on {first['host']}; bring it up to date")
    late = abs(answer["ahead"]) > CLOCK_SECONDS
    clock = f"{answer['ahead']:+.1f} s"
    findings.append(Finding(host, "clock", clock, "set it (chrony, NTP): logs would not agree" if late else ""))
    for path, described in answer["paths"].items():
        if described is None:
            findings.append(Finding(host, path, "not there", "every host needs it at this path"))
            continue
        if first["paths"][path] is not None and described["content"] != first["paths"][path]["content"]:
            findings.append(Finding(host, path, "differs", f"{first['host']} has other files; share the folder"))
        free = f"{described['free_bytes'] / 1e9:.0f} GB free"
        findings.append(Finding(host, path, free, "free some" if described["free_bytes"] < FREE_BYTES else ""))
    return findings
