"""A launch over ssh to two hosts: the real pdsh, an sshd on each, gloo over the wire between them."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from brumby.train.tracking import read_metrics
from tests.launch.conftest import TwoHosts, missing, wait_for
from tests.launch.test_faults import assert_same

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KEY = "0123456789abcdef0123456789abcdef01234567"
LAUNCH = """
import json, sys
from pathlib import Path
from brumby.launch.cluster import LaunchConfig, launch

hosts, module, run_dir, options = sys.argv[1:]
try:
    config = LaunchConfig(hosts=hosts, module=module, **json.loads(options))
    code = launch(config, Path(run_dir))
except ValueError as error:
    print(error)
    code = 2
sys.exit(code)
"""
ALL_REDUCE = """
import json, os, subprocess, sys
from pathlib import Path
import deepspeed, torch
import torch.distributed as dist

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it takes a minute to compile
deepspeed.init_distributed("gloo")
number = torch.tensor([10.0 ** dist.get_rank()])
dist.all_reduce(number)
found = {"sum": number.item(), "world_size": dist.get_world_size(), "env": dict(os.environ)}
found["address"] = subprocess.check_output(["hostname", "-I"], text=True).split()[0]
Path(sys.argv[1], f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
"""
# Rank 1 may fail; on SIGTERM to rank 0 both stop, as the trainer's ranks do.
WAIT = """
import os, signal, sys, time
from pathlib import Path

run_dir, rank = Path(sys.argv[1]), os.environ["RANK"]
if rank == "0":
    signal.signal(signal.SIGTERM, lambda number, frame: (run_dir / "stop").touch())
(run_dir / f"ready-{rank}").touch()
while not (run_dir / "stop").exists():
    if (run_dir / f"fail-{rank}").exists():
        raise SystemExit(3)
    time.sleep(0.1)
(run_dir / f"stopped-{rank}").touch()
raise SystemExit(130)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}\n")
    return tmp_path / "run"


def launch_command(hosts: TwoHosts, run_dir: Path, program: str | None = None, **options) -> list[str]:
    """A launch of `program`, or of the trainer, on both hosts; `options` are LaunchConfig's."""
    module = "brumby.train"
    if program is not None:
        module = "stand_in"
        (run_dir.parent / "stand_in.py").write_text(program)
        hosts.env["PYTHONPATH"] = str(run_dir.parent)
    options = {"restarts": 0, **options}
    return ["python", "-c", LAUNCH, str(hosts.hostfile), module, str(run_dir), json.dumps(options)]


def wait_for_steps(run_dir: Path, steps: int) -> None:
    deadline = time.monotonic() + 90
    while len(read_metrics(run_dir / "metrics.jsonl")) < steps:
        assert time.monotonic() < deadline, (run_dir / "output").read_text()
        time.sleep(0.02)


