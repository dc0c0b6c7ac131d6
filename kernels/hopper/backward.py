"""The attention form backward, for Hopper: power 2, bf16, head dims 64 and 128. `attention_form.py` has the
mathematics.

s and dy . v are made once: five products, where kernels of their own for dq and for dk and dv take seven. A
program owns 128 keys of a head and holds three warpgroups. One warp loads blocks of 64 queries, of all query heads
that share the keys, into rings of shared memory; two warpgroups take 64 keys each, keep their dk and dv in
registers, and share dq: each multiplies all 128 keys by its half of k's columns. Products are asynchronous: the
weights of a block are made while dp is under way, ds while dv is, and dq leaves while dk is.

dq is added up in memory by the copy engine, in fixed point: integers give the same bits in any order
(`_row_kernel` bounds them). Scores stand as [keys, queries].

q, dy and dq together are more than L2 holds, so all programs of a head have to be at the same block of queries at
the same time: each takes a long and a short block of keys, and walks down over the queries, then up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
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

from brumby.kernels.attention_form import FromStates, RowSums, descriptor
from brumby.kernels.gates import Spans, factors
from brumby.kernels.hopper.language import (
    FLAT,
    as_matrix,
    as_tile,
    barrier,
    barriers,
    reinterpret,
    release,
    tiles_of,
    tma_add,
    tma_load,
    tma_store,
)

BQ = 64
BK = 128  # keys of a program, 64 for each of two warpgroups


@gluon.jit
def _order(end, i_k, part, T, BQ: gl.constexpr, BK: gl.constexpr):
    """How a part walks over the blocks of queries right of the diagonal, so that L2 serves programs side by side.

    Where all queries to the last see the keys: down from there in part 0, up to there in part 1; all programs of a
    head are at the same block at a time. Where gates or documents end them before: block b at time b modulo their
    number, so that neighbours meet at the blocks they share.
    """
    right = (i_k + BK) // BQ
    n = gl.maximum(end - right, 1)
    cut = end < gl.cdiv(T, BQ)
    return gl.where(cut, (n - right % n) % n, 0), (part == 0) & (not cut)


@gluon.jit
def _query_block(i, end, i_k, shift, down, i_h, R: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr):
    """Query head and first query of step i: the diagonal, then as `_order` says; heads side by side."""
    right = (i_k + BK) // BQ
    i_b = i // R + shift - BK // BQ
    i_b = gl.where(i_b >= end - right, i_b - (end - right), i_b)
    i_b = gl.where(down, end - 1 - i_b, right + i_b)
    i_q = gl.where(i < BK // BQ * R, i_k // BQ + i // R, i_b) * BQ
    return i_h * R + i % R, i_q


@gluon.jit
def _end(
    p_stop, p_end, i_k, T, key_blocks, BQ: gl.constexpr, BK: gl.constexpr, FACTORS: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """The first block of queries that does not see these keys."""
    end = T
    if FACTORS:
        end = gl.load(p_stop + gl.program_id(1) * key_blocks + i_k // BK)
    if PACKED:
        end = gl.minimum(end, gl.load(p_end + gl.minimum(i_k + BK, T) - 1))
    return gl.maximum(gl.cdiv(end, BQ), (i_k + BK) // BQ)


@gluon.jit
def _load(
    d_q, d_k, d_v, d_dy, d_rows, s_q, s_k, s_v, s_dy, s_rows, s_since, s_where,
    kv_full, kv_empty, full, done, p_G, p_stop, p_end, T, H,
    R: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr, FACTORS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """One warp: k and v once a part, then q with its numbers per row, the decay since the last key, and dy.

    A step is done when both warpgroups have read its q and dy and written its ds.
    """
    i_b = gl.program_id(1) // H
    i_h = gl.program_id(1) % H
    key_blocks = gl.cdiv(T, BK)
    if FACTORS:
        p_G += gl.program_id(1).to(gl.int64) * T
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    i_step = 0
    for part in range(0, gl.where(gl.program_id(0) * 2 + 1 == key_blocks, 1, 2)):
        i_k = gl.where(part == 0, gl.program_id(0), key_blocks - 1 - gl.program_id(0)) * BK
        end = _end(p_stop, p_end, i_k, T, key_blocks, BQ, BK, FACTORS, PACKED)
        mbarrier.wait(kv_empty, part & 1 ^ 1)
        mbarrier.expect(kv_full, d_k.block_type.nbytes + d_v.block_type.nbytes)
        tma_load(d_k, [i_b, i_h, i_k, 0], kv_full, as_tile(s_k, d_k))
        tma_load(d_v, [i_b, i_h, i_k, 0], kv_full, as_tile(s_v, d_v))
        shift, down = _order(end, i_k, part, T, BQ, BK)
        G_q = 0.0
        G_e = 0.0
        if FACTORS:
            G_e = gl.load(p_G + gl.minimum(i_k + BK, T) - 1)
            G_q = gl.load(p_G + i_k)
        for i in range(0, (end - i_k // BQ) * R):
            i_hq, i_q = _query_block(i, end, i_k, shift, down, i_h, R, BQ, BK)
            i_row = (i_b * H * R + i_hq) * (key_blocks * (BK // BQ)) + i_q // BQ
            i_stage = i_step & 1
            mbarrier.wait(done.index(i_stage), i_step // 2 + 1 & 1, pred=i_step > 1)
            if FACTORS:
                since = gl.exp2(gl.minimum(G_q - G_e, 0.0).to(gl.float32))
                s_since.index(i_stage).store(gl.full([1], since, gl.float32, one))
                _, i_q_next = _query_block(i + 1, end, i_k, shift, down, i_h, R, BQ, BK)
                G_q = gl.load(p_G + gl.minimum(i_q_next, T - 1))
            where = (i_hq << 20) + i_q // BQ  # query head and block: up to 2047 heads and 2^26 tokens
            s_where.index(i_stage).store(gl.full([1], where, gl.int32, one))
            bar = full.index(i_stage)
            mbarrier.expect(bar, d_q.block_type.nbytes + d_dy.block_type.nbytes + d_rows.block_type.nbytes)
            tma_load(d_q, [i_b, i_hq, i_q, 0], bar, as_tile(s_q.index(i_stage), d_q))
            tma_load(d_rows, [i_row, 0], bar, s_rows.index(i_stage))
            tma_load(d_dy, [i_b, i_hq, i_q, 0], bar, as_tile(s_dy.index(i_stage), d_dy))
            i_step += 1
        mbarrier.wait(done.index(i_step & 1), i_step // 2 + 1 & 1, pred=i_step > 1)
        mbarrier.arrive(full.index(i_step & 1), count=1)  # the step of the last dq has none
        i_step += 1


@gluon.jit
def _row(s_rows, n: gl.constexpr, BQ: gl.constexpr, layout: gl.constexpr):
    """The n-th number of every query of a block, [BQ]."""
    return reinterpret(s_rows, gl.float32, [4 * BQ], FLAT).slice(n * BQ, BQ, 0).load(layout)


@gluon.jit
def _add_dq(d_dq, s_dq, b_dq, b_fix_q, s_fix_k, i_b, i_hq, i_q, W: gl.constexpr, LQ: gl.constexpr):
    """One warpgroup's half of a block's dq, as integers."""
    BQ: gl.constexpr = b_dq.shape[0]
    N: gl.constexpr = b_dq.shape[1]
    b_fix_k = s_fix_k.slice(W * N, N, 0).load(gl.SliceLayout(0, LQ))  # [N]
    b_dq = (b_dq * b_fix_q[:, None] * b_fix_k[None, :]).to(gl.int32)  # [BQ, N]
    tma.store_wait(0)
    barrier()
    # Thread t of four holds columns 8 i + 2 t + b; in memory they stand as 8 t + 2 i + b, for writes of 16 bytes
    b_dq = b_dq.reshape([BQ, N // 32, 4, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([BQ, N])
    as_matrix(s_dq, gl.int32, BQ, N).store(b_dq)
    fence_async_shared()
    barrier()
    tma_add(d_dq, [i_b, i_hq, i_q, W * N], as_tile(s_dq, d_dq))


@gluon.jit
def _store(d_x, s_x, b_x, i_b, i_h, i_t):
    """A tile through shared memory to memory."""
    tma.store_wait(0)
    barrier()
    as_matrix(s_x, d_x.dtype, d_x.block_type.shape[2], d_x.block_type.shape[3]).store(b_x.to(d_x.dtype))
    fence_async_shared()
    barrier()
    tma_store(d_x, [i_b, i_h, i_t, 0], as_tile(s_x, d_x))


@gluon.jit
def _from_states(p_x, i_t, T, M: gl.constexpr, D: gl.constexpr, L: gl.constexpr):
    """Rows i_t to i_t + M of this head's gradient from the states, [M, D]."""
    o_t = i_t + gl.arange(0, M, gl.SliceLayout(1, L))[:, None]
    p_x += gl.program_id(1).to(gl.int64) * T * D + gl.arange(0, D, gl.SliceLayout(0, L))[None, :]
    return gl.load(p_x + o_t.to(gl.int64) * D, o_t < T, 0.0)


