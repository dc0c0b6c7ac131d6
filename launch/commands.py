"""The command lines that start a run's ranks: on this machine, on a hostfile's hosts, or in a Slurm allocation.

    torchrun   this machine      torchrun
    pdsh       a hostfile        deepspeed --launcher pdsh, over ssh
    openmpi    a hostfile        deepspeed --launcher openmpi, over mpirun
    slurm      the allocation    srun torchrun, one on each node

DeepSpeed has a Slurm launcher too, but it starts a module as if it were a script and tells the ranks nothing
of each other. Each rank runs `python -m brumby.train RUN_DIR` and finds RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT in its environment. Working directory, interpreter and run directory have the same
path on every host.

DeepSpeed writes the variables it exports into command lines, which anyone on a host can read. So secrets are
kept from it: `WANDB_API_KEY` stays on this machine, and hosts read `~/.netrc` (`wandb login`) instead.
"""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from brumby.launch.cluster import LaunchConfig

# What hosts get of this environment; the rest is for `LaunchConfig.env` to say.
PASSED_ON = (
    *("NCCL_", "GLOO_", "UCX_", "OMP_", "HF_", "TORCH_", "TRITON_", "PYTHON"),
    *("DS_ACCELERATOR", "WANDB_MODE"),
)
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|^MLFLOW", re.IGNORECASE)  # MLflow's URI: a password
PLAIN = re.compile(r"[\w@+=:,./-]*", re.ASCII)  # what DeepSpeed passes on unquoted, less %: pdsh expands it
QUOTED = re.compile(r"[\w@+=:,./^*; -]*", re.ASCII)  # what also survives the double quotes around the rest


def command(config: "LaunchConfig", run_dir: Path) -> tuple[list[str], dict[str, str]]:
    """The command line that starts the ranks of `run_dir` (absolute), and the environment to start it in.

    Raises:
        ValueError: a path or variable that a shell on a host would change, or a secret in `config.env`.
    """
    if config.multi_host:
        return _deepspeed(config, run_dir)
    head, ranks = next(iter(config.slots.items()))
    num_nodes = len(config.slots) * config.num_nodes
    argv = [sys.executable, "-m", "torch.distributed.run"]
    argv += [f"--nnodes={num_nodes}", f"--nproc-per-node={ranks}"]
    if config.launcher == "slurm":
        argv = [*srun(config), *argv, "--rdzv-backend=c10d"]
        argv += [f"--rdzv-id={os.environ['SLURM_JOB_ID']}", f"--rdzv-endpoint={head}:{config.master_port}"]
    elif config.num_nodes > 1:
        argv += [f"--node-rank={config.node_rank}"]
    elif config.master_port is None:
        argv += ["--standalone"]
    else:
        argv += ["--master-addr=127.0.0.1", f"--master-port={config.master_port}"]
    argv += ["-m", *_rank(config, run_dir)]
    threads = max(1, (os.cpu_count() or 1) // ranks)
    env = {"OMP_NUM_THREADS": str(threads), **os.environ, **config.env}
    if config.launcher == "slurm":
        env.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")  # srun signals torchrun; ranks need time to save
    return argv, env | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def srun(config: "LaunchConfig") -> list[str]:
    """How one process on each node of the allocation starts; by default srun would tie it to one core."""
    tasks = [f"--nodes={len(config.slots)}", f"--ntasks={len(config.slots)}", "--ntasks-per-node=1"]
    return ["srun", *tasks, "--cpu-bind=none", "--kill-on-bad-exit=1"]


def exports(config: "LaunchConfig") -> dict[str, str]:
    """The variables that hosts get through DeepSpeed.

    Raises:
        ValueError: a secret in `config.env`, or a value that a shell on a host would change.
    """
    for name in config.env:
        if SECRET.search(name):
            raise ValueError(f"env: {name} would be in command lines on every host; keep it in a file there")
    ambient = {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON) and not SECRET.search(k)}
    variables = {"PYTHONPATH": "", **ambient, **config.env, "PYTHONSAFEPATH": "1"}
    allowed = QUOTED if config.launcher == "pdsh" else PLAIN
    for name, value in variables.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ValueError(f"env: {name!r} is no name for a variable")
        if not allowed.fullmatch(value):
            raise ValueError(
                f"{config.launcher} cannot carry {name}={value} to a host unchanged; unset or change it"
            )
    if config.launcher == "openmpi":
        return variables | {"MASTER_ADDR": next(iter(config.slots)), "MASTER_PORT": str(config.master_port)}
    return variables


def _deepspeed(config: "LaunchConfig", run_dir: Path) -> tuple[list[str], dict[str, str]]:
    for path in (str(run_dir), os.getcwd(), sys.executable):
        if not PLAIN.fullmatch(path):
            raise ValueError(
                f"{path} is read by a shell on every host; rename it to letters, digits and @+=:,./-_"
            )
    exports(config)
    logs = run_dir / "logs"
    argv = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={logs / 'hostfile'}"]
    argv += [f"--launcher={config.launcher}", "--force_multi", "--no_ssh_check", "--no_local_rank"]
    argv += [f"--master_addr={next(iter(config.slots))}", f"--master_port={config.master_port}"]
    if config.launcher == "openmpi":
        argv += ["--launcher_args=--bind-to none"]  # mpirun would tie each rank to one core
    argv += ["--module", *_rank(config, run_dir)]
    env = {k: v for k, v in os.environ.items() if not SECRET.search(k)}
    if config.launcher == "pdsh":  # or ssh would wait for hours for a host whose link is cut
        alive = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"
        env["PDSH_SSH_ARGS_APPEND"] = f"{env.get('PDSH_SSH_ARGS_APPEND', '')} {alive}".strip()
    return argv, env | {"DS_ENV_FILE": str(logs / "launch.env"), "PYTHONSAFEPATH": "1"}


def _rank(config: "LaunchConfig", run_dir: Path) -> list[str]:
    return ["brumby.launch.rank", config.module, str(run_dir)]
