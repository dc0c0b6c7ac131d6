"""What is started, with what, and what is refused; the launchers themselves are stand-ins here."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from brumby.launch import cluster
from brumby.launch.cluster import LaunchConfig, launch
from brumby.launch.commands import PASSED_ON, command
from brumby.launch.examine import Finding, examine
from brumby.launch.hosts import expand_nodelist, parse_hostfile
from brumby.launch.supervise import supervise
from tests.launch.conftest import wait_for

KEY = "0123456789abcdef0123456789abcdef01234567"
LAUNCH_LOCAL = """
import sys
import time
from pathlib import Path
from brumby.launch.cluster import LaunchConfig, launch

sys.exit(launch(LaunchConfig(launcher="torchrun", ranks_per_host=2, module="stand_in"), Path(sys.argv[1])))
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM_", "WANDB_", *PASSED_ON)):
            monkeypatch.delenv(name)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Put shell scripts on the PATH, before everything else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def add(**scripts: str) -> None:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return add


@pytest.fixture
def hostfile(tmp_path) -> str:
    (tmp_path / "hostfile").write_text("node-1 slots=8\nnode-2 slots=4\n")
    return str(tmp_path / "hostfile")


@pytest.fixture
def run_dir(tmp_path, monkeypatch) -> Path:
    """A run whose module, `stand_in`, writes its environment to a file per rank."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("{}\n")
    (tmp_path / "stand_in.py").write_text(
        "import json, os, sys; from pathlib import Path\n"
        "Path(sys.argv[1], f'rank-{os.environ[\"RANK\"]}.json').write_text(json.dumps(dict(os.environ)))\n"
        "print('rank', os.environ['RANK'], 'was here')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return run_dir


class TestHostfile:
    def test_reads_hosts_in_order(self, tmp_path):
        (tmp_path / "hosts").write_text("# two machines\n\nb.example slots=8  # the head\n10.0.0.7\tslots=4\n")
        assert list(parse_hostfile(tmp_path / "hosts").items()) == [("b.example", 8), ("10.0.0.7", 4)]

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("a slots=8\nb\n", "line 2: 'b': expected 'host slots=8'"),
            ("a slots=8 max=9\n", "line 1: 'a slots=8 max=9': expected"),
            ("a slots=0\n", "slots is '0'"),
            ("a slots=-1\n", "slots is '-1'"),
            ("a slots=eight\n", "slots is 'eight'"),
            ("a slots=²\n", "slots is '²'"),
            ("a slots=1\n\na slots=2\n", "line 3: 'a slots=2': a is listed twice"),
            ("", "names no host"),
            ("# a slots=8\n", "names no host"),
            ("-oProxyCommand=x slots=8\n", "is no host name"),
            ("a;reboot slots=8\n", "is no host name"),
            ("$(reboot) slots=8\n", "is no host name"),
            ("a[1-4] slots=8\n", "is no host name"),
            ("a,b slots=8\n", "is no host name"),
            ("root@a slots=8\n", "is no host name"),
            ("a\u0661 slots=8\n", "is no host name"),
            ("a slots=8\nlocalhost slots=8\n", "localhost means another machine on every host"),
        ],
    )
    def test_refuses(self, tmp_path, text, complaint):
        (tmp_path / "hosts").write_text(text)
        with pytest.raises(ValueError, match=re.escape(complaint)):
            parse_hostfile(tmp_path / "hosts")

    def test_refuses_a_missing_file(self, tmp_path):
        with pytest.raises(ValueError, match="there is no such file"):
            parse_hostfile(tmp_path / "none")


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("login", ["login"]),
        ("gpu[08-10],login", ["gpu08", "gpu09", "gpu10", "login"]),
        ("a[1,3-4],b7", ["a1", "a3", "a4", "b7"]),
        ("r[1-2]n[1-2]-ib", ["r1n1-ib", "r1n2-ib", "r2n1-ib", "r2n2-ib"]),
    ],
)
def test_slurm_nodelists(nodelist, hosts):
    assert expand_nodelist(nodelist) == hosts


class TestConfig:
    def test_hosts_mean_pdsh(self, programs, hostfile):
        programs(pdsh="", ssh="")
        config = LaunchConfig(hosts=hostfile)
        assert (config.launcher, config.num_ranks) == ("pdsh", 12)
        assert config.master_port is not None
        assert LaunchConfig(hosts=hostfile, ranks_per_host=2).num_ranks == 4

    def test_an_allocation_means_slurm(self, programs, monkeypatch):
        programs(srun="")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[1-4]")
        config = LaunchConfig(ranks_per_host=8)
        assert (config.launcher, config.num_ranks) == ("slurm", 32)

    def test_hosts_beyond_num_hosts_are_spare(self, programs, hostfile):
        programs(pdsh="", ssh="")
        config = LaunchConfig(hosts=hostfile, num_hosts=1, ranks_per_host=8)
        assert (config.slots, config.spares) == ({"node-1": 8}, {"node-2": 8})
        with pytest.raises(ValueError, match="a spare host takes any other's place, so all need the same slots"):
            LaunchConfig(hosts=hostfile, num_hosts=1)

    def test_this_machine_means_torchrun(self):
        config = LaunchConfig(ranks_per_host=2)
        assert (config.launcher, config.num_ranks) == ("torchrun", 2)

    @pytest.mark.parametrize(
        ("values", "complaint"),
        [
            ({"launcher": "ssh"}, "launcher is 'ssh'; expected auto, torchrun, pdsh, openmpi, slurm"),
            ({"ranks_per_host": 0}, "ranks_per_host is 0"),
            ({"master_port": 80}, "master_port is 80"),
            ({"launcher": "pdsh"}, "launcher=pdsh needs hosts=HOSTFILE"),
            ({"launcher": "openmpi"}, "launcher=openmpi needs hosts=HOSTFILE"),
            ({"launcher": "torchrun", "hosts": "hosts"}, "launcher=torchrun takes no hosts"),
            ({"launcher": "slurm"}, "inside an allocation"),
            ({"num_hosts": 1}, "num_hosts needs hosts=HOSTFILE"),
        ],
    )
    def test_refuses(self, values, complaint):
        with pytest.raises(ValueError, match=re.escape(complaint)):
            LaunchConfig(**values)

    @pytest.mark.parametrize(("launcher", "program"), [("auto", "pdsh"), ("pdsh", "pdsh"), ("openmpi", "mpirun")])
    def test_names_the_missing_program(self, tmp_path, monkeypatch, hostfile, launcher, program):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ValueError, match=f"there is no {program} on the PATH .apt-get install"):
            LaunchConfig(hosts=hostfile, launcher=launcher)

    @pytest.mark.parametrize(
        ("variables", "complaint"),
        [
            ({"PET_NNODES": "1:4"}, "PET_NNODES is '1:4'"),
            ({"PET_NNODES": "4", "PET_NODE_RANK": "4"}, "PET_NODE_RANK '4'"),
            ({"PET_NNODES": "4", "PET_NODE_RANK": "3"}, "PET_MASTER_ADDR is not"),
        ],
    )
    def test_a_place_among_nodes_is_checked(self, monkeypatch, variables, complaint):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=re.escape(complaint)):
            LaunchConfig(launcher="torchrun", ranks_per_host=8)
        monkeypatch.setenv("PET_NNODES", "4")
        monkeypatch.setenv("PET_NODE_RANK", "3")
        monkeypatch.setenv("PET_MASTER_ADDR", "a")
        config = LaunchConfig(launcher="torchrun", ranks_per_host=8)
        assert (config.num_ranks, config.first_rank) == (32, 24)


class TestCommand:
    def test_torchrun(self):
        argv, env = command(LaunchConfig(ranks_per_host=2, env={"GREETING": "hi"}), Path("/runs/a b;$(c)"))
        assert argv[0] == sys.executable
        assert argv[1:] == [
            "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--standalone",
            "-m", "brumby.launch.rank", "brumby.train", "/runs/a b;$(c)",
        ]  # fmt: skip
        assert env["GREETING"] == "hi"
        assert env["PATH"] == os.environ["PATH"]
        assert int(env["OMP_NUM_THREADS"]) >= 1

    def test_torchrun_at_a_port(self):
        argv, _ = command(LaunchConfig(ranks_per_host=1, master_port=29511), Path("/runs/a"))
        assert {"--master-addr=127.0.0.1", "--master-port=29511"} <= set(argv)
        assert "--standalone" not in argv

    def test_slurm(self, programs, monkeypatch):
        programs(srun="")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[01-03]")
        argv, _ = command(LaunchConfig(ranks_per_host=8, master_port=29511), Path("/runs/a b"))
        assert argv[:7] == [
            "srun",
            "--nodes=3",
            "--ntasks=3",
            "--ntasks-per-node=1",
            "--cpu-bind=none",
            "--kill-on-bad-exit=1",
            sys.executable,
        ]
        assert {"--nnodes=3", "--nproc-per-node=8", "--rdzv-id=7", "--rdzv-endpoint=gpu01:29511"} <= set(argv)
        assert argv[-3:] == ["brumby.launch.rank", "brumby.train", "/runs/a b"]

    @pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
    def test_deepspeed(self, programs, hostfile, monkeypatch, launcher):
        programs(pdsh="", ssh="", mpirun="", ompi_info="")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        argv, env = command(
            LaunchConfig(hosts=hostfile, launcher=launcher, master_port=29511), Path("/runs/lr=1e-3,a")
        )
        extra = ["--launcher_args=--bind-to none"] if launcher == "openmpi" else []
        assert argv[0] == sys.executable
        assert argv[1:] == [
            "-m", "deepspeed.launcher.runner", "--hostfile=/runs/lr=1e-3,a/logs/hostfile",
            f"--launcher={launcher}", "--force_multi", "--no_ssh_check", "--no_local_rank",
            "--master_addr=node-1", "--master_port=29511", *extra,
            "--module", "brumby.launch.rank", "brumby.train", "/runs/lr=1e-3,a",
        ]  # fmt: skip
        assert env["DS_ENV_FILE"] == "/runs/lr=1e-3,a/logs/launch.env"
        assert KEY not in env.values()

    @pytest.mark.parametrize("name", ["a b", "a;b", "$(a)", "a'b", 'a"b', "a%n", "a\nb", "ä"])
    def test_refuses_paths_that_a_remote_shell_would_change(self, programs, hostfile, name):
        programs(pdsh="", ssh="")
        with pytest.raises(ValueError, match="is read by a shell on every host"):
            command(LaunchConfig(hosts=hostfile), Path("/runs") / name)

    @pytest.mark.parametrize(
        ("env", "complaint"),
        [
            ({"WANDB_API_KEY": KEY}, "WANDB_API_KEY would be in command lines"),
            ({"HF_TOKEN": KEY}, "HF_TOKEN would be in command lines"),
            ({"A": "$(reboot)"}, "cannot carry A="),
            ({"A": "50%n"}, "cannot carry A="),
            ({"A": "a\nB=c"}, "cannot carry A="),
            ({"A;reboot;B": "c"}, "is no name for a variable"),
        ],
    )
    def test_refuses_variables(self, programs, hostfile, env, complaint):
        programs(pdsh="", ssh="")
        with pytest.raises(ValueError, match=re.escape(complaint)) as error:
            command(LaunchConfig(hosts=hostfile, env=env), Path("/runs/a"))
        assert KEY not in str(error.value)


class TestLaunch:
    @pytest.mark.slow
    def test_this_machine(self, run_dir, capfd):
        assert launch(LaunchConfig(launcher="torchrun", ranks_per_host=2, module="stand_in"), run_dir) == 0
        assert {path.name for path in run_dir.glob("rank-*.json")} == {"rank-0.json", "rank-1.json"}
        terminal = capfd.readouterr().out
        assert "rank 0 was here" in terminal
        assert "rank 1 was here" not in terminal
        assert "rank 0 was here" in (run_dir / "logs" / "launch.log").read_text()
        assert (run_dir / "logs" / "rank-00001.log").read_text() == "rank 1 was here\n"

    @pytest.mark.slow
    def test_passes_on_the_exit_code(self, run_dir, tmp_path):
        (tmp_path / "stand_in.py").write_text("raise SystemExit(3)")
        config = LaunchConfig(launcher="torchrun", ranks_per_host=1, module="stand_in", restarts=0)
        assert launch(config, run_dir) != 0

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_an_interrupt_reaches_rank_0_once(self, run_dir, tmp_path, number):
        (tmp_path / "stand_in.py").write_text(
            "import os, signal, sys, time; from pathlib import Path\n"
            "run_dir, rank = Path(sys.argv[1]), os.environ['RANK']\n"
            "def save(number, frame):\n"
            "    with (run_dir / 'signals').open('a') as file: file.write(f'{rank} {number}\\n')\n"
            "signal.signal(signal.SIGTERM, save)\n"
            "(run_dir / f'ready-{rank}').touch()\n"
            "while not (run_dir / 'signals').exists(): time.sleep(0.1)\n"
            "time.sleep(1)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH_LOCAL, str(run_dir)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(run_dir / "ready-0", run_dir / "ready-1")
        process.send_signal(number)
        assert process.wait(timeout=60) == 130
        assert (run_dir / "signals").read_text() == f"0 {int(signal.SIGTERM)}\n"

    @pytest.mark.slow
    @pytest.mark.parametrize(("num_signals", "grace"), [(2, 300), (1, 2)])
    def test_ranks_that_do_not_stop_are_ended(self, run_dir, tmp_path, num_signals, grace):
        """By a second Ctrl-C, or when the time to save is over; torchrun kills what is left a little later."""
        (tmp_path / "stand_in.py").write_text(
            "import os, signal, sys, time; from pathlib import Path\n"
            "signal.signal(signal.SIGTERM, lambda number, frame: None)\n"
            "Path(sys.argv[1], f'ready-{os.environ[\"RANK\"]}').write_text(str(os.getpid()))\n"
            "while True: time.sleep(0.1)\n"
        )
        program = LAUNCH_LOCAL.replace("ranks_per_host=2", f"ranks_per_host=2, grace={grace}")
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(run_dir)],
            env=os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"},
            stderr=subprocess.PIPE,
            text=True,
        )
        ready = [run_dir / "ready-0", run_dir / "ready-1"]
        wait_for(*ready)
        for _ in range(num_signals):
            time.sleep(1)
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=80) == 130
        assert process.stderr
        assert "interrupt again to end them" in process.stderr.read()
        assert not any(Path("/proc", path.read_text()).exists() for path in ready)

    @pytest.mark.slow
    def test_srun_runs_torchrun(self, programs, run_dir, monkeypatch):
        programs(srun='while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"')
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_JOB_NODELIST", "localhost")
        assert launch(LaunchConfig(ranks_per_host=2, module="stand_in"), run_dir) == 0
        assert {path.name for path in run_dir.glob("rank-*.json")} == {"rank-0.json", "rank-1.json"}

    @pytest.mark.slow
    @pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
    def test_no_secret_reaches_a_command_line(self, programs, hostfile, run_dir, monkeypatch, launcher):
        record = f'for word in "$@"; do echo "$word"; done >>{run_dir}/argv; env >>{run_dir}/env'
        programs(pdsh=record, mpirun=record, ssh="", ompi_info="")
        secrets = ["WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "UCX_SECRET"]
        for name in secrets:
            monkeypatch.setenv(name, KEY)
        monkeypatch.setenv("HOME", str(run_dir.parent))
        (run_dir.parent / ".deepspeed_env").write_text(f"WANDB_API_KEY={KEY}\n")
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
        config = LaunchConfig(hosts=hostfile, launcher=launcher, env={"GREETING": "hi"})
        assert launch(config, run_dir) == 0
        argv = (run_dir / "argv").read_text()
        assert "NCCL_SOCKET_IFNAME=ib0" in argv
        assert "GREETING=hi" in argv
        assert "brumby.launch.rank" in argv
        written = [path for path in run_dir.rglob("*") if path.is_file()]
        assert run_dir / "logs" / "launch.log" in written
        assert [path for path in written if KEY in path.read_text()] == []

    def test_a_host_with_a_broken_gpu_is_replaced_or_left_out(self, programs, tmp_path, run_dir, monkeypatch):
        programs(pdsh="", ssh="")
        (tmp_path / "hostfile").write_text("a slots=2\nb slots=2\nc slots=2\n")
        config = LaunchConfig(hosts=str(tmp_path / "hostfile"), num_hosts=2, min_hosts=1)
        broken = {"a"}
        monkeypatch.setattr(
            cluster,
            "examine",
            lambda *_: [Finding(host, "GPU 0", "computes a wrong product", "x") for host in broken],
        )
        assert cluster._wait_for_hosts(config, run_dir)
        assert (config.slots, config.spares) == ({"c": 2, "b": 2}, {})
        broken.add("b")
        assert cluster._wait_for_hosts(config, run_dir)
        assert (config.slots, config.spares) == ({"c": 2}, {})
        broken.add("c")
        assert not cluster._wait_for_hosts(config, run_dir)

    def test_slurm_nodes_must_see_the_run(self, programs, run_dir, monkeypatch):
        programs(srun="exit 1")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[1-2]")
        with pytest.raises(
            ValueError, match=r"test -r .*config.yaml failed; runs need a filesystem that all nodes"
        ):
            launch(LaunchConfig(ranks_per_host=2), run_dir)
        assert not (run_dir / "logs").exists()

    @pytest.mark.slow
    def test_slurm_nodes_are_examined(self, programs, run_dir, monkeypatch):
        programs(srun=f'while [ "${{1#--}}" != "$1" ]; do echo "$1" >>{run_dir}/options; shift; done; exec "$@"')
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[1-2]")
        findings = examine(LaunchConfig(ranks_per_host=2), ["/nowhere"])
        assert [f.host for f in findings if f.found == "not there"] == ["gpu1", "gpu2"]
        assert {"--nodelist=gpu1", "--nodelist=gpu2"} <= set((run_dir / "options").read_text().splitlines())

    def test_unready_hosts_are_named(self, programs, hostfile, run_dir):
        programs(
            pdsh=f"touch {run_dir}/started",
            ssh='case "$*" in *node-1*) echo "no route" >&2; exit 255;; *) exit 84;; esac',
        )
        with pytest.raises(ValueError, match="not all hosts are ready") as error:
            launch(LaunchConfig(hosts=hostfile), run_dir)
        assert "node-1 cannot be reached over ssh without a password: no route" in str(error.value)
        assert f"node-2 does not see {run_dir / 'config.yaml'}" in str(error.value)
        assert not (run_dir / "started").exists()
        assert not (run_dir / "logs").exists()


def test_a_launch_outlives_a_full_disk(capfd):
    argv = [sys.executable, "-c", "for i in range(100): print('line', i)"]
    no = lambda *_: False  # noqa: E731
    assert supervise(argv, dict(os.environ), Path("/dev/full"), no, no, no, grace=1.0) == 0
    assert capfd.readouterr().out.splitlines() == [f"line {i}" for i in range(100)]
