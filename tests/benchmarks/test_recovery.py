"""The recovery study's code path on a model of two layers: calibration, alignment, distillation, rows."""

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from brumby.benchmarks import alignment, recovery, recovery_bases, recovery_sample
from brumby.benchmarks.accuracy import Task, save_tasks
from brumby.benchmarks.calibration import Calibration, calibrate
from brumby.benchmarks.muon import Muon, by_head, orthogonal
from brumby.benchmarks.recovery_steps import Stage, Steps, loss_metrics, teach
from brumby.model import BrumbyConfig, BrumbyForCausalLM


def pair(qk_norm: bool) -> tuple[BrumbyForCausalLM, BrumbyForCausalLM]:
    """Student and softmax teacher of the same random weights, large enough that attention is not uniform."""
    torch.manual_seed(0)
    config = BrumbyConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, gate_bias=True, qk_norm=qk_norm,
        initializer_range=0.2,
    )  # fmt: skip
    student = BrumbyForCausalLM(config)
    with (
        torch.no_grad()
    ):  # a direction that all tokens share, as in trained models: q . k of one sign comes from it
        student.model.embed_tokens.weight += 0.1
    teacher = BrumbyForCausalLM(BrumbyConfig(**config.to_dict() | {"use_exp": True}))
    teacher.load_state_dict(student.state_dict())
    return student, teacher


@torch.no_grad()
def errors(student: BrumbyForCausalLM, teacher: BrumbyForCausalLM, ids: Tensor) -> Tensor:
    """Relative squared error of the residual stream after each layer's mixer and after the layer, [layers, 2]."""
    streams: list[list[Tensor]] = []
    for model in (student, teacher):
        stream: list[Tensor] = []
        hooks = []
        for layer in model.model.layers:
            hooks.append(
                layer.post_attention_layernorm.register_forward_hook(lambda m, x, y, s=stream: s.append(x[0]))
            )
            hooks.append(layer.register_forward_hook(lambda m, x, y, s=stream: s.append(y)))
        model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        streams.append(stream)
    found = [(x - y).square().sum() / y.square().sum() for x, y in zip(*streams, strict=True)]
    return torch.stack(found).view(-1, 2)


@pytest.mark.parametrize(
    ("qk_norm", "options"),
    [
        (True, {"outputs": True}),
        (True, {"outputs": True, "mlp": True}),
        (True, {"gates": "fit", "outputs": True}),
        (True, {"gates": "distance", "outputs": True}),
        (False, {"outputs": True, "mlp": True}),
        (False, {"qk": 1}),
        (False, {"qk": 1, "outputs": True}),
    ],
)
def test_calibration_lowers_the_error_of_every_layer_on_other_tokens(qk_norm: bool, options: dict) -> None:
    student, teacher = pair(qk_norm)
    ids, held_out = torch.randint(97, (2, 16, 64)).unbind()
    calibrate(student, teacher, ids, Calibration(gates=options.get("gates", "spread")))
    before = errors(student, teacher, held_out)
    calibrate(student, teacher, ids, Calibration(**options, sequences=16))
    after = errors(student, teacher, held_out)
    assert (after < 0.9 * before).all(), (before, after)


def test_q_and_k_under_norms_are_not_fitted() -> None:
    student, teacher = pair(qk_norm=True)
    with pytest.raises(ValueError, match="have norms"):
        calibrate(student, teacher, torch.randint(97, (1, 8)), Calibration(qk=1))


def test_fitted_q_and_k_keep_the_norm_of_each_head() -> None:
    student, teacher = pair(qk_norm=False)
    calibrate(student, teacher, torch.randint(97, (4, 32)), Calibration(qk=1))
    for ours, theirs in zip(student.model.layers, teacher.model.layers, strict=True):
        for name in ("q_proj", "k_proj"):
            found, before = (getattr(layer.self_attn, name).weight.view(-1, 8 * 32) for layer in (ours, theirs))
            torch.testing.assert_close(found.norm(dim=1), before.norm(dim=1), rtol=1e-5, atol=0)
            assert ((found - before).norm(dim=1) > 0.1 * before.norm(dim=1)).all()


