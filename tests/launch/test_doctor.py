"""What is said about machines: of this one as it is, and of answers that a worse one would give."""

import copy
import subprocess
import sys

import pytest

from brumby.launch.doctor import require
from brumby.launch.examine import _compared, _own
from brumby.launch.probe import probe

GPU = {"name": "NVIDIA H100", "free_bytes": 80e9, "total_bytes": 85e9, "tiles": "h100", "problem": None}
DRIVER = {"ecc.errors.uncorrected.volatile.total": "0"}


@pytest.fixture(scope="module")
def answer() -> dict:
    """This machine's own, with two GPUs."""
    found = probe(["/tmp", "/nowhere"])
    return found | {"gpus": [GPU, GPU], "driver": [DRIVER, DRIVER], "ahead": 0.1}


def advice(findings) -> dict[str, str]:
    return {finding.subject: finding.advice for finding in findings if finding.advice}


def test_a_machine_as_it_should_be(answer):
    assert advice(_own("a", answer, 2)) == {}
    assert advice(_compared("a", answer, answer)) == {"/nowhere": "every host needs it at this path"}
    found = {finding.subject: finding.found for finding in _own("a", answer, 2)}
    assert found["GPUs"] == "2 x NVIDIA H100"
    assert found["memory"] == "160 GB free GPU memory: about 8.9B parameters"


@pytest.mark.parametrize(
    ("change", "subject", "words"),
    [
        ({"gpus": [GPU]}, "GPUs", "2 are needed"),
        ({"gpus": [GPU, GPU | {"free_bytes": 40e9}]}, "GPU 1", "another process"),
        ({"gpus": [GPU | {"problem": "computes a wrong product"}, GPU]}, "GPU 0", "replace the GPU"),
        ({"driver": [DRIVER, {"ecc.errors.uncorrected.volatile.total": "3"}]}, "GPU 1", "take the host out"),
        ({"gpus": []}, "GPUs", "install PyTorch for this CUDA"),
        ({"gpus": [], "driver": []}, "GPUs", "other hosts have some"),
        ({"compiler": None}, "compiler", r"apt-get install g\+\+"),
        ({"headers": False}, "Python.h", "python3-dev"),
    ],
)
def test_what_one_machine_lacks(answer, change, subject, words):
    with pytest.raises(ValueError, match=f"a: {subject}: .*{words}"):
        require(_own("a", answer | change, 2))


def test_what_differs_from_the_first(answer):
    other = copy.deepcopy(answer) | {"python": "3.9.1", "code": "another", "ahead": -60.0}
    other["versions"]["torch"] = "1.0"
    other["paths"]["/tmp"] = {"free_bytes": 10, "content": "other"}
    found = advice(_compared("b", other, answer))
    assert found.keys() == {"Python", "packages", "code", "clock", "/tmp", "/nowhere"}
    assert found["packages"] == f"{answer['host']} has torch {answer['versions']['torch']}"


@pytest.mark.slow
def test_doctor_on_this_machine(tmp_path):
    words = ["doctor", "launcher=torchrun", "ranks_per_host=2", f"runs_dir={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "brumby.launch.cli", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all-reduce of 2 ranks" in done.stdout
    words[-1:] = [f"runs_dir={tmp_path}", "paths=[/nowhere]"]
    done = subprocess.run([sys.executable, "-m", "brumby.launch.cli", *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert "every host needs it at this path" in " ".join(done.stdout.split())
