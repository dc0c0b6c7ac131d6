"""Runs that real things happen to: they finish by themselves and compute what the undisturbed run computes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import cast

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from brumby.convert.pieces import PiecesReader, manifest
from brumby.data import Batches
from brumby.launch.runs import create_or_resume, find_checkpoint
from brumby.model import BrumbyForCausalLM
from brumby.train.config import load
from brumby.train.objective import Objective
from brumby.train.status import completed, step_of
from brumby.train.tracking import read_metrics
from tests.conftest import MUON, WITH_TESTS
from tests.launch.conftest import missing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LAUNCH = """
import sys
from pathlib import Path
from brumby.launch.cluster import LaunchConfig, launch

run_dir, ranks = sys.argv[1:]
config = LaunchConfig(launcher="torchrun", ranks_per_host=int(ranks), module="faults")
sys.exit(launch(config, Path(run_dir)))
"""


def start(run_dir: Path, faults: list[dict], ranks: int = 2, env: dict | None = None) -> subprocess.Popen:
    """Launch a run on this machine, with faults."""
    (run_dir / "faults.json").write_text(json.dumps(faults))
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(run_dir), str(ranks)],
        env=os.environ | {"PYTHONPATH": WITH_TESTS, "OMP_NUM_THREADS": "1"} | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launch(run_dir: Path, faults: list[dict], expected: int = 0, **options) -> str:
    """Launch and wait; the output of the launch, or a failure that shows it."""
    process = start(run_dir, faults, **options)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == expected, output
    return output


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    reader = PiecesReader(find_checkpoint(run_dir))
    return {name: reader.weight(name) for name in reader.shapes}


def updates(checkpoint: Path) -> int:
    described = manifest(checkpoint)
    assert described
    return described["state"]["updates"]


def assert_same(run_dir: Path, undisturbed: Path) -> None:
    """To the bit: every step's loss and the final weights."""
    assert losses(run_dir) == losses(undisturbed)
    found, expected = weights(run_dir), weights(undisturbed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_training_goes_on_while_a_checkpoint_is_written(make_run, trained, long_data):
    """The weights in it are those of its step, though many steps pass before they are on the disk."""
    options = {"data": long_data, "zero_stage": 2}
    undisturbed, run_dir = trained(**options), make_run(**options, checkpoint_every=10, keep_checkpoints=9)
    launch(run_dir, [{"kind": "slow_write", "rank": 1, "step": 9}])
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert rows[10]["checkpoint_seconds"] < 1.0
    assert rows[20]["checkpoint_seconds"] > 0.0
    one, two = (PiecesReader(folder / "checkpoints" / "step-000010") for folder in (run_dir, undisturbed))
    for kind, name in one.found:
        values = [reader.read(kind, name, 0, math.prod(one.shapes[name])) for reader in (one, two)]
        assert torch.equal(*values), (kind, name)
    assert_same(run_dir, undisturbed)


def test_ranks_that_outlive_their_launcher_are_ended(make_run, trained, long_data):
    """And nobody else may train the run meanwhile."""
    options = {"data": long_data, "zero_stage": 3, "precision": "bf16"}
    undisturbed, run_dir = trained(**options), make_run(**options)
    process = start(run_dir, [{"kind": "hang", "rank": 1, "step": 7}])
    while len(losses(run_dir)) < 7 and process.poll() is None:
        time.sleep(0.02)
    assert "is being trained by processes" in launch(run_dir, [], expected=1)
    (torchrun,) = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(torchrun), signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "starting again;" in output
    assert_same(run_dir, undisturbed)


def test_what_was_wrong_is_said(make_run, long_data):
    """The newest checkpoint is cut off and a rank killed; another fails by itself."""
    run_dir = make_run(data=long_data)
    faults = [{"kind": "truncate", "rank": 0, "step": 28}, {"kind": "raise", "rank": 1, "step": 40}]
    output = launch(run_dir, faults)
    assert "step-000025 is passed over: pieces-00001.safetensors has 1000 bytes and should have" in output
    lines = output.splitlines()
    first = next(i for i, line in enumerate(lines) if "was killed without a word" in line)
    assert lines[first].startswith("rank 0 on")
    assert lines[first + 1].startswith("rank 1 on")  # what it met with comes after the cause
    assert "starting again; the newest checkpoint is of step" in "".join(lines[first + 2 :])
    failed = [line for line in lines if line.startswith("rank") and "failed at" in line]
    assert "rank 1 on" in failed[1]
    assert "RuntimeError: a fault of this rank" in failed[1]
    assert "a fault of this rank" in (run_dir / "logs" / "rank-00001.log").read_text()


@pytest.mark.parametrize(
    ("zero_stage", "precision", "options"),
    [
        *[(0, "fp32", {}), (0, "bf16", {}), (1, "bf16", {}), (2, "fp32", {}), (2, "bf16", {}), (3, "bf16", {})],
        *[(2, "bf16", MUON), (3, "fp32", MUON)],
    ],
)
def test_a_bad_step_changes_nothing(make_run, zero_stage, precision, options):
    """The last two of twelve are not applied: weights, moments and number of updates stay as after the tenth."""
    stability = {"window": 4, "compare_every": 1}
    options = options | {"zero_stage": zero_stage, "precision": precision, "stability": stability}
    run_dir = make_run(**options, checkpoint_every=10)
    bad = [{"kind": "spike", "rank": 1, "step": 10}, {"kind": "nan", "rank": 0, "step": 11}]
    launch(run_dir, bad)
    before, after = (run_dir / "checkpoints" / name for name in ("step-000010", "step-000012"))
    assert [updates(folder) for folder in (before, after)] == [10, 10]
    one, two = PiecesReader(before), PiecesReader(after)
    for kind, name in one.found:
        values = [reader.read(kind, name, 0, math.prod(one.shapes[name])) for reader in (one, two)]
        assert torch.equal(*values), (kind, name)
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if "not_applied" in row] == [11, 12]
    assert [row["skipped_steps"] for row in rows[-3:]] == [0, 1, 2]
    assert "deviations above" in rows[10]["not_applied"]
    (batch,) = Batches(load(run_dir).data).micro_batches(11, 0, 1, 8)
    assert rows[11]["sample_ids"] == batch.sample_ids
    assert rows[11]["loss"] is None


