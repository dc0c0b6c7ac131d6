"""Alignment, then retraining with a divergence from the base: against plain PyTorch, and resumed anywhere."""

import json
import shutil
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from brumby.convert.pieces import PiecesReader
from brumby.data import Batches
from brumby.data.batches import IGNORE_INDEX
from brumby.launch.runs import find_checkpoint
from brumby.model import BrumbyForCausalLM
from brumby.train.config import RunConfig, StageConfig, load
from brumby.train.objective import (
    Objective,
    Taught,
    fused_cross_entropy,
    fused_divergence,
    inputs,
    retraining,
)
from brumby.train.status import completed, step_of
from brumby.train.teacher import Base, Teacher
from brumby.train.tracking import read_metrics
from tests.conftest import WITH_TESTS, stage, train

SCHEDULE = {"warmup_tokens": 256, "decay_tokens": 512}
RETRAIN = {"ce": 0.5, "kl": 1.0, "temperature": 2.0}
STAGES = {  # of 5 and 7 steps
    "retrain": stage(lr=3e-3, mixer_lr=5e-3, schedule=SCHEDULE, **RETRAIN),
    "align": stage(lr=2e-3, objective="align", tokens=5 * 256, schedule=SCHEDULE),
}
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
OPTIONS = {"stages": STAGES, "checkpoint_every": 1, "activation_checkpointing": True}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def documents(batch) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels, [T] each."""
    tokens, labels = batch.input_ids.flatten(), batch.labels.flatten()
    bounds = pairwise(batch.cu_seqlens.tolist())
    return [(tokens[i:j], labels[i:j]) for i, j in bounds]


def alignment(model, base, batches) -> Tensor:
    """Layer by layer and document by document."""
    errors = []
    for batch in batches:
        error = torch.zeros(len(base.model.layers))
        power = torch.zeros(len(base.model.layers))
        num_valid = 0
        for tokens, labels in documents(batch):
            valid = labels != IGNORE_INDEX
            num_valid += int(valid.sum())
            x = base.model.embed_tokens(tokens[None])
            rotation = base.model.rotary_emb(x, torch.arange(len(tokens))[None])
            for i, (theirs, ours) in enumerate(zip(base.model.layers, model.model.layers, strict=True)):
                with torch.no_grad():
                    h = theirs.input_layernorm(x)
                    a = theirs.self_attn(h, rotation)
                    x = x + a
                    x = x + theirs.mlp(theirs.post_attention_layernorm(x))
                y = ours.self_attn(h, rotation)
                error[i] += (y - a)[0, valid].float().square().sum()
                power[i] += a[0, valid].float().square().sum()
        errors.append((error / power).mean() * num_valid)
    return sum(errors)


def losses(model, base, batches, ce: float, kl: float, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Objective, cross-entropy of the model and of the base."""
    nats = divergence = base_nats = torch.zeros(())
    for batch in batches:
        for tokens, labels in documents(batch):
            valid = labels != IGNORE_INDEX
            z, labels = model(tokens[None], use_cache=False).logits[0, valid].float(), labels[valid]
            with torch.no_grad():
                z_base = base(tokens[None], use_cache=False).logits[0, valid].float()
            nats = nats + F.cross_entropy(z, labels, reduction="sum")
            base_nats = base_nats + F.cross_entropy(z_base, labels, reduction="sum")
            t = (z_base / temperature).softmax(-1)
            divergence = divergence + (t * (t.log() - (z / temperature).softmax(-1).log())).sum()
    return ce * nats + kl * temperature**2 * divergence, nats, base_nats


def plain_run(config: RunConfig) -> list[dict]:
    """Objective and losses by step of the two stages in plain PyTorch, in micro-batches of one process."""
    dtype, data = DTYPES[config.precision], Batches(config.data)
    model = BrumbyForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    without = {"qk_norm": False} if model.config.qk_norm == "retention" else {}
    base = BrumbyForCausalLM.from_pretrained(config.model, dtype=dtype, use_exp=True, **without)
    copy, found = deepcopy(model).to(dtype), []
    for first, last, rates in ((0, 5, {"mixer": 2e-3}), (5, 12, {"mixer": 5e-3, "gate": 3e-3, "rest": 3e-3})):
        groups = []
        for name, parameter in model.named_parameters():
            kind = "gate" if "g_proj" in name else "mixer" if "self_attn" in name else "rest"
            if first == 0:
                kind = "rest" if kind == "rest" else "mixer"
            if kind in rates:
                decay = 0.1 if parameter.ndim == 2 and "g_proj" not in name else 0.0
                groups.append({"params": [parameter], "name": name, "peak": rates[kind], "weight_decay": decay})
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
        for step in range(first, last):
            batches = data.micro_batches(step, 0, 1, config.micro_batch)
            num_valid = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
            objective, nats, base_nats = losses(copy, base, batches, **RETRAIN)
            if first == 0:
                objective = alignment(copy, base, batches)
            values = (objective, nats, base_nats)
            names = ("objective", "loss", "base_loss")
            found.append({name: value.item() / num_valid for name, value in zip(names, values, strict=True)})
            copy.zero_grad()
            (objective / num_valid).backward()
            seen, total = (step + 1 - first) * 256, (last - first) * 256
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(seen / 256, (total - seen) / 512, 1.0)
                group["params"][0].grad = copy.get_parameter(group["name"]).grad.float()
            parameters = [group["params"][0] for group in optimizer.param_groups]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            copy.load_state_dict(model.state_dict())
    return found


