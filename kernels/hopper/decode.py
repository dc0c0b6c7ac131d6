"""Decoding's step in Gluon: K and V 128, at most 8 query heads to a key-value head.

The same programs and partial sums as `kernels/decode.py`, whose second kernel adds them up. What Triton cannot
say is which thread holds what: here a warp owns 32 columns of the state and all rows of a tile, which go from
memory into the registers that multiply them. Nothing is exchanged between warps.

L is the layout of a tile, [4, 4, V]: j in registers, j in lanes, and columns.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from brumby.kernels.decode import STEP

BJ = gl.constexpr(STEP.BJ)  # rows of a tile; as many tiles a program
BC = gl.constexpr(STEP.BC)  # buffered tokens a program
AHEAD = gl.constexpr(4)  # tiles under way


@gluon.jit
def _row(i, K: gl.constexpr):
    """Where x_i x_0 would stand in D."""
    return i * (2 * K - 1 - i) // 2


@gluon.jit
def _load(p, i, o_j, o_row, K: gl.constexpr, V: gl.constexpr, DIAGONAL: gl.constexpr):
    """Rows (i, o_j) of the state [4, 4, V]; zero where j < i."""
    p = p + _row(i, K) * V + o_row
    if DIAGONAL:
        return gl.load(p, (o_j >= i)[:, :, None], 0)
    return gl.load(p)


@gluon.jit
def _multiply(acc, b_qj, b_s, p_q, i, o_j, K: gl.constexpr, R: gl.constexpr, DIAGONAL: gl.constexpr):
    """acc, of each query head [4, V], with q_i sum_j q_j s_j added: each lane the sum over its own j."""
    if DIAGONAL:
        b_s *= gl.where(o_j == i, 0.7071067811865476, 1.0)[:, :, None]
    found = ()
    for r in gl.static_range(R):
        b_qi = gl.load(p_q + r * K + i).to(gl.float32)
        found = found + (acc[r] + b_qi * gl.sum(b_qj[r][:, :, None] * b_s, 0),)  # type: ignore[assignment]
    return found


@gluon.jit
def _denominator(p_q, p_z, p_l, c, i_first, i_j, K: gl.constexpr, R: gl.constexpr):
    """c times what BJ tiles of z answer: a warp takes two query heads."""
    L: gl.constexpr = gl.BlockedLayout([2, 2, 4], [1, 8, 4], [4, 1, 1], [2, 1, 0])
    HEADS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, L))
    o_r = gl.arange(0, 8, HEADS)
    o_i = (i_first + gl.arange(0, BJ, gl.SliceLayout(0, gl.SliceLayout(2, L))))[None, :, None]
    o_j = (i_j + gl.arange(0, BJ, gl.SliceLayout(0, gl.SliceLayout(1, L))))[None, None, :]
    o_3 = o_r[:, None, None]
    b_z = gl.load(p_z + _row(o_i, K) + o_j, o_j >= o_i, 0)
    b_z *= gl.where(o_i == o_j, 0.7071067811865476, 1.0)
    b_qi = gl.load(p_q + o_3 * K + o_i, o_3 < R, 0).to(gl.float32)
    b_qj = gl.load(p_q + o_3 * K + o_j, o_3 < R, 0).to(gl.float32)
    gl.store(p_l + o_r, gl.sum(gl.sum(b_qi * b_qj * b_z, 2), 1) * c, o_r < R)


@gluon.jit
def _tiles(
    p_q, p_s, p_z, p_o, p_l, c, i_first, i_j,
    K: gl.constexpr, V: gl.constexpr, R: gl.constexpr, DIAGONAL: gl.constexpr,
):  # fmt: skip
    """c times what BJ tiles answer, those of i from i_first on and the block of j at i_j."""
    L: gl.constexpr = gl.BlockedLayout([4, 1, 4], [1, 4, 8], [1, 1, 4], [2, 1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(2, L)
    SUM: gl.constexpr = gl.SliceLayout(0, L)
    o_4 = gl.arange(0, 4, gl.SliceLayout(1, ROWS))
    o_j = i_j + o_4[:, None] * 4 + gl.arange(0, 4, gl.SliceLayout(0, ROWS))[None, :]
    o_v = gl.arange(0, V, gl.SliceLayout(0, SUM))
    o_row = o_j[:, :, None] * V + gl.arange(0, V, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]

    b_s = ()
    for m in gl.static_range(AHEAD):
        b_s = b_s + (_load(p_s, i_first + m, o_j, o_row, K, V, DIAGONAL),)  # type: ignore[assignment]
    _denominator(p_q, p_z, p_l, c, i_first, i_j, K, R)  # while the first tiles are on their way
    acc = ()
    b_qj = ()
    for r in gl.static_range(R):
        acc = acc + (gl.zeros([4, V], gl.float32, SUM),)  # type: ignore[assignment]
        b_qj = b_qj + (gl.load(p_q + r * K + o_j).to(gl.float32),)  # type: ignore[assignment]
    for i in range(i_first, i_first + BJ - AHEAD, AHEAD):
        for m in gl.static_range(AHEAD):
            acc = _multiply(acc, b_qj, b_s[0], p_q, i + m, o_j, K, R, DIAGONAL)  # type: ignore[misc]
            b_s = b_s[1:] + (_load(p_s, i + m + AHEAD, o_j, o_row, K, V, DIAGONAL),)  # type: ignore[assignment]
    for m in gl.static_range(AHEAD):
        acc = _multiply(acc, b_qj, b_s[m], p_q, i_first + BJ - AHEAD + m, o_j, K, R, DIAGONAL)
    for r in gl.static_range(R):
        gl.store(p_o + r * V + o_v, gl.sum(acc[r], 0) * c)


@gluon.jit
def _tokens(
    p_q, p_k, p_v, p_k_buffer, p_v_buffer, p_G_buffer, p_o, p_l, n, t, G_t, scale, H,
    K: gl.constexpr, V: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    """What block n of BC tokens answers. If place t is in it, the new token is stored there; nobody reads it."""
    KEYS: gl.constexpr = gl.BlockedLayout([8, 4], [1, 32], [4, 1], [1, 0])
    VALUES: gl.constexpr = gl.BlockedLayout([8, 4], [4, 8], [1, 4], [1, 0])
    o_t = n * BC + gl.arange(0, BC, gl.SliceLayout(1, KEYS))
    o_u = n * BC + gl.arange(0, BC, gl.SliceLayout(1, VALUES))
    o_k = gl.arange(0, K, gl.SliceLayout(0, KEYS))
    o_v = gl.arange(0, V, gl.SliceLayout(0, VALUES))
    p_k_buffer += o_t[:, None] * H * K + o_k[None, :]
    p_v_buffer += o_u[:, None] * H * V + o_v[None, :]
    p_G_buffer += o_t * H
    b_k = gl.load(p_k_buffer, (o_t < t)[:, None], 0)
    b_v = gl.load(p_v_buffer, (o_u < t)[:, None], 0)
    b_k = gl.where((o_t == t)[:, None], gl.load(p_k + o_k)[None, :], b_k)
    b_v = gl.where((o_u == t)[:, None], gl.load(p_v + o_v)[None, :], b_v)
    b_G = gl.where(o_t == t, G_t, gl.load(p_G_buffer, o_t < t, 0))
    gl.store(p_k_buffer, b_k, (o_t == t)[:, None])
    gl.store(p_v_buffer, b_v, (o_u == t)[:, None])
    gl.store(p_G_buffer, b_G, o_t == t)

    b_g = gl.where(o_t <= t, gl.exp((G_t - b_G).to(gl.float32)), 0)
    b_k = b_k.to(gl.float32)
    b_v = b_v.to(gl.float32)
    for r in gl.static_range(R):
        b_q = gl.load(p_q + r * K + o_k).to(gl.float32)
        b_x = gl.sum(b_q[None, :] * b_k, 1) * scale
        b_w = b_x * b_x * b_g
        gl.store(p_l + r, gl.sum(b_w, 0))
        b_u = gl.convert_layout(b_w, gl.SliceLayout(1, VALUES))
        gl.store(p_o + r * V + o_v, gl.sum(b_u[:, None] * b_v, 0))


@gluon.jit(do_not_specialize=["t"])
def step_kernel(
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
    K: gl.constexpr,
    V: gl.constexpr,
    R: gl.constexpr,
):
    """Program (b * H + h, n) of S a head: the first ceil((t + 1) / BC) answer for tokens, the others for s."""
    i_bh = gl.program_id(0).to(gl.int64)
    i_bch = i_bh // H * C * H + i_bh % H
    n = gl.program_id(1)
    num_blocks = (t + BC) // BC
    D: gl.constexpr = K * (K + 1) // 2
    p_q += i_bh * R * K
    p_o += (i_bh * gl.num_programs(1) + n) * R * V
    p_l += (i_bh * gl.num_programs(1) + n) * R
    p_G_buffer += i_bch
    G_t = gl.load(p_G_buffer + (t - 1) * H, t > 0, 0)
    if p_log_g is not None:
        G_t += gl.load(p_log_g + i_bh)
    if n < num_blocks:
        _tokens(
            p_q, p_k + i_bh * K, p_v + i_bh * V, p_k_buffer + i_bch * K, p_v_buffer + i_bch * V, p_G_buffer,
            p_o, p_l, n, t, G_t, scale, H, K, V, R,
        )  # fmt: skip
    else:
        c = gl.exp(G_t.to(gl.float32)) * scale * scale * 1.4142135623730951
        m = n - num_blocks  # block m' of BJ j has a program for each block of BJ i up to its own
        i_block = ((gl.sqrt((8 * m + 4).to(gl.float32)) - 1) * 0.5).to(gl.int32)
        i_first = (m - i_block * (i_block + 1) // 2) * BJ
        i_j = i_block * BJ
        p_s += i_bh * D * V
        if i_first < i_j:
            _tiles(p_q, p_s, p_z + i_bh * D, p_o, p_l, c, i_first, i_j, K, V, R, False)
        else:
            _tiles(p_q, p_s, p_z + i_bh * D, p_o, p_l, c, i_first, i_j, K, V, R, True)
