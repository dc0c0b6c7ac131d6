"""Liger's kernels in the model under training: on a GPU, and without one what they are called with."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from brumby.model import BrumbyConfig, BrumbyForCausalLM
from brumby.train.engine import use_liger

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-3,
}  # fmt: skip


def gradients(model: BrumbyForCausalLM) -> dict[str, Tensor]:
    """Of two packed rows; with the logits as "logits"."""
    device = model.lm_head.weight.device
    ids = torch.arange(64, device=device).view(2, 32) % 97
    documents = torch.tensor([0, 5, 32, 64], dtype=torch.int32, device=device)
    logits = model(ids, cu_seqlens=documents, use_cache=False).logits
    logits.float().logsumexp(-1).square().mean().backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"logits": logits.detach().double()}


def make(softmax: bool) -> BrumbyForCausalLM:
    torch.manual_seed(0)
    model = BrumbyForCausalLM(BrumbyConfig(**SIZES, use_exp=softmax, gate_bias=True)).double()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)  # norms that are not one
    return model.train()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("softmax", [False, True], ids=["retention", "softmax"])
def test_fused_kernels_are_as_exact_as_plain_ones(softmax: bool) -> None:
    exact = make(softmax)
    plain = deepcopy(exact).to("cuda", torch.bfloat16)
    fused = deepcopy(plain)
    use_liger(fused)
    fused.gradient_checkpointing_enable()
    expected, usual, found = (gradients(model) for model in (exact, plain, fused))
    assert set(found) == set(expected)
    for name, value in expected.items():
        plain_error, fused_error = ((x[name].cpu() - value).norm() / value.norm() for x in (usual, found))
        assert fused_error < 1.5 * plain_error, name


@pytest.mark.parametrize("softmax", [False, True], ids=["retention", "softmax"])
def test_layers_call_fused_kernels(softmax: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With functions in their places that do what Liger documents."""
    calls = []

    def norm(x, weight, eps):
        calls.append("norm")
        return F.rms_norm(x, weight.shape, weight, eps)

    def swiglu(a, b):
        calls.append("swiglu")
        return F.silu(a) * b

    def rope(q, k, cos, sin):
        calls.append("rope")
        assert (q.shape[1], k.shape[1]) == (6, 2)  # heads before tokens
        return apply_rotary_pos_emb(q, k, cos, sin)

    for name, function in (("rms_norm", norm), ("swiglu", swiglu), ("rope", rope)):
        monkeypatch.setattr(f"liger_kernel.transformers.functional.liger_{name}", function)
    plain = make(softmax)
    fused = deepcopy(plain)
    use_liger(fused)
    expected, found = gradients(plain), gradients(fused)
    assert sorted(calls) == ["norm"] * 9 + ["rope"] * 2 + ["swiglu"] * 2
    for name, value in expected.items():
        assert (found[name] - value).norm() < 1e-5 * value.norm(), name  # the plain norms are in float32
