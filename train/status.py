"""What a run shows whoever started it: its checkpoints, and what becomes of each rank (`logs/rank-K.json`)."""

import contextlib
import json
import os
import re
import socket
import time
from pathlib import Path

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_INTERRUPTED = 130


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def completed(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first. Unfinished ones have another name and are not among them."""
    folders = (run_dir / "checkpoints").glob("step-*")
    return sorted((f for f in folders if re.fullmatch(r"step-\d+", f.name)), key=step_of)


class Status:
    """One rank's file. It says "running" until the rank ends: one that was killed leaves it so.

    Args:
        run_dir: the run's directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.path = run_dir / "logs" / f"rank-{self.rank:05d}.json"
        self.write("running")

    def write(self, state: str, code: int | None = None, error: str = "") -> None:
        """`code` is the exit code of a rank that ends, and None before."""
        row = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "state": state,
            "code": code,
            "error": error,
            "time": time.time(),
        }
        temporary = self.path.with_suffix(".tmp")
        with contextlib.suppress(OSError):  # a full disk must not end a rank
            self.path.parent.mkdir(exist_ok=True)
            temporary.write_text(json.dumps(row) + "\n")
            temporary.rename(self.path)

    def beat(self) -> None:
        """Show that this rank makes progress: the file's time of change."""
        with contextlib.suppress(OSError):
            os.utime(self.path)


def read(run_dir: Path) -> list[dict]:
    """All ranks' rows, by rank."""
    rows = []
    for path in sorted((run_dir / "logs").glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError):
            rows.append(json.loads(path.read_text()))
    return rows
