"""Start a run's ranks on one machine or many, see them to their end, and start them again.

Where something else starts a process on every node, as Kubernetes does, each of them is a `brumby launch`, and
torchrun's own variables PET_NNODES, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT tell it its place. It then
ends with its ranks, and whoever started the nodes starts all of them again.
"""

import contextlib
import functools
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which

from omegaconf import DictConfig, OmegaConf

from brumby.launch.commands import command, exports, srun
from brumby.launch.examine import examine
from brumby.launch.hosts import check_hosts, expand_nodelist, parse_hostfile, ssh
from brumby.launch.supervise import first_error, supervise
from brumby.train import status
from brumby.train.status import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_FAILED, EXIT_INTERRUPTED, completed, step_of

PROGRAMS: dict[str, dict[str, str]] = {
    "torchrun": {},
    "pdsh": {"pdsh": "apt-get install pdsh", "ssh": "apt-get install openssh-client"},
    "openmpi": {"mpirun": "apt-get install openmpi-bin", "ssh": "apt-get install openssh-client"},
    "slurm": {"srun": "it comes with Slurm"},
}


@dataclass
class LaunchConfig:
    """Where the ranks run. Complete once constructed: "auto" and None have been replaced.

    Args:
        hosts: A DeepSpeed hostfile; None is this machine, or the Slurm allocation.
        num_hosts: The run takes so many of the hostfile, the first; the others are spare. None takes all.
        launcher: "torchrun", "pdsh", "openmpi", "slurm", or "auto": pdsh with `hosts`, else slurm inside an
            allocation, else torchrun.
        ranks_per_host: None is the hostfile's slots, else the number of CUDA devices here, else 1.
        master_port: Where rank 0 gathers the others; None is a port that is free here.
        env: Variables for the ranks, beyond those passed on from this environment.
        restarts: How often a run that failed is started again without a checkpoint more than before.
        min_hosts: If after a failure hosts are lost and no spare ones are left, go on with those that remain, if
            there are so many; None gives up.
        grace: Seconds to save and stop after a first signal.
        module: What each rank runs; its argument is the run directory.

    Raises:
        ValueError: a value out of range, a contradiction, a bad hostfile, or a missing program.
    """

    hosts: str | None = None
    num_hosts: int | None = None
    launcher: str = "auto"
    ranks_per_host: int | None = None
    master_port: int | None = None
    env: dict[str, str] = field(default_factory=dict)
    restarts: int = 3
    min_hosts: int | None = None
    grace: float = 300.0
    module: str = "brumby.train"
    slots: dict[str, int] = field(init=False)  # host -> number of ranks
    spares: dict[str, int] = field(init=False)  # the same of hosts that wait for one of these to fail
    num_nodes: int = field(init=False)  # that this machine is one of, each with its own launch
    node_rank: int = field(init=False)
    any_port: bool = field(init=False)  # each attempt takes a port that is free here

    def __post_init__(self) -> None:
        in_allocation = "SLURM_JOB_ID" in os.environ
        if self.launcher == "auto":
            self.launcher = "pdsh" if self.hosts else "slurm" if in_allocation else "torchrun"
        if self.launcher not in PROGRAMS:
            raise ValueError(f"launcher is {self.launcher!r}; expected auto, {', '.join(PROGRAMS)}")
        if self.ranks_per_host is not None and self.ranks_per_host < 1:
            raise ValueError(f"ranks_per_host is {self.ranks_per_host}; it must be at least 1")
        if self.master_port is not None and not 1024 <= self.master_port <= 65535:
            raise ValueError(f"master_port is {self.master_port}; expected a port from 1024 to 65535")
        if self.restarts < 0:
            raise ValueError(f"restarts is {self.restarts}; it must not be negative")
        if self.min_hosts is not None and self.min_hosts < 1:
            raise ValueError(f"min_hosts is {self.min_hosts}; it must be at least 1")
        if not self.grace > 0:
            raise ValueError(f"grace is {self.grace} seconds; it must be above 0")
        if self.multi_host and not self.hosts:
            raise ValueError(f"launcher={self.launcher} needs hosts=HOSTFILE with lines like 'host slots=8'")
        if self.hosts and not self.multi_host:
            raise ValueError(f"launcher={self.launcher} takes no hosts; omit them, or take pdsh or openmpi")
        if self.launcher == "slurm" and not in_allocation:
            raise ValueError("launcher=slurm works inside an allocation; start this from sbatch or salloc")
        for program, remedy in PROGRAMS[self.launcher].items():
            if which(program) is None:
                raise ValueError(f"launcher={self.launcher}: there is no {program} on the PATH ({remedy})")
        self.num_nodes, self.node_rank = _place_among_nodes() if self.launcher == "torchrun" else (1, 0)
        self.slots, self.spares = self._slots(), {}
        if self.num_hosts is not None:
            self._set_spares_aside(self.num_hosts)
        self.any_port = self.master_port is None
        if self.any_port and self.launcher != "torchrun":
            self.master_port = _free_port()

    def _slots(self) -> dict[str, int]:
        if self.hosts:
            slots = parse_hostfile(self.hosts)
            return dict.fromkeys(slots, self.ranks_per_host) if self.ranks_per_host else slots
        in_slurm = self.launcher == "slurm"
        hosts = expand_nodelist(os.environ["SLURM_JOB_NODELIST"]) if in_slurm else ["localhost"]
        return dict.fromkeys(hosts, self.ranks_per_host or _num_devices())

    def _set_spares_aside(self, num_hosts: int) -> None:
        if not self.hosts:
            raise ValueError("num_hosts needs hosts=HOSTFILE, which names more than that")
        if not 1 <= num_hosts <= len(self.slots):
            raise ValueError(f"num_hosts is {num_hosts}; {self.hosts} names {len(self.slots)}")
        if len(set(self.slots.values())) > 1:
            raise ValueError(f"{self.hosts}: a spare host takes any other's place, so all need the same slots")
        hosts = list(self.slots)
        self.spares = {host: self.slots.pop(host) for host in hosts[num_hosts:]}

    @property
    def multi_host(self) -> bool:
        """Whether DeepSpeed's launcher takes the ranks to the hosts."""
        return self.launcher in ("pdsh", "openmpi")

    @property
    def num_ranks(self) -> int:
        return sum(self.slots.values()) * self.num_nodes

    @property
    def first_rank(self) -> int:
        """The first that this launch starts."""
        return self.node_rank * sum(self.slots.values())

    def owns(self, rank: int) -> bool:
        """Whether this launch starts a rank, and no other node's; or no launch does, now that there are fewer."""
        return self.first_rank <= rank < self.first_rank + sum(self.slots.values()) or rank >= self.num_ranks


