"""One rank of a training case of benchmarks/multigpu.py: `python -m brumby.benchmarks.multigpu_rank RUN`.

It takes steps of the run with the run's own trainer, a few of each stage, and writes no checkpoint. Rank 0 writes
`RUN/measured.json`, a row a stage.
"""

import json
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from brumby.train import config as run_config
from brumby.train.__main__ import end, quieten
from brumby.train.schedule import Stage
from brumby.train.throughput import flops_per_token
from brumby.train.trainer import Trainer, memory_bytes

WARM_UP, TIMED, PROFILED = 2, 4, 1
STAGE_STEPS = WARM_UP + TIMED + PROFILED

Intervals = list[tuple[float, float]]


def measure(trainer: Trainer, stage: Stage) -> dict:
    """The row of a stage whose first step is the next one."""
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    first = stage.first_step
    timed(trainer, range(first, first + WARM_UP))
    first += WARM_UP
    seconds, last = timed(trainer, range(first, first + TIMED))
    first += TIMED
    found = profiled(trainer, range(first, first + PROFILED))
    phase = trainer.batches.phases[0]
    rate = TIMED * phase.tokens_per_step / seconds
    flops = flops_per_token(trainer.model_config, phase.sequence_length, stage.config)
    peak = torch.tensor(float(memory_bytes(trainer.device)), dtype=torch.float64, device=trainer.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return {
        "stage": stage.name,
        "tokens_per_second_per_gpu": rate / trainer.world_size,
        "mfu": rate * flops / trainer.peak_flops,
        "step_seconds": seconds / TIMED,
        "peak_bytes": int(peak.item()),
        "shares": found,
        "objective": last["objective"],
        "loss": last["loss"],
    }


def timed(trainer: Trainer, steps: range) -> tuple[float, dict]:
    """Seconds that the steps take, from all ranks' readiness until the GPU is through; and the last one's row."""
    synchronize(trainer.device)
    dist.barrier()
    start = time.perf_counter()
    rows = [trainer.train_step(step) for step in steps]
    synchronize(trainer.device)
    return time.perf_counter() - start, rows[-1]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profiled(trainer: Trainer, steps: range) -> dict[str, float] | None:
    """`shares` of this rank's GPU in these steps; None on a CPU."""
    if trainer.device.type != "cuda":
        timed(trainer, steps)
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds, _ = timed(trainer, steps)
    path = trainer.config.run_dir / f"trace-{trainer.rank}.json"
    profiler.export_chrome_trace(str(path))
    return shares(json.loads(path.read_text())["traceEvents"], seconds)


def shares(events: list[dict], seconds: float) -> dict[str, float] | None:
    """Shares of `seconds` in which NCCL's kernels run, `exposed`, alone, and `overlapped`, with other work, and in
    which nothing runs: `idle`.

    Args:
        events: of a trace in Chrome's format, whose times are microseconds.
    """
    nccl: Intervals = []
    others: Intervals = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            kind = nccl if event["name"].startswith("nccl") else others
            kind.append((event["ts"], event["ts"] + event["dur"]))
    if not nccl and not others:
        return None  # no permission to trace
    busy = covered(nccl + others)
    exposed = busy - covered(others)
    overlapped = covered(nccl) - exposed
    found = {"exposed": exposed, "overlapped": overlapped, "idle": 1e6 * seconds - busy}
    return {name: microseconds / 1e6 / seconds for name, microseconds in found.items()}


def covered(intervals: Intervals) -> float:
    """The length of their union."""
    total, end = 0.0, float("-inf")
    for low, high in sorted(intervals):
        total += max(0.0, high - max(low, end))
        end = max(end, high)
    return total


def main(run_dir: Path) -> NoReturn:
    quieten()
    trainer = Trainer(run_config.load(run_dir), beat=lambda: None)
    rows = [measure(trainer, stage) for stage in trainer.stages]
    if trainer.rank == 0:
        (run_dir / "measured.json").write_text(json.dumps(rows) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    end(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