def compare(run_dir, tolerance: dict) -> None:
    config = load(run_dir)
    rows, expected = read_metrics(run_dir / "metrics.jsonl"), plain_run(config)
    assert [row["stage"] for row in rows] == ["align"] * 5 + ["retrain"] * 7
    for i, (row, plain) in enumerate(zip(rows, expected, strict=True)):
        assert row["objective"] == pytest.approx(plain["objective"], **tolerance), i
        measured = i % config.measure_every == 0 or i == 11
        assert (row["loss"] is not None) == (measured or i >= 5)
        assert (row["base_loss"] is not None) == measured
        for name in ("loss", "base_loss"):
            if row[name] is not None:
                assert row[name] == pytest.approx(plain[name], **tolerance), (i, name)


@pytest.mark.parametrize("qk_norm", [True, "retention"])
def test_one_rank_trains_both_stages_as_plain_pytorch_does(qk_norm, make_run, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"qk_norm": qk_norm}))
    run_dir = make_run(stages=STAGES, zero_stage=0, measure_every=1, model=str(model))
    train(run_dir)
    compare(run_dir, {"abs": 2e-5})
    objectives = [row["objective"] for row in read_metrics(run_dir / "metrics.jsonl")]
    assert objectives[4] < 0.95 * objectives[0]
    assert objectives[11] < 0.9 * objectives[5]


def test_a_ramp_aligns_in_smaller_steps_and_resumes(make_run, tiny_data):
    stages = STAGES | {"align": stage(objective="align", tokens=512, schedule={"warmup_tokens": 64})}
    options = {"data": tiny_data | {"ramp": {"tokens": 512, "sequences_per_step": 2}}, "stages": stages}
    options |= {"checkpoint_every": 1, "keep_checkpoints": 20}
    whole, resumed = make_run("whole", **options), make_run("resumed", **options)
    train(whole)
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["tokens_seen"] for row in rows] == [*range(64, 512, 64), *range(512, 3073, 256)]
    assert [(row["phase"], row["stage"]) for row in rows[6:10]] == [("ramp", "align")] * 2 + [
        ("one", "retrain")
    ] * 2
    for folder in completed(whole):
        if step_of(folder) <= 7:
            shutil.copytree(folder, resumed / "checkpoints" / folder.name)
    train(resumed)
    names = ("step", "objective", "loss", "grad_norm", "mixer_lr")
    again = read_metrics(resumed / "metrics.jsonl")
    assert [[row[n] for n in names] for row in again] == [[row[n] for n in names] for row in rows[7:]]


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_alignment_changes_the_mixers_alone(trained, zero_stage, precision):
    """On two ranks, to the bit; and both stages are those of plain PyTorch."""
    run_dir = trained(zero_stage=zero_stage, precision=precision, **OPTIONS)
    model = BrumbyForCausalLM.from_pretrained(load(run_dir).model, dtype=DTYPES[precision])
    reader = PiecesReader(find_checkpoint(run_dir, 5))
    for name, parameter in model.named_parameters():
        assert torch.equal(reader.weight(name), parameter.float()) == (".self_attn." not in name), name
    compare(run_dir, {"abs": 2e-5} if precision == "fp32" else {"rel": 0.01})


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_before_at_and_after_the_switch(make_run, trained):
    options = {"zero_stage": 3, "precision": "bf16", **OPTIONS}
    whole = trained(**options)
    expected = PiecesReader(find_checkpoint(whole))
    for step in (4, 5, 6):
        run_dir = make_run(f"from-{step}", **options, keep_checkpoints=12)
        for folder in completed(whole):
            if step_of(folder) <= step:
                shutil.copytree(folder, run_dir / "checkpoints" / folder.name)
        train(run_dir, num_ranks=2)
        rows, undisturbed = (read_metrics(folder / "metrics.jsonl") for folder in (run_dir, whole))
        assert [row["step"] for row in rows] == list(range(step + 1, 13))
        names = ("objective", "loss", "base_loss", "grad_norm", "lr", "mixer_lr", "gate_lr", "stage")
        assert [[row[n] for n in names] for row in rows] == [[row[n] for n in names] for row in undisturbed[step:]]
        found = PiecesReader(find_checkpoint(run_dir))
        assert found.found.keys() == expected.found.keys()
        assert all(torch.equal(found.weight(name), expected.weight(name)) for name in expected.shapes)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter stands in for a GPU")