def launch(config: LaunchConfig, run_dir: Path) -> int:
    """Run every rank of `run_dir` and wait: output of rank 0 on the terminal and in `logs/launch.log`.

    The other ranks write to files of their own in `logs/`. Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP reach rank 0 as
    one SIGTERM, on which all ranks save a checkpoint and stop. When a rank dies or hangs, the rest are ended and
    all are started again from the newest checkpoint.

    Returns:
        0, the launcher's exit code, 2 or 3 if the ranks refused the run or it diverged, or 130 if interrupted.

    Raises:
        ValueError: something is missing here or on a host. Nothing was started.
    """
    run_dir = run_dir.absolute()
    if alive := _ranks_here(config, run_dir):
        raise ValueError(
            f"{run_dir} is being trained by processes {', '.join(map(str, alive))} here; stop them first"
        )
    command(config, run_dir)  # refuses what it cannot carry, before anything is asked of the hosts
    preflight(config, run_dir)
    if config.multi_host and "WANDB_API_KEY" in os.environ:
        print("WANDB_API_KEY is not sent to the hosts; they read ~/.netrc, which `wandb login` writes")
    attempts = config.restarts
    while True:
        reached = newest_step(run_dir)
        code = _attempt(config, run_dir)
        rows = status.read(run_dir)
        codes = {row["code"] for row in rows}
        if code == 0:
            return EXIT_INTERRUPTED if EXIT_INTERRUPTED in codes else 0
        if code == EXIT_INTERRUPTED and EXIT_FAILED not in codes:
            return code
        print(first_error(rows, config.num_ranks) or f"the launcher failed with exit code {code}", file=sys.stderr)
        if code == EXIT_INTERRUPTED:
            print("interrupted, and not all is saved; the last checkpoint is kept", file=sys.stderr)
            return code
        if codes & {EXIT_BAD_INPUT, EXIT_DIVERGED}:
            return EXIT_BAD_INPUT if EXIT_BAD_INPUT in codes else EXIT_DIVERGED
        if config.num_nodes > 1:
            return code
        attempts = config.restarts if newest_step(run_dir) > reached else attempts - 1
        if attempts < 0:
            print(f"given up: {config.restarts} restarts without a checkpoint more; logs: {run_dir / 'logs'}")
            return code
        print(f"starting again; the newest checkpoint is of step {newest_step(run_dir)}", file=sys.stderr)
        if not _wait_for_hosts(config, run_dir):
            return code


