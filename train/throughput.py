"""How much of the hardware a step uses: FLOPs per token, and the device's peak.

H, HQ key-value and query heads, K head_dim, D expanded key, L layers, E hidden size.
"""

import time

import torch

from brumby.model import BrumbyConfig
from brumby.train.config import StageConfig
from brumby.train.objective import CROSS_ENTROPY

# Dense bf16 matrix rate in FLOP/s, from the vendors' data sheets, by a part of the device's name.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "MI300X": 1307e12,
}


def flops_per_token(config: BrumbyConfig, sequence_length: int, stage: StageConfig = CROSS_ENTROPY) -> float:
    """Matrix FLOPs that a stage needs for a trained token, nothing recomputed.

    Twice the weights that take part in a product, forward, and the mixer: the attention form over
    half the sequence on average (causal), or the chunk form (state update, query, and the attention
    form inside a chunk). The backward costs twice the forward (arXiv 2001.08361, section 2.1), but once
    where nothing is passed on: what aligned mixers read has no gradient.
    """
    c = config
    HQ, H, K = c.num_attention_heads, c.num_key_value_heads or c.num_attention_heads, c.head_dim
    L, E = c.num_hidden_layers, c.hidden_size
    attention = 2 * 2 * HQ * K * sequence_length / 2
    if c.use_exp or sequence_length <= c.switch_over_seq_len:
        mixer = attention
    else:
        D = K * (K + 1) // 2
        mixer = 2 * D * K * (HQ + H) + 2 * 2 * HQ * K * c.prefill_chunk_size / 2
    into, gates, out_of = E * (HQ + 2 * H) * K, E * H, E * HQ * K  # weights of a layer's projections
    mlp, head = 3 * E * c.intermediate_size, c.vocab_size * E
    base = L * (2 * (into + out_of + mlp) + attention)  # the teacher's forward, without the head
    if stage.aligns:
        return base + L * (2 * 2 * (into + gates) + 3 * (2 * out_of + mixer))
    trained = 3 * (L * (2 * (into + gates + out_of + mlp) + mixer) + 2 * head)
    return trained + (base + 2 * head if stage.kl else 0)


def slow_in_bf16(device: torch.device) -> bool:
    """Whether this is a CPU without bfloat16, where a matrix product in it takes some fifty times as long."""
    return device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The device's matrix rate: the data sheet's for a known GPU, else that of a product timed here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_FLOPS.items():
            if part in name:
                return peak
    n = 512  # a CPU without bfloat16 takes a quarter of a second for it
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
