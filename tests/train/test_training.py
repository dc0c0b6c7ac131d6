"""Real runs of real ranks: what they write, what they compute, how they are interrupted and resumed."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from brumby.convert.export import export
from brumby.convert.pieces import PiecesReader
from brumby.data import Batches
from brumby.launch.runs import find_checkpoint
from brumby.model import BrumbyForCausalLM
from brumby.train.config import load
from brumby.train.status import completed, step_of
from brumby.train.throughput import slow_in_bf16
from brumby.train.tracking import read_metrics
from tests.conftest import WITH_TESTS, stage, start_ranks, train

TOLERANCES = {"fp32": {"abs": 2e-5}, "bf16": {"rel": 0.01}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROW = {
    "step", "tokens_seen", "phase", "loss", "base_loss", "lr", "grad_norm", "tokens_per_second", "mfu",
    "step_seconds",
}  # fmt: skip


def losses(run_dir) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")]


def weights(run_dir) -> dict[str, torch.Tensor]:
    reader = PiecesReader(find_checkpoint(run_dir))
    return {name: reader.weight(name) for name in reader.shapes}


def is_hidden(name: str) -> bool:
    """Whether Muon updates the parameter: a layer's matrix, not the gates'."""
    return name.endswith("_proj.weight") and "g_proj" not in name


def plain_losses(run_dir, use_exp: bool = False, trained: str = "") -> list[float]:
    return plain_training(run_dir, use_exp, trained=trained)[0]


def plain_training(
    run_dir, use_exp: bool = False, steps: int | None = None, trained: str = ""
) -> tuple[list[float], BrumbyForCausalLM]:
    """The same training in plain PyTorch: one process, whole batches, documents one by one.

    Parameters without `trained` in their names are frozen, and what softmax has no use for. A copy
    in the run's precision computes the gradients.

    Returns:
        The losses and the float32 model behind the last step.
    """
    config = load(run_dir)
    stage, with_muon = config.stages["retrain"], config.optimizer.name == "muon"
    model = BrumbyForCausalLM.from_pretrained(config.model, dtype=torch.float32, use_exp=use_exp)
    copy = deepcopy(model).to(DTYPES[config.precision])
    unused = ["g_proj"] if use_exp else []
    unused += ["q_norm", "k_norm"] if use_exp and model.config.qk_norm == "retention" else []
    named = [(n, p) for n, p in model.named_parameters() if trained in n and not any(u in n for u in unused)]
    hidden = [p for n, p in named if with_muon and is_hidden(n)]
    by_adamw = [(n, p) for n, p in named if not (with_muon and is_hidden(n))]
    matrices = [p for n, p in by_adamw if p.ndim == 2 and "g_proj" not in n]
    others = [p for n, p in by_adamw if p.ndim == 1 or "g_proj" in n]
    decay = config.optimizer.weight_decay
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8), stage.lr)
    ]
    if with_muon:
        muon = torch.optim.Muon(hidden, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append((muon, stage.muon_lr or math.nan))
    found, batches = [], Batches(config.data)
    total_tokens = batches.tokens_seen(batches.num_steps)
    for step in range(steps or batches.num_steps):
        (batch,) = batches.micro_batches(step, 0, 1, batches.phase_of(step)[1].sequences_per_step)
        total, count = torch.zeros(()), 0
        tokens, labels = batch.input_ids.flatten(), batch.labels.flatten()
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            logits = copy(tokens[None, start:end], use_cache=False).logits[0].float()
            total = total + torch.nn.functional.cross_entropy(logits, labels[start:end], reduction="sum")
            count += int((labels[start:end] != -100).sum())
        found.append(total.item() / count)
        if use_exp and not config.softmax:
            continue
        copy.zero_grad()
        (total / count).backward()
        for name, p in named:
            p.grad = copy.get_parameter(name).grad.float()
        torch.nn.utils.clip_grad_norm_([p for _, p in by_adamw], 1.0)
        seen = batches.tokens_seen(step + 1)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * min(seen / 512, (total_tokens - seen) / 1024, 1.0)
            optimizer.step()
        copy.load_state_dict(model.state_dict())
    return found, model


def test_one_rank_trains_as_plain_pytorch_does(make_run):
    run_dir = make_run(zero_stage=0)
    train(run_dir)
    assert losses(run_dir) == pytest.approx(plain_losses(run_dir), abs=2e-5)
    assert losses(run_dir)[-1] < losses(run_dir)[0] - 0.3
    base = [row["base_loss"] for row in read_metrics(run_dir / "metrics.jsonl")]
    assert [i for i, loss in enumerate(base) if loss is not None] == [0, 4, 8, 11]
    expected = plain_losses(run_dir, use_exp=True)
    assert [base[i] for i in (0, 4, 8, 11)] == pytest.approx([expected[i] for i in (0, 4, 8, 11)], abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_phases_with_their_own_lengths_and_batches(make_run, tiny_data, zero_stage):
    phases = {
        "one": {"tokens": 3 * 256, "blend": {"wiki": 1.0}},
        "two": {"tokens": 4 * 384, "blend": {"code": 1.0}, "sequence_length": 64, "sequences_per_step": 6},
        "three": {"tokens": 2 * 512, "blend": {"math": 1.0}, "sequence_length": 128, "sequences_per_step": 4},
    }
    run_dir = make_run(data=tiny_data | {"phases": phases}, zero_stage=zero_stage)  # 4, 3 and 2 micro-batches
    train(run_dir)
    assert losses(run_dir) == pytest.approx(plain_losses(run_dir), abs=2e-5)
    tokens = [row["tokens_seen"] for row in read_metrics(run_dir / "metrics.jsonl")]
    assert tokens == [256, 512, 768, 1152, 1536, 1920, 2304, 2816, 3328]


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_at_every_zero_stage_train_as_one(trained, zero_stage):
    run_dir = trained(zero_stage=zero_stage)
    assert losses(run_dir) == pytest.approx(plain_losses(run_dir), abs=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_trains_float32_masters(trained, zero_stage):
    run_dir = trained(zero_stage=zero_stage, precision="bf16", stages={"retrain": stage(lr=5e-3)})
    assert losses(run_dir) == pytest.approx(plain_losses(run_dir), rel=3e-3)
    for name, weight in weights(run_dir).items():
        assert (weight.bfloat16().float() != weight).float().mean() > 0.9, f"{name} is no more precise than bf16"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stage", "then", "precision"), [(0, 1, "fp32"), (1, 2, "bf16"), (2, 3, "fp32"), (3, 0, "bf16")]
)
def test_frozen_parameters_stay_as_they_are(make_run, zero_stage, then, precision):
    """The mixers are trained alone, by two ranks; then one takes up the checkpoint of step 5 at another stage."""
    options = {"zero_stage": zero_stage, "precision": precision, "stages": {"retrain": stage(lr=1e-3)}}
    run_dir = make_run(**options, activation_checkpointing=True, keep_checkpoints=3)
    frozen_ranks = {"module": "frozen", "PYTHONPATH": WITH_TESTS}
    train(run_dir, num_ranks=2, **frozen_ranks)
    expected = pytest.approx(plain_losses(run_dir, trained=".self_attn."), **TOLERANCES[precision])
    assert losses(run_dir) == expected
    for later in completed(run_dir)[1:]:
        shutil.rmtree(later)
    config = (run_dir / "config.yaml").read_text().replace(f"zero_stage: {zero_stage}", f"zero_stage: {then}")
    (run_dir / "config.yaml").write_text(config)
    train(run_dir, num_ranks=1, **frozen_ranks)
    assert losses(run_dir) == expected
    model = BrumbyForCausalLM.from_pretrained(load(run_dir).model, dtype=DTYPES[precision])
    found = weights(run_dir)
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter.float()) == (".self_attn." not in name), name
    reader = PiecesReader(find_checkpoint(run_dir))
    assert {name for kind, name in reader.found if kind == "exp_avg"} == {n for n in found if ".self_attn." in n}


@pytest.mark.parametrize(("zero_stage", "num_ranks", "qk_norm"), [(0, 1, True), (2, 2, "retention"), (3, 2, True)])
def test_a_softmax_run_trains_the_base(make_run, tiny_model, tmp_path, zero_stage, num_ranks, qk_norm):
    shutil.copytree(tiny_model, model := tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"qk_norm": qk_norm}))
    run_dir = make_run(softmax=True, zero_stage=zero_stage, model=str(model))
    train(run_dir, num_ranks)
    assert losses(run_dir) == pytest.approx(plain_losses(run_dir, use_exp=True), **TOLERANCES["fp32"])
    before, after = BrumbyForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict(), weights(run_dir)
    same = {name for name in after if torch.equal(after[name], before[name])}
    kept = ("g_proj",) if qk_norm is True else ("g_proj", "q_norm", "k_norm")
    assert same == {name for name in after if any(part in name for part in kept)}
    export(find_checkpoint(run_dir), model, tmp_path / "taught", "float32")
    taught = BrumbyForCausalLM.from_pretrained(tmp_path / "taught")
    assert not taught.config.use_exp
    assert all(torch.equal(taught.state_dict()[name], weight) for name, weight in after.items())


@pytest.mark.slow
def test_what_a_run_leaves_behind(make_run):
    run_dir = make_run(keep_checkpoints=1, keep_every=10)
    train(run_dir, num_ranks=2)
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["tokens_seen"] for row in rows] == [256 * i for i in range(1, 13)]
    assert [row["phase"] for row in rows] == ["one"] * 4 + ["two"] * 4 + ["three"] * 4
    assert all(row.keys() >= ROW for row in rows)
    assert [row["lr"] for row in rows[:3]] == pytest.approx([5e-3, 1e-2, 1e-2])
    assert 0 < rows[0]["gates/layer_01/min"] <= rows[0]["gates/layer_01/mean"] <= rows[0]["gates/layer_01/max"] < 1
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["loss_start"] == rows[0]["loss"]
    assert summary["loss_end"] == rows[-1]["loss"]
    assert summary["base_loss"] == rows[-1]["base_loss"]
    assert summary["phases"] == ["one", "two", "three"]
    assert (summary["steps"], summary["tokens_seen"]) == (12, 3072)
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    folders = [path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir()]
    assert sorted(folders) == ["step-000010", "step-000012"]  # the others are deleted, not set aside
    assert [folder.name for folder in completed(run_dir)] == ["step-000010", "step-000012"]
    assert (run_dir / "checkpoints" / "latest").read_text() == "step-000012\n"
    described = json.loads((run_dir / "checkpoints" / "step-000012" / "manifest.json").read_text())
    assert described["config"]["zero_stage"] == 2
    assert described["versions"]["torch"] == torch.__version__
    assert described["state"]["updates"] == 12


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "precision"), [(1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_an_interrupted_run_resumes_bit_for_bit(make_run, trained, long_data, zero_stage, precision):
    options = {"zero_stage": zero_stage, "precision": precision, "data": long_data}
    whole = trained(**options)
    run_dir = make_run(**options, checkpoint_every=50)
    process = start_ranks(run_dir, 2)
    while len(losses(run_dir)) < 6 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    stopped = len(losses(run_dir))
    assert 6 <= stopped < 50, output
    assert ("no bfloat16" in output) == (precision == "bf16" and slow_in_bf16(torch.device("cpu")))
    assert find_checkpoint(run_dir).name == f"step-{stopped:06d}"
    train(run_dir, num_ranks=2)
    assert losses(run_dir) == losses(whole)
    resumed, expected = weights(run_dir), weights(whole)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(make_run, long_data):
    """What it had done after that checkpoint is done again; no row of metrics stands twice."""
    run_dir = make_run(data=long_data, checkpoint_every=5)
    process = start_ranks(run_dir, 1)
    while len(losses(run_dir)) < 7 and process.poll() is None:
        time.sleep(0.02)
    for rank in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split():
        os.kill(int(rank), signal.SIGKILL)
    process.communicate(timeout=120)
    assert 5 <= step_of(find_checkpoint(run_dir)) < 60
    before = losses(run_dir)
    train(run_dir)
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == list(range(1, 61))
    assert losses(run_dir)[: len(before)] == before


@pytest.mark.slow
@pytest.mark.parametrize("signals", [["SIGUSR1"], ["SIGINT", "SIGTERM"]])
def test_one_signal_saves_and_a_second_does_not_wait(make_run, long_data, signals):
    run_dir = make_run(data=long_data, checkpoint_every=100)
    words = ["-m", "brumby.launch.cli", "train", f"resume={run_dir}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *words], env=environment, stderr=subprocess.PIPE, text=True)
    while len(losses(run_dir)) < 5 and process.poll() is None:
        time.sleep(0.02)
    for name in signals:
        process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert len(completed(run_dir)) == (1 if len(signals) == 1 else 0)
    assert ("stopped and saved" in errors) == (len(signals) == 1)


@pytest.mark.slow
def test_resuming_on_other_data_is_refused(trained, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(trained(zero_stage=2), run_dir)
    config = (run_dir / "config.yaml").read_text().replace(str(trained(zero_stage=2).parent), str(tmp_path))
    (run_dir / "config.yaml").write_text(config.replace("seed: 1", "seed: 2"))
    errors = train(run_dir, num_ranks=2, expected=1)
    assert "changed since its checkpoint: seed was 1, now 2. A resumed run needs the same" in errors


@pytest.mark.slow
def test_divergence_stops_the_run(make_run):
    run_dir = make_run(stages={"retrain": stage(lr=1e30)}, stability={"max_in_a_row": 3})
    assert "and there is no checkpoint from before them" in train(run_dir, expected=1)
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if "not_applied" in row] == [2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_export_holds_the_trained_weights(trained, tmp_path, zero_stage):
    run_dir = trained(zero_stage=zero_stage)
    export(find_checkpoint(run_dir), Path(load(run_dir).model), tmp_path / "out", "float32")
    model = BrumbyForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = weights(run_dir)
    exported = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert all(torch.equal(exported[name], expected[name]) for name in exported)
    (batch,) = Batches(load(run_dir).data).micro_batches(11, 0, 1, 8)
    assert model(batch.input_ids).logits.isfinite().all()
