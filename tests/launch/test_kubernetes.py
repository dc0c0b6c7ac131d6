"""The files for Kubernetes: what they name exists, and the pod's own command trains, saves and resumes."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from brumby.launch.commands import SECRET
from brumby.launch.runs import await_run, find_checkpoint
from brumby.train.status import EXIT_BAD_INPUT, EXIT_DIVERGED, step_of
from brumby.train.tracking import read_metrics
from tests.conftest import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job() -> dict:
    jobset = yaml.safe_load((ROOT / "docs" / "examples" / "jobset.yaml").read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


@pytest.fixture
def container(job) -> dict:
    (container,) = job["template"]["spec"]["containers"]
    return container


def test_the_image_is_installed_as_the_readme_says():
    (line,) = (
        line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    pip install")
    )
    assert f"RUN {line.strip()}" in (ROOT / "Dockerfile").read_text().splitlines()


def test_numbers_agree(job, container):
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert int(environment["PET_NNODES"]) == job["completions"] == job["parallelism"]
    grace = re.search(r"grace=(\d+)", container["command"][-1])
    assert int(grace[1]) < job["template"]["spec"]["terminationGracePeriodSeconds"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [EXIT_BAD_INPUT, EXIT_DIVERGED]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in job["template"]["spec"]["volumes"]
    }


def test_secrets_are_references(container):
    secret = [variable for variable in container["env"] if SECRET.search(variable["name"])]
    assert [variable["name"] for variable in secret] == ["WANDB_API_KEY"]
    assert all(variable.keys() == {"name", "valueFrom"} for variable in secret)


def test_a_node_waits_for_the_first_ones_run(make_run, tmp_path):
    config = OmegaConf.create({"resume": None, "runs_dir": str(tmp_path), "name": "run"})
    with ThreadPoolExecutor() as pool:
        found = pool.submit(await_run, config)
        time.sleep(0.2)
        assert not found.done()
        assert make_run() == found.result()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_pods_save_when_one_is_preempted_and_resume(make_run, container, long_data, tmp_path):
    """The command in the file, as two pods of one rank each would run it."""
    run_dir = make_run(data=long_data, checkpoint_every=100)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "brumby").write_text(f'#!/bin/sh\nexec {sys.executable} -m brumby.launch.cli "$@"\n')
    (tmp_path / "bin" / "brumby").chmod(0o755)
    pods = {"RUN": str(run_dir), "PET_NNODES": "2", "PET_MASTER_ADDR": "127.0.0.1"}
    assert pods.keys() | {"PET_MASTER_PORT", "PET_NODE_RANK"} <= {
        variable["name"] for variable in container["env"]
    }

    def start() -> list[subprocess.Popen]:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        common = os.environ | pods | {"PET_MASTER_PORT": str(free_port()), "PATH": path, "OMP_NUM_THREADS": "1"}
        return [
            subprocess.Popen(
                container["command"],
                env=common | {"PET_NODE_RANK": rank},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in ("0", "1")
        ]

    def wait(processes: list[subprocess.Popen], expected: int) -> None:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [expected] * 2, "\n".join(outputs)

    started = start()
    while len(read_metrics(run_dir / "metrics.jsonl")) < 5 and started[0].poll() is None:
        time.sleep(0.02)
    started[1].send_signal(signal.SIGTERM)
    wait(started, 130)
    assert 5 <= step_of(find_checkpoint(run_dir)) < 60
    wait(start(), 0)
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == list(range(1, 61))
