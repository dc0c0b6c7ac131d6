"""What the machines of a run can do and what they lack, in words: `brumby doctor`, and before every launch."""

import json
import shutil
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from brumby.launch.cluster import LaunchConfig, launch
from brumby.launch.examine import Finding

LEAST_NCCL = 5.0  # GB/s: below it, NCCL has found no fast network between the hosts


def all_reduce(config: LaunchConfig, runs_dir: Path) -> list[Finding]:
    """Let all ranks add up numbers, through the launcher that a run would use."""
    if config.num_ranks == 1:
        return []
    subject, where = f"all-reduce of {config.num_ranks} ranks", config.launcher
    runs_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=runs_dir))
    try:
        (folder / "config.yaml").write_text("step_timeout: 120\n")
        config.module, config.restarts = "brumby.launch.bandwidth", 0
        code = launch(config, folder)
        if code:
            return [Finding(where, subject, f"failed with exit code {code}", "the output above says why")]
        found = json.loads((folder / "bandwidth.json").read_text())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    slow = found["backend"] == "nccl" and found["gigabytes_per_second"] < LEAST_NCCL
    advice = "NCCL uses no fast network; NCCL_DEBUG=INFO says which, NCCL_SOCKET_IFNAME names one" if slow else ""
    return [Finding(where, subject, f"{found['gigabytes_per_second']:.2f} GB/s ({found['backend']})", advice)]


def show(findings: list[Finding]) -> None:
    table = Table("host", "what", "found", "what to do", box=None, header_style="bold", pad_edge=False)
    for finding in findings:
        style = "red" if finding.advice else None
        table.add_row(finding.host, finding.subject, finding.found, finding.advice, style=style)
    Console(soft_wrap=True).print(table)


def require(findings: list[Finding]) -> None:
    """Go on if all is well.

    Raises:
        ValueError: with a line for everything that is not.
    """
    lines = [f"{f.host}: {f.subject}: {f.found}; {f.advice}" for f in findings if f.advice]
    if lines:
        raise ValueError("not all hosts are ready; nothing was started\n  " + "\n  ".join(lines))
