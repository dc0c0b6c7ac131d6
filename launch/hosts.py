"""The hosts of a multi-node run: the hostfile that names them, and what each must have."""

import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# No brackets, commas or colons (pdsh expands them), no leading dash (ssh would read an option).
HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
LOOPBACK = re.compile(r"localhost|127\..*")


def parse_hostfile(path: str | Path) -> dict[str, int]:
    """Host names and their slots, in the file's order, from lines of the form `host slots=8`.

    A `#` starts a comment. Host names reach a shell, so they are letters, digits, dots, dashes and
    underscores; a user name or a port belongs in `~/.ssh/config`.

    Raises:
        ValueError: the file is missing or empty, or a line is wrong (its number is in the message).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"hosts={path}: there is no such file; expected lines of the form 'host slots=8'")
    slots: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        where = f"{path}, line {number}: {line!r}"
        match line.split():
            case [host, count] if count.startswith("slots="):
                count = count.removeprefix("slots=")
            case _:
                raise ValueError(f"{where}: expected 'host slots=8'")
        if not HOST.fullmatch(host):
            raise ValueError(f"{where}: {host!r} is no host name (letters, digits, '.', '-', '_')")
        if host in slots:
            raise ValueError(f"{where}: {host} is listed twice; give it one line with all its slots")
        if not re.fullmatch(r"[1-9][0-9]{0,3}", count):
            raise ValueError(f"{where}: slots is {count!r}; expected a whole number from 1 to 9999")
        slots[host] = int(count)
    if not slots:
        raise ValueError(f"{path} names no host; expected lines of the form 'host slots=8'")
    loopback = [host for host in slots if LOOPBACK.fullmatch(host)]
    if loopback and len(slots) > 1:
        raise ValueError(f"{path}: {loopback[0]} means another machine on every host; use its network name")
    return slots


def expand_nodelist(nodelist: str) -> list[str]:
    """Slurm's short form of host names, written out: `gpu[08-10],login` is gpu08, gpu09, gpu10 and login."""
    hosts = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        literals_and_ranges = re.split(r"\[([^\]]*)\]", item)
        names = [""]
        for index, part in enumerate(literals_and_ranges):
            choices = _expand_ranges(part) if index % 2 else [part]
            names = [name + choice for name in names for choice in choices]
        hosts += names
    return hosts


def _expand_ranges(ranges: str) -> list[str]:
    numbers = []
    for item in ranges.split(","):
        first, _, last = item.partition("-")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return numbers


def check_hosts(hosts: list[str], run_dir: Path | None) -> None:
    """See that every host answers over ssh and has this directory, interpreter, package and, if given, run.

    Raises:
        ValueError: with a line for each host that is not ready.
    """
    with ThreadPoolExecutor(max_workers=32) as pool:
        problems = [problem for problem in pool.map(lambda host: _problem(host, run_dir), hosts) if problem]
    if problems:
        raise ValueError("not all hosts are ready; nothing was started\n  " + "\n  ".join(problems))


def ssh(host: str) -> list[str]:
    """How a command on `host` starts; the options in PDSH_SSH_ARGS_APPEND hold here as they do for pdsh."""
    options = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    return ["ssh", *options, "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", host]


def _problem(host: str, run_dir: Path | None) -> str | None:
    """What keeps `host` from running a rank, or None."""
    directory, python = os.getcwd(), sys.executable
    same_path = "paths must be the same on every host"
    steps = {
        f"cd {shlex.quote(directory)}": f"has no directory {directory}; {same_path}",
        f"test -x {shlex.quote(python)}": f"has no Python at {python}; {same_path}",
        f"{shlex.quote(python)} -P -c 'import brumby'": f"has no brumby for {python}; install it there",
    }
    if run_dir is not None:
        config = str(run_dir / "config.yaml")
        steps[f"test -r {shlex.quote(config)}"] = f"does not see {config}; runs need a shared filesystem"
    first_code = 81
    script = "; ".join(f"{step} || exit {code}" for code, step in enumerate(steps, start=first_code))
    try:
        done = subprocess.run(
            [*ssh(host), script], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        return f"{host} answers over ssh but is not through with the check after 120 s"
    if done.returncode == 0:
        return None
    if first_code <= done.returncode < first_code + len(steps):
        return f"{host} {list(steps.values())[done.returncode - first_code]}"
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"{host} cannot be reached over ssh without a password: {reason}"
