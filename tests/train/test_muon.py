"""Muon beside AdamW in real runs: its updates, what it leaves alone, and its state through interruptions."""

import importlib
import math
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime import compiler
from torch import Tensor

from brumby.convert.pieces import PiecesReader
from brumby.launch.runs import find_checkpoint
from brumby.model import BrumbyForCausalLM
from brumby.train.config import load
from brumby.train.muon import adamw_norm, spare_the_cpu
from brumby.train.status import completed, step_of
from brumby.train.tracking import read_metrics
from tests.conftest import MUON, stage, train
from tests.train.test_training import is_hidden, losses, plain_training

ZEROPOWER = "torch.optim._muon._zeropower_via_newtonschulz"
FULL = MUON | {"checkpoint_every": 1}
SCHEDULE = {"warmup_tokens": 256, "decay_tokens": 512}
ALIGNED = FULL | {
    "zero_stage": 3,
    "precision": "bf16",
    "stages": {
        "align": stage(objective="align", tokens=5 * 256, schedule=SCHEDULE, muon_lr=2e-2),
        "retrain": stage(schedule=SCHEDULE, muon_lr=1e-2),
    },
}


def exact_zeropower(gradient: Tensor, coefficients: tuple, num_steps: int, _eps: float) -> Tensor:
    """torch.optim.Muon's iteration in float64."""
    a, b, c = coefficients
    x = gradient.double() / gradient.double().norm()
    for _ in range(num_steps):
        power = x @ x.mT
        x = a * x + (b * power + c * power @ power) @ x
    return x.to(gradient.dtype)


def errors(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> dict[int, float]:
    """Relative RMS error of the change since `start`: of Muon's matrices by their columns, of the rest as 0."""
    squares: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, weight in expected.items():
        total = squares[weight.shape[1] if is_hidden(name) else 0]
        total[0] += (found[name] - weight).square().sum().item()
        total[1] += (weight - start[name]).square().sum().item()
    return {columns: math.sqrt(error / change) for columns, (error, change) in squares.items()}


def take_up(run_dir: Path, whole: Path, step: int, num_ranks: int) -> None:
    """Train `run_dir` on from the checkpoint of `step` of another run."""
    (folder,) = [folder for folder in completed(whole) if step_of(folder) == step]
    shutil.copytree(folder, run_dir / "checkpoints" / folder.name)
    train(run_dir, num_ranks=num_ranks)


def assert_same(run_dir: Path, whole: Path, from_step: int) -> None:
    """To the bit: what was measured, all weights and moments."""
    rows, undisturbed = (read_metrics(folder / "metrics.jsonl") for folder in (run_dir, whole))
    for row, expected in zip(rows, undisturbed[from_step:], strict=True):
        for name in ("step", "objective", "loss", "grad_norm", "lr", "gate_lr", "muon_lr"):
            assert row[name] == expected[name], name
    one, two = (PiecesReader(find_checkpoint(folder)) for folder in (run_dir, whole))
    assert one.found.keys() == two.found.keys()
    for kind, name in one.found:
        values = [reader.read(kind, name, 0, math.prod(one.shapes[name])) for reader in (one, two)]
        assert torch.equal(*values), (kind, name)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_norm_is_adamws_and_shows_a_matrix_that_is_not_finite(value):
    module = torch.nn.Linear(3, 4)
    module.weight.use_muon, module.bias.use_muon = True, False
    engine: Any = SimpleNamespace(zero_optimization_stage=lambda: 0, module=module, device="cpu")
    module(torch.randn(2, 3)).square().sum().backward()
    assert adamw_norm(engine).item() == pytest.approx(module.bias.grad.norm().item())
    module.weight.grad[0, 0] = value
    assert adamw_norm(engine).isnan()


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_an_update_is_that_of_torchs_muon(trained, monkeypatch, zero_stage):
    """On two ranks with accumulation: within twice the error of torch's own in bfloat16, both against float64.

    The rest is updated as by torch's AdamW, after gradients of its own are clipped.
    """
    run_dir = trained(**FULL, zero_stage=zero_stage)
    rough = {n: p.detach() for n, p in plain_training(run_dir, steps=1)[1].named_parameters()}
    monkeypatch.setattr(ZEROPOWER, exact_zeropower)
    expected = {n: p.detach() for n, p in plain_training(run_dir, steps=1)[1].named_parameters()}
    start = BrumbyForCausalLM.from_pretrained(load(run_dir).model, dtype=torch.float32).state_dict()
    reader = PiecesReader(find_checkpoint(run_dir, 1))
    found = errors({name: reader.weight(name) for name in expected}, expected, start)
    allowed = errors(rough, expected, start)
    assert found.keys() == {0, 32, 64}
    assert found[0] < 1e-4
    assert all(found[columns] < 2 * allowed[columns] < 0.15 for columns in (32, 64))
    monkeypatch.undo()
    assert losses(run_dir) == pytest.approx(plain_training(run_dir)[0], abs=5e-3)
    assert losses(run_dir)[-1] < losses(run_dir)[0] - 2


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_or_elsewhere(make_run, trained):
    """Under ZeRO-2; then by one rank under ZeRO-3.

    There the gradients' last bits differ, which the iteration in bfloat16 makes more of than AdamW does.
    """
    whole = trained(**FULL, zero_stage=2)
    take_up(again := make_run("again", **FULL, zero_stage=2), whole, step=6, num_ranks=2)
    assert_same(again, whole, from_step=6)
    take_up(run_dir := make_run("elsewhere", **FULL, zero_stage=3), whole, step=9, num_ranks=1)
    assert losses(run_dir)[:1] == pytest.approx(losses(whole)[9:10], abs=1e-5)
    assert losses(run_dir) == pytest.approx(losses(whole)[9:], abs=2e-3)


@pytest.mark.slow
def test_alignment_changes_the_mixers_alone_and_resumes(make_run, trained):
    whole = trained(**ALIGNED)
    start = BrumbyForCausalLM.from_pretrained(load(whole).model, dtype=torch.bfloat16)
    reader = PiecesReader(find_checkpoint(whole, 5))
    for name, parameter in start.named_parameters():
        assert torch.equal(reader.weight(name), parameter.float()) == (".self_attn." not in name), name
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["muon_lr"] for row in rows[:2] + rows[5:7]] == pytest.approx([2e-2, 2e-2, 1e-2, 1e-2])
    assert rows[4]["objective"] < 0.9 * rows[0]["objective"]
    take_up(again := make_run(**ALIGNED), whole, step=4, num_ranks=2)
    assert_same(again, whole, from_step=4)


@pytest.mark.parametrize(("has_bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_newton_schulz_spares_a_cpu(has_bf16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "compile", lambda: compiler.dummy_decorator)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    original = importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    for name in ("zeropower_via_newtonschulz5", "ns_compute_dtype"):
        monkeypatch.setattr(original, name, getattr(original, name))
    torch.manual_seed(0)
    G, calls = torch.randn(24, 48), []
    expected = original.zeropower_via_newtonschulz5(G, 5).float()
    plain = original.zeropower_via_newtonschulz5
    original.zeropower_via_newtonschulz5 = lambda G, steps: (calls.append(steps), plain(G, steps))[1]
    spare_the_cpu(original)
    found = original.zeropower_via_newtonschulz5(G, 5)
    assert found.dtype == dtype
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert not original.zeropower_via_newtonschulz5(torch.zeros(24, 48), 5).any()
    assert calls == [5]
