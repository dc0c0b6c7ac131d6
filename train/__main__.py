"""One rank of a run: `python -m brumby.train RUN`, started by torchrun or DeepSpeed's launcher."""

import argparse
import faulthandler
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import NoReturn

from brumby.train.status import EXIT_BAD_INPUT, EXIT_DIVERGED, EXIT_FAILED, EXIT_INTERRUPTED, Status

log = logging.getLogger(__name__)


def run(run_dir: Path) -> int:
    """Train the run in this process.

    Returns:
        The exit code: 0 complete, 1 failed, 2 bad input, 3 diverged (starting it again does not help), 130
        interrupted: saved, unless a second signal cut it short.
    """
    status = Status(run_dir)
    try:
        code, error = _train(run_dir, status)
    except BaseException as raised:
        status.write("failed", EXIT_FAILED, f"{type(raised).__name__}: {raised}")
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    states = {0: "complete", EXIT_BAD_INPUT: "refused", EXIT_DIVERGED: "diverged", EXIT_INTERRUPTED: "interrupted"}
    status.write(states[code], code, error)
    return code


def _train(run_dir: Path, status: Status) -> tuple[int, str]:
    quieten()
    import torch.distributed as dist

    from brumby.train.config import load
    from brumby.train.guard import DivergenceError
    from brumby.train.trainer import Trainer

    try:
        complete = Trainer(load(run_dir), status.beat).fit()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT, str(error)
    except DivergenceError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_DIVERGED, str(error)
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint is kept", file=sys.stderr)
        return EXIT_INTERRUPTED, "interrupted a second time"
    # All is saved. A launcher that sees one rank end signals the others, which must not take it for a failure.
    dist.barrier()
    for name in ("SIGTERM", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    dist.destroy_process_group()  # gloo's threads must not outlive the interpreter
    if not complete and int(os.environ["RANK"]) == 0:
        log.warning("stopped and saved; go on with resume=%s", run_dir)
    return (0 if complete else EXIT_INTERRUPTED), ""


def quieten() -> None:
    """Keep libraries' bars and advice, one copy a rank, out of the run's log."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable`")  # its new name is newer than 5.17
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def main() -> NoReturn:
    parser = argparse.ArgumentParser(prog="python -m brumby.train", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory with a config.yaml")
    logging.basicConfig(format=f"[rank {os.environ.get('RANK', '0')}] %(levelname)s %(message)s")
    code = run(parser.parse_args().run)
    end(0 if code == EXIT_INTERRUPTED else code)  # a launcher takes any other code for a rank that failed


def end(code: int) -> NoReturn:
    """End a rank that has written all it has to.

    A thread of gloo's or NCCL's that is still there would abort the interpreter's own end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
