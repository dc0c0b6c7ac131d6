"""The attention form forward, for Hopper: power 2, bf16, head dims 64 and 128. `attention_form.py` has the
mathematics.

A persistent program holds three warpgroups. One warp loads keys, values and column factors into rings of shared
memory; two warpgroups take 64 queries each and multiply. Each keeps the tensor cores busy with p v of one block
while it makes p of the next, and the two drift apart, so that one's elementwise work falls into the other's
products.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from brumby.kernels.gates import NEGLIGIBLE, Spans, factors, padded
from brumby.kernels.hopper.language import (
    FLAT,
    advance,
    as_matrix,
    as_tile,
    barrier,
    barriers,
    num_programs,
    release,
    tiles_of,
    tma_load,
    tma_store,
)

BQ = 128  # queries of a program, 64 for each of two warpgroups
BK = 128
STAGES = 3


@gluon.jit
def _tile(i, T, BHQ, HQ, H, BQ: gl.constexpr):
    """Batch, query head, head and first query of tile i: the longest first, heads side by side."""
    i_q = (gl.cdiv(T, BQ) - 1 - i // BHQ) * BQ
    i_b = i % BHQ // HQ
    i_hq = i % HQ
    return i_b, i_hq, i_hq // (HQ // H), i_q


@gluon.jit
def _begin(
    p_begin, p_first, i_bh, i_q, T, BQ: gl.constexpr, BK: gl.constexpr, FACTORS: gl.constexpr, PACKED: gl.constexpr
):
    """The first block of keys that counts for queries from i_q on."""
    begin = i_q * 0
    if FACTORS:
        begin = gl.load(p_begin + i_bh * gl.cdiv(T, BQ) + i_q // BQ)
    if PACKED:
        begin = gl.maximum(begin, gl.load(p_first + i_q))
    return begin // BK


@gluon.jit
def _load(
    d_q, d_k, d_v, s_q, s_k, s_v, s_c, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    p_c, p_G, p_begin, p_first, T, BHQ, HQ, H,
    BQ: gl.constexpr, BK: gl.constexpr, FACTORS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """One warp: q once a tile, then k, its column factors and v from the diagonal to the left.

    A column factor is exp2(G_a - G_j), a the tile's first query.
    """
    STAGES: gl.constexpr = s_k.shape[0]
    o_c = gl.arange(0, BK, gl.BlockedLayout([BK // 32], [32], [1], [0]))  # [BK]
    i_stage = 0
    i_phase = 1  # a ring's buffers are empty at first
    q_phase = 1
    for i in range(gl.program_id(0), gl.cdiv(T, BQ) * BHQ, gl.num_programs(0)):
        i_b, i_hq, i_h, i_q = _tile(i, T, BHQ, HQ, H, BQ)
        for w in gl.static_range(2):
            mbarrier.wait(q_empty.index(w), q_phase)
            mbarrier.expect(q_full.index(w), d_q.block_type.nbytes)
            s_qw = as_tile(s_q.index(w), d_q)
            tma_load(d_q, [i_b, i_hq, i_q + w * (BQ // 2), 0], q_full.index(w), s_qw)
        begin = _begin(p_begin, p_first, i_b * H + i_h, i_q, T, BQ, BK, FACTORS, PACKED)
        q_phase ^= 1
        G_q = 0.0
        if FACTORS:
            p_Gh = p_G + (i_b * H + i_h).to(gl.int64) * T
            p_ch = p_c + (i_b * H + i_h).to(gl.int64) * padded(T)
            G_q = gl.load(p_Gh + i_q)
        for j in range(0, i_q // BK + 1 - begin):
            i_k = i_q - j * BK
            mbarrier.wait(k_empty.index(i_stage), i_phase)
            if FACTORS:
                since = gl.exp2(gl.minimum(G_q - gl.load(p_Gh + gl.minimum(i_k + BK, T) - 1), 0.0).to(gl.float32))
                s_c.index(i_stage).store(gl.load(p_ch + i_k + o_c) * since)
                barrier()
            mbarrier.expect(k_full.index(i_stage), d_k.block_type.nbytes)
            tma_load(d_k, [i_b, i_h, i_k, 0], k_full.index(i_stage), s_k.index(i_stage))
            mbarrier.wait(v_empty.index(i_stage), i_phase)
            mbarrier.expect(v_full.index(i_stage), d_v.block_type.nbytes)
            tma_load(d_v, [i_b, i_h, i_k, 0], v_full.index(i_stage), s_v.index(i_stage))
            i_stage, i_phase = advance(i_stage, i_phase, STAGES)


@gluon.jit
def _multiply(
    d_y, s_q, s_k, s_v, s_c, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    p_l_inv, p_G, p_begin, p_first, T, BHQ, HQ, H, eps,
    W: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr, FACTORS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: y of 64 queries. While p v of one block is under way, p of the next is made."""
    STAGES: gl.constexpr = s_k.shape[0]
    M: gl.constexpr = BQ // 2
    K: gl.constexpr = s_k.shape[4]
    V: gl.constexpr = s_v.shape[4]
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    LY: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    LK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    LP: gl.constexpr = gl.DotOperandLayout(0, LY, 2)
    LR: gl.constexpr = gl.SliceLayout(1, LS)
    LC: gl.constexpr = gl.SliceLayout(0, LS)
    zeros = gl.zeros([M, BK], gl.float32, LS)
    b_q = as_matrix(s_q.index(W), s_v.dtype, M, K)
    i_stage = 0
    i_phase = 0
    q_phase = 0
    for i in range(gl.program_id(0), gl.cdiv(T, BQ) * BHQ, gl.num_programs(0)):
        i_b, i_hq, i_h, i_q = _tile(i, T, BHQ, HQ, H, BQ)
        mbarrier.wait(q_full.index(W), q_phase)
        mbarrier.wait(k_full.index(i_stage), i_phase)
        b_k = as_matrix(s_k.index(i_stage), s_v.dtype, BK, K).permute((1, 0))  # [K, BK]
        b_s = warpgroup_mma(b_q, b_k, zeros, use_acc=False, is_async=True)
        begin = _begin(p_begin, p_first, i_b * H + i_h, i_q, T, BQ, BK, FACTORS, PACKED)
        o_q = i_q + W * M + gl.arange(0, M, LR)  # [M]
        o_k = i_q + gl.arange(0, BK, LC)  # [BK]
        m_q = o_q < T
        b_a = gl.full([M], 1.0, gl.float32, LR)
        if FACTORS:
            p_Gh = p_G + (i_b * H + i_h).to(gl.int64) * T
            i_last = gl.minimum(i_q + BQ, T) - 1
            G_q = gl.load(p_Gh + i_q)  # the first query: the reference point
            b_G = gl.where(m_q, gl.load(p_Gh + o_q, m_q, 0) - G_q, 0).to(gl.float32)  # [M]
            b_G_k = (gl.load(p_Gh + o_k, o_k < T, 0) - G_q).to(gl.float32)  # [BK]
            reaches = b_G > -NEGLIGIBLE  # [M], rows that see what is left of the diagonal
            cut = G_q - gl.load(p_Gh + i_last) >= NEGLIGIBLE

        # The diagonal
        b_s = warpgroup_mma_wait(0, [b_s])  # [M, BK]
        release(k_empty.index(i_stage))
        m_s = o_k[None, :] <= o_q[:, None]  # [M, BK]
        if PACKED:
            b_first = gl.load(p_first + o_q, m_q, 0)  # [M]
            first = gl.load(p_first + i_q)
            m_s = m_s & (o_k[None, :] >= b_first[:, None])
            reaches = reaches & (b_first == first)
            cut = cut | (gl.load(p_first + i_last) != first)
        b_s = gl.where(m_s, b_s, 0.0)
        b_p = b_s * b_s
        if FACTORS:
            # What a row adds up is relative to its row factor, exp2(G_i - G_a) <= 1, if that is not too small
            b_a = gl.exp2(gl.where(reaches, b_G, 0.0))  # [M]
            b_own = gl.where(reaches, 0.0, b_G)
            b_p *= gl.exp2(gl.where(m_s, b_own[:, None] - b_G_k[None, :], 0.0))
            if cut:
                b_rows = b_q.load(LK)  # [M, K]
                b_q.store(gl.where(gl.convert_layout(reaches, gl.SliceLayout(1, LK))[:, None], b_rows, 0.0))
                fence_async_shared()
                barrier()
        b_l = gl.sum(b_p, 1)  # [M]
        b_p = gl.convert_layout(b_p.to(s_v.dtype), LP)
        b_y = gl.zeros([M, V], gl.float32, LY)

        # Left of it
        for _ in range(0, i_q // BK - begin):
            v_stage = i_stage
            v_phase = i_phase
            i_stage, i_phase = advance(i_stage, i_phase, STAGES)
            mbarrier.wait(k_full.index(i_stage), i_phase)
            b_k = as_matrix(s_k.index(i_stage), s_v.dtype, BK, K).permute((1, 0))  # [K, BK]
            b_s = warpgroup_mma(b_q, b_k, zeros, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(v_stage), v_phase)
            b_y = warpgroup_mma(b_p, as_matrix(s_v.index(v_stage), s_v.dtype, BK, V), b_y, is_async=True)
            if FACTORS:
                b_c = s_c.index(i_stage).load(LC)  # [BK]
            b_s = warpgroup_mma_wait(1, [b_s])  # [M, BK]
            release(k_empty.index(i_stage))
            b_next = b_s * b_s  # [M, BK]
            if FACTORS:
                b_next = b_next * b_c[None, :]
            b_l += gl.sum(b_next, 1)
            b_next = gl.convert_layout(b_next.to(s_v.dtype), LP)
            b_y = warpgroup_mma_wait(0, [b_y])
            release(v_empty.index(v_stage))
            b_p = b_next

        mbarrier.wait(v_full.index(i_stage), i_phase)
        b_y = warpgroup_mma(b_p, as_matrix(s_v.index(i_stage), s_v.dtype, BK, V), b_y, is_async=True)
        b_l_inv = 1 / (b_l * b_a + eps)  # [M]
        gl.store(p_l_inv + (i_b * HQ + i_hq).to(gl.int64) * T + o_q, b_l_inv, m_q)
        b_y = warpgroup_mma_wait(0, [b_y])
        release(v_empty.index(i_stage))
        i_stage, i_phase = advance(i_stage, i_phase, STAGES)
        q_phase ^= 1
        b_y = b_y * gl.convert_layout(b_a * b_l_inv, gl.SliceLayout(1, LY))[:, None]
        s_y = as_matrix(s_q.index(W), s_v.dtype, M, V)
        s_y.store(b_y.to(d_y.dtype))
        fence_async_shared()
        barrier()
        tma_store(d_y, [i_b, i_hq, i_q + W * M, 0], as_tile(s_q.index(W), d_y))
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(W), count=1)


