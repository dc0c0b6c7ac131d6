"""What Triton forms need per token: cumulated gates, factors of tiles, spans of documents, the gates' gradient.

B batch, T tokens, H key-value heads, R query heads of each, BQ queries and BK keys in a tile, G cumulated log2
gates. In memory everything per token is [B, heads, T].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Weights so much smaller than they were without gates (log2) are left out: far below float32's rounding
NEGLIGIBLE = tl.constexpr(40.0)


class Spans(NamedTuple):
    """The tokens that a token may see and be seen by, int32 [T]: from `first` to `end`, exclusive."""

    first: Tensor
    end: Tensor


def spans(T: int, cu_seqlens: Tensor | None, chunk: int | None, device: torch.device) -> Spans | None:
    """Of documents, of chunks, or of what documents leave of chunks; None where all tokens see each other."""
    if cu_seqlens is None and chunk is None:
        return None
    t = torch.arange(T, device=device)
    first, end = 0 * t, 0 * t + T
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens, t.to(cu_seqlens.dtype), right=True)
        first, end = cu_seqlens[document - 1], cu_seqlens[document]
    if chunk is not None:
        start = t // chunk * chunk
        first, end = torch.maximum(first, start), torch.minimum(end, start + chunk)
    return Spans(first.int(), end.int())


@triton.jit
def _cumulate_kernel(p_log_g, p_G, T, H, N: tl.constexpr):
    """G_t in float64, since differences of long sums count. One program a head."""
    i_b = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    p_log_g += i_b.to(tl.int64) * T * H + i_h
    p_G += tl.program_id(0).to(tl.int64) * T
    carry = tl.zeros([], tl.float64)
    for i_t in range(0, T, N):
        o_t = i_t + tl.arange(0, N)
        b_g = tl.load(p_log_g + o_t.to(tl.int64) * H, o_t < T, 0).to(tl.float64) * 1.4426950408889634  # [N]
        tl.store(p_G + o_t, tl.cumsum(b_g, 0) + carry, o_t < T)
        carry += tl.sum(b_g, 0)


def cumulate(log_g: Tensor) -> Tensor:
    """log_g [B, T, H] -> G [B, H, T] float64, in log2."""
    B, T, H = log_g.shape
    G = log_g.new_empty(B, H, T, dtype=torch.float64)
    _cumulate_kernel[(B * H,)](log_g.contiguous(), G, T, H, min(4096, triton.next_power_of_2(T)), num_warps=8)
    return G


class Factors(NamedTuple):
    """Of tiles: column factors, and where loops over other blocks begin and stop."""

    c: Tensor | None  # [B, H, T rounded up to 128] exp2(G_e - G_t), e the last token of t's block of keys
    begin: Tensor | None  # int32 [B, H, blocks of queries]: the first key that counts, a multiple of BK
    stop: Tensor | None  # int32 [B, H, blocks of keys]: the end of the queries that count, a multiple of BQ or T


@triton.jit
def padded(T):
    """The length of rows that are read by TMA, too."""
    return tl.cdiv(T, 128) * 128


@triton.jit
def _factor_kernel(
    p_G,
    p_first,
    p_c,
    p_begin,
    p_stop,
    T,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    N: tl.constexpr,
    PACKED: tl.constexpr,
):
    i_bh = tl.program_id(1)
    p_G += i_bh.to(tl.int64) * T
    i_k = tl.program_id(0) * BK
    if i_k < T:
        o_k = i_k + tl.arange(0, BK)
        i_e = tl.minimum(i_k + BK, T) - 1
        G_e = tl.load(p_G + i_e)
        b_c = tl.exp2((G_e - tl.load(p_G + o_k, o_k < T, 0)).to(tl.float32))  # [BK]
        if PACKED:
            b_c = tl.where(o_k >= tl.load(p_first + i_e), b_c, 0)
        tl.store(p_c + i_bh.to(tl.int64) * padded(T) + o_k, b_c, o_k < T)
        count = 0  # G falls: how many blocks of queries are near enough
        for i in range(0, tl.cdiv(T, BQ), N):
            o_q = (i + tl.arange(0, N)) * BQ
            b_G = tl.load(p_G + o_q, o_q < T, -float("inf"))
            count += tl.sum((b_G > G_e - NEGLIGIBLE).to(tl.int32), 0)
        tl.store(p_stop + i_bh * tl.cdiv(T, BK) + tl.program_id(0), tl.minimum(count * BQ, T))
    i_q = tl.program_id(0) * BQ
    if i_q < T:
        G_q = tl.load(p_G + i_q)
        count = 0
        for i in range(0, tl.cdiv(T, BK), N):
            o_k = (i + tl.arange(0, N)) * BK
            b_G = tl.load(p_G + tl.minimum(o_k + BK, T) - 1, o_k < T, -float("inf"))
            count += tl.sum((b_G >= G_q + NEGLIGIBLE).to(tl.int32), 0)
        tl.store(p_begin + i_bh * tl.cdiv(T, BQ) + tl.program_id(0), count * BK)


def factors(G: Tensor | None, first: Tensor | None, BQ: int, BK: int) -> Factors:
    if G is None:
        return Factors(None, None, None)
    B, H, T = G.shape
    c = G.new_zeros(B, H, triton.cdiv(T, 128) * 128, dtype=torch.float32)
    begin, stop = (G.new_empty(B, H, triton.cdiv(T, N), dtype=torch.int32) for N in (BQ, BK))
    blocks = triton.cdiv(T, min(BQ, BK))
    N = min(1024, triton.next_power_of_2(blocks))
    _factor_kernel[(blocks, B * H)](G, first, c, begin, stop, T, BQ, BK, N, first is not None)
    return Factors(c, begin, stop)


@triton.jit
def _gradient_kernel(
    p_qdq, p_kdk, p_first, p_dlog_g, p_bounds, T, H, scale, R: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr,
    FORWARD: tl.constexpr,
):  # fmt: skip
    """Walks a document from its end, or from its start if FORWARD."""
    i_b = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    start, end = 0, T
    if PACKED:
        start = tl.load(p_bounds + tl.program_id(1)).to(tl.int32)
        end = tl.load(p_bounds + tl.program_id(1) + 1).to(tl.int32)
    p_qdq += tl.program_id(0).to(tl.int64) * R * T
    p_kdk += tl.program_id(0).to(tl.int64) * T
    p_dlog_g += i_b.to(tl.int64) * T * H + i_h
    carry = tl.zeros([], tl.float64)
    if p_first is not None:
        carry += tl.load(p_first + tl.program_id(0))
    for i_t in range(0, end - start, N):
        o_t = i_t + tl.arange(0, N)  # [N]
        o_t = start + o_t if FORWARD else end - 1 - o_t
        m_t = (o_t >= start) & (o_t < end)
        b_dG = -tl.load(p_kdk + o_t, m_t, 0).to(tl.float64)  # [N]
        for i_r in tl.static_range(R):
            b_dG += tl.load(p_qdq + tl.cast(i_r, tl.int64) * T + o_t, m_t, 0)
        b_dG *= scale
        b_sum = tl.cumsum(b_dG, 0)
        if FORWARD:
            b_sum = b_dG - b_sum
        tl.store(p_dlog_g + o_t.to(tl.int64) * H, b_sum + carry, m_t)
        b_all = tl.sum(b_dG, 0)
        carry += -b_all if FORWARD else b_all


def gate_gradient(
    qdq: Tensor, kdk: Tensor, cu_seqlens: Tensor | None, power: int, forward: bool = False,
    first: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dlog_g [B, T, H], from dG_t = (q_t . dq_t - k_t . dk_t) / P.

    It is the sum of dG from t to the end of t's document and, if the final state has a gradient, their product.
    At a document's first token that is the initial state's product with its gradient, which the first gate scales.
    So `forward`, for a final state with a gradient: `first`, that product, less the sum of dG before t. The other
    way is a difference of large numbers, rounded differently, where states are large.

    qdq [B, HQ, T], kdk [B, H, T] and first [B, H] (None is zero), float32.
    """
    B, H, T = kdk.shape
    dlog_g = kdk.new_empty(B, T, H)
    grid = (B * H, 1 if cu_seqlens is None else len(cu_seqlens) - 1)
    _gradient_kernel[grid](
        qdq, kdk, first, dlog_g, cu_seqlens, T, H, 1 / power, qdq.shape[1] // H,
        min(4096, triton.next_power_of_2(T)), cu_seqlens is not None, forward, num_warps=8,
    )  # fmt: skip
    return dlog_g