def test_bad_data_is_jumped_over(make_run, long_data):
    """Three bad steps in a row, 13 to 15: back to step 10, on with step 16."""
    stability = {"max_in_a_row": 3}
    run_dir = make_run(data=long_data, stability=stability, zero_stage=3, keep_checkpoints=20)
    launch(run_dir, [{"kind": "nan", "rank": 1, "step": step} for step in (12, 13, 14)])
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert [(row["step"], row["returned_to"]) for row in rows if "returned_to" in row] == [(15, 10)]
    assert updates(find_checkpoint(run_dir)) == 10 + 45
    config = load(run_dir)
    model = BrumbyForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    reader = PiecesReader(run_dir / "checkpoints" / "step-000010")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.weight(name))
        (batch,) = Batches(config.data).micro_batches(15, 0, 1, 8)
        _, loss = Objective(model)(batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens)
    assert rows[15]["loss"] == pytest.approx(loss.item() / rows[15]["valid_tokens"], abs=1e-5)


def test_a_run_that_goes_back_again_and_again_stops(make_run, long_data):
    stability = {"max_in_a_row": 2, "max_returns": 1}
    run_dir = make_run(data=long_data, stability=stability)
    output = launch(run_dir, [{"kind": "nan", "rank": 0, "step": step} for step in range(8, 60)], expected=3)
    assert "steps 11 to 12 could not be applied" in output
    assert "after 1 returns to a checkpoint" in output
    assert "starting again" not in output
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if "not_applied" in row] == [9, 10, 11, 12]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_ranks_that_differ_stop_the_run(make_run, zero_stage):
    run_dir = make_run(zero_stage=zero_stage, stability={"compare_every": 3})
    output = launch(run_dir, [{"kind": "flip", "rank": 1, "step": 5}], expected=3)
    assert "after step 6 the weights of ranks [1] differ" in output
    assert [step_of(folder) for folder in completed(run_dir)] == [5]


