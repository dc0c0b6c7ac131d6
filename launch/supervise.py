"""Run a launcher to its end: its output on the terminal and in a log, its processes ended with it."""

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from brumby.train.terminal import LiveLog

INTERRUPTED = 130
END_SECONDS = 60  # DeepSpeed and torchrun give a rank 30 s to end before they kill it
FAILED_HOST = re.compile(r"pdsh@\S+: \S+: ssh exited with exit code \d+")


def supervise(
    argv: list[str],
    env: dict[str, str],
    log: Path,
    interrupt: Callable[[subprocess.Popen], bool],
    end: Callable[[subprocess.Popen], None],
    stalled: Callable[[], bool],
    grace: float,
) -> int:
    """Run `argv` and return its exit code, or 130 after Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP.

    The launcher gets a session of its own, so that signals reach it only from here. The first signal asks the
    ranks to save and stop, within `grace` seconds; a second one ends them. When pdsh reports that a host has
    failed, or nothing moves any more, all are ended: they would wait for each other in a collective.

    Args:
        argv: The launcher's command line.
        env: Its whole environment.
        log: File that its output is appended to.
        interrupt: Asks the ranks to stop; False if they could not be asked yet.
        end: Ends ranks that do not stop by themselves.
        stalled: Whether the ranks have made no progress for too long.
    """
    host_failed = threading.Event()
    failed = lambda: host_failed.is_set() or stalled()  # noqa: E731
    interrupted = False
    with LiveLog() as terminal, _signals_interrupt():
        process = subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        tee = threading.Thread(target=_tee, args=(process.stdout, log, terminal, host_failed), daemon=True)
        tee.start()
        try:
            try:
                _wait(process, failed)
            except KeyboardInterrupt:
                interrupted = True
                print("interrupted: the ranks save and stop; interrupt again to end them", file=sys.stderr)
                with contextlib.suppress(KeyboardInterrupt):
                    deadline = time.monotonic() + grace
                    while process.poll() is None and not interrupt(process) and time.monotonic() < deadline:
                        time.sleep(1)
                    _wait(process, failed, timeout=deadline - time.monotonic())
                    if host_failed.is_set():
                        _wait(process, timeout=END_SECONDS / 2)  # the other hosts stop a little later
            if process.poll() is None:
                end(process)
                _wait(process, timeout=END_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            tee.join(timeout=5)
    if interrupted:
        return INTERRUPTED
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    return code or int(failed())


def _wait(
    process: subprocess.Popen, failed: Callable[[], bool] = lambda: False, timeout: float = math.inf
) -> None:
    """Wait until the process ends, something failed, or `timeout` seconds have passed."""
    deadline = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < deadline and not failed():
        time.sleep(0.2)


def _tee(lines: IO[str], log: Path, terminal: LiveLog, host_failed: threading.Event) -> None:
    for line in lines:
        # On a full disk the pipe must be read all the same. Closing fails there too: it writes what is left.
        with contextlib.suppress(OSError), log.open("a") as copy:
            copy.write(line)
        terminal.write(line)
        if FAILED_HOST.match(line):
            host_failed.set()


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM, SIGUSR1 and SIGHUP raise KeyboardInterrupt as Ctrl-C does, unless they are ignored (nohup)."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}
    try:
        for number, handler in handlers.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def first_error(rows: list[dict], num_ranks: int) -> str:
    """Why an attempt failed, in lines; what is likely to have come first stands first.

    Args:
        rows: of `brumby.train.status`, as the ranks left them.
    """
    clock = lambda row: time.strftime("%H:%M:%S", time.localtime(row["time"]))  # noqa: E731
    lines = [
        f"rank {row['rank']} on {row['host']} (process {row['pid']}) was killed without a word: by the system "
        "(out of memory?), with its host, or because another rank had failed"
        for row in rows
        if row["state"] == "running"
    ]
    lines += [
        f"rank {row['rank']} on {row['host']} {row['state']} at {clock(row)}: {row['error']}"
        for row in sorted(rows, key=lambda row: row["time"])
        if row["code"]
    ]
    silent = sorted(set(range(num_ranks)) - {row["rank"] for row in rows})
    if silent:
        lines.append(f"ranks {', '.join(map(str, silent))} never started")
    return "\n".join(lines)