@gluon.jit
def _forward_kernel(
    d_q, d_k, d_v, d_y, p_l_inv, p_c, p_G, p_begin, p_first, T, BHQ, HQ, H, eps,
    BQ: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, FACTORS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = max(d_q.block_type.shape[3], d_y.block_type.shape[3])  # the buffer takes q, then y
    s_q = gl.allocate_shared_memory(d_q.dtype, [2, 1, 1, BQ // 2, D], d_q.layout)
    s_k = gl.allocate_shared_memory(d_k.dtype, [STAGES] + d_k.block_type.shape, d_k.layout)
    s_v = gl.allocate_shared_memory(d_v.dtype, [STAGES] + d_v.block_type.shape, d_v.layout)
    s_c = gl.allocate_shared_memory(gl.float32, [STAGES, BK], FLAT)
    q_full, q_empty = barriers(2, 1), barriers(2, 1)
    k_full, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    v_full, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    gl.warp_specialize(
        [
            (_multiply, (
                d_y, s_q, s_k, s_v, s_c, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                p_l_inv, p_G, p_begin, p_first, T, BHQ, HQ, H, eps, 0, BQ, BK, FACTORS, PACKED,
            )),
            (_multiply, (
                d_y, s_q, s_k, s_v, s_c, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                p_l_inv, p_G, p_begin, p_first, T, BHQ, HQ, H, eps, 1, BQ, BK, FACTORS, PACKED,
            )),
            (_load, (
                d_q, d_k, d_v, s_q, s_k, s_v, s_c, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                p_c, p_G, p_begin, p_first, T, BHQ, HQ, H, BQ, BK, FACTORS, PACKED,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, G: Tensor | None, span: Spans | None, eps: float
) -> tuple[Tensor, Tensor]:
    """As `attention_form.forward`."""
    B, T, HQ, _ = q.shape
    H, V = v.shape[2:]
    if G is None and span is not None:
        G = q.new_zeros(B, H, T, dtype=torch.float64)
    y = q.new_empty(B, T, HQ, V)
    l_inv = q.new_empty(B, HQ, T, dtype=torch.float32)
    first = None if span is None else span.first
    c, begin, _ = factors(G, first, BQ, BK)
    d_q, d_k, d_v, d_y = (
        tiles_of(x.transpose(1, 2), rows, x.shape[-1])
        for x, rows in ((q, BQ // 2), (k, BK), (v, BK), (y, BQ // 2))
    )
    _forward_kernel[num_programs(q, B * HQ * triton.cdiv(T, BQ))](
        d_q, d_k, d_v, d_y, l_inv, c, G, begin, first, T, B * HQ, HQ, H, eps,
        BQ, BK, STAGES, G is not None, span is not None, num_warps=4,
    )  # fmt: skip
    return y, l_inv
