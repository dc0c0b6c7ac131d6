"""The products of power retention's state form in Triton: what chunks add to states, and what states answer.

phi(x) . S = sum_ij x_i x_j S_ij is a matrix product for a fixed i: rows x_i x by the [K, V] tile S_i, where x_i
scales the operand in registers. S_ij = S_ji: with the head_dim in four blocks of 32, i in block I needs j in block
I and after it only. Windows of 128 rows hold what is needed without waste; the blocks of x stand as 0 1 2 3 3 2,

    window 0   0 1 2 3   i in block 0 (32 tiles)
    window 1   1 2 3 3   i in block 1 for three of them, in block 3 for the last (32 tiles)
    window 2   2 3 3 2   two different i of block 2 (16 tiles)

so a state is 80 tiles of 128 rows, 10240 against D = 8256. With head_dim 64 there is one window, 0 1 0 1, two i at
a time (32 tiles). The normaliser needs no expanded vector: z is sum c k k^T, [K, K], and phi(q) . z = q z q.

`state_form.py` has the mathematics and the names of sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from brumby.kernels.attention_form import descriptor, precision
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
    m_first = tl.arange(0, ROWS)[:, None] < split
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
        b_s0 = tl.dot(b_x * tl.where(m_first, b_i, b_j), b_u, b_s0, input_precision=PRECISION)
        b_i = d_row.load([i_x, i_1, i_t]).reshape(1, BT)
        b_j = d_row.load([i_x, j_1, i_t]).reshape(1, BT)
        b_s1 = tl.dot(b_x * tl.where(m_first, b_i, b_j), b_u, b_s1, input_precision=PRECISION)
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
# Launches


def num_tiles(K: int) -> int:
    return 80 if K == 128 else 32


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
    """The state form's products of one head_dim, dtype and chunk. `hopper.HopperProducts` are faster ones.

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
            e.R, self.K, V, BM, self.tiles, num_stages, precision(self.dtype), num_warps=num_warps,
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


def normalisers(p: Products, e: Heads, w: Tensor) -> Tensor:
    """Chunk sums of w x x^T, float32 [B * H, NC, K, K]; w [B, HX, T]."""
    B, T, HX, K = e.x.shape
    N, NC = B * e.H, triton.cdiv(T, p.C)
    z = w.new_empty(N, NC, K, K)
    _normaliser_kernel[(NC, N)](
        _box(e.xT, 1, K, 64), w, z, NC, T, e.R, K, p.C, 64, precision(p.dtype), num_warps=8
    )
    return z


def scan(x: Tensor, g: Tensor, first: Tensor | None, reverse: bool, keep: bool) -> Tensor | None:
    """In place; x [N, NC, ., .], first and the last one that is returned [N, ., .]."""
    N, NC = x.shape[:2]
    last = x.new_empty(N, *x.shape[2:], dtype=torch.float32) if keep else None
    n = x.shape[2] * x.shape[3]
    _scan_kernel[(triton.cdiv(n, 1024), N)](x, g, first, last, NC, n, 1024, reverse, num_warps=4)
    return last
