"""Decoding with a buffer in Triton, for power 2 and bound by memory: two kernels a token, one more a chunk.

    y = (exp(G_t) S^T phi(scale q) + sum_j exp(G_t - G_j) (scale q . k_j)^2 v_j) / (the same of ones + sink + EPS)

`power_retention_decode` is the definition. The step's kernel reads the state once: a program takes a block of
it, or of the buffered tokens, and writes a partial sum. A second kernel adds these up, always in the same
order, and divides. The state is written by the fold's kernel alone, when the buffer is full.

phi is never stored. Its monomials x_i x_j, i <= j, stand row by row, so that for one i and a block of j they
are consecutive: a block of S is answered by q_i sum_j (q_j S_ij). With few query heads to a key-value head
that takes fewer instructions on the ordinary units, in float32, than on tensor cores in three parts of TF32.

B batch, H key-value heads, HQ = H * R query heads, K and V head dims, C places in the buffer, t of them taken
before this token, D = K (K + 1) / 2 size of the expanded key, G cumulated log gates, S partial sums a head.
BR and BT, BC, BJ, BK and BV are blocks of query heads, tokens, monomials and head dims.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from brumby.kernels.power_retention import RetentionBuffer, RetentionState, _decode, _fold

# ----------------------------------------------------------------------------------------------------
# The monomials x_i x_j, i <= j


@triton.jit
def _tile(n, BJ: tl.constexpr):
    """Tile n's i and its first j. Block m of BJ j has a tile for each i up to its end: (m + 1) BJ of them."""
    m = ((tl.sqrt((8 * (n // BJ) + 4).to(tl.float32)) - 1) * 0.5).to(tl.int32)  # m (m + 1) / 2 <= n // BJ
    return n - m * (m + 1) // 2 * BJ, m * BJ


@triton.jit
def _place(i, j, K: tl.constexpr):
    """Where x_i x_j stands in D; also for a block of j."""
    return i * (2 * K - 1 - i) // 2 + j


@triton.jit
def _weight(i, j):
    return tl.where(i == j, 1.0, 1.4142135623730951)


# ----------------------------------------------------------------------------------------------------
# One token


@triton.jit
def _load_q(p_q, o_r, o_j, K: tl.constexpr, R: tl.constexpr):
    """q, float32 [BR, BJ / WARPS, WARPS], of heads o_r [BR] and entries o_j [BJ / WARPS, WARPS]."""
    m_q = (o_r < R)[:, None, None] & (o_j < K)[None]
    return tl.load(p_q + o_r[:, None, None] * K + o_j[None], m_q, 0).to(tl.float32)


@triton.jit
def _add(b_o, b_qj, b_s, p_q, o_r, i, K: tl.constexpr, R: tl.constexpr):
    """b_o [BR, WARPS, BV] with q_i sum_j q_j s_j over the first dimension of b_s [BJ / WARPS, WARPS, BV]."""
    b_qi = tl.load(p_q + o_r * K + tl.minimum(i, K - 1), o_r < R, 0).to(tl.float32)  # [BR]; no s has i >= K
    return b_o + b_qi[:, None, None] * tl.sum(b_qj[:, :, :, None] * b_s[None], 1)


@triton.jit
def _store_o(p_o, b_o, o_r, o_v, R: tl.constexpr, V: tl.constexpr):
    """Store b_o [BR, BV] as heads o_r of a partial numerator [R, V]."""
    tl.store(p_o + o_r[:, None] * V + o_v[None, :], b_o, (o_r < R)[:, None] & (o_v < V)[None, :])


@triton.jit
def _answer_of_state(
    p_q,  # [R, K]
    p_s,  # [D, V]
    p_z,  # [D]
    p_o,  # [R, V]
    p_l,  # [R]
    n,
    c,
    K: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BJ: tl.constexpr,
    BV: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """c times what BJ tiles answer, those of block n; they share their j.

    The j are laid out so that each warp sums its own in registers. R query heads are taken as BR and BT, both
    powers of two: 5 as 4 and 1, not as 8.
    """
    i_first, i_j = _tile(n * BJ, BJ)
    o_j = i_j + tl.arange(0, BJ // WARPS)[:, None] * WARPS + tl.arange(0, WARPS)[None, :]  # [BJ / WARPS, WARPS]
    o_r, o_v = tl.arange(0, BR), tl.arange(0, BV)
    b_qj = _load_q(p_q, o_r, o_j, K, R)
    b_o = tl.zeros([BR, WARPS, BV], tl.float32)
    if BT > 0:
        o_rest = BR + tl.arange(0, BT)
        b_qj_rest = _load_q(p_q, o_rest, o_j, K, R)
        b_o_rest = tl.zeros([BT, WARPS, BV], tl.float32)
    for i in tl.range(i_first, i_first + BJ, num_stages=STAGES):
        m_s = ((o_j >= i) & (o_j < K))[:, :, None] & (o_v < V)[None, None, :]
        b_s = tl.load(p_s + _place(i, o_j, K)[:, :, None] * V + o_v[None, None, :], m_s, 0)
        b_s *= tl.where(o_j == i, 0.7071067811865476, 1.0)[:, :, None]  # the weights, but for a factor sqrt(2)
        b_o = _add(b_o, b_qj, b_s, p_q, o_r, i, K, R)
        if BT > 0:
            b_o_rest = _add(b_o_rest, b_qj_rest, b_s, p_q, o_rest, i, K, R)
    c_o = c * 1.4142135623730951
    _store_o(p_o, tl.sum(b_o, 1) * c_o, o_r, o_v, R, V)
    if BT > 0:
        _store_o(p_o, tl.sum(b_o_rest, 1) * c_o, o_rest, o_v, R, V)

    # The denominator: all of the block's tiles at once
    o_r, o_i, o_j = tl.arange(0, BR if BT == 0 else 2 * BR), i_first + tl.arange(0, BJ), i_j + tl.arange(0, BJ)
    m_r, m_z = o_r < R, (o_j[None, :] >= o_i[:, None]) & (o_j < K)[None, :]
    b_z = tl.load(p_z + _place(o_i[:, None], o_j[None, :], K), m_z, 0) * _weight(o_i[:, None], o_j[None, :])
    b_qi = tl.load(p_q + o_r[:, None] * K + o_i[None, :], m_r[:, None] & (o_i < K)[None, :], 0).to(tl.float32)
    b_qj = tl.load(p_q + o_r[:, None] * K + o_j[None, :], m_r[:, None] & (o_j < K)[None, :], 0).to(tl.float32)
    b_l = tl.sum(tl.sum(b_qi[:, :, None] * b_qj[:, None, :] * b_z[None], 2), 1)
    tl.store(p_l + o_r, b_l * c, m_r)


@triton.jit
def _answer_of_tokens(
    p_q,  # [R, K]
    p_k,  # [K], the new token
    p_v,  # [V]
    p_k_buffer,  # [C, H, K] from its head on, as the next two
    p_v_buffer,
    p_G_buffer,
    p_o,  # [R, V]
    p_l,  # [R]
    n,
    t,
    G_t,
    scale,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """What block n of BC tokens answers. If place t is in it, the new token is stored there.

    Nobody reads place t: the new token is taken from where it is.
    """
    o_r, o_k, o_v, o_t = tl.arange(0, BR), tl.arange(0, BK), tl.arange(0, BV), n * BC + tl.arange(0, BC)
    m_r, m_k, m_v, m_past, m_new = o_r < R, o_k < K, o_v < V, o_t < t, o_t == t
    p_k_buffer += o_t[:, None] * H * K + o_k[None, :]
    p_v_buffer += o_t[:, None] * H * V + o_v[None, :]
    p_G_buffer += o_t * H
    b_k = tl.load(p_k_buffer, m_past[:, None] & m_k[None, :], 0)  # [BC, BK]
    b_v = tl.load(p_v_buffer, m_past[:, None] & m_v[None, :], 0)  # [BC, BV]
    b_k = tl.where(m_new[:, None], tl.load(p_k + o_k, m_k, 0)[None, :], b_k)
    b_v = tl.where(m_new[:, None], tl.load(p_v + o_v, m_v, 0)[None, :], b_v)
    b_G = tl.where(m_new, G_t, tl.load(p_G_buffer, m_past, 0))  # [BC]
    tl.store(p_k_buffer, b_k, m_new[:, None] & m_k[None, :])
    tl.store(p_v_buffer, b_v, m_new[:, None] & m_v[None, :])
    tl.store(p_G_buffer, b_G, m_new)

    b_q = tl.load(p_q + o_r[:, None] * K + o_k[None, :], m_r[:, None] & m_k[None, :], 0)  # [BR, BK]
    b_x = tl.dot(b_q, b_k.T, input_precision="tf32x3") * scale  # [BR, BC]
    b_w = b_x * b_x * tl.where(o_t <= t, tl.exp((G_t - b_G).to(tl.float32)), 0)[None, :]
    _store_o(p_o, tl.dot(b_w, b_v.to(tl.float32), input_precision="tf32x3"), o_r, o_v, R, V)
    tl.store(p_l + o_r, tl.sum(b_w, 1), m_r)


@triton.jit(do_not_specialize=["t"])
def _step_kernel(
    p_q,  # [B, HQ, K]
    p_k,  # [B, H, K]
    p_v,  # [B, H, V]
    p_log_g,  # [B, H], or None
    p_s,  # [B, H, D, V]
    p_z,  # [B, H, D]
    p_k_buffer,  # [B, C, H, K]
    p_v_buffer,  # [B, C, H, V]
    p_G_buffer,  # [B, C, H]
    p_o,  # [B, H, S, R, V], partial numerators
    p_l,  # [B, H, S, R], partial denominators
    t,
    scale,
    H,
    C,
    K: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BJ: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (b * H + h, n) of S a head: the first ceil((t + 1) / BC) answer for tokens, the others for s."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_bch = i_bh // H * C * H + i_bh % H
    n, num_blocks = tl.program_id(1), tl.cdiv(t + 1, BC)
    D: tl.constexpr = K * (K + 1) // 2
    p_q += i_bh * R * K
    p_o += (i_bh * tl.num_programs(1) + n) * R * V
    p_l += (i_bh * tl.num_programs(1) + n) * R
    p_G_buffer += i_bch
    G_t = tl.load(p_G_buffer + (t - 1) * H, t > 0, 0)
    if p_log_g is not None:
        G_t += tl.load(p_log_g + i_bh)
    if n < num_blocks:
        _answer_of_tokens(
            p_q, p_k + i_bh * K, p_v + i_bh * V, p_k_buffer + i_bch * K, p_v_buffer + i_bch * V, p_G_buffer,
            p_o, p_l, n, t, G_t, scale, H, K, V, R, max(BR if BT == 0 else 2 * BR, 16), BC, BK, BV,
        )  # fmt: skip
    else:
        c = tl.exp(G_t.to(tl.float32)) * scale * scale
        _answer_of_state(
            p_q, p_s + i_bh * D * V, p_z + i_bh * D, p_o, p_l,
            n - num_blocks, c, K, V, R, BR, BT, BJ, BV, WARPS, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_parts"])
def _divide_kernel(
    p_o,  # [B, H, S, R, V]
    p_l,  # [B, H, S, R]
    p_y,  # [B, HQ, V]
    num_parts,
    eps,
    R: tl.constexpr,
    V: tl.constexpr,
    BS: tl.constexpr,
    BV: tl.constexpr,
):
    """Program ((b * H + h) * R + r, n) adds up the partial sums of a query head's block n of V and divides."""
    i_bh, i_r = tl.program_id(0).to(tl.int64) // R, tl.program_id(0) % R
    o_v = tl.program_id(1) * BV + tl.arange(0, BV)
    b_o = tl.zeros([BV], tl.float32)
    b_l = tl.zeros([], tl.float32)
    for i_s in range(0, num_parts, BS):
        o_s = i_s + tl.arange(0, BS)
        m_s = o_s < num_parts
        o_part = (i_bh * num_parts + o_s) * R + i_r  # [BS]
        m_o = m_s[:, None] & (o_v < V)[None, :]
        b_o += tl.sum(tl.load(p_o + o_part[:, None] * V + o_v[None, :], m_o, 0), 0)
        b_l += tl.sum(tl.load(p_l + o_part, m_s, 0), 0)
    tl.store(p_y + (i_bh * R + i_r) * V + o_v, (b_o / (b_l + eps)).to(p_y.dtype.element_ty), o_v < V)


# ----------------------------------------------------------------------------------------------------
# The end of a chunk


@triton.jit(do_not_specialize=["t"])
def _fold_kernel(
    p_s,  # [B, H, D, V]
    p_z,  # [B, H, D]
    p_k,  # [B, C, H, K]
    p_v,  # [B, C, H, V]
    p_G,  # [B, C, H]
    t,
    H,
    C,
    K: tl.constexpr,
    V: tl.constexpr,
    BC: tl.constexpr,
    BJ: tl.constexpr,
    BV: tl.constexpr,
):
    """s = exp(G_e) s + sum_j exp(G_e - G_j) phi(k_j) v_j^T, e = t - 1, and z: tile n in program (b * H + h, n)."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_bch = i_bh // H * C * H + i_bh % H
    i, i_j = _tile(tl.program_id(1), BJ)
    o_j, o_v = i_j + tl.arange(0, BJ), tl.arange(0, BV)
    m_j, m_v = o_j < K, o_v < V
    o_d, m_d = i_bh * (K * (K + 1) // 2) + _place(i, o_j, K), (o_j >= i) & m_j  # [BJ]
    m_s = m_d[:, None] & m_v[None, :]
    p_s += o_d[:, None] * V + o_v[None, :]
    p_z += o_d
    p_k += i_bch * K
    p_v += i_bch * V
    p_G += i_bch

    G_e = tl.load(p_G + (t - 1) * H)
    g = tl.exp(G_e.to(tl.float32))
    b_s = tl.load(p_s, m_s, 0) * g  # [BJ, BV]
    b_z = tl.load(p_z, m_d, 0) * g  # [BJ]
    for i_t in range(0, t, BC):
        o_t = i_t + tl.arange(0, BC)
        m_t = o_t < t
        b_c = tl.exp((G_e - tl.load(p_G + o_t * H, m_t, G_e)).to(tl.float32))  # [BC]
        b_c *= tl.load(p_k + o_t * H * K + tl.minimum(i, K - 1), m_t, 0).to(tl.float32)  # no s has i >= K
        b_k = tl.load(p_k + o_t[None, :] * H * K + o_j[:, None], m_j[:, None] & m_t[None, :], 0)  # [BJ, BC]
        b_phi = b_k.to(tl.float32) * b_c[None, :] * _weight(i, o_j)[:, None]
        b_v = tl.load(p_v + o_t[:, None] * H * V + o_v[None, :], m_t[:, None] & m_v[None, :], 0)  # [BC, BV]
        b_s = tl.dot(b_phi, b_v.to(tl.float32), b_s, input_precision="tf32x3")
        b_z += tl.sum(b_phi, 1)
    tl.store(p_s, b_s, m_s)
    tl.store(p_z, b_z, m_d)


# ----------------------------------------------------------------------------------------------------
# Launches


class Tile(NamedTuple):
    """How a kernel is cut: block sizes and the compiler's two numbers."""

    BC: int
    BJ: int
    num_warps: int
    num_stages: int


STEP, FOLD = Tile(32, 16, 4, 4), Tile(32, 32, 4, 2)
BS, DIVIDE_BV = 64, 32  # partial sums added up at a time, for so many columns: by one warp, without shared memory


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: RetentionState,
    buffer: RetentionBuffer,
    power: int,
    scale: float,
    eps: float,
) -> Tensor:
    """`power_retention_decode` after its checks. Powers above 2 and float64 run in plain PyTorch."""
    if power != 2 or state.s.dtype == torch.float64:
        return _decode(q, k, v, log_g, state, buffer, power, scale, eps)
    B, H, _, V = state.s.shape
    C, K, R = buffer.k.shape[1], k.shape[-1], q.shape[1] // H
    num_parts = triton.cdiv(buffer.num_tokens + 1, STEP.BC) + _num_tiles(K, STEP.BJ) // STEP.BJ
    o, l_ = state.s.new_empty(B, H, num_parts, R, V), state.s.new_empty(B, H, num_parts, R)
    y = v.new_empty(B, H * R, V)
    tensors = (
        q.contiguous(), k.contiguous(), v.contiguous(), None if log_g is None else log_g.contiguous(),
        state.s, state.z, buffer.k, buffer.v, buffer.G, o, l_,
    )  # fmt: skip
    with torch.cuda.device_of(q):
        if _on_hopper(q, K, V, R):
            from brumby.kernels.hopper import decode as hopper  # Gluon, which other GPUs need not have

            hopper.step_kernel[B * H, num_parts](
                *tensors, buffer.num_tokens, scale, H, C, K, V, R, num_warps=4, maxnreg=168
            )
        else:
            BR = 2 ** (R.bit_length() - 1)
            BT = triton.next_power_of_2(R - BR) if R > BR else 0
            _step_kernel[B * H, num_parts](
                *tensors, buffer.num_tokens, scale, H, C, K, V, R, BR, BT, STEP.BC, STEP.BJ, _block(K), _block(V),
                STEP.num_warps, STEP.num_stages, num_warps=STEP.num_warps,
            )  # fmt: skip
        grid = B * H * R, triton.cdiv(V, DIVIDE_BV)
        _divide_kernel[grid](o, l_, y, num_parts, eps, R, V, BS, DIVIDE_BV, num_warps=1)
    return y


def _on_hopper(q: Tensor, K: int, V: int, R: int) -> bool:
    """Whether the kernel for Hopper takes it; with more query heads its sums would not fit into registers."""
    fits = q.dtype == torch.bfloat16 and K == V == 128 and R <= 8
    return fits and q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9


def fold(state: RetentionState, buffer: RetentionBuffer, power: int) -> None:
    """`power_retention_fold` of a buffer that holds something."""
    if power != 2 or state.s.dtype == torch.float64:
        return _fold(state, buffer, power)
    B, H, _, V = state.s.shape
    C, K = buffer.k.shape[1], buffer.k.shape[-1]
    with torch.cuda.device_of(state.s):
        _fold_kernel[B * H, _num_tiles(K, FOLD.BJ)](
            state.s, state.z, buffer.k, buffer.v, buffer.G, buffer.num_tokens, H, C,
            K, V, FOLD.BC, FOLD.BJ, _block(V), num_warps=FOLD.num_warps, num_stages=FOLD.num_stages,
        )  # fmt: skip


def _num_tiles(K: int, BJ: int) -> int:
    blocks = triton.cdiv(K, BJ)
    return blocks * (blocks + 1) // 2 * BJ


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
