"""Run directories: made whole, or taken up again."""

import json
import math
import os
import shutil
import time
from pathlib import Path

from omegaconf import DictConfig
from safetensors import safe_open

from brumby.data import Batches, check_divisible, load_tokenizer, schedule
from brumby.model import BrumbyConfig
from brumby.train import config as run_config
from brumby.train.checkpoint import problems
from brumby.train.config import RunConfig
from brumby.train.schedule import plan
from brumby.train.status import completed, step_of


def create_or_resume(config: DictConfig, num_ranks: int) -> Path:
    """The run directory that `config` describes: a new one, or the one that `resume` names.

    Raises:
        ValueError: the configuration, the model, the data or the number of ranks does not fit, or the
            run exists already. Nothing was written.
    """
    config = config.copy()
    resume = config.pop("resume")
    if resume is not None:
        run_dir = Path(resume)
        check(run_config.load(run_dir), num_ranks)
        return run_dir
    run = run_config.from_omegaconf(config)
    if run.run_dir.exists():
        raise ValueError(f"{run.run_dir} exists; go on with `resume={run.run_dir}`, or choose another name")
    check(run, num_ranks)
    check_space(run)
    return create(run)


def await_run(config: DictConfig) -> Path:
    """The run directory that the first node makes of the same `config`, or resumes.

    Raises:
        ValueError: it does not come within five minutes.
    """
    run_dir = Path(config.resume or f"{config.runs_dir}/{config.name}")
    deadline = time.monotonic() + 300
    while not (run_dir / "config.yaml").is_file():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{run_dir} is not there; either the first node refused it, or not all share its folder"
            )
        time.sleep(0.5)
    return run_dir


def check(run: RunConfig, num_ranks: int) -> None:
    """Everything that can be known to be wrong before a GPU is touched."""
    plan(run)
    config_file = Path(run.model) / "config.json"
    if not config_file.is_file():
        raise ValueError(
            f"model: {run.model} holds no checkpoint; make one with `brumby convert source=... out={run.model}`"
        )
    model = json.loads(config_file.read_text())
    if model.get("model_type") != "brumby":
        raise ValueError(
            f"model: {run.model} is a {model.get('model_type')!r} checkpoint; convert it with "
            f"`brumby convert source={run.model} out=...`"
        )
    if run.calibrate and not BrumbyConfig(**model).gate_bias:
        raise ValueError(
            f"calibrate: the gates of {run.model} have no biases to be set; convert it with gate_bias=true, or "
            "leave out calibrate"
        )
    for phase in schedule(run.data):
        check_divisible(phase.sequences_per_step, num_ranks, run.micro_batch)
    batches = Batches(run.data)
    if batches.vocab_size > model["vocab_size"]:
        raise ValueError(
            f"data: the tokenizer of {run.data.root} has {batches.vocab_size} words and the model "
            f"{model['vocab_size']}; prepare the data with the model's own tokenizer"
        )
    if (Path(run.model) / "tokenizer.json").is_file() and (
        load_tokenizer(run.model).sha256 != batches.tokenizer_sha256
    ):
        raise ValueError(
            f"data: the tokenizer that made {run.data.root} is not that of {run.model}; prepare the data with the "
            "model's own tokenizer"
        )


def check_space(run: RunConfig) -> None:
    """See that the disk holds the checkpoints that are kept, and the one that is being written beside them.

    Raises:
        ValueError: it does not.
    """
    files = [safe_open(path, "pt") for path in Path(run.model).glob("*.safetensors")]
    shapes = [file.get_slice(name).get_shape() for file in files for name in file.keys()]  # noqa: SIM118
    elements = sum(math.prod(shape) for shape in shapes)
    checkpoint = 12 * elements  # float32 weights and two moments
    needed = (run.keep_checkpoints + 1) * checkpoint
    parent = next(p for p in run.run_dir.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(
            f"{parent} has {free / 1e9:.3g} GB free; {run.keep_checkpoints + 1} checkpoints of "
            f"{checkpoint / 1e9:.3g} GB need {needed / 1e9:.3g} GB. Choose another runs_dir, or lower "
            "keep_checkpoints"
        )


def create(run: RunConfig) -> Path:
    """Make the run directory under a temporary name, then give it its own."""
    unfinished = run.run_dir.with_name(f".{run.run_dir.name}.{os.getpid()}")
    try:
        for folder in ("checkpoints", "wandb", "logs"):
            (unfinished / folder).mkdir(parents=True)
        run_config.save(run, unfinished / "config.yaml")
        unfinished.rename(run.run_dir)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return run.run_dir


def find_checkpoint(run_dir: Path, step: int | None = None) -> Path:
    """The run's checkpoint of `step`, or its newest.

    Raises:
        ValueError: there is none, and the message names those that are there; or it is damaged.
    """
    found = {step_of(folder): folder for folder in completed(run_dir)}
    if not found:
        raise ValueError(f"{run_dir} has no checkpoint yet")
    if step is not None and step not in found:
        raise ValueError(f"{run_dir} has no checkpoint of step {step}; it has {', '.join(map(str, found))}")
    folder = found[step if step is not None else max(found)]
    if wrong := problems(folder):
        raise ValueError(
            f"{folder} is damaged: {'; '.join(wrong)}. The run has steps {', '.join(map(str, found))}"
        )
    return folder
