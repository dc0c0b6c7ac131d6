"""A rank that real things happen to: the module that `brumby launch` starts in place of `brumby.train`.

`RUN/faults.json` lists them: `{"kind", "rank", "step", ...}`. Each happens once, whatever is started again, but
"nan" and "spike", which are in the data and come back. The process is really killed, the disk really full; only
losses are made bad by hand.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from brumby.train import __main__ as main
from brumby.train import checkpoint, trainer
from brumby.train.objective import Objective


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Faults:
    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.rank = run_dir, int(os.environ["RANK"])
        self.faults = json.loads((run_dir / "faults.json").read_text())
        self.step = -1

    def take(self, *kinds: str) -> dict | None:
        """The fault of one of these kinds that is due on this rank; it does not come again."""
        for i, fault in enumerate(self.faults):
            marker = self.run_dir / f"fault-{i}"
            due = fault["kind"] in kinds and fault["rank"] == self.rank and self.step >= fault["step"]
            if due and not marker.exists():
                marker.touch()
                return fault
        return None

    def at_step(self, step: int) -> None:
        self.step = step
        if fault := self.take("kill"):
            threading.Timer(fault["delay"], die).start()
        if self.take("hang"):
            time.sleep(3600)
        if self.take("truncate"):
            newest = checkpoint.completed(self.run_dir)[-1]
            os.truncate(newest / "pieces-00001.safetensors", 1000)
            die()
        if self.take("raise"):
            raise RuntimeError("a fault of this rank")
        if fault := self.take("signal"):
            os.kill(os.getpid(), getattr(signal, fault["name"]))

    def factor(self) -> float:
        """What this step's loss is multiplied by on this rank."""
        due = {f["kind"] for f in self.faults if f["rank"] == self.rank and f["step"] == self.step}
        return float("nan") if "nan" in due else 1000.0 if "spike" in due else 1.0

    def write(self, path: Path, tensors) -> dict:
        if self.take("kill_in_write"):
            with path.open("wb") as file:
                file.write(next(iter(tensors.values())).numpy().tobytes()[:1000])
                file.flush()
                die()
        if self.take("slow_write"):
            time.sleep(3)
        if self.take("fill_disk"):
            with (path.parents[1] / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1 << 16))
        return write(path, tensors)


write = checkpoint.write


def install(faults: Faults) -> None:
    train_step, forward, commit = trainer.Trainer.train_step, Objective.forward, checkpoint.Checkpoints._commit
    check_ranks = trainer.check_ranks

    def faulty_train_step(self, step: int) -> dict:
        faults.at_step(step)
        row = train_step(self, step)
        batches = self.batches.micro_batches(step, self.rank, self.world_size, self.config.micro_batch)
        ids = [name for batch in batches for name in batch.sample_ids]
        with (
            contextlib.suppress(OSError),
            (faults.run_dir / f"samples-{self.rank}.jsonl").open("a") as file,
        ):
            file.write(json.dumps({"step": step, "ids": ids}) + "\n")
        filler = self.checkpoints.folder / "filler"
        if self.rank == 0 and filler.exists() and faults.take("free_disk"):
            filler.unlink()
        return row

    def faulty_forward(self, *args, **kwargs):
        return tuple(loss * faults.factor() for loss in forward(self, *args, **kwargs))

    def faulty_commit(self, files) -> None:
        if faults.take("kill_in_commit"):
            (self._unfinished() / "manifest.json").write_text("{")
            die()
        commit(self, files)

    def faulty_check(weights, step: int, device) -> None:
        if faults.take("flip"):
            weights[0].view(-1)[0] += 1e-3
        check_ranks(weights, step, device)

    trainer.Trainer.train_step, Objective.forward = faulty_train_step, faulty_forward
    checkpoint.Checkpoints._commit, checkpoint.write, trainer.check_ranks = (
        faulty_commit,
        faults.write,
        faulty_check,
    )


if __name__ == "__main__":
    install(Faults(Path(sys.argv[1])))
    main.main()