def newest_step(run_dir: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    return max((step_of(folder) for folder in completed(run_dir)), default=0)


def _attempt(config: LaunchConfig, run_dir: Path) -> int:
    """Start all ranks once and wait for them; the launcher's exit code, or 130."""
    if config.any_port and config.launcher != "torchrun":  # torchrun finds one itself
        config.master_port = _free_port()
    argv, env = command(config, run_dir)
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    for old in [*logs.glob("*.pid"), *logs.glob("rank-*.json")]:
        if config.owns(int(old.stem.partition("-")[2])):
            old.unlink()
    if config.multi_host:
        hostfile = (f"{host} slots={slots}\n" for host, slots in config.slots.items())
        (logs / "hostfile").write_text("".join(hostfile))
        variables = (f"{name}={value}\n" for name, value in exports(config).items())
        (logs / "launch.env").write_text("".join(variables))
    # Ranks end themselves after step_timeout; this is for those that cannot.
    limit = _patience(run_dir)
    started = time.time()

    def stalled() -> bool:
        return time.time() - max(started, _sign_of_life(run_dir)) > limit

    interrupt = functools.partial(_interrupt, config, logs)
    end = functools.partial(_end, config, logs)
    name = f"launch-{config.node_rank}.log" if config.node_rank else "launch.log"
    return supervise(argv, env, logs / name, interrupt, end, stalled, config.grace)


def _wait_for_hosts(config: LaunchConfig, run_dir: Path) -> bool:
    """Wait until every host answers and has no rank of this run left; False if too few do in time.

    In `config.slots` a host that is lost is replaced by a spare one, or left out if `config.min_hosts` allows it.
    So is one that answers and has a broken GPU.
    """
    if not config.multi_host:
        while alive := _ranks_here(config, run_dir):  # their launcher was killed
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)
        return True
    started = time.time()
    waiting = list(config.slots)
    # Hosts that only this one cannot reach may train on: then it waits until they have finished.
    while waiting and time.time() - max(started, _sign_of_life(run_dir)) < _patience(run_dir):
        with ThreadPoolExecutor(max_workers=32) as pool:
            clear = list(pool.map(functools.partial(_is_clear, config, run_dir), waiting))
        waiting = [host for host, is_clear in zip(waiting, clear, strict=True) if not is_clear]
        if waiting:
            time.sleep(2)
    lost = dict.fromkeys(waiting, "it does not answer, or has ranks that do not end")
    if config.spares or config.min_hosts is not None:
        found = [f for f in examine(config, []) if f.advice and (f.subject == "answer" or "GPU" in f.subject)]
        lost |= {finding.host: f"{finding.subject}: {finding.found}" for finding in found}
    if not lost:
        return True
    for host, reason in lost.items():
        print(f"{host} is lost: {reason}", file=sys.stderr)
    spares = [host for host in config.spares if host not in lost]
    left = [spares.pop(0) if host in lost and spares else host for host in config.slots]
    left = [host for host in left if host not in lost]
    if len(left) < (config.min_hosts or len(config.slots)):
        return False
    print(f"going on with {', '.join(left)}", file=sys.stderr)
    slots = config.slots | config.spares
    config.slots, config.spares = ({host: slots[host] for host in hosts} for hosts in (left, spares))
    return True


def _ranks_here(config: LaunchConfig, run_dir: Path) -> list[int]:
    """The ids of this machine's processes that are ranks of the run."""
    found = []
    for row in status.read(run_dir):
        line = Path(f"/proc/{row['pid']}/cmdline")
        is_here = row["host"] == socket.gethostname() and config.owns(row["rank"])
        with contextlib.suppress(OSError):
            if is_here and os.fsencode(run_dir) in line.read_bytes().split(b"\0"):
                found.append(row["pid"])
    return found


