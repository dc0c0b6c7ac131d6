"""One rank of a run: `python -m brumby.train RUN`, started by torchrun or DeepSpeed's launcher."""

import argparse
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

log = logging.getLogger(__name__)

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def run(run_dir: Path) -> int:
    """Train the run in this process; the exit code: 0 complete, 2 bad input, 130 interrupted and saved."""
    quieten()
    import torch.distributed as dist

    from brumby.train.config import load
    from brumby.train.trainer import Trainer

    try:
        complete = Trainer(load(run_dir)).fit()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    # All is saved. A launcher that sees one rank end signals the others, which must not take it for a failure.
    dist.barrier()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    dist.destroy_process_group()  # gloo's threads must not outlive the interpreter
    if not complete and int(os.environ["RANK"]) == 0:
        log.warning("stopped and saved; go on with resume=%s", run_dir)
    return 0 if complete else EXIT_INTERRUPTED


def quieten() -> None:
    """Keep libraries' bars and advice, one copy a rank, out of the run's log."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m brumby.train", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory with a config.yaml")
    logging.basicConfig(format=f"[rank {os.environ.get('RANK', '0')}] %(levelname)s %(message)s")
    code = run(parser.parse_args().run)
    return 0 if code == EXIT_INTERRUPTED else code  # a launcher takes any other code for a rank that failed


if __name__ == "__main__":
    sys.exit(main())
