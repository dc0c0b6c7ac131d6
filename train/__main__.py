"""One rank of a run: `python -m brumby.train RUN`, started by torchrun or DeepSpeed's launcher."""

import argparse
import logging
import os
import sys
from pathlib import Path

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def run(run_dir: Path) -> int:
    """Train the run in this process; the exit code: 0 complete, 2 bad input, 130 interrupted and saved."""
    from brumby.train.config import load
    from brumby.train.trainer import Trainer

    try:
        complete = Trainer(load(run_dir)).fit()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0 if complete else EXIT_INTERRUPTED


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m brumby.train", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory with a config.yaml")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it; the environment has it
    logging.basicConfig(format=f"[rank {os.environ.get('RANK', '0')}] %(levelname)s %(message)s")
    return run(parser.parse_args().run)


if __name__ == "__main__":
    sys.exit(main())
