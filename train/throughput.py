"""How much of the hardware a step uses: FLOPs per token, and the device's peak."""

import time

import torch

from brumby.model import BrumbyConfig

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


def flops_per_token(config: BrumbyConfig, sequence_length: int) -> float:
    """Matrix FLOPs of forward and backward per trained token, nothing recomputed.

    Twice the weights that take part in a product, forward, and the mixer: the attention form over
    half the sequence on average (causal), or the chunk form (state update, query, and the attention
    form inside a chunk). The backward costs twice the forward (arXiv 2001.08361, section 2.1).
    """
    c = config
    HQ, H, K = c.num_attention_heads, c.num_key_value_heads or c.num_attention_heads, c.head_dim
    projections = c.hidden_size * (2 * HQ * K + 2 * H * K + H)
    weights = c.num_hidden_layers * (projections + 3 * c.hidden_size * c.intermediate_size)
    weights += c.vocab_size * c.hidden_size
    if c.use_exp or sequence_length <= c.switch_over_seq_len:
        mixer = 2 * 2 * HQ * K * sequence_length / 2
    else:
        D = K * (K + 1) // 2
        mixer = 2 * D * K * (HQ + H) + 2 * 2 * HQ * K * c.prefill_chunk_size / 2
    return 3 * (2 * weights + c.num_hidden_layers * mixer)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The device's matrix rate: the data sheet's for a known GPU, else that of a product timed here."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_FLOPS.items():
            if part in name:
                return peak
    n = 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
