"""Gates set from the base's attention before a run's first step."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from brumby.convert.pieces import PiecesReader
from brumby.data import Batches
from brumby.data.batches import IGNORE_INDEX
from brumby.launch.runs import check, find_checkpoint
from brumby.model import BrumbyConfig, BrumbyForCausalLM, modeling_brumby
from brumby.model.modeling_brumby import softmax_attention
from brumby.train import calibration
from brumby.train.config import load
from brumby.train.objective import Objective, inputs
from brumby.train.teacher import Base, Teacher
from brumby.train.tracking import read_metrics
from tests.conftest import stage, train


def attention_by_hand(q: Tensor, k: Tensor, bounds: list[int]) -> Tensor:
    """Token by token: q [N, HQ, K], k [N, H, K]."""
    N, H, K = k.shape
    mass = torch.zeros(H, N, dtype=torch.float64)
    for first, end in pairwise(bounds):
        for t in range(first, end):
            for head in range(q.shape[1]):
                group = head * H // q.shape[1]
                a = (k[first : t + 1, group] @ q[t, head] * K**-0.5).softmax(0)
                for j in range(first + 1, t + 1):
                    mass[group, t - j] += a[j - first].double()
    return mass


@pytest.mark.parametrize("queries", [1, 3, 1024])
def test_attention_is_summed_by_distance(monkeypatch, queries):
    monkeypatch.setattr(calibration, "QUERIES", queries)
    q, k = torch.randn(17, 6, 8), torch.randn(17, 2, 8)
    bounds = [0, 1, 9, 17]
    found = calibration.by_distance(q, k, torch.tensor(bounds))
    torch.testing.assert_close(found, attention_by_hand(q, k, bounds), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("qk_norm", [True, False, "retention"])
def test_it_is_the_attention_that_the_base_computes(monkeypatch, qk_norm):
    """Its queries and keys as they come to softmax, by hand."""
    config = BrumbyConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, qk_norm=qk_norm, use_exp=True, initializer_range=0.3,
    )  # fmt: skip
    model = BrumbyForCausalLM(config).eval()
    seen = []

    def note(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        if len(rest) > 1:  # all documents, and no call for one of them
            seen.append((q[0], k[0]))
        return softmax_attention(q, k, *rest)

    def rotate(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """In place, as Liger does it."""
        return tuple(x.copy_(y) for x, y in zip((q, k), rotated(q, k, *rest, **options), strict=True))

    rotated = modeling_brumby.BrumbyAttention.rotate
    monkeypatch.setattr(modeling_brumby.BrumbyAttention, "rotate", staticmethod(rotate))
    monkeypatch.setattr(modeling_brumby, "softmax_attention", note)
    bounds, ids = [0, 5, 10, 20], torch.randint(97, (2, 10))
    positions = torch.cat([torch.arange(j - i) for i, j in pairwise(bounds)]).view(2, 10)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions, "cu_seqlens": torch.tensor(bounds)}
    found = calibration.attention_by_distance(Teacher(Base(model), model), batch)
    expected = torch.stack([attention_by_hand(q, k, bounds) for q, k in seen])
    assert expected.shape == (2, 2, 20)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_gate_halves_in_the_median_distance():
    mass = torch.zeros(3, 5000, dtype=torch.float64)
    mass[0, 20], mass[1, :], mass[2, 0] = 1.0, 1.0, 1.0
    gates = calibration.gate_logits(mass).sigmoid()
    assert gates[0].item() ** 20.5 == pytest.approx(0.5, rel=1e-4)
    assert gates[1].item() == pytest.approx(torch.tensor(calibration.MAX_LOGIT).sigmoid().item())
    assert gates[2].item() == 0.5  # never below: what it has just read a gate keeps in part


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "fp32")])
def test_a_run_begins_with_the_bases_distances(make_run, zero_stage, precision):
    """Masters and the weights that compute: the gates' rate is next to nothing, and the first loss shows them."""
    options = {"zero_stage": zero_stage, "precision": precision, "checkpoint_every": 1, "keep_checkpoints": 12}
    run_dir = make_run(calibrate=True, **options, stages={"retrain": stage(gate_lr=1e-12)})
    train(run_dir, num_ranks=2)
    config = load(run_dir)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    base = BrumbyForCausalLM.from_pretrained(config.model, dtype=dtype, use_exp=True).eval()
    (batch,) = Batches(config.data).micro_batches(0, 0, 1, 8)
    teacher = Teacher(Base(base), base)
    mass = calibration.attention_by_distance(teacher, inputs(batch, torch.device("cpu")))
    reader = PiecesReader(find_checkpoint(run_dir, 1))
    model = BrumbyForCausalLM.from_pretrained(config.model, dtype=dtype)
    for i, (layer, found) in enumerate(zip(model.model.layers, mass, strict=True)):
        expected = calibration.gate_logits(found)
        assert (expected > 0).any()
        master = reader.weight(f"model.layers.{i}.self_attn.g_proj.bias")
        torch.testing.assert_close(master, expected, rtol=1e-4, atol=1e-4)
        layer.self_attn.g_proj.bias.data.copy_(expected)
    loss = Objective(model)(**inputs(batch, torch.device("cpu")))[1].item()
    expected_loss = loss / int((batch.labels != IGNORE_INDEX).sum())
    (row, *_) = read_metrics(run_dir / "metrics.jsonl")
    assert row["loss"] == pytest.approx(expected_loss, rel=2e-3 if precision == "bf16" else 1e-5)


def test_gates_without_biases_are_refused(make_run, tmp_path):
    model = BrumbyForCausalLM(BrumbyConfig(vocab_size=257, hidden_size=32, num_hidden_layers=1, gate_bias=False))
    model.config.save_pretrained(tmp_path / "model")
    run = load(make_run(model=str(tmp_path / "model"), calibrate=True))
    with pytest.raises(ValueError, match=r"calibrate: the gates of .* have no biases"):
        check(run, 1)