@gluon.jit
def _steps(
    start, n, i_step, b_dk, b_dv, b_fix_q, hq_last, q_last, b_c, b_g,
    d_dq, s_q, s_k, s_v, s_dy, s_rows, s_since, s_where, s_ds, s_dq, s_fix_k, full, done,
    p_first, i_b, i_h, i_k, end, part, T,
    W: gl.constexpr, R: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr,
    DIAGONAL: gl.constexpr, FACTORS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Steps start to start + n of warpgroup W: dk and dv of this block of queries, dq of the one before it.

    dq needs both warpgroups' ds: a step late, none waits for the other. The first step adds zeros (b_fix_q is 0).
    """
    M: gl.constexpr = BK // 2
    K: gl.constexpr = s_k.shape[1]
    V: gl.constexpr = s_v.shape[1]
    dtype: gl.constexpr = s_k.dtype
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BQ, 16])
    LQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K // 2, 16])
    LK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    LV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    LR: gl.constexpr = gl.SliceLayout(0, LS)  # numbers per query
    s_kw = s_k.slice(W * M, M, 0)  # [M, K]
    s_vw = s_v.slice(W * M, M, 0)  # [M, V]
    s_kn = s_k.slice(W * (K // 2), K // 2, 1)  # [BK, K / 2]
    zeros = gl.zeros([M, BQ], gl.float32, LS)
    zeros_q = gl.zeros([BQ, K // 2], gl.float32, LQ)
    for i in range(start, start + n):
        i_stage = i_step & 1
        b_q = as_matrix(s_q.index(i_stage), dtype, BQ, K)
        b_dy = as_matrix(s_dy.index(i_stage), dtype, BQ, V)
        mbarrier.wait(full.index(i_stage), i_step // 2 & 1)
        where = gl.sum(s_where.index(i_stage).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        i_hq = where >> 20
        i_q = (where & 0xFFFFF) * BQ
        t_s = warpgroup_mma(s_kw, b_q.permute((1, 0)), zeros, use_acc=False, is_async=True)  # [M, BQ]
        b_delta = _row(s_rows.index(i_stage), 1, BQ, LR)  # [BQ], negative
        b_dp = gl.zeros([M, BQ], gl.float32, LS) + b_delta[None, :]
        t_dp = warpgroup_mma(s_vw, b_dy.permute((1, 0)), b_dp, is_async=True)  # [M, BQ]
        if DIAGONAL:
            o_k = i_k + W * M + gl.arange(0, M, gl.SliceLayout(1, LS))  # [M]
            o_q = i_q + gl.arange(0, BQ, LR)  # [BQ]
            m_s = o_k[:, None] <= o_q[None, :]  # [M, BQ]
            if PACKED:
                m_s = m_s & (o_k[:, None] >= gl.load(p_first + o_q, o_q < T, 0)[None, :])
            b_h = _row(s_rows.index(i_stage), 3, BQ, LR)  # [BQ]
            b_w = gl.exp2(gl.where(m_s, b_h[None, :] - b_g[:, None], -1e30))  # [M, BQ]
            b_s = warpgroup_mma_wait(1, [t_s])
            b_u = b_s * b_w
        else:
            b_a = _row(s_rows.index(i_stage), 0, BQ, LR)  # [BQ]
            b_row = b_c
            if FACTORS:
                b_row = b_c * s_since.index(i_stage).load(gl.SliceLayout(1, LS))  # [M]
            b_s = warpgroup_mma_wait(1, [t_s])
            b_u = b_s * b_a[None, :]
            if FACTORS:
                b_u = b_u * b_row[:, None]
        b_p = gl.convert_layout((b_u * b_s).to(dtype), gl.DotOperandLayout(0, LV, 2))  # [M, BQ]
        t_dv = warpgroup_mma(b_p, b_dy, b_dv, is_async=True)
        b_dp = warpgroup_mma_wait(1, [t_dp])
        b_ds = (b_u * b_dp).to(dtype)  # [M, BQ], without its factor 2
        mbarrier.wait(done.index(1 - i_stage), (i_step - 1) // 2 & 1, pred=i > 0)
        t_dq = warpgroup_mma(s_ds.index(1 - i_stage).permute((1, 0)), s_kn, zeros_q, use_acc=False, is_async=True)
        s_ds.index(i_stage).slice(W * M, M, 0).store(b_ds)
        fence_async_shared()
        t_dk = warpgroup_mma(gl.convert_layout(b_ds, gl.DotOperandLayout(0, LK, 2)), b_q, b_dk, is_async=True)
        b_dv, b_dq = warpgroup_mma_wait(1, [t_dv, t_dq])  # [M, V], [BQ, K / 2]
        _add_dq(d_dq, s_dq, b_dq, b_fix_q, s_fix_k, i_b, hq_last, q_last, W, LQ)
        b_fix_q = _row(s_rows.index(i_stage), 2, BQ, gl.SliceLayout(1, LQ))  # [BQ]
        hq_last = i_hq
        q_last = i_q
        b_dk = warpgroup_mma_wait(0, [t_dk])  # [M, K]
        release(done.index(i_stage))
        i_step += 1
    return i_step, b_dk, b_dv, b_fix_q, hq_last, q_last


@gluon.jit
def _multiply(
    d_dq, d_dk, d_dv, s_q, s_k, s_v, s_dy, s_rows, s_since, s_where, s_ds, s_dqs, s_fix_k,
    kv_full, kv_empty, full, done,
    p_dk, p_dv, p_kdk, p_G, p_first, p_stop, p_end, T, H,
    W: gl.constexpr, R: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr,
    FACTORS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: dk and dv of 64 keys, and half of dq's columns."""
    M: gl.constexpr = BK // 2
    K: gl.constexpr = s_k.shape[1]
    V: gl.constexpr = s_v.shape[1]
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BQ, 16])
    LK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    LV: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    LQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K // 2, 16])
    i_b = gl.program_id(1) // H
    i_h = gl.program_id(1) % H
    key_blocks = gl.cdiv(T, BK)
    s_dq = s_dqs.index(W)
    if FACTORS:
        p_G += gl.program_id(1).to(gl.int64) * T
    p_kdk += gl.program_id(1).to(gl.int64) * T
    i_step = 0
    for part in range(0, gl.where(gl.program_id(0) * 2 + 1 == key_blocks, 1, 2)):
        i_k = gl.where(part == 0, gl.program_id(0), key_blocks - 1 - gl.program_id(0)) * BK
        end = _end(p_stop, p_end, i_k, T, key_blocks, BQ, BK, FACTORS, PACKED)
        o_k = i_k + W * M + gl.arange(0, M, gl.SliceLayout(1, LS))  # [M]
        i_e = gl.minimum(i_k + BK, T) - 1  # the last key: the reference point
        b_g = gl.full([M], 0.0, gl.float32, gl.SliceLayout(1, LS))
        b_c = gl.full([M], 1.0, gl.float32, gl.SliceLayout(1, LS))
        G_e = 0.0
        if FACTORS:
            G_e = gl.load(p_G + i_e)
            b_g = (gl.load(p_G + o_k, o_k < T, 0.0) - G_e).to(gl.float32)  # [M]
            b_c = gl.exp2(-b_g)  # [M], column factor
            if PACKED:
                b_c = gl.where(o_k >= gl.load(p_first + i_e), b_c, 0.0)
        b_dk = gl.zeros([M, K], gl.float32, LK)
        b_dv = gl.zeros([M, V], gl.float32, LV)
        mbarrier.wait(kv_full, part & 1)
        b_fix_q = gl.zeros([BQ], gl.float32, gl.SliceLayout(1, LQ))
        i_step, b_dk, b_dv, b_fix_q, hq_last, q_last = _steps(
            0, BK // BQ * R, i_step, b_dk, b_dv, b_fix_q, i_h * R, i_k, b_c, b_g,
            d_dq, s_q, s_k, s_v, s_dy, s_rows, s_since, s_where, s_ds, s_dq, s_fix_k, full, done,
            p_first, i_b, i_h, i_k, end, part, T, W, R, BQ, BK, True, FACTORS, PACKED,
        )  # fmt: skip
        i_step, b_dk, b_dv, b_fix_q, hq_last, q_last = _steps(
            BK // BQ * R, (end - (i_k + BK) // BQ) * R,
            i_step, b_dk, b_dv, b_fix_q, hq_last, q_last, b_c, b_g,
            d_dq, s_q, s_k, s_v, s_dy, s_rows, s_since, s_where, s_ds, s_dq, s_fix_k, full, done,
            p_first, i_b, i_h, i_k, end, part, T, W, R, BQ, BK, False, FACTORS, PACKED,
        )  # fmt: skip
        last = i_step + 1 & 1
        mbarrier.wait(done.index(last), (i_step - 1) // 2 & 1)
        zeros = gl.zeros([BQ, K // 2], gl.float32, LQ)
        s_kn = s_k.slice(W * (K // 2), K // 2, 1)  # [BK, K / 2]
        b_dq = warpgroup_mma(s_ds.index(last).permute((1, 0)), s_kn, zeros, use_acc=False)  # [BQ, K / 2]
        _add_dq(d_dq, s_dq, b_dq, b_fix_q, s_fix_k, i_b, hq_last, q_last, W, LQ)
        mbarrier.arrive(done.index(i_step & 1), count=1)
        i_step += 1

        b_dk = b_dk * 2
        if p_dk is not None:
            b_dk += _from_states(p_dk, i_k + W * M, T, M, K, LK)
            b_dv += _from_states(p_dv, i_k + W * M, T, M, V, LV)
        b_kdk = gl.sum(s_k.slice(W * M, M, 0).load(LK).to(gl.float32) * b_dk, 1)  # [M]
        fence_async_shared()
        release(kv_empty)
        o_k = i_k + W * M + gl.arange(0, M, gl.SliceLayout(1, LK))  # [M]
        gl.store(p_kdk + o_k, b_kdk, o_k < T)
        _store(d_dk, s_dq, b_dk, i_b, i_h, i_k + W * M)
        _store(d_dv, s_dq, b_dv, i_b, i_h, i_k + W * M)
    tma.store_wait(0)


@gluon.jit
def _backward_kernel(
    d_q, d_k, d_v, d_dy, d_rows, d_dq, d_dk, d_dv, p_dk, p_dv, p_kdk, p_fix_k, p_G, p_first, p_stop, p_end, T, H,
    R: gl.constexpr, BQ: gl.constexpr, BK: gl.constexpr, FACTORS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """dk, dv, k . dk and dq's sums of two blocks of keys, the i-th and the i-th last: programs of one length."""
    dtype: gl.constexpr = d_k.dtype
    K: gl.constexpr = d_k.block_type.shape[3]
    V: gl.constexpr = d_v.block_type.shape[3]
    s_k = gl.allocate_shared_memory(dtype, [BK, K], gl.NVMMASharedLayout.get_default_for([BK, K], dtype))
    s_v = gl.allocate_shared_memory(dtype, [BK, V], gl.NVMMASharedLayout.get_default_for([BK, V], dtype))
    s_q = gl.allocate_shared_memory(dtype, [2] + d_q.block_type.shape, d_q.layout)
    s_dy = gl.allocate_shared_memory(dtype, [2] + d_dy.block_type.shape, d_dy.layout)
    s_rows = gl.allocate_shared_memory(gl.float32, [2] + d_rows.block_type.shape, d_rows.layout)
    s_since = gl.allocate_shared_memory(gl.float32, [2, 1], FLAT)
    s_where = gl.allocate_shared_memory(gl.int32, [2, 1], FLAT)
    s_ds = gl.allocate_shared_memory(dtype, [2, BK, BQ], gl.NVMMASharedLayout.get_default_for([BK, BQ], dtype))
    N: gl.constexpr = max(K, V) // 2  # room for dq's integers, then dk, then dv
    s_dq = gl.allocate_shared_memory(gl.int32, [2, BQ, N], gl.NVMMASharedLayout.get_default_for([BQ, N], gl.int32))
    s_fix_k = gl.allocate_shared_memory(gl.float32, [K], FLAT)
    o_k = gl.arange(0, K, gl.BlockedLayout([1], [32], [4], [0]))  # [K]
    s_fix_k.store(gl.load(p_fix_k + gl.program_id(1) * K + o_k))
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    mbarrier.init(kv_empty, count=2)
    full, done = barriers(2, 1), barriers(2, 2)
    gl.warp_specialize(
        [
            (_multiply, (
                d_dq, d_dk, d_dv, s_q, s_k, s_v, s_dy, s_rows, s_since, s_where, s_ds, s_dq, s_fix_k,
                kv_full, kv_empty, full, done,
                p_dk, p_dv, p_kdk, p_G, p_first, p_stop, p_end, T, H, 0, R, BQ, BK, FACTORS, PACKED,
            )),
            (_multiply, (
                d_dq, d_dk, d_dv, s_q, s_k, s_v, s_dy, s_rows, s_since, s_where, s_ds, s_dq, s_fix_k,
                kv_full, kv_empty, full, done,
                p_dk, p_dv, p_kdk, p_G, p_first, p_stop, p_end, T, H, 1, R, BQ, BK, FACTORS, PACKED,
            )),
            (_load, (
                d_q, d_k, d_v, d_dy, d_rows, s_q, s_k, s_v, s_dy, s_rows, s_since, s_where,
                kv_full, kv_empty, full, done, p_G, p_stop, p_end, T, H, R, BQ, BK, FACTORS, PACKED,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@triton.jit
def _column_kernel(
    d_k, d_v, p_k2, p_v2k2, p_v2, H, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, N: tl.constexpr
):
    """Over N blocks of tokens: sum k_jc^2 and sum |v_j|^2 k_jc^2, each [K], and sum |v_j|^2."""
    i_b = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    b_k2 = tl.zeros([K], tl.float32)
    b_v2k2 = tl.zeros([K], tl.float32)
    v2 = tl.zeros([], tl.float32)
    for i in range(N):
        i_t = (tl.program_id(1) * N + i) * BT
        b_k = d_k.load([i_b, i_h, i_t, 0]).reshape(BT, K).to(tl.float32)  # [BT, K]
        b_v = d_v.load([i_b, i_h, i_t, 0]).reshape(BT, V).to(tl.float32)  # [BT, V]
        b_v2 = tl.sum(b_v * b_v, 1)  # [BT]
        b_k2 += tl.sum(b_k * b_k, 0)
        b_v2k2 += tl.sum(b_k * b_k * b_v2[:, None], 0)
        v2 += tl.sum(b_v2, 0)
    i = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(p_k2 + i * K + tl.arange(0, K), b_k2)
    tl.store(p_v2k2 + i * K + tl.arange(0, K), b_v2k2)
    tl.store(p_v2 + i, v2)


@triton.jit
def _row_kernel(
    p_l_inv, p_delta, p_dy2, p_y2, p_G, p_first, p_k2, p_v2k2, p_v2, p_rows, p_fix_k, T, H, chunks,
    R: tl.constexpr, K: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, N: tl.constexpr,
    FACTORS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Four numbers per query, side by side for every block of BQ:

    the row factor exp2(G_i - G_a) / l_i, a the first query of the block; -delta; dq's unit; and, for the diagonal,
    log2 of exp2(G_i - G_e) / l_i, e the last token of i's block of BK.

    The unit: by Cauchy and Schwarz, over any set of keys, with c one of dq's K components and any sigma > 0,

        |sum_j u_ij dy_i . (v_j - y_i) k_jc|^2
            <= (sum_j w_ij / l_i) (sum_j (dy_i . (v_j - y_i) k_jc)^2 / l_i)
            <= |dy_i|^2 / l_i (1 + |y_i|^2 / sigma^2) sum_j (sigma^2 + |v_j|^2) k_jc^2

    a bound of i times a bound of c. sigma^2 is the mean of |v_j|^2. NaN and infinity reach dq through them.
    """
    i_b = tl.program_id(0) // (H * R)
    i_hq = tl.program_id(0) % (H * R)
    i_bh = i_b * H + i_hq // R
    i_q = tl.program_id(1) * BQ
    o_q = i_q + tl.arange(0, BQ)  # [BQ]
    m_q = o_q < T
    i_row = tl.program_id(0).to(tl.int64) * T + o_q
    b_l_inv = tl.load(p_l_inv + i_row, m_q, 0)  # [BQ]
    b_a = b_l_inv
    b_h = tl.log2(b_l_inv)
    if FACTORS:
        p_G += i_bh.to(tl.int64) * T
        b_G = tl.load(p_G + o_q, m_q, 0)  # [BQ]
        b_a *= tl.exp2((b_G - tl.load(p_G + tl.minimum(i_q, T - 1))).to(tl.float32))
        b_h += (b_G - tl.load(p_G + tl.minimum((i_q // BK + 1) * BK, T) - 1)).to(tl.float32)
    if PACKED:
        b_a = tl.where(tl.load(p_first + o_q, m_q, 0) == tl.load(p_first + tl.minimum(i_q, T - 1)), b_a, 0)

    o_n = tl.arange(0, N)
    i_n = i_bh * chunks + o_n  # [N]
    sigma2 = tl.sum(tl.load(p_v2 + i_n, o_n < chunks, 0), 0) / T
    b_dy2, b_y2 = tl.load(p_dy2 + i_row, m_q, 0), tl.load(p_y2 + i_row, m_q, 0)  # [BQ]
    b_bound = b_dy2 * b_l_inv * (1 + b_y2 / (sigma2 + 1e-30))  # [BQ]
    if (i_q == 0) & (i_hq % R == 0):
        i_nk = i_n[:, None] * K + tl.arange(0, K)[None, :]  # [N, K]
        b_k2 = tl.sum(tl.load(p_k2 + i_nk, (o_n < chunks)[:, None], 0), 0)  # [K]
        b_v2k2 = tl.sum(tl.load(p_v2k2 + i_nk, (o_n < chunks)[:, None], 0), 0)  # [K]
        b_fix_k = 1 / tl.maximum(tl.sqrt(b_v2k2 + sigma2 * b_k2), 1e-25, propagate_nan=tl.PropagateNan.ALL)
        tl.store(p_fix_k + i_bh * K + tl.arange(0, K), b_fix_k)

    p_rows += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 4 * BQ + tl.arange(0, BQ)
    tl.store(p_rows, tl.where(m_q, b_a, 0))
    tl.store(p_rows + BQ, -tl.load(p_delta + i_row, m_q, 0))
    tl.store(p_rows + 2 * BQ, 1073741824.0 / (tl.sqrt(b_bound) + 1e-25))
    tl.store(p_rows + 3 * BQ, tl.where(m_q, b_h, -1e30))


@triton.jit
def _query_gradient_kernel(
    p_sum, d_q, d_dq, p_state, p_rows, p_fix_k, p_qdq, T, H, R: tl.constexpr, K: tl.constexpr, BQ: tl.constexpr
):
    """dq from its fixed-point sums and from the states, and q . dq from dq before it is rounded."""
    i_b = tl.program_id(0) // (H * R)
    i_hq = tl.program_id(0) % (H * R)
    i_q = tl.program_id(1) * BQ
    o_q = i_q + tl.arange(0, BQ)  # [BQ]
    o_d = tl.arange(0, K)  # [K]
    m_q = o_q < T
    i_row = tl.program_id(0).to(tl.int64) * T + o_q
    p_rows += (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 4 * BQ
    b_fix_q = tl.load(p_rows + 2 * BQ + tl.arange(0, BQ))  # [BQ]
    b_fix_k = tl.load(p_fix_k + (i_b * H + i_hq // R) * K + o_d)  # [K]
    o_sum = o_d // 32 * 32 + o_d // 2 % 4 * 8 + o_d // 8 % 4 * 2 + o_d % 2  # [K], as `_add_dq` wrote them
    b_dq = tl.load(p_sum + i_row[:, None] * K + o_sum[None, :], m_q[:, None], 0).to(tl.float32)  # [BQ, K]
    b_dq = b_dq / b_fix_k[None, :] * (2 / b_fix_q)[:, None]
    if p_state is not None:
        b_dq += tl.load(p_state + i_row[:, None] * K + o_d[None, :], m_q[:, None], 0)
    b_q = d_q.load([i_b, i_hq, i_q, 0]).reshape(BQ, K).to(tl.float32)  # [BQ, K]
    tl.store(p_qdq + i_row, tl.sum(b_q * b_dq, 1), m_q)
    d_dq.store([i_b, i_hq, i_q, 0], b_dq.to(d_dq.dtype).reshape(1, 1, BQ, K))


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, l_inv: Tensor,
    sums: RowSums, G: Tensor | None, span: Spans | None, from_states: FromStates,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `attention_form.backward`."""
    B, T, HQ, K = q.shape
    H, V = v.shape[2:]
    R = HQ // H
    if G is None and span is not None:
        G = q.new_zeros(B, H, T, dtype=torch.float64)
    gated, packed = G is not None, span is not None
    first, end = (None, None) if span is None else span
    key_blocks = triton.cdiv(T, BK)
    blocks = key_blocks * (BK // BQ)

    # What a program needs of rows, and the bounds of the fixed-point sums
    N = triton.cdiv(blocks, 32)
    chunks = triton.cdiv(blocks, N)
    k2, v2k2, v2 = (l_inv.new_empty(B, H, chunks, D) for D in (K, K, 1))
    _column_kernel[(B * H, chunks)](descriptor(k, 64, K), descriptor(v, 64, V), k2, v2k2, v2, H, K, V, 64, N)
    rows, fix_k = l_inv.new_empty(B * HQ * blocks, 4 * BQ), l_inv.new_empty(B, H, K)
    _row_kernel[(B * HQ, blocks)](
        l_inv, *sums, G, first, k2, v2k2, v2, rows, fix_k, T, H, chunks, R, K, BQ, BK,
        triton.next_power_of_2(chunks), gated, packed, num_warps=2,
    )  # fmt: skip

    kdk, qdq = l_inv.new_empty(B, H, T), torch.empty_like(l_inv)
    dq_sum = q.new_zeros(B, HQ, T, K, dtype=torch.int32)
    d_q, d_k, d_v, d_dy, d_dk, d_dv = (
        tiles_of(x.transpose(1, 2), n, x.shape[-1])
        for x, n in ((q, BQ), (k, BK), (v, BK), (dy, BQ), (dk, BK // 2), (dv, BK // 2))
    )
    _backward_kernel[(triton.cdiv(key_blocks, 2), B * H)](
        d_q, d_k, d_v, d_dy, tiles_of(rows, 4 * BQ), tiles_of(dq_sum, BQ, K // 2), d_dk, d_dv,
        from_states.dk, from_states.dv, kdk, fix_k, G, first, factors(G, first, BQ, BK).stop, end,
        T, H, R, BQ, BK, gated, packed, num_warps=4,
    )  # fmt: skip
    _query_gradient_kernel[(B * HQ, blocks)](
        dq_sum, descriptor(q, BQ, K), descriptor(dq, BQ, K), from_states.dq, rows, fix_k, qdq, T, H, R, K, BQ
    )
    return qdq, kdk