def test_other_ranks_and_stages_see_the_same_samples(make_run, trained, elastic):
    """2 ranks under ZeRO-3, then 1 under ZeRO-1, 3 under ZeRO-0, 2 under ZeRO-2; stopped by signals on the way."""
    undisturbed = trained(**elastic)
    run_dir = make_run(**elastic | {"zero_stage": 3}, checkpoint_every=100)
    stops = [
        {"kind": "signal", "name": "SIGTERM", "rank": 1, "step": 9},
        {"kind": "signal", "name": "SIGUSR1", "rank": 0, "step": 19},
        {"kind": "signal", "name": "SIGTERM", "rank": 2, "step": 29},
    ]
    launch(run_dir, stops, ranks=2, expected=130)
    set_stage(run_dir, 3, 1)
    launch(run_dir, stops, ranks=1, expected=130)
    set_stage(run_dir, 1, 0)
    launch(run_dir, stops, ranks=3, expected=130)
    set_stage(run_dir, 0, 2)
    launch(run_dir, stops, ranks=2)
    assert losses(run_dir) == pytest.approx(losses(undisturbed), abs=1e-4)
    seen = defaultdict(list)
    for path in sorted(run_dir.glob("samples-*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            seen[row["step"]].append(row["ids"])
    batches = Batches(load(run_dir).data)
    assert [len(seen[step]) for step in range(batches.num_steps)] == [2] * 10 + [1] * 10 + [3] * 10 + [2] * 10
    for step, by_rank in seen.items():
        (batch,) = batches.micro_batches(step, 0, 1, 12)
        in_order = [name for micro_batch in zip(*by_rank, strict=True) for name in micro_batch]
        assert in_order == batch.sample_ids


def set_stage(run_dir: Path, old: int, new: int) -> None:
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace(f"zero_stage: {old}", f"zero_stage: {new}"))


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of six megabytes; a checkpoint has 0.3."""
    if os.geteuid() != 0:
        missing("needs root, to mount a file system")
    folder = tmp_path / "small_disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_and_no_wandb(make_run, trained, long_data, small_disk):
    """Full in the middle of the checkpoint of step 10 until step 22, and from step 52 until the run has failed."""
    options = {"data": long_data, "zero_stage": 2}
    undisturbed = trained(**options)
    run_dir = make_run(**options, runs_dir=str(small_disk), wandb={"mode": "online"})
    fill = [{"kind": "fill_disk", "rank": 0, "step": step} for step in (8, 52)]
    free = {"kind": "free_disk", "rank": 0, "step": 22}
    refusing = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "3"}
    process = start(run_dir, [*fill, free], env=refusing)
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "starting again" in line:
            (run_dir / "checkpoints" / "filler").unlink()
    output = "".join(lines)
    assert process.wait() == 0, output
    assert "no checkpoint of step 10, training goes on: rank" in output
    assert "No space left on device" in output
    assert "no checkpoint of step 15, training goes on: it needs" in output
    assert "the checkpoint of step 60 is not written: it needs" in output
    assert "starting again; the newest checkpoint is of step 50" in output
    assert "wandb failed and is off" in output
    assert_same(run_dir, undisturbed)


def test_a_disk_too_small_is_refused_before_anything_is_written(make_run, small_disk):
    """31 checkpoints of 0.3 MB do not fit on 6."""
    config = cast(DictConfig, OmegaConf.load(make_run() / "config.yaml"))
    config.update({"runs_dir": str(small_disk), "keep_checkpoints": 30, "resume": None})
    with pytest.raises(ValueError, match=r"31 checkpoints of .* GB need .* GB\. Choose another runs_dir"):
        create_or_resume(config, 1)
    assert os.listdir(small_disk) == []


def test_the_slurm_script_saves_and_queues_again(make_run, long_data, tmp_path):
    """Slurm's own programs are stand-ins; the script, the launch and the ranks are real."""
    run_dir = make_run(data=long_data)
    programs = {
        "brumby": f'exec {sys.executable} -m brumby.launch.cli "$@"',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "scontrol": f'echo "$@" >>{tmp_path}/requeued',
    }
    (tmp_path / "bin").mkdir()
    for name, script in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": "2"}
    env = os.environ | slurm | {"RUN": str(run_dir), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    batch_script = Path(__file__).parents[2] / "docs" / "examples" / "slurm.sh"
    with (tmp_path / "output").open("w") as output:
        job = subprocess.Popen(["bash", batch_script], env=env, stdout=output, stderr=subprocess.STDOUT)
        while len(losses(run_dir)) < 5 and job.poll() is None:
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)  # as `--signal=B:USR1@300` does
        assert job.wait(timeout=90) == 130, (tmp_path / "output").read_text()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert 5 <= step_of(find_checkpoint(run_dir)) < 60
    again = subprocess.run(["bash", batch_script], env=env, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(losses(run_dir)) == 60
