"""Seeded accidents: whatever comes when, a run finishes by itself and computes what it would have computed.

Five in the tests, 25 with `make chaos`, which prints the table of docs/reliability.md.
"""

import os
import random
import time

import pytest

from brumby.train.tracking import read_metrics
from tests.launch.test_faults import assert_same, launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KINDS = {
    "kill": "SIGKILL in a step",
    "kill_in_write": "SIGKILL while writing a checkpoint",
    "kill_in_commit": "SIGKILL before a checkpoint has its name",
    "truncate": "newest checkpoint cut off, then SIGKILL",
    "hang": "hangs in a step",
}


def accidents(seed: int) -> list[dict]:
    """Five at random steps of 60, on random ranks of two; each kind once, then as they come."""
    rng = random.Random(seed)
    kinds = list(KINDS) if seed == 0 else rng.choices(list(KINDS), weights=[4, 2, 1, 2, 1], k=5)
    rng.shuffle(kinds)
    steps = [rng.randrange(first, first + 8) for first in (11, 20, 29, 38, 47)]
    return [
        {
            "kind": kind,
            "rank": 0 if kind == "kill_in_commit" else rng.randrange(2),  # only rank 0 gives names
            "step": step,
            "delay": rng.uniform(0, 0.1),
        }
        for kind, step in zip(kinds, steps, strict=True)
    ]


@pytest.mark.parametrize("seed", range(int(os.environ.get("BRUMBY_CHAOS_RUNS", "1"))))
def test_accidents(make_run, long_data, capsys, seed):
    rng = random.Random(100 + seed)
    precision = "bf16" if seed % 2 == 0 else "fp32"
    options = {"data": long_data, "step_timeout": 15, "zero_stage": 3 - seed % 3, "precision": precision}
    faults = accidents(seed)
    bad_batch = {"kind": "nan", "rank": rng.randrange(2), "step": rng.randrange(60)}
    undisturbed, run_dir = make_run("undisturbed", **options), make_run("disturbed", **options)
    launch(undisturbed, [bad_batch])
    start = time.monotonic()
    output = launch(run_dir, [*faults, bad_batch])
    seconds = time.monotonic() - start
    assert all((run_dir / f"fault-{i}").exists() for i in range(len(faults)))
    assert_same(run_dir, undisturbed)
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == list(range(1, 61))
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl") if "not_applied" in row] == [
        bad_batch["step"] + 1
    ]
    restarts = [line.split()[-1] for line in output.splitlines() if "starting again;" in line]
    with capsys.disabled():
        print()
        for fault in faults:
            where = f"ZeRO-{options['zero_stage']} {precision}"
            print(f"| {seed} | {where} | {KINDS[fault['kind']]} | {fault['rank']} | {fault['step'] + 1} | yes |")
        restarted = f"{len(restarts)} restarts, newest checkpoints then {', '.join(restarts)}"
        print(f"<!-- run {seed}: {restarted}; step {bad_batch['step'] + 1} is NaN; {seconds:.0f} s -->")
