"""One rank of a run: `python -m brumby.launch.rank MODULE RUN_DIR`.

Does what launchers leave undone, then runs MODULE: under `mpirun` a rank learns its number only from Open
MPI's own variables, and nothing tells the launching machine which processes to signal.
"""

import os
import runpy
import sys
from pathlib import Path

OPEN_MPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}


def main(module: str, run_dir: str) -> None:
    for name, source in OPEN_MPI.items():
        if source in os.environ:
            os.environ[name] = os.environ[source]
    logs = Path(run_dir, "logs")
    if os.environ["RANK"] != "0":  # rank 0 speaks for all, on the terminal and in launch.log
        descriptor = os.open(
            logs / f"rank-{int(os.environ['RANK']):05d}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND
        )
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    if os.environ["LOCAL_RANK"] == "0" and "CROSS_RANK" in os.environ:  # the host's index, from DeepSpeed
        (logs / f"host-{os.environ['CROSS_RANK']}.pid").write_text(f"{os.getppid()}\n")
    if os.environ["LOCAL_RANK"] == "0":
        (logs / f"rank-{os.environ['RANK']}.pid").write_text(f"{os.getpid()}\n")
    sys.argv = [module, run_dir]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