def assert_clean(hosts: TwoHosts) -> None:
    assert [hosts.processes(0), hosts.processes(1)] == [[], []]
    assert not hosts.pkill_calls.exists()


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_two_hosts_all_reduce(two_hosts, run_dir, launcher):
    if launcher == "openmpi" and not shutil.which("mpirun"):
        missing("needs the package openmpi-bin")
    command = launch_command(two_hosts, run_dir, ALL_REDUCE, launcher=launcher)
    done = two_hosts.run(*command, WANDB_API_KEY=KEY)
    assert done.returncode == 0, done.stdout
    ranks = [json.loads((run_dir / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [rank["sum"] for rank in ranks] == [11.0, 11.0]
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    assert [rank["address"] for rank in ranks] == two_hosts.addresses
    assert [rank["env"]["LOCAL_RANK"] for rank in ranks] == ["0", "0"]
    assert [rank["env"]["GLOO_SOCKET_IFNAME"] for rank in ranks] == ["eth0", "eth0"]
    assert all("WANDB_API_KEY" not in rank["env"] for rank in ranks)
    log = (run_dir / "logs" / "launch.log").read_text()
    assert log in done.stdout
    assert KEY not in done.stdout
    assert_clean(two_hosts)


def test_two_hosts_train_as_one(two_hosts, make_run, trained):
    one, two = trained(zero_stage=2), make_run(zero_stage=2)
    done = two_hosts.run(*launch_command(two_hosts, two))
    assert done.returncode == 0, done.stdout
    losses = [[row["loss"] for row in read_metrics(run / "metrics.jsonl")] for run in (one, two)]
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert_clean(two_hosts)


def test_an_interrupt_lets_both_hosts_stop(two_hosts, run_dir):
    command = two_hosts.command(*launch_command(two_hosts, run_dir, WAIT))
    process = subprocess.Popen(command, env=two_hosts.env, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    wait_for(run_dir / "ready-0", run_dir / "ready-1")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=90) == 130
    assert (run_dir / "stopped-0").exists()
    assert (run_dir / "stopped-1").exists()
    assert_clean(two_hosts)


def test_a_failed_host_ends_the_other(two_hosts, run_dir):
    (run_dir / "fail-1").touch()
    done = two_hosts.run(*launch_command(two_hosts, run_dir, WAIT), timeout=120)
    assert done.returncode == 3, done.stdout
    assert_clean(two_hosts)


def test_an_unreachable_host_stops_everything(two_hosts, run_dir):
    two_hosts.hostfile.write_text(two_hosts.hostfile.read_text() + "10.77.0.3 slots=1\n")
    done = two_hosts.run(*launch_command(two_hosts, run_dir, WAIT))
    assert done.returncode == 2, done.stdout
    assert "10.77.0.3 cannot be reached over ssh without a password" in done.stdout
    assert not (run_dir / "ready-0").exists()


def test_a_run_outlives_a_cut_link(two_hosts, make_run, trained, long_data):
    """The ranks hang, end themselves on both hosts, and start again when the hosts see each other."""
    options = {"data": long_data, "zero_stage": 2}
    whole, run_dir = trained(**options), make_run(**options, step_timeout=12)
    command = two_hosts.command(*launch_command(two_hosts, run_dir, restarts=3))
    with (run_dir / "output").open("w") as output:
        process = subprocess.Popen(command, env=two_hosts.env, stdout=output, stderr=subprocess.STDOUT)
    wait_for_steps(run_dir, 7)
    two_hosts.wire("down")
    time.sleep(25)
    cut = len(read_metrics(run_dir / "metrics.jsonl"))
    two_hosts.wire("up")
    assert process.wait(timeout=200) == 0, (run_dir / "output").read_text()
    assert 7 <= cut < 60
    assert "starting again; the newest checkpoint is of step" in (run_dir / "output").read_text()
    assert_same(run_dir, whole)
    assert_clean(two_hosts)


def test_a_run_goes_on_with_the_host_that_is_left(two_hosts, make_run, trained, elastic):
    whole, run_dir = trained(**elastic), make_run(**elastic | {"zero_stage": 3}, step_timeout=12)
    command = two_hosts.command(*launch_command(two_hosts, run_dir, restarts=1, min_hosts=1))
    with (run_dir / "output").open("w") as output:
        process = subprocess.Popen(command, env=two_hosts.env, stdout=output, stderr=subprocess.STDOUT)
    wait_for_steps(run_dir, 7)
    two_hosts.wire("down")
    assert process.wait(timeout=280) == 0, (run_dir / "output").read_text()
    assert f"going on with {two_hosts.addresses[0]}\n" in (run_dir / "output").read_text()
    losses = [[row["loss"] for row in read_metrics(run / "metrics.jsonl")] for run in (run_dir, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert_clean(two_hosts)


def test_a_spare_host_takes_the_place_of_one_that_fails(two_hosts, make_run, trained, elastic):
    """The run is on the second host alone, which fails with all that runs on it; the first one is spare."""
    whole, run_dir = trained(**elastic), make_run(**elastic, step_timeout=10)
    first, second = two_hosts.addresses
    two_hosts.hostfile.write_text(f"{second} slots=1\n{first} slots=1\n")
    command = two_hosts.command(*launch_command(two_hosts, run_dir, restarts=1, num_hosts=1))
    with (run_dir / "output").open("w") as output:
        process = subprocess.Popen(command, env=two_hosts.env, stdout=output, stderr=subprocess.STDOUT)
    wait_for_steps(run_dir, 7)
    two_hosts.end_processes(1)
    assert process.wait(timeout=200) == 0, (run_dir / "output").read_text()
    assert f"{second} is lost: " in (run_dir / "output").read_text()
    assert f"going on with {first}\n" in (run_dir / "output").read_text()
    losses = [[row["loss"] for row in read_metrics(run / "metrics.jsonl")] for run in (run_dir, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert_clean(two_hosts)


def test_doctor_compares_hosts(two_hosts, tmp_path):
    (tmp_path / "data").mkdir()
    command = ["python", "-m", "brumby.launch.cli", "doctor", f"hosts={two_hosts.hostfile}"]
    command += [f"paths=[{tmp_path / 'data'}]", f"runs_dir={tmp_path / 'runs'}"]
    done = two_hosts.run(*command, COLUMNS="200")
    assert done.returncode == 0, done.stdout
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    for address in two_hosts.addresses:
        assert [row[1] for row in rows if row and row[0] == address][:2] == ["GPUs", "memory"]
    assert "all-reduce of 2 ranks" in done.stdout
    assert "GB/s (gloo)" in done.stdout
    assert os.listdir(tmp_path / "runs") == []
    done = two_hosts.run(*command[:-2], f"paths=[{tmp_path / 'none'}]", command[-1], COLUMNS="200")
    assert done.returncode == 1
    assert "every host needs it at this path" in done.stdout
