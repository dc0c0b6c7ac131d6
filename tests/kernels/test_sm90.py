"""Every kernel compiles for a Hopper GPU, and needs no more registers and stack than when it was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent


@pytest.mark.slow
def test_kernels_compile_for_hopper_within_their_figures():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, FOLDER / "sm90.py"], env=environment, capture_output=True, text=True, timeout=580
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout)
    figures = json.loads((FOLDER / "sm90.json").read_text())
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    held = figures.get(version) or figures[max(figures, key=lambda v: tuple(map(int, v.split("."))))]
    assert found.keys() == held.keys()
    worse = {
        f"{name}: {what}": (row[what], held[name][what])
        for name, row in found.items()
        for what in row
        if row[what] > held[name][what]
    }
    assert not worse, (
        f"found and committed: {worse}; if it was measured to be faster, {FOLDER / 'sm90.py'} --update"
    )
