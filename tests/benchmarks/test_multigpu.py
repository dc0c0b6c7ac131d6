"""Intervals of a trace by hand, and the smallest cases from end to end."""

import json
import sys

import pytest

from brumby.benchmarks import multigpu
from brumby.benchmarks.multigpu_rank import shares


def event(name: str, start: float, end: float, cat: str = "kernel") -> dict:
    return {"cat": cat, "name": name, "ts": 1e6 * start, "dur": 1e6 * (end - start)}


def test_communication_alone_and_beside_other_work() -> None:
    events = [
        event("ncclDevKernel_AllGather", 1, 4),
        event("gemm", 0, 2),
        event("Memset", 3, 3.5, "gpu_memset"),
        event("ncclDevKernel_ReduceScatter", 3, 6),  # on another stream than the first
        event("gemm", 7, 8),
        event("nccl:all_gather", 0, 8, "gpu_user_annotation"),
        {"ph": "M", "name": "process_name"},
    ]
    # NCCL runs from 1 to 6, others meanwhile from 1 to 2 and from 3 to 3.5; nothing runs from 6 to 7 and after 8
    assert shares(events, 10.0) == pytest.approx({"exposed": 0.35, "overlapped": 0.15, "idle": 0.3})
    assert shares(events[-2:], 10.0) is None


@pytest.mark.slow
def test_cases_on_two_ranks(tmp_path, monkeypatch, capsys) -> None:
    argv = ["multigpu", "--shape", "tiny", "--gpus", "2", "--layers", "1", "--accumulation", "2"]
    for cases in (["one"], ["zero3-kl", "bandwidth"]):
        monkeypatch.setattr(sys, "argv", [*argv, "--out", str(tmp_path), "--cases", *cases])
        assert multigpu.main() == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "multigpu.json").read_text())["rows"]
    assert [row["case"] for row in rows] == ["one", "zero3-kl", "zero3-kl", "bandwidth"]
    assert [row["stage"] for row in rows[:3]] == ["retrain", "align", "retrain"]
    assert [row["gpus"] for row in rows[:3]] == [1, 2, 2]
    assert all(row["tokens_per_second_per_gpu"] > 0 < row["peak_bytes"] for row in rows[:3])
    assert rows[0]["scaling"] == 1
