"""Checkpoints of a run in `checkpoints/step-N/`: complete and verifiable, or not there at all.

Written aside by a thread on each rank while the training goes on, which waits only until the pieces are copied
to host memory. When all ranks are through, which they learn at the end of a step, the manifest with every file's
size and checksum is written, the folder gets its name, and `latest` is moved to it.
"""

import json
import logging
import os
import platform
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from brumby.convert.files import sync
from brumby.convert.pieces import MANIFEST, PiecesReader, file_name, manifest, problem, write
from brumby.train import partition
from brumby.train.config import RunConfig
from brumby.train.status import completed, step_of

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

MARGIN = 1.02  # of the bytes a checkpoint needs: headers, manifest, the file system's own


def problems(folder: Path, part: int = 0, num_parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint; `part` of `num_parts` looks at its share of the files."""
    described = manifest(folder)
    if described is None:
        return [f"{MANIFEST} is missing or damaged"]
    files = list(described["files"].items())[part::num_parts]
    return [found for name, expected in files if (found := problem(folder / name, expected))]


def remove(folder: Path) -> None:
    """Delete a checkpoint, which is none any more from the first moment on."""
    shutil.rmtree(_set_aside(folder))


def _set_aside(folder: Path) -> Path:
    return folder.rename(folder.with_name(f"unfinished-{folder.name}-removed"))


def versions() -> dict[str, str]:
    names = ("torch", "deepspeed", "transformers", "numpy")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


class Checkpoints:
    """One rank's side of the run's checkpoints. What is not private is called by all ranks together.

    `config.run_dir` must be one file system for all of them.
    """

    def __init__(self, config: RunConfig, engine: "DeepSpeedEngine", device: torch.device) -> None:
        self.config, self.engine, self.device = config, engine, device
        self.folder = config.run_dir / "checkpoints"
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.pieces = partition.pieces(engine)
        # Pages for gigabytes take the host seconds: while the first step is compiled nobody waits for them.
        self.host = ThreadPoolExecutor(1).submit(self._make_host)
        self.state: dict | None = None  # of the checkpoint being written
        self.writer: threading.Thread | None = None
        self.remover: threading.Thread | None = None  # of old ones: gigabytes take a file system a second
        self.written: dict | None = None
        self.error: str | None = None  # why the last one was not written

    def save(self, state: dict) -> None:
        """Begin to write a checkpoint; returns when the pieces are copied. `settle` finishes it.

        Args:
            state: what the trainer needs to go on, at least `step`; JSON.
        """
        self.wait()
        self.error = self._too_little_space()
        if self.error:
            if self.rank == 0:
                log.error("no checkpoint of step %d, training goes on: %s", state["step"], self.error)
            return
        self._copy_to_host()
        self.state, self.written = state, None
        unfinished = self._unfinished()
        if self.rank == 0:
            for old in self.folder.glob("unfinished-*"):
                shutil.rmtree(old, ignore_errors=True)
            unfinished.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        self.writer = threading.Thread(target=self._write, args=(unfinished / file_name(self.rank),))
        self.writer.start()

    @property
    def pending(self) -> bool:
        """Whether this rank is still writing."""
        return self.writer is not None and self.writer.is_alive()

    def settle(self, any_pending: bool) -> None:
        """Give the checkpoint its name if no rank is still writing."""
        if self.state is None or any_pending:
            return
        assert self.writer is not None
        self.writer.join()
        files: list = [None] * self.world_size
        dist.all_gather_object(files, self.written or self.error)
        self.error = next((found for found in files if isinstance(found, str)), None)
        outcome = [self.error]
        if self.rank == 0:
            if self.error is None:
                try:
                    self._commit({file_name(rank): file for rank, file in enumerate(files)})
                except OSError as error:
                    outcome = [str(error)]
            if outcome[0]:
                log.error("no checkpoint of step %d, training goes on: %s", self.state["step"], outcome[0])
                shutil.rmtree(self._unfinished(), ignore_errors=True)
        dist.broadcast_object_list(outcome, device=self.device)
        self.error = outcome[0]
        self.state = self.writer = None

    def wait(self) -> None:
        """Finish what is being written; then `error` says what went wrong, if it did."""
        if self.writer is not None:
            self.writer.join()
        dist.barrier()
        self.settle(any_pending=False)
        if self.remover is not None:
            self.remover.join()

    def load(self, before: int | None = None) -> dict | None:
        """Load the newest checkpoint that verifies, of a step below `before`; its state, None if there is none.

        Raises:
            ValueError: there are some and none verifies, or it is not of this model.
        """
        folders = [f for f in completed(self.config.run_dir) if before is None or step_of(f) < before]
        complaints = []
        for folder in reversed(folders):
            found: list = [None] * self.world_size
            dist.all_gather_object(found, problems(folder, self.rank, self.world_size))
            wrong = [problem for part in found for problem in part]
            if not wrong:
                return self._load(folder)
            complaints.append(f"{folder} is passed over: {'; '.join(dict.fromkeys(wrong))}")
            if self.rank == 0:
                log.warning(complaints[-1])
        if complaints:
            raise ValueError(
                "no checkpoint is whole; restore one, or begin another run\n  " + "\n  ".join(complaints)
            )
        return None

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints after `step`: the run went back to it."""
        if self.rank == 0:
            for folder in completed(self.config.run_dir):
                if step_of(folder) > step:
                    remove(folder)
        dist.barrier()

    def _load(self, folder: Path) -> dict:
        described = manifest(folder)
        assert described is not None
        changed = {name: old for name, old in described["versions"].items() if versions().get(name) != old}
        if changed and self.rank == 0:
            log.warning("%s was written with %s: results may differ in the last bits", folder.name, changed)
        state, reader = described["state"], PiecesReader(folder)
        partition.restore(self.engine, reader, state["updates"])
        if state["world_size"] == self.world_size:
            for name, (_, set_state) in self._generators().items():
                if (kept := reader.extra(self.rank, name)) is not None:
                    set_state(kept)
        return state

    def _too_little_space(self) -> str | None:
        elements = sum(len(tensor) for piece in self.pieces for tensor in piece.tensors.values())
        needed = torch.tensor(4 * elements, device=self.device)
        dist.all_reduce(needed)
        found: list[str | None] = [None]
        if self.rank == 0:
            free = shutil.disk_usage(self.folder).free
            if free < needed.item() * MARGIN:
                found = [
                    f"it needs {needed.item() * MARGIN / 1e9:.3g} GB and {self.folder} has {free / 1e9:.3g} free; "
                    f"free some, or keep fewer (keep_checkpoints is {self.config.keep_checkpoints})"
                ]
        dist.broadcast_object_list(found, device=self.device)
        return found[0]

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{kind}:{piece.name}:{piece.start}": tensor
            for piece in self.pieces
            for kind, tensor in piece.tensors.items()
        }

    def _make_host(self) -> dict[str, Tensor]:
        if pin := self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # this thread's
        return {key: torch.empty(tensor.shape, pin_memory=pin) for key, tensor in self._tensors().items()}

    def _copy_to_host(self) -> None:
        host = self.host.result()
        for key, tensor in self._tensors().items():
            host[key].copy_(tensor, non_blocking=True)
        for name, (get_state, _) in self._generators().items():
            host[f"{name}::0"] = get_state().cpu().contiguous()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _generators(self) -> dict:
        """This rank's random numbers: how to get and to set the generator's state."""
        found = {"rng_cpu": (torch.get_rng_state, torch.set_rng_state)}
        if self.device.type == "cuda":
            found["rng_cuda"] = (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
        return found

    def _write(self, path: Path) -> None:
        try:
            self.written = write(path, self.host.result())
        except Exception as error:  # a thread's own would be lost
            self.error = f"rank {self.rank}: {error}"

    def _unfinished(self) -> Path:
        assert self.state is not None
        return self.folder / f"unfinished-{self._name()}"

    def _name(self) -> str:
        assert self.state is not None
        return f"step-{self.state['step']:06d}"

    def _commit(self, files: dict[str, dict]) -> None:
        run_id = self.config.run_dir / "wandb" / "run-id"
        described = {
            "state": self.state,
            "files": files,
            "shapes": partition.shapes(self.engine),
            "versions": versions(),
            "wandb_id": run_id.read_text() if run_id.is_file() else None,
            "config": asdict(self.config),
        }
        unfinished, final = self._unfinished(), self.folder / self._name()
        _write_text(unfinished / MANIFEST, json.dumps(described, indent=2) + "\n")
        sync(unfinished)
        if final.exists():  # damaged, or the run went back since
            remove(final)
        unfinished.rename(final)
        sync(self.folder)
        _write_text(self.folder / "latest.tmp", final.name + "\n")
        (self.folder / "latest.tmp").rename(self.folder / "latest")
        every = self.config.keep_every
        kept = [f for f in completed(self.config.run_dir) if every is None or step_of(f) % every]
        if old := [_set_aside(folder) for folder in kept[: -self.config.keep_checkpoints]]:
            self.remover = threading.Thread(target=_delete, args=old)
            self.remover.start()


def _delete(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # the next checkpoint tries again


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