def test_fused_losses_find_the_output_matrices_under_zero3(make_run, trained):
    """They read them outside their modules' forward, where ZeRO-3 leaves a parameter in parts."""
    stages = STAGES | {"align": stage(objective="align", tokens=9 * 256)}
    options = {"stages": stages, "zero_stage": 3, "activation_checkpointing": True, "measure_every": 1}
    run_dir = make_run(**options)
    train(run_dir, num_ranks=2, module="fused", PYTHONPATH=WITH_TESTS, TRITON_INTERPRET="1")
    found, expected = (read_metrics(folder / "metrics.jsonl") for folder in (run_dir, trained(**options)))
    for name in ("objective", "loss", "base_loss", "grad_norm"):
        assert [row[name] for row in found[9:]] == pytest.approx([row[name] for row in expected[9:]], rel=1e-4)


@pytest.fixture
def small(tiny_model, tiny_data):
    from brumby.data import DataConfig

    model = BrumbyForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    base = BrumbyForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, use_exp=True)
    (batch,) = Batches(DataConfig.from_dict(tiny_data)).micro_batches(0, 0, 4, 2)
    return model, base.requires_grad_(False), batch


@pytest.mark.parametrize("checkpointing", [False, True])
def test_alignment_has_the_gradient_of_a_plain_loop_over_layers(small, checkpointing):
    model, base, batch = small
    expected = alignment(model, base, [batch])
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == {name for name, _ in model.named_parameters() if ".self_attn." in name}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable()
    tensors, align = inputs(batch, torch.device("cpu")), StageConfig(objective="align")
    taught = Teacher(Base(base), base)(tensors, attentions=True)
    found, ce = Objective(model.train())(**tensors, stage=align, taught=taught)
    found.backward()
    assert ce is None
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        if ".self_attn." in name:
            assert (parameter.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name
        else:
            assert parameter.grad is None


def random_logits(device: str, dtype: torch.dtype) -> tuple[torch.nn.Linear, Tensor, Taught, Tensor]:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 300, bias=False)
    hidden, labels = torch.randn(48, 64, requires_grad=True), torch.randint(300, (48,))
    labels[::7] = IGNORE_INDEX
    taught = Taught(torch.randn(48, 64).to(device, dtype), torch.randn(300, 64).to(device, dtype) / 4)
    hidden = hidden.detach().to(device, dtype).requires_grad_()
    return head.to(device, dtype), hidden, taught, labels.to(device)


def expected_retraining(head, hidden, taught, labels, stage) -> tuple[float, float, Tensor, Tensor]:
    """Objective, cross-entropy and gradients in float64, on a CPU."""
    x, w = (t.detach().double().cpu().requires_grad_() for t in (hidden, head.weight))
    valid, target = (labels != IGNORE_INDEX).cpu(), (taught.hidden.double() @ taught.head.double().T).cpu()
    z = (x @ w.T)[valid]
    ce = F.nll_loss(z.log_softmax(-1), labels.cpu()[valid], reduction="sum")
    p, t = (z / stage.temperature).softmax(-1), (target[valid] / stage.temperature).softmax(-1)
    objective = stage.ce * ce + stage.kl * stage.temperature**2 * torch.nn.KLDivLoss(reduction="sum")(p.log(), t)
    objective.backward()
    return objective.item(), ce.item(), x.grad, w.grad


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize(("ce", "kl", "temperature"), [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.3, 0.7, 2.0)])
def test_divergence_and_cross_entropy_are_those_of_pytorch_in_float64(device, ce, kl, temperature):
    """The divergence is that of the model from the base: KL(base || model)."""
    stage = StageConfig(ce=ce, kl=kl, temperature=temperature)
    case = random_logits(device, torch.float32)
    objective, nats, dx, dw = expected_retraining(*case, stage)
    head, hidden, taught, labels = case
    found, found_nats = retraining(head, hidden, labels, stage, taught)
    found.backward()
    tolerance = 1e-5 if device == "cpu" else 5e-3  # TF32 products
    assert found.item() == pytest.approx(objective, rel=tolerance)
    assert found_nats.item() == pytest.approx(nats, rel=tolerance)
    for grad, expected in ((hidden.grad, dx), (head.weight.grad, dw)):
        assert (grad.double().cpu() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter stands in for a GPU")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fused_losses_are_those_of_pytorch_in_float64(temperature):
    """What a GPU runs, from Liger, in Triton's interpreter."""
    head, hidden, taught, labels = random_logits("cpu", torch.float32)
    for terms, call in (
        (
            StageConfig(ce=0.0, kl=temperature**-2, temperature=temperature),
            lambda: fused_divergence(head.weight, hidden, taught, labels, temperature),
        ),
        (StageConfig(), lambda: fused_cross_entropy(head.weight, hidden, labels)),
    ):
        objective, _, dx, dw = expected_retraining(head, hidden, taught, labels, terms)
        found = call()
        assert found.item() == pytest.approx(objective, rel=1e-5)
        for grad, expected in zip(torch.autograd.grad(found, (hidden, head.weight)), (dx, dw), strict=True):
            assert (grad.double() - expected).norm() <= 1e-5 * expected.norm()
