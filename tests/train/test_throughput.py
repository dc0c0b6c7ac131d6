import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from brumby.model import BrumbyConfig, BrumbyForCausalLM
from brumby.train.config import StageConfig
from brumby.train.objective import Objective
from brumby.train.teacher import Base, Teacher
from brumby.train.throughput import flops_per_token, peak_flops

SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def test_flops_are_those_that_pytorch_counts():
    """Softmax attention, whose products PyTorch sees; it counts the whole square, we the causal half."""
    config, T = BrumbyConfig(**SIZES, use_exp=True), 128
    model = BrumbyForCausalLM(config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randint(300, (1, T)), use_cache=False).logits.sum().backward()
    mixer = 3 * 2 * (2 * 2 * 4 * 16 * T) * T  # layers, both products, forward and backward, the whole square
    square = counter.get_total_flops() - mixer / 2
    assert flops_per_token(config, T) * T == pytest.approx(square, rel=0.01)


def test_flops_of_stages_are_those_that_pytorch_counts():
    """What one micro-batch runs, with softmax in the mixers too, so that PyTorch sees their products."""
    config, T = BrumbyConfig(**SIZES, use_exp=True), 128
    model, base = BrumbyForCausalLM(config), BrumbyForCausalLM(config).requires_grad_(False)
    teacher, objective = Teacher(Base(base), base), Objective(model)
    ids = torch.randint(300, (1, T))
    batch = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": torch.arange(T)[None],
        "cu_seqlens": torch.tensor([0, T]),
    }
    forward = 2 * (2 * 2 * 4 * 16 * T) * T  # layers, both products, the whole square
    gates = 2 * 64 * 2 * T * 2  # forward, layers: softmax has none
    cases = (
        (StageConfig(objective="align"), 4, 2 * gates),
        (StageConfig(ce=0.0, kl=1.0), 4, 3 * gates),
    )
    for stage, squares, absent in cases:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            taught = teacher(batch, attentions=stage.aligns)
            objective(**batch, stage=stage, taught=taught)[0].backward()
        counted = counter.get_total_flops() - squares * forward / 2 + absent
        assert flops_per_token(config, T, stage) * T == pytest.approx(counted, rel=0.01)


def test_chunks_cost_the_same_at_every_length():
    config = BrumbyConfig(**SIZES, switch_over_seq_len=64)
    assert flops_per_token(config, 65) == flops_per_token(config, 10**6)
    assert flops_per_token(config, 64) < flops_per_token(BrumbyConfig(**SIZES), 10**6)


def test_peak_of_an_unknown_device_is_measured():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14
