"""Where a run's figures go: `metrics.jsonl` always, and wandb if it can."""

import json
import logging
import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from brumby.train.config import RunConfig

log = logging.getLogger(__name__)

FINISH_SECONDS = 60


class MetricsFile:
    """`metrics.jsonl`: one JSON object a step, flushed as it is written.

    On a full disk rows wait in memory for space; the training goes on.

    Args:
        path: the file; it is made if it is not there.
        steps: keep the rows of the first `steps` steps and drop what an interrupted run wrote later.
    """

    def __init__(self, path: Path, steps: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= steps]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.rename(path)
        self.file = path.open("ab", buffering=0)
        self.waiting = b""

    def write(self, row: dict) -> None:
        was_waiting = bool(self.waiting)
        self.waiting += json.dumps(row).encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if not was_waiting:
                log.warning("%s: rows wait for space: %s", self.file.name, error)


def read_metrics(path: Path) -> list[dict]:
    """The rows of a `metrics.jsonl`; a last line cut off by a crash is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Wandb:
    """A wandb run that outlives resumes and never stops the training.

    Its id is kept in `wandb/run-id` of the run directory. The first failure of any call is logged,
    and nothing more is sent.
    """

    def __init__(self, config: RunConfig, extra: dict) -> None:
        self.run: Any = None
        mode = config.wandb.mode
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") or _netrc_has_key() else "offline"
        if mode != "disabled":
            self._try(lambda: self._init(config, extra, mode))

    def _init(self, config: RunConfig, extra: dict, mode: str) -> None:
        import wandb

        folder = config.run_dir / "wandb"
        folder.mkdir(exist_ok=True)
        id_file = folder / "run-id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            name=config.name,
            id=id_file.read_text().strip(),
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=str(config.run_dir),
            config=asdict(config) | extra,
            settings=wandb.Settings(silent=True),
        )
        self.run.define_metric("tokens_seen")
        self.run.define_metric("*", step_metric="tokens_seen")

    def log(self, row: dict) -> None:
        """One step's figures; all are drawn against `tokens_seen`."""
        if self.run is not None:
            sent = {name: value for name, value in row.items() if name != "sample_ids"}  # no list of words there
            self._try(lambda: self.run.log(sent))

    def log_picture(self, path: Path) -> None:
        if self.run is not None:
            self._try(lambda: self._picture(path))

    def _picture(self, path: Path) -> None:
        import wandb

        self.run.log({"loss_curve": wandb.Image(str(path))})

    def finish(self, summary: dict) -> None:
        if self.run is not None:
            self._try(lambda: self.run.summary.update(summary))
        if self.run is not None:
            # With its server gone, wandb would try for hours to send the rest; `wandb sync` can do that later.
            thread = threading.Thread(target=lambda: self._try(self.run.finish), daemon=True)
            thread.start()
            thread.join(FINISH_SECONDS)
            if thread.is_alive():
                log.warning("wandb did not take all within %d s; `wandb sync` sends the rest", FINISH_SECONDS)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            log.warning("wandb failed and is off for the rest of this run (training goes on): %s", error)
            self.run = None


def _netrc_has_key() -> bool:
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
