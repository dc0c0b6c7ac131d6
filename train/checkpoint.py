"""Checkpoints of a run: DeepSpeed's files in `checkpoints/step-N/`, complete or not there at all."""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def completed(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first. Unfinished ones have another name and are not among them."""
    folders = (run_dir / "checkpoints").glob("step-*")
    return sorted((f for f in folders if re.fullmatch(r"step-\d+", f.name)), key=step_of)


def save(engine: "DeepSpeedEngine", run_dir: Path, state: dict, keep: int) -> None:
    """Write a checkpoint beside the others, then give it its name; drop all but the newest `keep`.

    All ranks call this; `run_dir` must be one file system for all of them.

    Args:
        state: what the trainer needs to go on, at least `step`; saved as JSON too, for people.
    """
    folder = run_dir / "checkpoints"
    name = f"step-{state['step']:06d}"
    unfinished = f"unfinished-{name}"
    if dist.get_rank() == 0:
        shutil.rmtree(folder / unfinished, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=unfinished, client_state=state, save_latest=False)
    if dist.get_rank() == 0:
        (folder / unfinished / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        (folder / unfinished).rename(folder / name)
        for script in folder.glob("zero_to_*.py"):  # DeepSpeed adds its converter; `brumby export` is ours
            script.unlink()
        for old in completed(run_dir)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_newest(engine: "DeepSpeedEngine", run_dir: Path) -> dict | None:
    """Load the newest checkpoint into `engine`; its state, or None if the run has no checkpoint yet.

    Raises:
        ValueError: it was written with another number of ranks.
        RuntimeError: DeepSpeed could not load it.
    """
    folders = completed(run_dir)
    if not folders:
        return None
    state = json.loads((folders[-1] / "state.json").read_text())
    if state["world_size"] != dist.get_world_size():
        raise ValueError(
            f"{folders[-1]} was written by {state['world_size']} ranks and this run has {dist.get_world_size()}; "
            f"resume with {state['world_size']}"
        )
    path, client_state = engine.load_checkpoint(str(run_dir / "checkpoints"), tag=folders[-1].name)
    if path is None:
        raise RuntimeError(f"DeepSpeed could not load {folders[-1]}")
    return {key: client_state[key] for key in state}
