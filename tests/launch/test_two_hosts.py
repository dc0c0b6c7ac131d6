"""A launch over ssh to two hosts: the real pdsh, an sshd on each, gloo over the wire between them."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from brumby.train.tracking import read_metrics
from tests.launch.conftest import TwoHosts, missing, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KEY = "0123456789abcdef0123456789abcdef01234567"
LAUNCH = """
import sys
from pathlib import Path
from brumby.launch.cluster import LaunchConfig, launch

hosts, launcher, module, run_dir = sys.argv[1:]
try:
    code = launch(LaunchConfig(hosts=hosts, launcher=launcher, module=module, restarts=0), Path(run_dir))
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


def launch_command(
    hosts: TwoHosts, run_dir: Path, program: str | None = None, launcher: str = "auto"
) -> list[str]:
    """A launch of `program`, or of the trainer, on both hosts."""
    module = "brumby.train"
    if program is not None:
        module = "stand_in"
        (run_dir.parent / "stand_in.py").write_text(program)
        hosts.env["PYTHONPATH"] = str(run_dir.parent)
    return ["python", "-c", LAUNCH, str(hosts.hostfile), launcher, module, str(run_dir)]


def assert_clean(hosts: TwoHosts) -> None:
    assert [hosts.processes(0), hosts.processes(1)] == [[], []]
    assert not hosts.pkill_calls.exists()


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_two_hosts_all_reduce(two_hosts, run_dir, launcher):
    if launcher == "openmpi" and not shutil.which("mpirun"):
        missing("needs the package openmpi-bin")
    command = launch_command(two_hosts, run_dir, ALL_REDUCE, launcher)
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


def test_two_hosts_train_as_one(two_hosts, make_run, train):
    one, two = make_run("one"), make_run("two")
    train(one, num_ranks=2)
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