def _sign_of_life(run_dir: Path) -> float:
    """When rank 0 last took a step."""
    path = run_dir / "logs" / "rank-00000.json"
    return path.stat().st_mtime if path.exists() else 0.0


def _patience(run_dir: Path) -> float:
    """Seconds within which ranks that hang have ended themselves."""
    config = OmegaConf.load(run_dir / "config.yaml")
    assert isinstance(config, DictConfig)
    return 2 * config.get("step_timeout", 1800)


def _is_clear(config: LaunchConfig, run_dir: Path, host: str) -> bool:
    """Whether `host` answers and runs no rank; one that is left is told to end."""
    index = list(config.slots).index(host)
    pid_file, run = shlex.quote(str(run_dir / "logs" / f"host-{index}.pid")), shlex.quote(str(run_dir))
    script = (
        f"test -s {pid_file} || exit 0; pid=$(cat {pid_file}); "
        f"grep -qsF -- {run} /proc/$pid/cmdline || exit 0; kill -TERM $pid; exit 1"
    )
    return _quietly([*ssh(host), script])


def preflight(config: LaunchConfig, run_dir: Path | None = None) -> None:
    """See that the hosts can run it; without `run_dir`, that they could run anything.

    Raises:
        ValueError: with a line for each host that cannot.
    """
    if config.multi_host:
        check_hosts([*config.slots, *config.spares], run_dir)
    elif config.launcher == "slurm" and run_dir is not None:
        argv = [*srun(config), "test", "-r", str(run_dir / "config.yaml")]
        if not _quietly(argv):
            raise ValueError(f"{shlex.join(argv)} failed; runs need a filesystem that all nodes share")


def _interrupt(config: LaunchConfig, logs: Path, launcher: subprocess.Popen) -> bool:
    """Send SIGTERM to a rank; False while there is none. The ranks decide together: one signal is enough."""
    if config.launcher == "slurm":  # srun hands it to torchrun, which hands it to every rank
        os.killpg(launcher.pid, signal.SIGTERM)
        return True
    argv = ssh(next(iter(config.slots))) if config.multi_host else ["sh", "-c"]
    return _quietly([*argv, _kill(logs / f"rank-{config.first_rank}.pid")])


def _end(config: LaunchConfig, logs: Path, launcher: subprocess.Popen) -> None:
    """End all ranks through the processes that started them, which kill a rank that does not end within 30 s.

    Under pdsh they run on the hosts and are ended by id. DeepSpeed itself would call `pkill -f` there, with a
    pattern that fits every other run as well, so the signal is kept from it.
    """
    if config.launcher == "pdsh":
        with ThreadPoolExecutor(max_workers=32) as pool:
            for index, host in enumerate(config.slots):
                pool.submit(_quietly, [*ssh(host), _kill(logs / f"host-{index}.pid")])
    else:
        os.killpg(launcher.pid, signal.SIGTERM)


def _kill(pid_file: Path) -> str:
    quoted = shlex.quote(str(pid_file))
    return f"test -s {quoted} && kill -TERM $(cat {quoted})"


def _quietly(argv: list[str]) -> bool:
    """Whether a command succeeds, within a minute: a host may not answer at all."""
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _place_among_nodes() -> tuple[int, int]:
    """How many nodes there are and which one this is, by torchrun's variables; one without them."""
    if "PET_NNODES" not in os.environ:
        return 1, 0
    nodes, rank = os.environ["PET_NNODES"], os.environ.get("PET_NODE_RANK", "0")
    if not (nodes.isdecimal() and rank.isdecimal() and int(rank) < int(nodes)):
        raise ValueError(f"PET_NNODES is {nodes!r} and PET_NODE_RANK {rank!r}; expected numbers, ranks from 0 on")
    if int(nodes) > 1 and "PET_MASTER_ADDR" not in os.environ:
        raise ValueError("PET_NNODES is set and PET_MASTER_ADDR is not; it names the node of rank 0")
    return int(nodes), int(rank)


def _num_devices() -> int:
    import torch  # late: it takes seconds, and a hostfile makes it needless

    return max(1, torch.cuda.device_count())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