def test_muon_is_torchs_for_many_matrices() -> None:
    torch.manual_seed(0)
    shapes = [(32, 32), (16, 32), (32, 16), (32, 32)]
    ours, theirs = ([torch.randn(shape, generator=torch.Generator().manual_seed(i)).requires_grad_()
                     for i, shape in enumerate(shapes)] for _ in range(2))  # fmt: skip
    optimizers = (
        Muon([{"params": ours, "lr": 0.1}], weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    start = [p.detach().clone() for p in ours]
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.02 * (a - before).norm()  # Newton and Schulz in bfloat16


def test_heads_are_matrices_of_their_own() -> None:
    x = torch.randn(2, 6, 12)
    rows = by_head(x, (0, 3), orthogonal)
    columns = by_head(x.mT, (1, 3), orthogonal)
    for i in (0, 3):
        torch.testing.assert_close(rows[:, i : i + 3], orthogonal(x[:, i : i + 3]))
    assert torch.equal(columns, rows.mT)
    assert not torch.allclose(rows, orthogonal(x), atol=0.1)


def test_rows_of_one_size_move_alike() -> None:
    torch.manual_seed(0)
    changes = []
    for row_beta in (0.0, 0.95):
        p = torch.zeros(24, 8).requires_grad_()
        p.grad = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
        Muon([{"params": [p], "lr": 1.0}], row_beta=row_beta).step()
        changes.append(p.detach())
    plain, alike = changes
    assert alike.norm().item() == pytest.approx(plain.norm().item(), rel=1e-3)
    torch.testing.assert_close(alike.norm(dim=1), alike.norm(dim=1).mean().expand(24), rtol=1e-3, atol=0)
    assert plain.norm(dim=1).max() > 1.2 * plain.norm(dim=1).min()
    torch.testing.assert_close(F.normalize(alike, dim=1), F.normalize(plain, dim=1), rtol=1e-2, atol=1e-2)


def small_run(model: Path, folder: Path) -> recovery.Run:
    rng = np.random.default_rng(0)
    np.save(folder / "train.npy", rng.integers(257, size=33 * 16).astype(np.uint16))
    np.savez(folder / "held.npz", one=rng.integers(257, size=33 * 4))
    return recovery.Run(model, folder / "train.npy", folder / "held.npz", "cpu", False, 2**20, 32)


def test_a_softmax_stage_makes_the_teacher_of_the_next(tiny_model: Path, tmp_path: Path) -> None:
    run = small_run(tiny_model, tmp_path)
    rows: list[dict] = []
    softmax = Stage(tokens=256, kl=0.0, ce=1.0, softmax=True, sequences=4, lr=1e-2)
    align = Stage(tokens=256, align=True, sequences=4)
    run.recover(recovery.Recipe("control", [softmax], Calibration()), 0, rows.append)
    trained = run.copy_of_student()
    assert all(torch.equal(run.teacher.state_dict()[name], p) for name, p in run.start.items())
    run.recover(recovery.Recipe("corrected", [softmax, align], Calibration()), 0, rows.append)
    assert any(not torch.equal(trained[name], p) for name, p in run.start.items())
    assert all(torch.equal(run.teacher.state_dict()[name], p) for name, p in trained.items())
    zero, corrected, control = rows[2], rows[3], rows[1]
    assert zero["excess_nats"] == 0
    assert corrected["excess_nats"] == control["excess_nats"]
    run.recover(recovery.Recipe("plain", [align], Calibration()), 0, rows.append)
    assert all(torch.equal(run.teacher.state_dict()[name], p) for name, p in run.start.items())


def test_pieces_are_all_of_a_sequence(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    run, seen = small_run(tiny_model, tmp_path), []
    step = Steps.step
    monkeypatch.setattr(Steps, "step", lambda self, i, ids: (seen.append(ids.clone()), step(self, i, ids))[1])
    stage = Stage(tokens=128, align=True, sequences=2, pieces=4)
    run.recover(recovery.Recipe("pieces", [stage], Calibration()), 0, lambda row: None)
    assert [tuple(ids.shape) for ids in seen] == [(2, 9)] * 8
    rows = run.batches(0, run.train_ids)
    for i in (0, 4):
        whole = torch.cat([seen[i][:, :1], *(ids[:, 1:] for ids in seen[i : i + 4])], 1)
        assert torch.equal(whole, torch.stack([next(rows), next(rows)]))
        assert all(torch.equal(a[:, -1], b[:, 0]) for a, b in pairwise(seen[i : i + 4]))


def test_a_share_of_the_rows_is_the_bases_own(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    run, seen = small_run(tiny_model, tmp_path), []
    step = Steps.step
    monkeypatch.setattr(Steps, "step", lambda self, i, ids: (seen.append(ids.clone()), step(self, i, ids))[1])
    stages = [Stage(tokens=32 * 4, align=True, sequences=1), Stage(tokens=32 * 8, sequences=4, sampled=0.25)]
    with pytest.raises(ValueError, match="text that the base wrote"):
        run.recover(recovery.Recipe("none", stages, Calibration()), 0, lambda row: None)
    run.sampled_ids = torch.arange(3 * 33, dtype=torch.int32).view(3, 33)
    seen.clear()
    run.recover(recovery.Recipe("some", stages, Calibration()), 0, lambda row: None)
    rows, written = run.batches(0, run.train_ids), run.batches(0, run.sampled_ids)
    for _ in range(0 if len(seen) == 6 else 4):
        next(rows)  # the first stage is not run again
    for ids in seen:
        expected = [next(written) if len(ids) == 4 and i == 3 else next(rows) for i in range(len(ids))]
        assert torch.equal(ids, torch.stack(expected))


def test_what_recipes_begin_with_alike_is_done_once(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    softmax = Stage(tokens=256, kl=0.0, ce=1.0, softmax=True, sequences=4, lr=1e-2)
    align = Stage(tokens=256, align=True, sequences=4)
    ends = [Stage(tokens=256, sequences=4, lr=lr) for lr in (1e-3, 1e-2)]
    one, other = (recovery.Recipe(f"{end.lr}", [softmax, align, end], Calibration()) for end in ends)
    alone, after = [], []
    small_run(tiny_model, tmp_path).recover(other, 0, alone.append)
    run, steps = small_run(tiny_model, tmp_path), []
    step = Steps.step
    monkeypatch.setattr(Steps, "step", lambda self, i, ids: (steps.append(self.stage), step(self, i, ids))[1])
    run.recover(one, 0, lambda row: None)
    steps.clear()
    run.recover(other, 0, after.append)
    assert steps == [ends[1]] * 2
    same = ("tokens", "excess_nats", "train_loss", "final")
    assert [[row[name] for name in same] for row in after] == [[row[name] for name in same] for row in alone]
    steps.clear()
    run.recover(one, 1, lambda row: None)
    assert len(steps) == 6


def test_a_stage_goes_a_part_of_its_way(tiny_model: Path, tmp_path: Path) -> None:
    run, ends = small_run(tiny_model, tmp_path), {}
    for reach in (0.0, 0.75, 1.0):
        stage = Stage(tokens=256, kl=0.0, ce=1.0, softmax=True, sequences=4, lr=1e-2, reach=reach)
        run.recover(recovery.Recipe("part", [stage], Calibration()), 0, lambda row: None)
        ends[reach] = run.copy_of_student()
    for name, p in run.start.items():
        torch.testing.assert_close(ends[0.0][name], p)
        torch.testing.assert_close(ends[0.75][name], p + 0.75 * (ends[1.0][name] - p))
    assert any(not torch.allclose(ends[1.0][name], p, atol=1e-3) for name, p in run.start.items())


def test_mixers_have_a_rate_of_their_own_with_muon_too(tiny_model: Path, tmp_path: Path) -> None:
    run = small_run(tiny_model, tmp_path)
    names = {id(p): name for name, p in run.student.named_parameters()}
    muon = Steps(run, Stage(tokens=256, optimizer="muon", lr=1e-3, mixer_lr=2e-3)).optimizers[1]
    for group in muon.param_groups:
        mixers = [".self_attn." in names[id(p)] for p in group["params"]]
        assert set(mixers) == {group["lr"] == 2e-3}
    assert sorted(group["peak_lr"] for group in muon.param_groups) == [1e-3, 2e-3]


def test_the_excess_in_domain_is_on_rows_that_come_last(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(recovery, "EVALUATED", 4)
    run, found = small_run(tiny_model, tmp_path), []
    stage = Stage(tokens=32 * 12, kl=0.0, ce=1.0, lr=1e-2, sequences=4)  # all but the last four of 16 rows
    run.recover(recovery.Recipe("some", [stage], Calibration()), 3, found.append)
    rows = run.batches(3, run.train_ids)
    last = torch.stack([next(rows) for _ in range(16)])[12:].long()
    logits = [model(last[:, :-1], use_cache=False).logits.flatten(0, 1) for model in (run.student, run.teacher)]
    student, base = (F.cross_entropy(z, last[:, 1:].flatten()).item() for z in logits)
    assert found[-1]["excess_in_domain"] == pytest.approx(student - base, abs=1e-4)
    assert found[0]["excess_in_domain"] != found[-1]["excess_in_domain"]
    assert np.mean(found[-1]["excess_by_eighth"]) == pytest.approx(found[-1]["excess_nats"], abs=1e-4)
    assert "excess_by_eighth" not in found[0]


def test_a_repeat_follows_what_it_followed_before() -> None:
    rows = torch.randint(4, (3, 40))
    expected = [[(a, b) in list(pairwise(row[: i + 1])) for i, (a, b) in enumerate(pairwise(row))]
                for row in rows.tolist()]  # fmt: skip
    assert recovery.repeats(rows).tolist() == expected


def test_the_excess_is_told_by_where_it_is(tiny_model: Path, tmp_path: Path) -> None:
    run = small_run(tiny_model, tmp_path)
    rows = torch.arange(2 * 33).view(2, 33)
    rows[1, 20:22] = rows[1, 4:6]
    run.repeats = {"one": recovery.repeats(rows), "two": recovery.repeats(rows.flip(0))}
    excess = torch.arange(32.0).expand(2, 32)
    found = run.where({"one": excess, "two": 1 + excess})
    assert found["excess_by_eighth"] == [0.5 + 4 * i + 1.5 for i in range(8)]
    assert found["excess_of_repeats"] == 20.5
    assert found["excess_of_others"] == pytest.approx((64 * 16.0 - 20.5) / 63, abs=1e-4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_base_writes_from_its_own_distribution(qk_norm: bool) -> None:
    _, teacher = pair(qk_norm)
    sampler = recovery_sample.Sampler(teacher.eval(), B=3, T=20, min_p=0.1)
    rows = sampler.write(97).clone()
    expected = teacher(rows[:, :-1], use_cache=False).logits
    sampler.position.zero_()
    for i in range(20):
        torch.testing.assert_close(sampler.logits(20), expected[:, i])
        sampler.position += 1
    num_rows = 20_000
    sampler = recovery_sample.Sampler(teacher, B=num_rows, T=1, min_p=0.1)
    found = torch.bincount(sampler.write(1)[:, 1], minlength=97)
    p = teacher(rows.new_zeros(1, 1), use_cache=False).logits[0, 0].softmax(-1)
    likely = p >= 0.1 * p.max()
    assert 10 < likely.sum() < 90
    assert not found[~likely].any()
    found, p = found[likely], p[likely] / p[likely].sum()
    assert chi_square(found, p) < len(p) + 5 * (2 * len(p)) ** 0.5
    first = torch.bincount(sampler.write(60)[:, 0], minlength=97)
    assert not first[60:].any()
    assert chi_square(first[:60], torch.full((60,), 1 / 60)) < 60 + 5 * 120**0.5


def chi_square(found: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    num = found.sum()
    return ((found - num * p) / (num * p * (1 - p)).sqrt()).square().sum()


def test_what_the_base_writes_is_kept_as_tokens_and_as_text(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "sampled.npy"
    words = ["--base", tiny_model, "--tokens", 100, "--rows", 3, "--sequence-length", 16, "--out", out]
    with pytest.raises(SystemExit) as refused:
        recovery_sample.main([str(word) for word in (*words, "--min-p", 0)])
    assert refused.value.code == 2
    assert not list(tmp_path.iterdir())
    recovery_sample.main([str(word) for word in words])
    ids = np.load(out)
    assert ids.dtype == np.uint16
    rows = ids.reshape(-1, 17)
    assert len(rows) == 6
    assert len({tuple(row) for row in rows.tolist()}) == 6
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    assert len(set(rows[:, 0])) > 1
    assert (rows[:, 0] < tokenizer.get_vocab_size()).all()
    with gzip.open(tmp_path / "sampled.jsonl.gz", "rt") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    assert texts == [tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in rows]


def test_recipes_run_once(tiny_model: Path, tmp_path: Path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "train.npy", rng.integers(257, size=33 * 64).astype(np.uint16))
    np.savez(tmp_path / "held.npz", one=rng.integers(257, size=33 * 4), two=rng.integers(257, size=33 * 4))
    (tmp_path / "recipes.yaml").write_text(
        "recipes:\n"
        "  align-kl: {evaluate_at: [128], stages: [{align: true, sequences: 4, tokens: 2560, lr: 0.01},"
        " {kl: 1.0, sequences: 4, tokens: 256}]}\n"
        "  align-kl-again: {stages: [{align: true, sequences: 4, tokens: 2560, lr: 0.01},"
        " {kl: 1.0, sequences: 4, tokens: 256}]}\n"
        "  metric: {stages: [{align: true, metric: 10.0, sequences: 4, tokens: 2560, lr: 0.01},"
        " {align: true, own: true, metric: 10.0, sequences: 4, tokens: 2560, lr: 0.01}]}\n"
        "  by-head: {stages: [{align: true, optimizer: muon, by_head: true, row_beta: 0.95, pieces: 2,"
        " sequences: 2, tokens: 2560, lr: 0.01}]}\n"
        "  correct: {stages: [{kl: 0.0, ce: 1.0, softmax: true, sequences: 4, tokens: 256, lr: 1.0e-2},"
        " {align: true, sequences: 4, tokens: 2560, lr: 0.01}]}\n"
        "  softmax: {stages: [{kl: 0.0, ce: 1.0, softmax: true, sequences: 4, tokens: 256, lr: 1.0e-4}]}\n"
    )
    with (tmp_path / "tasks.npz").open("wb") as file:
        two, ids = np.array([0, 0]), np.arange(1, 7)
        save_tasks(file, {"piqa": Task(ids, two + 3, two + 1, two + 1, two, np.array([0, 1]), two)})
    words = [
        "--tasks", tmp_path / "tasks.npz", "--confirmation", tmp_path / "held.npz",
        "--base", tiny_model, "--train", tmp_path / "train.npy", "--held-out", tmp_path / "held.npz",
        "--recipe-file", tmp_path / "recipes.yaml", "--out", tmp_path, "--sequence-length", 32,
        "--device", "cpu", "--no-compile", "--seeds", 0, 1,
    ]  # fmt: skip
    recovery.main([str(word) for word in words])
    content = (tmp_path / "recovery.json").read_text()
    found = json.loads(content)
    assert {"device", "date", "torch"} <= set(found)
    rows = [row for row in found["rows"] if row["seed"] == 0 and row["recipe"] == "align-kl"]
    assert [row["tokens"] for row in rows] == [0, 128, 2560, 2816]
    again = [row for row in found["rows"] if row["seed"] == 0 and row["recipe"] == "align-kl-again"]
    same = ("tokens", "excess_by_source", "train_loss", "final")
    assert [[row[name] for name in same] for row in again] == [
        [row[name] for name in same] for row in rows if row["tokens"] != 128
    ]
    last = [(row["recipe"], row["tokens"]) for row in found["rows"] if row["final"] and row["seed"] == 1]
    assert last == [
        ("align-kl", 2816),
        ("align-kl-again", 2816),
        ("metric", 5120),
        ("by-head", 2560),
        ("correct", 2816),
        ("softmax", 256),
    ]
    fields = {"recipe", "model", "seed", "tokens", "excess_nats", "excess_by_source", "base_loss", "gpu_seconds"}
    assert all(fields | {"compile_seconds"} <= set(row) for row in found["rows"] if row["recipe"] != "base")
    assert all(("accuracy" in row) == row["final"] for row in found["rows"])
    confirmed = [row for row in found["rows"] if "excess_of_confirmation" in row]
    assert len(confirmed) == 2 * len(last)
    assert all(row["excess_of_confirmation"]["all"] == row["excess_nats"] for row in confirmed)
    bases = [row for row in found["rows"] if row["recipe"] == "base"]
    assert [row["accuracy_above_chance"] for row in bases] == [1]
    control = [row for row in found["rows"] if row["recipe"] == "softmax" and not row["tokens"]]
    assert all(row["excess_nats"] == 0 for row in control)

    results = recovery.Results(tmp_path / "recovery.json", recovery.MODEL, "cpu")
    assert results.base_accuracy({"piqa": two}) == bases[0]["accuracy"]
    assert results.base_accuracy({"piqa": two, "lambada": two}) == {}
    monkeypatch.delattr(recovery.Run, "answer")  # the base's answers are known, too
    recovery.main([str(word) for word in words])
    assert (tmp_path / "recovery.json").read_text() == content


@pytest.mark.parametrize("options", [{}, {"own": True}, {"metric": 10.0}, {"own": True, "metric": 10.0}])
def test_alignment_loss_falls(tiny_model: Path, tmp_path: Path, options: dict) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "train.npy", rng.integers(257, size=33 * 8).astype(np.uint16))
    np.savez(tmp_path / "held.npz", one=rng.integers(257, size=33 * 4))
    run = recovery.Run(tiny_model, tmp_path / "train.npy", tmp_path / "held.npz", "cpu", False, 2**20, 32)
    run.measure_metrics()
    steps = Steps(run, Stage(tokens=20 * 4 * 32, align=True, sequences=4, lr=1e-2, **options))
    losses = [steps.step(i, run.train_ids[:4].long()).item() for i in range(steps.num_steps)]
    assert losses[-1] < 0.5 * losses[0]


def test_metrics_are_the_fisher_information(tmp_path: Path) -> None:
    _, teacher = pair(qk_norm=False)
    teacher.save_pretrained(tmp_path / "base")
    ids = np.random.default_rng(0).integers(97, size=2 * 2000).astype(np.uint16)
    np.save(tmp_path / "train.npy", ids)
    np.savez(tmp_path / "held.npz", one=ids[:64])
    run = recovery.Run(tmp_path / "base", tmp_path / "train.npy", tmp_path / "held.npz", "cpu", False, 2**20, 1)
    tokens = run.train_ids[:, :1].long()  # alone, so that each token's label is its own
    values, vectors = loss_metrics(run, tokens)[0]

    rotation = run.rotation(run.teacher, 1)
    first, second = run.teacher.model.layers
    _, a, attended, _ = teach(first, run.teacher.model.embed_tokens(torch.arange(97)[:, None]), rotation)

    def log_p(a: Tensor, x: Tensor) -> Tensor:
        """Log-probabilities [W] of the token after one whose stream is x and whose attention gives a, each [E]."""
        x = (x + a)[None, None]
        x = x + first.mlp(first.post_attention_layernorm(x))
        x = second(x, position_embeddings=rotation)
        return run.teacher.lm_head(run.teacher.model.norm(x))[0, 0].log_softmax(-1)

    exact = torch.zeros(32, 32)
    counts = torch.bincount(tokens.flatten(), minlength=97)
    for token, count in enumerate(counts.tolist()):
        y = a[token, 0].detach()
        x = attended[token, 0].detach() - y
        g = torch.autograd.functional.jacobian(lambda y, x=x: log_p(y, x), y) * (x + y).square().mean().sqrt()
        exact += count * g.T @ (log_p(y, x).exp()[:, None] * g)
    exact /= exact.diagonal().mean()
    found = vectors * values @ vectors.T
    assert (found - exact).norm() < 0.2 * exact.norm()  # labels are sampled
    assert values.mean().item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("kv-heads", {"num_key_value_heads": 4}),
        ("offsets", {"qkv_bias": True}),
    ],
)
def test_made_bases_are_the_same_function(kind: str, change: dict, tmp_path: Path) -> None:
    _, teacher = pair(qk_norm=False)
    teacher.save_pretrained(tmp_path / "base")
    recovery_bases.main([kind, "--base", str(tmp_path / "base"), "--out", str(tmp_path / "made")])
    made = BrumbyForCausalLM.from_pretrained(tmp_path / "made")
    ids = torch.randint(97, (2, 16))
    assert made.config.to_dict().items() >= change.items()
    torch.testing.assert_close(made(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1e-5)


def test_norms_are_learnt_from_the_base_without(tmp_path: Path, capsys) -> None:
    _, teacher = pair(qk_norm=False)
    teacher.config.sink = 20.0
    teacher.save_pretrained(tmp_path / "base")
    rng = np.random.default_rng(0)
    np.save(tmp_path / "train.npy", rng.integers(97, size=33 * 64).astype(np.uint16))
    np.savez(tmp_path / "held.npz", one=rng.integers(97, size=33 * 8))
    words = ["--base", "base", "--train", "train.npy", "--held-out", "held.npz", "--out", "norms"]
    words = [word if word.startswith("--") else tmp_path / word for word in words]
    words += ["--tokens", 64 * 128, "--sequence-length", 32, "--device", "cpu", "--no-compile"]
    recovery_bases.main(["qk-norm", *(str(word) for word in words)])
    found = capsys.readouterr().out
    before, after = (float(number) for number in re.findall(r": (-?[0-9.]+)", found))
    assert after < before / 2
    model = BrumbyForCausalLM.from_pretrained(tmp_path / "norms", use_exp=True)
    assert model.config.qk_norm
    norms = [(layer.self_attn.q_norm.weight, layer.self_attn.k_norm.weight) for layer in model.model.layers]
    assert all((q != 1).any() for q, _ in norms)
    assert model.config.sink == pytest.approx([20 * (q * k).square().mean().item() for q, k in norms], rel=1e-5)
    run = recovery.Run(tmp_path / "norms", tmp_path / "train.npy", tmp_path / "held.npz", "cpu", False, 2**20, 32)
    excess = run.base_loss["all"] - recovery.means(run.losses_by_source(teacher, run.held_out))["all"]
    assert excess == pytest.approx(after, abs=1e-3)


def test_each_weighting_of_a_layer_learns_attention(tmp_path: Path) -> None:
    _, teacher = pair(qk_norm=True)
    teacher.save_pretrained(tmp_path / "base")
    np.save(tmp_path / "train.npy", np.random.default_rng(0).integers(97, size=4096).astype(np.uint16))
    words = ["--base", tmp_path / "base", "--train", tmp_path / "train.npy", "--out", tmp_path, "--layers", 1]
    words += ["--sequences", 96, "--sequence-length", 16, "--device", "cpu"]
    alignment.main([str(word) for word in words])
    rows = json.loads((tmp_path / "alignment.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == list(alignment.VARIANTS)
    assert all(row["error"] < 0.8 * row["start"] for row in rows), rows


def test_square_and_exponential_weights_are_retention_and_softmax() -> None:
    student, teacher = pair(qk_norm=True)
    h = torch.randn(2, 16, 32)
    rotation = student.model.rotary_emb(h, torch.arange(16)[None])
    for model, variant in ((student, "square"), (teacher, "exponential")):
        mixer = model.model.layers[0].self_attn
        if variant == "exponential":
            torch.nn.init.constant_(mixer.g_proj.bias, 50.0)  # no gates
        found = alignment.mix(mixer, h, rotation, alignment.VARIANTS[variant])
        torch.testing.assert_close(found, mixer(h, position_embeddings=rotation), rtol=1e-4, atol=1e-5)
