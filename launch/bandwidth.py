"""How fast the ranks add up numbers: `python -m brumby.launch.bandwidth FOLDER`, started on every rank."""

import json
import sys
import time
from pathlib import Path
from typing import NoReturn

from brumby.train.__main__ import end


def main(folder: Path) -> NoReturn:
    """Rank 0 writes `bandwidth.json`: `gigabytes_per_second` of the bus, the median of five all-reduces.

    The rate is 2 (n - 1) / n x bytes / seconds, as nccl-tests define it, which does not depend on n.
    """
    import torch
    import torch.distributed as dist

    from brumby.train.engine import setup_distributed

    device = setup_distributed()
    numbers = torch.ones(2**28 if device.type == "cuda" else 2**22, device=device)
    seconds = []
    for _ in range(6):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(numbers)
        numbers[0].item()
        seconds.append(time.perf_counter() - start)
    n = dist.get_world_size()
    rate = 2 * (n - 1) / n * numbers.nbytes / sorted(seconds[1:])[2] / 1e9
    if dist.get_rank() == 0:
        found = {"backend": dist.get_backend(), "ranks": n, "gigabytes_per_second": rate}
        (folder / "bandwidth.json").write_text(json.dumps(found) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    end(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
