"""Power retention's state form in Triton, forward and backward, power 2: attention in chunks, states across.

    num_t = a_t phi(q_t) . S_n + (its chunk's part)      S_{n+1} = g_n S_n + sum_{t in n} c_t phi(k_t) v_t^T

n is t's chunk, S_n the state before it, a_t the gates from there to t, c_t from t to the chunk's end, g_n over all
of it. Backward walks the other way: with dn_t = a_t dy_t / l_t,

    dS_n = g_n dS_{n+1} + sum_{t in n} phi(q_t) dn_t^T      dv_t += c_t phi(k_t) . dS_{n+1}
    dq_ti += 2 sum_j q_tj (S_n,ij . dn_t)                   dk_ti += 2 c_t sum_j k_tj (dS_{n+1},ij . v_t)

phi(x) . S = sum_ij x_i x_j S_ij is a matrix product for a fixed i: rows x_i x by the [K, V] tile S_i, where x_i
scales the operand in registers. S_ij = S_ji: with the head_dim in four blocks of 32, i in block I needs j in block
I and after it only. Windows of 128 rows hold what is needed without waste; the blocks of x stand as 0 1 2 3 3 2,

    window 0   0 1 2 3   i in block 0 (32 tiles)
    window 1   1 2 3 3   i in block 1 for three of them, in block 3 for the last (32 tiles)
    window 2   2 3 3 2   two different i of block 2 (16 tiles)

so a state is 80 tiles of 128 rows, 10240 against D = 8256. With head_dim 64 there is one window, 0 1 0 1, two i at
a time (32 tiles). The normaliser needs no expanded vector: z is sum c k k^T, [K, K], and phi(q) . z = q z q.

B batch, T tokens, H key-value heads, HQ = H * R query heads, K and V head dims, C tokens a chunk, NC chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from brumby.kernels import attention_form
from brumby.kernels.attention_form import FromStates, delta, descriptor, precision
from brumby.kernels.gates import cumulate, gate_gradient, spans
from brumby.kernels.power_retention import RetentionState
from brumby.kernels.tiles import tile_sizes

ROWS = tl.constexpr(128)  # of a tile of the state


@triton.jit
def _tile(tile, K: tl.constexpr):
    """Of a tile: its window's first row, where its second group begins, and the index i of both groups."""
    if K == 128:
        window = tl.minimum(tile // 32, 2)
        m = tile - 32 * window
        second = tl.where(window == 1, 96 + m, tl.where(window == 2, 80 + m, m))
        return 32 * window, 128 - 32 * window, 32 * window + m, second
    else:
        return 0, 64, tile, 32 + tile


@triton.jit
def _prepare_kernel(
    d_x, d_u, p_f, p_x, p_u, T, TP, HX, K: tl.constexpr, V: tl.constexpr, E: tl.constexpr, BT: tl.constexpr
):
    """x transposed, its blocks in the order of the windows, [B * HX, E, TP], and f_t u_t, [B * HX, T, V]."""
    i_b = tl.program_id(1) // HX
    i_h = tl.program_id(1) % HX
    i_t = tl.program_id(0) * BT
    o_t = i_t + tl.arange(0, BT)
    m_t = o_t < T
    o_k = tl.arange(0, K)
    b_x = d_x.load([i_b, i_h, i_t, 0]).reshape(BT, K).T  # [K, BT]
    p_x += tl.program_id(1).to(tl.int64) * E * TP + o_t[None, :]
    tl.store(p_x + o_k[:, None].to(tl.int64) * TP, b_x, m_t[None, :])
    if E > K:
        o_again = tl.where(o_k >= 96, o_k + 32, o_k + 96) if K == 128 else o_k + 64
        m_again = o_k >= (64 if K == 128 else 0)
        tl.store(p_x + o_again[:, None].to(tl.int64) * TP, b_x, m_t[None, :] & m_again[:, None])
    if p_u is not None:
        b_f = tl.load(p_f + tl.program_id(1).to(tl.int64) * T + o_t, m_t, 0)  # [BT]
        b_u = d_u.load([i_b, i_h, i_t, 0]).reshape(BT, V)  # [BT, V]
        p_u += (tl.program_id(1).to(tl.int64) * T + o_t[:, None]) * V + tl.arange(0, V)[None, :]
        tl.store(p_u, (b_u * b_f[:, None]).to(b_u.dtype), m_t[:, None])


@triton.jit
def _sum_kernel(
    d_x, d_row, d_u, p_s, NC, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C, BT: tl.constexpr,
    TILES: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum over a chunk, and over the R heads that share a state, of phi(x_t) u_t^T: two tiles, [2 * ROWS, V]."""
    tile = 2 * tl.program_id(0)
    i_n = tl.program_id(1)
    i_h = tl.program_id(2)
    row, split, i_0, j_0 = _tile(tile, K)
    row, split, i_1, j_1 = _tile(tile + 1, K)
    # Masks as numbers: a select would keep the compiler from scaling in the operand's registers
    b_first = (tl.arange(0, ROWS)[:, None] < split).to(d_x.dtype)
    b_second = (tl.arange(0, ROWS)[:, None] >= split).to(d_x.dtype)
    b_s0 = tl.zeros([ROWS, V], tl.float32)
    b_s1 = tl.zeros([ROWS, V], tl.float32)
    steps = C // BT
    for i in tl.range(0, R * steps, num_stages=STAGES):
        i_x = i_h * R + i // steps
        i_t = i_n * C + i % steps * BT
        b_x = d_x.load([i_x, row, i_t]).reshape(ROWS, BT)
        b_u = d_u.load([i_x, i_t, 0]).reshape(BT, V)
        b_i = d_row.load([i_x, i_0, i_t]).reshape(1, BT)
        b_j = d_row.load([i_x, j_0, i_t]).reshape(1, BT)
        b_s0 = tl.dot(b_x * (b_i * b_first + b_j * b_second), b_u, b_s0, input_precision=PRECISION)
        b_i = d_row.load([i_x, i_1, i_t]).reshape(1, BT)
        b_j = d_row.load([i_x, j_1, i_t]).reshape(1, BT)
        b_s1 = tl.dot(b_x * (b_i * b_first + b_j * b_second), b_u, b_s1, input_precision=PRECISION)
    p_s += (((i_h * NC + i_n).to(tl.int64) * TILES + tile) * ROWS + tl.arange(0, ROWS)[:, None]) * V
    p_s += tl.arange(0, V)[None, :]
    tl.store(p_s, b_s0.to(p_s.dtype.element_ty))
    tl.store(p_s + ROWS * V, b_s1.to(p_s.dtype.element_ty))


@triton.jit
def _normaliser_kernel(
    d_x, p_w, p_z, NC, T, R: tl.constexpr, K: tl.constexpr, C, BT: tl.constexpr, PRECISION: tl.constexpr
):
    """sum over a chunk and R heads of w_t x_t x_t^T, [K, K]."""
    i_n = tl.program_id(0)
    i_h = tl.program_id(1)
    b_z = tl.zeros([K, K], tl.float32)
    steps = C // BT
    for i in range(0, R * steps):
        i_x = i_h * R + i // steps
        i_t = i_n * C + i % steps * BT
        o_t = i_t + tl.arange(0, BT)
        b_x = d_x.load([i_x, 0, i_t]).reshape(K, BT)
        b_w = tl.load(p_w + i_x.to(tl.int64) * T + o_t, o_t < T, 0)
        b_z = tl.dot((b_x * b_w[None, :]).to(b_x.dtype), b_x.T, b_z, input_precision=PRECISION)
    p_z += ((i_h * NC + i_n).to(tl.int64) * K + tl.arange(0, K)[:, None]) * K + tl.arange(0, K)[None, :]
    tl.store(p_z, b_z)


@triton.jit
def _scan_kernel(p_s, p_g, p_first, p_last, NC, N, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """In place: chunk sums [BH, NC, N] become what came before each chunk (after it, if REVERSE).

    `first` [BH, N] is the state to begin with, `last` receives the one at the end; None is zero, or not wanted.
    """
    i_h = tl.program_id(1)
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    if p_first is None:
        b_s = tl.zeros([BLOCK], tl.float32)
    else:
        b_s = tl.load(p_first + i_h.to(tl.int64) * N + o, m, 0)
    p_s += i_h.to(tl.int64) * NC * N + o
    p_g += i_h * NC
    b_new = tl.load(p_s + (tl.cast(NC - 1, tl.int64) * N if REVERSE else 0), m, 0)
    for i in range(NC):
        i_n = tl.cast(NC - 1 - i if REVERSE else i, tl.int64)
        i_next = tl.maximum(i_n - 1, 0) if REVERSE else tl.minimum(i_n + 1, NC - 1)
        b_next = tl.load(p_s + i_next * N, m, 0)  # ahead of the store: it might be to the same place
        tl.store(p_s + i_n * N, b_s.to(p_s.dtype.element_ty), m)
        b_s = b_s * tl.load(p_g + i_n) + b_new.to(tl.float32)
        b_new = b_next
    if p_last is not None:
        tl.store(p_last + i_h.to(tl.int64) * N + o, b_s, m)


@triton.jit
def _answer(
    d_x, d_row, d_s, i_x, i_s, i_t, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """phi(x_t) . S, [BM, V]."""
    b_y = tl.zeros([BM, V], tl.float32)
    o_r = tl.arange(0, ROWS)[None, :]
    for window in tl.static_range(3 if K == 128 else 1):
        b_x = d_x.load([i_x, 32 * window, i_t]).reshape(ROWS, BM).T  # [BM, ROWS]
        if K == 128:  # S_ij = S_ji is there once for j after i's block
            m_once = (o_r < 32) | ((o_r >= 96) & (window > 0))
            b_x = tl.where(m_once, b_x, b_x * 2)
        for tile in tl.range(32 * window, tl.minimum(32 * window + 32, TILES), num_stages=STAGES):
            _, split, i, j = _tile(tile, K)
            b_s = d_s.load([i_s, tile * ROWS, 0]).reshape(ROWS, V)
            b_i = d_row.load([i_x, i, i_t]).reshape(BM, 1)
            if window > 0 or K == 64:
                b_j = d_row.load([i_x, j, i_t]).reshape(BM, 1)
                b_i = tl.where(o_r < (128 - 32 * window if K == 128 else 64), b_i, b_j)
            b_y = tl.dot(b_x * b_i, b_s, b_y, input_precision=PRECISION)
    return b_y


@triton.jit
def _normalise(d_q, p_z, i_x, i_s, i_t, K: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr):
    """x and x z, [BM, K]."""
    o_k = tl.arange(0, K)
    b_z = tl.load(p_z + i_s.to(tl.int64) * K * K + o_k[:, None] * K + o_k[None, :])  # [K, K]
    b_x = d_q.load([i_x, 0, i_t]).reshape(K, BM).T  # [BM, K]
    return b_x, tl.dot(b_x, b_z.to(b_x.dtype), input_precision=PRECISION)


@triton.jit
def _query_kernel(
    d_x, d_q, d_row, d_s, p_z, p_a, d_y, p_l_inv, NC, T, H, C, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the states' answers to y and 1 / l, which hold those of the chunks."""
    i_h = tl.program_id(2)  # b * H + h
    i_x = i_h * R + tl.program_id(0) % R
    i_n = tl.program_id(1)
    i_t = i_n * C + tl.program_id(0) // R * BM
    i_b = i_h // H
    i_s = i_h * NC + i_n
    o_t = i_t + tl.arange(0, BM)
    m_t = o_t < T
    b_y = _answer(d_x, d_row, d_s, i_x, i_s, i_t, K, V, BM, TILES, STAGES, PRECISION)  # [BM, V]
    b_q, b_zq = _normalise(d_q, p_z, i_x, i_s, i_t, K, BM, PRECISION)  # [BM, K]
    b_a = tl.load(p_a + i_x.to(tl.int64) * T + o_t, m_t, 0)  # [BM]
    b_l = tl.sum(b_zq * b_q, 1) * b_a  # [BM]
    p_l = p_l_inv + i_x.to(tl.int64) * T + o_t
    b_l_chunk = 1 / tl.load(p_l, m_t, 1)
    b_l_inv = 1 / (b_l + b_l_chunk)
    i_hq = i_x - i_b * H * R
    b_chunk = d_y.load([i_b, i_hq, i_t, 0]).reshape(BM, V)
    b_y = b_y * (b_a * b_l_inv)[:, None] + b_chunk * (b_l_chunk * b_l_inv)[:, None]
    tl.store(p_l, b_l_inv, m_t)
    d_y.store([i_b, i_hq, i_t, 0], b_y.to(d_y.dtype).reshape(1, 1, BM, V))


@triton.jit
def _value_gradient_kernel(
    d_x, d_row, d_s, p_c, d_dv, NC, T, H, C, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv_t = c_t phi(k_t) . dS: what later chunks ask of v."""
    i_h = tl.program_id(2)  # b * H + h
    i_n = tl.program_id(1)
    i_t = i_n * C + tl.program_id(0) * BM
    o_t = i_t + tl.arange(0, BM)
    b_dv = _answer(d_x, d_row, d_s, i_h, i_h * NC + i_n, i_t, K, V, BM, TILES, STAGES, PRECISION)  # [BM, V]
    b_dv *= tl.load(p_c + i_h.to(tl.int64) * T + o_t, o_t < T, 0)[:, None]
    d_dv.store([i_h // H, i_h % H, i_t, 0], b_dv.to(d_dv.dtype).reshape(1, 1, BM, V))


@triton.jit
def _add_columns(p_d, b_d, o_k, m_k, m_old):
    """Add columns of b_d, where m_k, to d, where m_old; elsewhere d holds nothing yet."""
    p = p_d + o_k
    b_old = tl.load(p, m_k & m_old, 0)
    tl.store(p, b_old + b_d, m_k)
    tl.debug_barrier()


@triton.jit
def _gradient_kernel(
    d_x, d_q, d_row, d_u, d_s, p_z, p_w, p_d, NC, T, C, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BM: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_ti = 2 sum_j x_tj (S_ij . u_t + w_t z_ij), float32 [B * HX, T, K].

    With P_ij = S_ij . u a tile of the state has, for one i, all j that it needs: x_i P_ij belongs to d_j, and
    x_j P_ij of the j in a later block to d_i. The latter are written one by one, each i once; windows go from the
    last to the first, so that they come before what is added to them.
    """
    i_h = tl.program_id(2)  # b * H + h
    i_x = i_h * R + tl.program_id(0) % R
    i_n = tl.program_id(1)
    i_t = i_n * C + tl.program_id(0) // R * BM
    i_s = i_h * NC + i_n
    o_t = i_t + tl.arange(0, BM)
    m_t = o_t < T
    p_t = p_d + (i_x.to(tl.int64) * T + o_t) * K  # [BM]
    o_r = tl.arange(0, ROWS)[None, :]
    b_u = d_u.load([i_x, i_t, 0]).reshape(BM, V)
    for window in tl.static_range(2 if K == 128 else 0, -1, -1):
        b_x = d_x.load([i_x, 32 * window, i_t]).reshape(ROWS, BM).T  # [BM, ROWS]
        b_d = tl.zeros([BM, ROWS], tl.float32)
        for tile in tl.range(32 * window, tl.minimum(32 * window + 32, TILES), num_stages=STAGES):
            _, split, i, j = _tile(tile, K)
            b_s = d_s.load([i_s, tile * ROWS, 0]).reshape(ROWS, V)
            b_p = tl.dot(b_u, b_s.T, input_precision=PRECISION)  # [BM, ROWS]
            b_i = d_row.load([i_x, i, i_t]).reshape(BM, 1).to(tl.float32)
            if window > 0 or K == 64:
                b_j = d_row.load([i_x, j, i_t]).reshape(BM, 1).to(tl.float32)
                b_i = tl.where(o_r < (128 - 32 * window if K == 128 else 64), b_i, b_j)
            b_d += b_p * b_i
            if K == 128:
                b_px = b_p * b_x
                if window == 2:
                    tl.store(p_t + j, tl.sum(tl.where((o_r >= 64) & (o_r < 96), b_px, 0), 1), m_t)
                    m_later = (o_r >= 32) & (o_r < 64)
                elif window == 1:
                    m_later = (o_r >= 32) & (o_r < 96)
                else:
                    m_later = o_r >= 32
                tl.store(p_t + i, tl.sum(tl.where(m_later, b_px, 0), 1), m_t)
        tl.debug_barrier()
        if K == 64:
            _add_columns(p_t[:, None], b_d, o_r, m_t[:, None] & (o_r < 64), o_r < 0)
            _add_columns(p_t[:, None], b_d, o_r - 64, m_t[:, None] & (o_r >= 64), o_r >= 0)
        elif window == 2:
            _add_columns(p_t[:, None], b_d, o_r + 64, m_t[:, None] & (o_r < 64), o_r < 32)
            o_c = o_r + tl.where(o_r < 96, 32, -32)
            _add_columns(p_t[:, None], b_d, o_c, m_t[:, None] & (o_r >= 64), o_r >= 0)
        elif window == 1:
            _add_columns(p_t[:, None], b_d, o_r + 32, m_t[:, None] & (o_r < 96), o_r >= 0)
            _add_columns(p_t[:, None], b_d, o_r, m_t[:, None] & (o_r >= 96), o_r >= 0)
        else:
            _add_columns(p_t[:, None], b_d, o_r, m_t[:, None] & (o_r >= 0), o_r >= 0)
    _, b_zx = _normalise(d_q, p_z, i_x, i_s, i_t, K, BM, PRECISION)  # [BM, K]
    b_w = tl.load(p_w + i_x.to(tl.int64) * T + o_t, m_t, 0)  # [BM]
    p_k = p_t[:, None] + tl.arange(0, K)[None, :]
    b_sum = tl.load(p_k, m_t[:, None], 0)
    tl.store(p_k, 2 * (b_sum + b_zx * b_w[:, None]), m_t[:, None])


# ----------------------------------------------------------------------------------------------------
# Between a `RetentionState` and tiles


def num_tiles(K: int) -> int:
    return 80 if K == 128 else 32


@lru_cache(maxsize=16)
def _layout(K: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every row of the tiles its monomial and weight, for every monomial one of its rows and its weight.

    A state holds sqrt(2) x_i x_j once, tiles hold x_i x_j, and both orders of i and j where they share a block.
    """
    tile = torch.arange(num_tiles(K))
    if K == 128:
        order = torch.cat([32 * block + torch.arange(32) for block in (0, 1, 2, 3, 3, 2)])
        window = (tile // 32).clamp(max=2)
        m = tile - 32 * window
        first, second, split = 32 * window + m, torch.where(window == 1, 96 + m, 80 + m), 128 - 32 * window
    else:
        order = torch.arange(64).repeat(2)
        window, first, second, split = 0 * tile, tile, 32 + tile, 0 * tile + 64
    row = torch.arange(128)
    j = order[32 * window[:, None] + row]  # [tiles, 128]
    i = torch.where(row < split[:, None], first[:, None], second[:, None])
    low, high = torch.minimum(i, j).flatten(), torch.maximum(i, j).flatten()
    monomial = _monomial(low, high, K)
    weight = torch.where(low == high, 1.0, 0.5**0.5)
    back = torch.empty(K * (K + 1) // 2, dtype=torch.long)
    back[monomial] = torch.arange(len(monomial))
    return monomial.to(device), weight.to(device), back.to(device), (1 / weight[back]).to(device)


def _monomial(low: Tensor, high: Tensor, K: int) -> Tensor:
    """The place of x_low x_high in the order of `itertools.combinations_with_replacement`."""
    return low * K - low * (low - 1) // 2 + high - low


def to_tiles(state: RetentionState, K: int) -> tuple[Tensor, Tensor]:
    """s [N, H, D, V] -> [N, H, rows, V], z [N, H, D] -> [N, H, K, K]: sums of x_i x_j v and of x_i x_j."""
    monomial, weight, _, _ = _layout(K, state.s.device)
    s = state.s.float().index_select(2, monomial) * weight[:, None]
    i = torch.arange(K, device=state.z.device)
    low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    z = state.z.float()[..., _monomial(low, high, K)]
    return s, torch.where(low == high, z, z * 0.5**0.5)


def from_tiles(s: Tensor, z: Tensor) -> RetentionState:
    """The inverse of `to_tiles`, for states and for their gradients alike."""
    K = z.shape[-1]
    _, _, row, weight = _layout(K, s.device)
    i, j = torch.triu_indices(K, K, device=z.device)
    z = z[..., i, j]
    return RetentionState(s.index_select(2, row) * weight[:, None], torch.where(i == j, z, z * 2**0.5))


# ----------------------------------------------------------------------------------------------------
# Launches


class Chunks(NamedTuple):
    """Gates between tokens and the ends of their chunks, float32."""

    a: Tensor  # [B, H, T], from before the chunk to t
    c: Tensor  # [B, H, T], from t to the chunk's end
    g: Tensor  # [B, H, NC], over the chunk


def chunk_gates(
    G: Tensor | None, first: Tensor | None, B: int, H: int, T: int, C: int, device: torch.device
) -> Chunks:
    """first [T]: where documents begin; what lies in another one counts for nothing."""
    start = torch.arange(0, T, C, device=device)
    last = (start + C).clamp(max=T) - 1
    t = torch.arange(T, device=device)
    if G is None:
        a, c = (torch.ones(B, H, T, device=device) for _ in range(2))
        g = torch.ones(B, H, len(start), device=device)
    else:
        before = torch.cat((G.new_zeros(B, H, 1), G[..., last[:-1]]), -1)  # [B, H, NC]
        end = G[..., last]  # [B, H, NC]
        a = (G - before[..., t // C]).exp2().float()
        c = (end[..., t // C] - G).exp2().float()
        g = (end - before).exp2().float()
    if first is not None:
        a = a.where(first < start[t // C], 0)
        c = c.where(t >= first[last[t // C]], 0)
        g = g.where(first[last] < start, 0)
    return Chunks(a, c, g)


def _box(x: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


class Heads(NamedTuple):
    """x of HX = H * R heads as the products read it, and the u that goes with it."""

    x: Tensor  # [B, T, HX, K]
    xT: Tensor  # [B * HX, E, T], rows in the order of the windows; a stride that is a multiple of 16 bytes
    u: Tensor  # [B * HX, T, V], or nothing
    H: int

    @property
    def R(self) -> int:
        return self.x.shape[2] // self.H


class Products:
    """The state form's three products of one head_dim, dtype and chunk. `hopper.HopperProducts` are the faster
    ones.

    States stand as s [B * H, NC, rows, V] in q's dtype and z [B * H, NC, K, K] in float32.
    """

    expanded = True  # whether they read x in the order of the windows

    def __init__(self, K: int, V: int, C: int, dtype: torch.dtype, device: torch.device) -> None:
        self.K, self.V, self.C, self.dtype, self.device = K, V, C, dtype, device
        self.tiles = num_tiles(K)

    def sums(self, e: Heads) -> Tensor:
        """Chunk sums of phi(x) u^T."""
        HX, T, V = e.u.shape
        N, NC = HX // e.R, triton.cdiv(T, self.C)
        BT, num_warps, num_stages = self._tile("sum")
        s = e.u.new_empty(N, NC, self.tiles * 128, V)
        _sum_kernel[(self.tiles // 2, NC, N)](
            _box(e.xT, 1, 128, BT), _box(e.xT, 1, 1, BT), _box(e.u, 1, BT, V), s, NC, e.R, self.K, V, self.C, BT,
            self.tiles, num_stages, precision(self.dtype), num_warps=num_warps,
        )  # fmt: skip
        return s

    def query(self, e: Heads, s: Tensor, z: Tensor, a: Tensor, y: Tensor, l_inv: Tensor) -> None:
        """Add the states' answers to y [B, T, HQ, V] and 1 / l [B, HQ, T], which hold the chunks' own."""
        B, T, HQ, V = y.shape
        BM, num_warps, num_stages = self._tile("query")
        _query_kernel[self._grid(e, BM)](
            *self._boxes(e, BM), self._states(s), z, a, descriptor(y, BM, V), l_inv, s.shape[1], T, e.H, self.C,
            e.R,
            self.K, V, BM, self.tiles, num_stages, precision(self.dtype), num_warps=num_warps,
        )  # fmt: skip

    def value_gradient(self, e: Heads, s: Tensor, c: Tensor) -> Tensor:
        """c phi(k) . dS, float32 [B * H, T, V]."""
        B, T, H, _ = e.x.shape
        V = self.V
        dv = s.new_empty(B, H, T, V, dtype=torch.float32)
        BM, num_warps, num_stages = self._tile("query")
        box_x, _, box_row = self._boxes(e, BM)
        _value_gradient_kernel[self._grid(e, BM)](
            box_x, box_row, self._states(s), c, descriptor(dv.transpose(1, 2), BM, V), s.shape[1], T, H, self.C,
            self.K, V, BM, self.tiles, num_stages, precision(self.dtype), num_warps=num_warps,
        )  # fmt: skip
        return dv.flatten(0, 1)

    def gradient(self, e: Heads, s: Tensor, z: Tensor, w: Tensor) -> Tensor:
        """d_ti = 2 sum_j x_tj (S_ij . u_t + w_t z_ij), float32 [B * HX, T, K]."""
        HX, T, V = e.u.shape
        BM, num_warps, num_stages = self._tile("gradient")
        d = s.new_empty(HX, T, self.K, dtype=torch.float32)
        box_x, box_q, box_row = self._boxes(e, BM)
        _gradient_kernel[self._grid(e, BM)](
            box_x, box_q, box_row, _box(e.u, 1, BM, V), self._states(s), z, w, d, s.shape[1], T, self.C,
            e.R, self.K, V, BM, self.tiles, num_stages, precision(self.dtype), num_warps=num_warps,
        )  # fmt: skip
        return d

    def _tile(self, kernel: str) -> list[int]:
        return tile_sizes(kernel, self.dtype, max(self.K, self.V), self.device)

    def _boxes(self, e: Heads, BM: int) -> list[TensorDescriptor]:
        return [_box(e.xT, 1, rows, BM) for rows in (128, self.K, 1)]

    def _states(self, s: Tensor) -> TensorDescriptor:
        return _box(s.flatten(0, 1), 1, 128, self.V)

    def _grid(self, e: Heads, BM: int) -> tuple[int, int, int]:
        B, T, HX, _ = e.x.shape
        return (triton.cdiv(min(self.C, T), BM) * e.R, triton.cdiv(T, self.C), B * e.H)


def products(K: int, V: int, C: int, dtype: torch.dtype, device: torch.device) -> Products:
    """The fastest there are for a device."""
    if (
        dtype == torch.bfloat16
        and K == V == 128
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == 9
    ):
        from brumby.kernels import hopper

        return hopper.HopperProducts(K, V, C, dtype, device)
    return Products(K, V, C, dtype, device)


def prepare(x: Tensor, u: Tensor | None, f: Tensor, H: int, expanded: bool) -> Heads:
    """x [B, T, HX, K]; u [B, T, HX, V] times f [B, HX, T], or None."""
    B, T, HX, K = x.shape
    V = K if u is None else u.shape[-1]
    E = K if not expanded else 192 if K == 128 else 128
    TP = triton.cdiv(T, 8) * 8
    xT = x.new_empty(B * HX, E, TP)
    out = None if u is None else u.new_empty(B * HX, T, V)
    _prepare_kernel[(triton.cdiv(T, 64), B * HX)](
        descriptor(x, 64, K), descriptor(x if u is None else u, 64, V), f, xT, out, T, TP, HX, K, V, E, 64
    )
    return Heads(x, xT[..., :T], x.new_empty(0) if out is None else out, H)


def _scan(x: Tensor, g: Tensor, first: Tensor | None, reverse: bool, keep: bool) -> Tensor | None:
    """In place; x [N, NC, ., .], first and the last one that is returned [N, ., .]."""
    N, NC = x.shape[:2]
    last = x.new_empty(N, *x.shape[2:], dtype=torch.float32) if keep else None
    n = x.shape[2] * x.shape[3]
    _scan_kernel[(triton.cdiv(n, 1024), N)](x, g, first, last, NC, n, 1024, reverse, num_warps=4)
    return last


class States(NamedTuple):
    s: Tensor  # [B * H, NC, rows, V]
    z: Tensor  # [B * H, NC, K, K] float32
    last: (
        tuple[Tensor, Tensor] | None
    )  # the same after the last chunk, float32, [B * H, rows, V] and [B * H, K, K]


def states(
    p: Products, e: Heads, w: Tensor, g: Tensor, first: RetentionState | None, keep: bool, reverse: bool = False
) -> States:
    """s before each chunk (after it, if reverse), of phi(x) u^T, and z of w x x^T; w [B, HX, T], g [B, H, NC]."""
    T = e.x.shape[1]
    s = p.sums(e)
    N, NC = s.shape[:2]
    z = s.new_empty(N, NC, p.K, p.K, dtype=torch.float32)
    _normaliser_kernel[(NC, N)](
        _box(e.xT, 1, p.K, 64), w, z, NC, T, e.R, p.K, p.C, 64, precision(p.dtype), num_warps=8
    )
    s_0, z_0 = (None, None) if first is None else (x.flatten(0, 1) for x in to_tiles(first, p.K))
    s_last, z_last = _scan(s, g, s_0, reverse, keep), _scan(z, g, z_0, reverse, keep)
    return States(s, z, None if s_last is None or z_last is None else (s_last, z_last))


WORKSPACE = 2**30  # bytes that the states of the heads which are done together may take


def _groups(p: Products, B: int, H: int, T: int) -> Iterator[tuple[slice, slice]]:
    """Batch rows and heads that are done together: all of them, or of one row as many as fit."""
    size = triton.cdiv(T, p.C) * p.tiles * 128 * p.V * p.dtype.itemsize
    if B * H * size <= WORKSPACE:
        yield slice(0, B), slice(0, H)
        return
    step = triton.cdiv(H, min(H, triton.cdiv(H * size, WORKSPACE)))
    for b in range(B):
        for h in range(0, H, step):
            yield slice(b, b + 1), slice(h, min(h + step, H))


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, cu_seqlens: Tensor | None, C: int, eps: float,
    initial: RetentionState | None, keep: bool,
) -> tuple[Tensor, Tensor, RetentionState | None]:  # fmt: skip
    """y [B, T, HQ, V], 1 / l [B, HQ, T] float32 and, if `keep`, the final state; C a multiple of 128."""
    B, T, HQ, K = q.shape
    H, V = v.shape[2:]
    R = HQ // H
    G = None if log_g is None else cumulate(log_g)
    y, l_inv = attention_form.forward(q, k, v, G, spans(T, cu_seqlens, C, q.device), 2, eps)
    documents = spans(T, cu_seqlens, None, q.device)
    a, c, g = chunk_gates(G, None if documents is None else documents.first, B, H, T, C, q.device)
    p = products(K, V, C, q.dtype, q.device)
    lasts = []
    asked = T > C or initial is not None
    for b, h in _groups(p, B, H, T):
        hq = slice(h.start * R, h.stop * R)
        first = None if initial is None else RetentionState(*(x[b, h] for x in initial))
        c_h, a_q = c[b, h].contiguous(), a[b, h].repeat_interleave(R, 1)
        before = states(p, prepare(k[b, :, h], v[b, :, h], c_h, h.stop - h.start, p.expanded), c_h,
                        g[b, h].contiguous(), first, keep)  # fmt: skip
        if asked:
            p.query(
                prepare(q[b, :, hq], None, a_q, h.stop - h.start, p.expanded),
                before.s, before.z, a_q, y[b, :, hq], l_inv[b, hq],
            )  # fmt: skip
        if before.last is not None:
            lasts.append(from_tiles(*(x.unflatten(0, (b.stop - b.start, -1)) for x in before.last)))
    return y, l_inv, _gather(lasts, B, H)


def _gather(parts: list[RetentionState], B: int, H: int) -> RetentionState | None:
    """What groups leave, in the order of `_groups`, as [B, H, ...]."""
    if not parts:
        return None
    return RetentionState(
        *(torch.cat([x.flatten(0, 1) for x in xs]).unflatten(0, (B, H)) for xs in zip(*parts, strict=True))
    )


def backward(
    dy: Tensor, d_final: RetentionState | None, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None,
    cu_seqlens: Tensor | None, C: int, initial: RetentionState | None, final: RetentionState | None,
    y: Tensor, l_inv: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, RetentionState | None]:  # fmt: skip
    """dq, dk, dv, dlog_g and the gradient of the initial state. States are made again: they are large."""
    B, T, HQ, K = q.shape
    H, V = v.shape[2:]
    R = HQ // H
    G = None if log_g is None else cumulate(log_g)
    documents, inside = spans(T, cu_seqlens, None, q.device), spans(T, cu_seqlens, C, q.device)
    a, c, g = chunk_gates(G, None if documents is None else documents.first, B, H, T, C, q.device)
    p = products(K, V, C, q.dtype, q.device)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta_q = delta(dy, q, k, v, y, l_inv, G, documents, 2, exact=initial is None)
    qdq, kdk = torch.empty_like(l_inv), l_inv.new_empty(B, H, T)
    d_firsts = []
    for b, h in _groups(p, B, H, T):
        hq = slice(h.start * R, h.stop * R)
        n = h.stop - h.start
        c_h, g_h = c[b, h].contiguous(), g[b, h].contiguous()
        l_q, d_q = l_inv[b, hq], delta_q[b, hq]
        first = None if initial is None else RetentionState(*(x[b, h] for x in initial))
        d_last = None if d_final is None else RetentionState(*(x[b, h] for x in d_final))
        a_q = a[b, h].repeat_interleave(R, 1) * l_q
        w_q = -a_q * d_q
        keys = prepare(k[b, :, h], v[b, :, h], c_h, n, p.expanded)
        queries = prepare(q[b, :, hq], dy[b, :, hq], a_q, n, p.expanded)

        dq_state = dk_state = dv_state = None
        if T > C or initial is not None:
            before = states(p, keys, c_h, g_h, first, False)
            dq_state = p.gradient(queries, before.s, before.z, w_q)
            del before
        if T > C or initial is not None or d_final is not None:
            after = states(p, queries, w_q, g_h, d_last, initial is not None, reverse=True)
            if after.last is not None:
                d_firsts.append(from_tiles(*(x.unflatten(0, (b.stop - b.start, -1)) for x in after.last)))
            if T > C or d_final is not None:
                dk_state = p.gradient(keys, after.s, after.z, c_h)
                dv_state = p.value_gradient(keys, after.s, c_h)
            del after
        del keys, queries
        qdq[b, hq], kdk[b, h] = attention_form.backward(
            dy[b, :, hq], q[b, :, hq], k[b, :, h], v[b, :, h], y[b, :, hq], dq[b, :, hq], dk[b, :, h], dv[b, :, h],
            l_q, d_q, None if G is None else G[b, h], inside, 2, FromStates(dq_state, dk_state, dv_state),
        )  # fmt: skip
        del dq_state, dk_state, dv_state
    dlog_g = None
    if log_g is not None:
        last = None  # the last token's gate also decays the whole final state
        if d_final is not None and final is not None:
            last = (d_final.s * final.s).sum((2, 3)) + (d_final.z * final.z).sum(2)
        dlog_g = gate_gradient(qdq, kdk, last, cu_seqlens, 2)
    return dq, dk, dv, dlog_g, _gather(d_firsts, B, H)
