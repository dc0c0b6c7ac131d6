"""Power retention's attention form in Triton, forward and backward.

    w_ij = exp(G_i - G_j) s_ij^P for j <= i,  s = scale q . k,  l_i = sum_j w_ij + eps,  y_i = sum_j w_ij v_j / l_i
    delta_i = dy_i . y_i      u_ij = exp(G_i - G_j) s_ij^(P-1) / l_i      ds_ij = P u_ij (dy_i . v_j - delta_i)
    dv_j = sum_i u_ij s_ij dy_i      dq = ds k      dk = ds^T q      dG_t = (q_t . dq_t - k_t . dk_t) / P

from "Scaling Context Requires Rethinking Attention" (arXiv 2507.04239); `power_retention.py` is the definition.
Weights are even powers times gates <= 1, so there is no running maximum and, left of the diagonal, no exponential
per element: with a reference point a between key and query, exp(G_i - G_j) = exp(G_i - G_a) exp(G_a - G_j), a row
factor times a column factor, both <= 1. Blocks whose gates have decayed too far are not visited. `scale` cancels
but for eps, which is what `power_retention` adds, sink + EPS, in units of unscaled weights.

Documents packed into one row, and chunks, cost nothing in the inner loops: where a query may not look, its row or
column factor is zero.

Backward has a kernel for dq and one for dk and dv, each the only writer of its results: nothing is added up in
memory, and the bits do not depend on the order in which programs run.

B batch, T tokens, H key-value heads, HQ = H * R query heads, K and V head dims, BQ queries and BK keys in a tile,
P power, G cumulated log2 gates. In memory gates and other numbers per token are [B, heads, T].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from brumby.kernels.gates import Spans, factors, padded
from brumby.kernels.tiles import tile_sizes


@triton.jit
def _load(d_x, i_b, i_h, i_t, BT: tl.constexpr, D: tl.constexpr):
    """Rows i_t to i_t + BT of one head, [BT, D]; zeros beyond T."""
    return d_x.load([i_b, i_h, i_t, 0]).reshape(BT, D)


@triton.jit
def _reach(
    p_begin, p_first, i_bh, i_q, T, BQ: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr
):
    """The first key, a multiple of BK, that counts for a block of queries."""
    begin = 0
    if GATED:
        begin = tl.load(p_begin + i_bh * tl.cdiv(T, BQ) + i_q // BQ)
    if PACKED:
        begin = tl.maximum(begin, tl.load(p_first + i_q) // BK * BK)
    return begin


@triton.jit
def _decay(b_G, b_G_k, m_s):
    """exp2(G_i - G_j) where a query may look, element by element, else 0."""
    return tl.where(m_s, tl.exp2(tl.where(m_s, b_G - b_G_k, 0)), 0)


@triton.jit
def _forward_kernel(
    d_q, d_k, d_v, d_y, p_l_inv, p_G, p_c, p_begin, p_first, T, H, eps, P: tl.constexpr, R: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y and 1 / l of one block of queries: the diagonal in straight code, then a loop over what is left of it.

    The longest blocks start first.
    """
    i_b = tl.program_id(0) // (H * R)
    i_hq = tl.program_id(0) % (H * R)
    i_h = i_hq // R
    i_bh = i_b * H + i_h
    i_q = (tl.num_programs(1) - 1 - tl.program_id(1)) * BQ  # first query: the reference point
    o_q = i_q + tl.arange(0, BQ)  # [BQ]
    m_q = o_q < T
    b_q = _load(d_q, i_b, i_hq, i_q, BQ, K)  # [BQ, K]
    b_y = tl.zeros([BQ, V], tl.float32)
    b_l = tl.zeros([BQ], tl.float32)
    b_a = tl.full([BQ], 1.0, tl.float32)  # row factor
    G_q = 0.0
    if GATED:
        p_G += i_bh.to(tl.int64) * T
        p_c += i_bh.to(tl.int64) * padded(T)
        G_q = tl.load(p_G + i_q)
        b_G = tl.where(m_q, tl.load(p_G + o_q, m_q, 0) - G_q, 0).to(tl.float32)  # [BQ], since the first query
        b_a = tl.exp2(b_G)
    if PACKED:
        b_first = tl.load(p_first + o_q, m_q, 0)  # [BQ]
        first = tl.load(p_first + i_q)

    for i in tl.static_range(BQ // BK):
        i_k = i_q + i * BK
        o_k = i_k + tl.arange(0, BK)  # [BK]
        m_s = o_k[None, :] <= o_q[:, None]  # [BQ, BK]
        if PACKED:
            m_s &= o_k[None, :] >= b_first[:, None]
        b_s = tl.dot(b_q, _load(d_k, i_b, i_h, i_k, BK, K).T, input_precision=PRECISION)  # [BQ, BK]
        if P == 4:
            b_s *= b_s
        if GATED:
            b_G_k = (tl.load(p_G + o_k, o_k < T, 0) - G_q).to(tl.float32)  # [BK]
            b_p = b_s * b_s * _decay(b_G[:, None], b_G_k[None, :], m_s)
        else:
            b_p = tl.where(m_s, b_s * b_s, 0)
        b_l += tl.sum(b_p, 1)
        b_v = _load(d_v, i_b, i_h, i_k, BK, V)  # [BK, V]
        b_y = tl.dot(b_p.to(b_v.dtype), b_v, b_y, input_precision=PRECISION)  # [BQ, V]

    if PACKED:
        b_a = tl.where(b_first == first, b_a, 0)
    for i_k in range(_reach(p_begin, p_first, i_bh, i_q, T, BQ, BK, GATED, PACKED), i_q, BK):
        o_k = i_k + tl.arange(0, BK)  # [BK]
        b_r = b_a
        if GATED:
            b_c = tl.load(p_c + o_k)  # [BK], column factor
            b_r *= tl.exp2((G_q - tl.load(p_G + i_k + BK - 1)).to(tl.float32))
        b_s = tl.dot(b_q, _load(d_k, i_b, i_h, i_k, BK, K).T, input_precision=PRECISION)  # [BQ, BK]
        if P == 4:
            b_s *= b_s
        if GATED:
            b_p = (b_s * b_r[:, None]) * (b_s * b_c[None, :])  # [BQ, BK]
        elif PACKED:
            b_p = (b_s * b_r[:, None]) * tl.where(o_k >= first, b_s, 0)
        else:
            b_p = b_s * b_s
        b_l += tl.sum(b_p, 1)
        b_v = _load(d_v, i_b, i_h, i_k, BK, V)  # [BK, V]
        b_y = tl.dot(b_p.to(b_v.dtype), b_v, b_y, input_precision=PRECISION)  # [BQ, V]

    b_l_inv = 1 / (b_l + eps)  # [BQ]
    tl.store(p_l_inv + (i_b * H * R + i_hq).to(tl.int64) * T + o_q, b_l_inv, m_q)
    b_y = (b_y * b_l_inv[:, None]).to(d_y.dtype)  # [BQ, V]
    d_y.store([i_b, i_hq, i_q, 0], b_y.reshape(1, 1, BQ, V))


@triton.jit
def _row_sum_kernel(
    d_q, d_k, d_v, d_y, d_dy, p_l_inv, p_delta, p_dy2, p_y2, p_G, p_first, T, H, P: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, GATED: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`RowSums`. Where a document has just begun, delta is sum_j w_ij / l_i v_j . dy, else y . dy.

    With few keys the two terms of ds cancel, and u can be large: there y's rounding would be most of dq.
    """
    i_b = tl.program_id(0) // (H * R)
    i_hq = tl.program_id(0) % (H * R)
    i_h = i_hq // R
    i_t = tl.program_id(1) * BT
    o_t = i_t + tl.arange(0, BT)  # [BT]
    m_t = o_t < T
    i_row = tl.program_id(0).to(tl.int64) * T + o_t
    b_dy = _load(d_dy, i_b, i_hq, i_t, BT, V)  # [BT, V]
    b_dyf = b_dy.to(tl.float32)  # [BT, V]
    b_y = _load(d_y, i_b, i_hq, i_t, BT, V).to(tl.float32)  # [BT, V]
    tl.store(p_dy2 + i_row, tl.sum(b_dyf * b_dyf, 1), m_t)
    tl.store(p_y2 + i_row, tl.sum(b_y * b_y, 1), m_t)
    b_delta = tl.sum(b_y * b_dyf, 1)  # [BT]
    if EXACT:
        begins = i_t == 0
        if PACKED:
            begins = tl.load(p_first + tl.minimum(i_t + BT, T) - 1) >= i_t
        if begins:
            b_s = tl.dot(
                _load(d_q, i_b, i_hq, i_t, BT, K), _load(d_k, i_b, i_h, i_t, BT, K).T, input_precision=PRECISION
            )  # [BT, BT]
            b_dp = tl.dot(b_dy, _load(d_v, i_b, i_h, i_t, BT, V).T, input_precision=PRECISION)  # [BT, BT]
            m_s = o_t[None, :] <= o_t[:, None]
            b_first = o_t * 0
            if PACKED:
                b_first = tl.load(p_first + o_t, m_t, 0)  # [BT]
                m_s &= o_t[None, :] >= b_first[:, None]
            if P == 4:
                b_s *= b_s
            b_p = tl.where(m_s, b_s * b_s, 0)
            if GATED:
                p_G += (i_b * H + i_h).to(tl.int64) * T
                b_G = (tl.load(p_G + o_t, m_t, 0) - tl.load(p_G + i_t)).to(tl.float32)  # [BT]
                b_p *= _decay(b_G[:, None], b_G[None, :], m_s)
            b_exact = tl.sum(b_p * b_dp, 1) * tl.load(p_l_inv + i_row, m_t, 0)
            b_delta = tl.where(b_first >= i_t, b_exact, b_delta)
    tl.store(p_delta + i_row, b_delta, m_t)


@triton.jit
def _query_gradient_kernel(
    d_q, d_k, d_v, d_dy, d_dq, p_dq_state, p_qdq, p_l_inv, p_delta, p_G, p_c, p_begin, p_first, T, H,
    P: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and q . dq before it is rounded, of one block of queries. `dq_state` [B * HQ, T, K] is added to it."""
    i_b = tl.program_id(0) // (H * R)
    i_hq = tl.program_id(0) % (H * R)
    i_h = i_hq // R
    i_bh = i_b * H + i_h
    i_q = (tl.num_programs(1) - 1 - tl.program_id(1)) * BQ  # first query: the reference point
    o_q = i_q + tl.arange(0, BQ)  # [BQ]
    m_q = o_q < T
    i_row = (i_b * H * R + i_hq).to(tl.int64) * T + o_q  # [BQ]
    b_q = _load(d_q, i_b, i_hq, i_q, BQ, K)  # [BQ, K]
    b_dy = _load(d_dy, i_b, i_hq, i_q, BQ, V)  # [BQ, V]
    b_l_inv = tl.load(p_l_inv + i_row, m_q, 0)  # [BQ]
    b_delta = tl.load(p_delta + i_row, m_q, 0)  # [BQ]
    b_dq = tl.zeros([BQ, K], tl.float32)
    b_a = b_l_inv  # row factor
    G_q = 0.0
    if GATED:
        p_G += i_bh.to(tl.int64) * T
        p_c += i_bh.to(tl.int64) * padded(T)
        G_q = tl.load(p_G + i_q)
        b_G = tl.where(m_q, tl.load(p_G + o_q, m_q, 0) - G_q, 0).to(tl.float32)  # [BQ]
        b_a *= tl.exp2(b_G)
    if PACKED:
        b_first = tl.load(p_first + o_q, m_q, 0)  # [BQ]
        first = tl.load(p_first + i_q)

    for i in tl.static_range(BQ // BK):
        i_k = i_q + i * BK
        o_k = i_k + tl.arange(0, BK)  # [BK]
        m_s = o_k[None, :] <= o_q[:, None]  # [BQ, BK]
        if PACKED:
            m_s &= o_k[None, :] >= b_first[:, None]
        b_k = _load(d_k, i_b, i_h, i_k, BK, K)  # [BK, K]
        b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [BQ, BK]
        b_dp = tl.dot(b_dy, _load(d_v, i_b, i_h, i_k, BK, V).T, input_precision=PRECISION)  # [BQ, BK]
        if P == 4:
            b_s *= b_s * b_s
        b_u = b_s * b_l_inv[:, None]
        if GATED:
            b_G_k = (tl.load(p_G + o_k, o_k < T, 0) - G_q).to(tl.float32)  # [BK]
            b_u *= _decay(b_G[:, None], b_G_k[None, :], m_s)
        else:
            b_u = tl.where(m_s, b_u, 0)
        b_ds = (b_u * (b_dp - b_delta[:, None])).to(b_k.dtype)  # [BQ, BK], without its factor P
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)  # [BQ, K]

    if PACKED:
        b_a = tl.where(b_first == first, b_a, 0)
    for i_k in range(_reach(p_begin, p_first, i_bh, i_q, T, BQ, BK, GATED, PACKED), i_q, BK):
        o_k = i_k + tl.arange(0, BK)  # [BK]
        b_r = b_a
        if GATED:
            b_c = tl.load(p_c + o_k)  # [BK], column factor
            b_r *= tl.exp2((G_q - tl.load(p_G + i_k + BK - 1)).to(tl.float32))
        b_k = _load(d_k, i_b, i_h, i_k, BK, K)  # [BK, K]
        b_s = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [BQ, BK]
        b_dp = tl.dot(b_dy, _load(d_v, i_b, i_h, i_k, BK, V).T, input_precision=PRECISION)  # [BQ, BK]
        if P == 4:
            b_s *= b_s * b_s
        b_u = b_s * b_r[:, None]
        if GATED:
            b_u *= b_c[None, :]
        elif PACKED:
            b_u = tl.where((o_k >= first)[None, :], b_u, 0)
        b_ds = (b_u * (b_dp - b_delta[:, None])).to(b_k.dtype)  # [BQ, BK]
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)  # [BQ, K]

    b_dq *= P
    if p_dq_state is not None:
        b_dq += tl.load(p_dq_state + i_row[:, None] * K + tl.arange(0, K)[None, :], m_q[:, None], 0)
    tl.store(p_qdq + i_row, tl.sum(b_q.to(tl.float32) * b_dq, 1), m_q)
    d_dq.store([i_b, i_hq, i_q, 0], b_dq.to(d_dq.dtype).reshape(1, 1, BQ, K))


@triton.jit
def _key_value_step(
    d_q, d_dy, b_k, b_v, b_dk, b_dv, b_c, G_e, p_l_inv, p_delta, p_G, p_first, i_b, i_hq, i_k, i_e, i_q, T,
    P: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, DIAGONAL: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one block of queries to dk and dv. Scores stand as [BK, BQ]."""
    o_q = i_q + tl.arange(0, BQ)  # [BQ]
    m_q = o_q < T
    b_a = tl.load(p_l_inv + o_q, m_q, 0)  # [BQ]
    b_delta = tl.load(p_delta + o_q, m_q, 0)  # [BQ]
    if GATED:
        b_G = tl.where(m_q, tl.load(p_G + o_q, m_q, 0) - G_e, 0).to(tl.float32)  # [BQ], since the last key
        if not DIAGONAL:
            b_a *= tl.exp2(b_G)
    if PACKED:
        b_first = tl.load(p_first + o_q, m_q, 0)  # [BQ]
        if not DIAGONAL:
            b_a = tl.where(b_first <= i_e, b_a, 0)
    b_q = _load(d_q, i_b, i_hq, i_q, BQ, K)  # [BQ, K]
    b_dy = _load(d_dy, i_b, i_hq, i_q, BQ, V)  # [BQ, V]
    b_s = tl.dot(b_k, b_q.T, input_precision=PRECISION)  # [BK, BQ]
    b_dp = tl.dot(b_v, b_dy.T, input_precision=PRECISION)  # [BK, BQ]
    b_u = b_s * b_a[None, :]
    if P == 4:
        b_u *= b_s * b_s
    if DIAGONAL:
        o_k = i_k + tl.arange(0, BK)  # [BK]
        m_s = o_k[:, None] <= o_q[None, :]  # [BK, BQ]
        if PACKED:
            m_s &= o_k[:, None] >= b_first[None, :]
        if GATED:
            b_G_k = (tl.load(p_G + o_k, o_k < T, 0) - G_e).to(tl.float32)  # [BK]
            b_u *= _decay(b_G[None, :], b_G_k[:, None], m_s)
        else:
            b_u = tl.where(m_s, b_u, 0)
    elif GATED or PACKED:
        b_u *= b_c[:, None]
    b_dv = tl.dot((b_u * b_s).to(b_dy.dtype), b_dy, b_dv, input_precision=PRECISION)  # [BK, V]
    b_ds = (b_u * (b_dp - b_delta[None, :])).to(b_q.dtype)  # [BK, BQ], without its factor P
    b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)  # [BK, K]
    return b_dk, b_dv


@triton.jit
def _key_value_gradient_kernel(
    d_q, d_k, d_v, d_dy, d_dk, d_dv, p_dk_state, p_dv_state, p_kdk, p_l_inv, p_delta, p_G, p_c, p_stop, p_first,
    p_end, T, H,
    P: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    GATED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk, dv and k . dk of one block of keys, over all query heads that share it.

    Blocks go from the last query to the diagonal, the query heads of one block after another: programs that
    run side by side read the same q and dy. The longest programs start first. `dk_state` [B * H, T, K] and
    `dv_state` [B * H, T, V] are added.
    """
    i_b = tl.program_id(0) // H
    i_h = tl.program_id(0) % H
    i_k = tl.program_id(1) * BK
    o_k = i_k + tl.arange(0, BK)  # [BK]
    m_k = o_k < T
    i_e = tl.minimum(i_k + BK, T) - 1  # last key: the reference point
    p_row = tl.program_id(0).to(tl.int64) * T
    b_k = _load(d_k, i_b, i_h, i_k, BK, K)  # [BK, K]
    b_v = _load(d_v, i_b, i_h, i_k, BK, V)  # [BK, V]
    b_dk = tl.zeros([BK, K], tl.float32)
    b_dv = tl.zeros([BK, V], tl.float32)
    b_c = tl.full([BK], 1.0, tl.float32)  # column factor
    G_e = 0.0
    end = T
    if PACKED:
        end = tl.load(p_end + i_e)
        b_c = tl.where(o_k >= tl.load(p_first + i_e), b_c, 0)
    if GATED:
        p_G += p_row
        G_e = tl.load(p_G + i_e)
        b_c = tl.load(p_c + tl.program_id(0).to(tl.int64) * padded(T) + o_k, m_k, 0)
        end = tl.minimum(end, tl.load(p_stop + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)))

    blocks = tl.maximum(tl.cdiv(end, BQ) - (i_k + BK) // BQ, 0)  # right of the diagonal
    for i in tl.range(0, blocks * R, num_stages=STAGES):
        i_hq = i_h * R + i % R
        o_row = (i_b * H * R + i_hq).to(tl.int64) * T
        i_q = i_k + BK + (blocks - 1 - i // R) * BQ
        b_dk, b_dv = _key_value_step(
            d_q, d_dy, b_k, b_v, b_dk, b_dv, b_c, G_e, p_l_inv + o_row, p_delta + o_row, p_G, p_first,
            i_b, i_hq, i_k, i_e, i_q, T, P, K, V, BQ, BK, False, GATED, PACKED, PRECISION,
        )  # fmt: skip
    for i in tl.range(0, BK // BQ * R, num_stages=1):
        i_hq = i_h * R + i % R
        o_row = (i_b * H * R + i_hq).to(tl.int64) * T
        i_q = i_k + i // R * BQ
        b_dk, b_dv = _key_value_step(
            d_q, d_dy, b_k, b_v, b_dk, b_dv, b_c, G_e, p_l_inv + o_row, p_delta + o_row, p_G, p_first,
            i_b, i_hq, i_k, i_e, i_q, T, P, K, V, BQ, BK, True, GATED, PACKED, PRECISION,
        )  # fmt: skip

    b_dk *= P
    if p_dk_state is not None:
        b_dk += tl.load(p_dk_state + (p_row + o_k)[:, None] * K + tl.arange(0, K)[None, :], m_k[:, None], 0)
        b_dv += tl.load(p_dv_state + (p_row + o_k)[:, None] * V + tl.arange(0, V)[None, :], m_k[:, None], 0)
    b_kdk = tl.sum(_load(d_k, i_b, i_h, i_k, BK, K).to(tl.float32) * b_dk, 1)  # [BK]
    tl.store(p_kdk + p_row + o_k, b_kdk, m_k)
    d_dk.store([i_b, i_h, i_k, 0], b_dk.to(d_dk.dtype).reshape(1, 1, BK, K))
    d_dv.store([i_b, i_h, i_k, 0], b_dv.to(d_dv.dtype).reshape(1, 1, BK, V))


# ----------------------------------------------------------------------------------------------------
# Launches


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """x [B, T, heads, D] as tiles [rows, columns] of one head; columns beyond D read as zeros."""
    x = x.transpose(1, 2)  # [B, heads, T, D]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, columns])


def precision(dtype: torch.dtype) -> str:
    """Float32 as three products of tf32: close to float32 at the tensor cores' speed."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def on_hopper(q: Tensor, v: Tensor, power: int) -> bool:
    """Whether the kernels for Hopper compute it."""
    return (
        q.is_cuda
        and q.dtype == torch.bfloat16
        and power == 2
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] in (64, 128)
        and torch.cuda.get_device_capability(q.device)[0] == 9
    )


def _widths(*xs: Tensor) -> list[int]:
    return [triton.next_power_of_2(x.shape[-1]) for x in xs]


def forward(
    q: Tensor, k: Tensor, v: Tensor, G: Tensor | None, span: Spans | None, power: int, eps: float
) -> tuple[Tensor, Tensor]:
    """y [B, T, HQ, V] in v's dtype and 1 / l [B, HQ, T] float32; eps is that of unscaled weights."""
    if on_hopper(q, v, power):
        from brumby.kernels import hopper  # Gluon, which other GPUs need not have

        return hopper.forward(q, k, v, G, span, eps)
    B, T, HQ, _ = q.shape
    H = k.shape[2]
    K, V = _widths(k, v)
    BQ, BK, num_warps, num_stages = tile_sizes("forward", q.dtype, max(K, V), q.device)
    y = v.new_empty(B, T, HQ, v.shape[-1])
    l_inv = q.new_empty(B, HQ, T, dtype=torch.float32)
    first = None if span is None else span.first
    c, begin, _ = factors(G, first, BQ, BK)
    _forward_kernel[(B * HQ, triton.cdiv(T, BQ))](
        descriptor(q, BQ, K), descriptor(k, BK, K), descriptor(v, BK, V), descriptor(y, BQ, V), l_inv,
        G, c, begin, first, T, H, eps, power, HQ // H, K, V, BQ, BK,
        G is not None, span is not None, precision(q.dtype), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return y, l_inv


class RowSums(NamedTuple):
    """Per query, float32 [B, HQ, T]."""

    delta: Tensor  # sum_j w_ij / l_i v_j . dy
    dy2: Tensor  # |dy|^2
    y2: Tensor  # |y|^2


def row_sums(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, l_inv: Tensor, G: Tensor | None,
    documents: Spans | None, power: int, exact: bool = True,
) -> RowSums:  # fmt: skip
    """`exact`: sequences begin here, not with a state."""
    B, T, HQ, _ = q.shape
    H = k.shape[2]
    K, V = _widths(k, v)
    sums = RowSums(*(torch.empty_like(l_inv) for _ in range(3)))
    first = None if documents is None else documents.first
    _row_sum_kernel[(B * HQ, triton.cdiv(T, 64))](
        descriptor(q, 64, K), descriptor(k, 64, K), descriptor(v, 64, V), descriptor(y, 64, V),
        descriptor(dy, 64, V), l_inv, *sums, G, first, T, H, power, HQ // H, K, V, 64,
        G is not None, documents is not None, exact, precision(q.dtype),
    )  # fmt: skip
    return sums


class FromStates(NamedTuple):
    """What states add to the gradients, float32 [B * heads, T, D]; None is nothing."""

    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


NOTHING = FromStates()


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, l_inv: Tensor,
    sums: RowSums, G: Tensor | None, span: Spans | None, power: int, from_states: FromStates = NOTHING,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write dq, dk and dv; return q . dq [B, HQ, T] and k . dk [B, H, T], float32, whence the gates' gradient."""
    if on_hopper(q, v, power):
        from brumby.kernels import hopper

        return hopper.backward(dy, q, k, v, dq, dk, dv, l_inv, sums, G, span, from_states)
    B, T, HQ, _ = q.shape
    H = k.shape[2]
    K, V = _widths(k, v)
    first, end = (None, None) if span is None else span
    gated, packed = G is not None, span is not None

    BQ, BK, num_warps, num_stages = tile_sizes("query_gradient", q.dtype, max(K, V), q.device)
    c, begin, _ = factors(G, first, BQ, BK)
    qdq = torch.empty_like(l_inv)
    _query_gradient_kernel[(B * HQ, triton.cdiv(T, BQ))](
        descriptor(q, BQ, K), descriptor(k, BK, K), descriptor(v, BK, V), descriptor(dy, BQ, V),
        descriptor(dq, BQ, K), from_states.dq, qdq, l_inv, sums.delta, G, c, begin, first, T, H, power, HQ // H,
        K, V, BQ, BK, gated, packed, precision(q.dtype), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip

    BQ, BK, num_warps, num_stages = tile_sizes("key_value_gradient", q.dtype, max(K, V), q.device)
    c, _, stop = factors(G, first, BQ, BK)
    kdk = l_inv.new_empty(B, H, T)
    _key_value_gradient_kernel[(B * H, triton.cdiv(T, BK))](
        descriptor(q, BQ, K), descriptor(k, BK, K), descriptor(v, BK, V), descriptor(dy, BQ, V),
        descriptor(dk, BK, K), descriptor(dv, BK, V), from_states.dk, from_states.dv, kdk, l_inv, sums.delta, G, c,
        stop,
        first, end, T, H, power, HQ // H, K, V, BQ, BK, gated, packed, precision(q.dtype), num_stages,
        num_warps=num_warps,
    )  # fmt: skip
    return qdq, kdk
