"""Two hosts on one machine: network namespaces joined by a wire, with an sshd in each."""

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import stage

PACKAGES = {"ip": "iproute2", "pdsh": "pdsh", "ssh": "openssh-client", "sshd": "openssh-server"}
QUICK = "-o ConnectTimeout=2 -o ServerAliveInterval=4 -o ServerAliveCountMax=3"  # the first of each counts for ssh
SYSTEM_PATH = os.environ["PATH"] + ":/usr/local/sbin:/usr/sbin:/sbin"


def missing(reason: str) -> None:
    """Skip the test, but fail it in CI, where everything is supposed to be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def wait_for(*paths: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"not all of {paths} after {seconds} s"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def elastic(long_data: dict) -> dict:
    """Options of a run of 40 steps that one, two or three ranks can train, with losses that agree.

    At the other tests' rate a difference in the seventh digit grows tenfold a step, without any resume.
    """
    stages = {"retrain": stage(lr=5e-4)}
    return {"data": long_data | {"sequences_per_step": 12}, "micro_batch": 1, "stages": stages, "zero_stage": 2}


@dataclass
class TwoHosts:
    """`hostfile` names both, with a slot each; commands run on the first."""

    namespaces: list[str]
    addresses: list[str]
    hostfile: Path
    env: dict[str, str]
    pkill_calls: Path  # lists the hosts' calls of pkill, which is replaced there: it would reach beyond them

    def command(self, *argv: str, host: int = 0) -> list[str]:
        """`argv` as a command that runs on a host, with this process's Python path for `python`."""
        argv = tuple(sys.executable if word == "python" else word for word in argv)
        return ["ip", "netns", "exec", self.namespaces[host], *argv]

    def run(self, *argv: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `argv` on the first host; its output is stdout, with stderr in it."""
        return subprocess.run(
            self.command(*argv),
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def wire(self, state: str) -> None:
        """Take the wire between the hosts "up" or "down"."""
        self._ip("-n", self.namespaces[1], "link", "set", "eth0", state)

    def processes(self, host: int) -> list[str]:
        """The command lines of the host's processes, without its sshd."""
        pids = self._ip("netns", "pids", self.namespaces[host]).split()
        lines = [Path(f"/proc/{pid}/cmdline") for pid in pids]
        words = [line.read_bytes().replace(b"\0", b" ").decode() for line in lines if line.exists()]
        return [line for line in words if "sshd" not in line]

    def end_processes(self, host: int) -> None:
        """All of the host's, its sshd too."""
        while pids := self._ip("netns", "pids", self.namespaces[host]).split():
            subprocess.run(["kill", "-KILL", *pids], stderr=subprocess.DEVNULL)
            time.sleep(0.1)

    @staticmethod
    def _ip(*arguments: str) -> str:
        return subprocess.run(
            ["ip", *arguments], env={"PATH": SYSTEM_PATH}, check=True, capture_output=True, text=True
        ).stdout


@pytest.fixture
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    absent = [package for name, package in PACKAGES.items() if not shutil.which(name, path=SYSTEM_PATH)]
    if absent:
        missing(f"needs the packages {' '.join(absent)}")
    if os.geteuid() != 0:
        missing("needs root, to make network namespaces")
    folder = tmp_path_factory.mktemp("hosts")
    tag = uuid.uuid4().hex[:8]
    hosts = TwoHosts(
        namespaces=[f"brumby-{tag}-{letter}" for letter in "ab"],
        addresses=["10.77.0.1", "10.77.0.2"],
        hostfile=folder / "hostfile",
        env={
            **os.environ,
            "PATH": SYSTEM_PATH,
            "PDSH_SSH_ARGS_APPEND": f"-F {folder / 'ssh_config'} {QUICK}",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "OMPI_MCA_plm_rsh_args": f"-F {folder / 'ssh_config'}",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        },
        pkill_calls=folder / "pkill_calls",
    )
    hosts.hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
    (folder / "bin").mkdir()
    (folder / "bin" / "pkill").write_text(f'#!/bin/sh\necho "$@" >>{hosts.pkill_calls}\n')
    (folder / "bin" / "pkill").chmod(0o755)
    servers: list[subprocess.Popen] = []
    try:
        _wire(hosts)
        servers = [_serve_ssh(hosts, host, folder) for host in range(2)]
        yield hosts
    finally:
        for host in range(2):
            hosts.end_processes(host)
        for server in servers:
            server.wait(timeout=10)
        for namespace in hosts.namespaces:
            subprocess.run(["ip", "netns", "del", namespace], env=hosts.env, stderr=subprocess.DEVNULL)


def _wire(hosts: TwoHosts) -> None:
    first, second = hosts.namespaces
    for namespace in hosts.namespaces:
        try:
            hosts._ip("netns", "add", namespace)
        except subprocess.CalledProcessError as error:
            missing(f"cannot make a network namespace: {error.stderr.strip()}")
    hosts._ip(*f"link add eth0 netns {first} type veth peer name eth0 netns {second}".split())
    for namespace, address in zip(hosts.namespaces, hosts.addresses, strict=True):
        hosts._ip(*f"-n {namespace} address add {address}/24 dev eth0".split())
        for device in ("lo", "eth0"):
            hosts._ip(*f"-n {namespace} link set {device} up".split())


def _serve_ssh(hosts: TwoHosts, host: int, folder: Path) -> subprocess.Popen:
    """Start an sshd on a host, with keys of its own, and wait until it answers."""
    user_key, host_key = folder / "user_key", folder / f"host_key_{host}"
    for key in (user_key, host_key):
        if not key.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    (folder / "ssh_config").write_text(
        f"IdentityFile {user_key}\nIdentitiesOnly yes\nIdentityAgent none\nStrictHostKeyChecking no\n"
        f"UserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    config = folder / f"sshd_config_{host}"
    config.write_text(
        f"ListenAddress {hosts.addresses[host]}\nHostKey {host_key}\nAuthorizedKeysFile {user_key}.pub\n"
        f"SetEnv PATH={folder / 'bin'}:{SYSTEM_PATH}\n"
        "AuthenticationMethods publickey\nPermitRootLogin yes\nStrictModes no\nUsePAM no\nPidFile none\n"
    )
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd will not start without it
    sshd = shutil.which("sshd", path=SYSTEM_PATH)
    assert sshd
    with (folder / f"sshd_{host}.log").open("w") as log:
        command = hosts.command(sshd, "-D", "-e", "-f", str(config), host=host)
        server = subprocess.Popen(command, env=hosts.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    deadline = time.monotonic() + 15
    probe = f"import socket; socket.create_connection(({hosts.addresses[host]!r}, 22), timeout=1)"
    while hosts.run("python", "-c", probe).returncode:
        if time.monotonic() > deadline or server.poll() is not None:
            raise RuntimeError((folder / f"sshd_{host}.log").read_text())
    return server
