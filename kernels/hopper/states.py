"""The state form's three products for Hopper, in Gluon: K and V 128, bf16. `state_products.py` has their form.

Persistent programs of three warpgroups: one warp brings tiles into rings of shared memory, two warpgroups
multiply. What Triton cannot say is where an operand lives: x stays in registers for the whole loop over a state's
80 tiles, in four blocks of 32 columns that every window is put together from, and is scaled there.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from brumby.kernels.hopper.language import (
    FLAT,
    advance,
    as_matrix,
    barrier,
    barriers,
    num_programs,
    reinterpret,
    release,
    tiles_of,
    tma_load,
    tma_store,
)
from brumby.kernels.state_products import Heads, Products

ROWS = gl.constexpr(128)  # of a tile of the state
M = gl.constexpr(64)  # tokens, or rows of a state, of a warpgroup


@gluon.jit
def _rows(s_x, R: gl.constexpr, D: gl.constexpr):
    """A buffer that TMA wrote without swizzling, as R rows that can be picked by number."""
    return reinterpret(s_x, s_x.dtype, [R, D], FLAT)


# ----------------------------------------------------------------------------------------------------
# Sums over a chunk


@gluon.jit
def _unit(i):
    """Of unit i, the upper or lower 64 rows of four tiles: first tile, half, blocks of x, indices of scales."""
    window = gl.minimum(i // 16, 2)
    j = i - 16 * window
    groups = gl.where(window == 2, 4, 8)
    half = j // groups
    m = 4 * (j % groups)
    first = 32 * window + m
    second = gl.where(window == 1, 96 + m, gl.where(window == 2, 80 + m, m))
    # blocks 0 1 | 2 3, 1 2 | 3 3, 2 3 | 3 2
    block_0 = gl.where(half == 0, window, gl.where(window == 0, 2, 3))
    block_1 = gl.where(half == 0, window + 1, gl.where(window == 2, 2, 3))
    scale_0 = gl.where((half == 1) & (window == 2), second, first)
    scale_1 = gl.where((half == 1) & (window > 0), second, first)
    return 32 * window + m, half, block_0, block_1, scale_0, scale_1


@gluon.jit
def _sum_load(
    d_x, d_row, d_u, s_x, s_row, s_u, full, empty, NC, N, R, C, BT: gl.constexpr, RING: gl.constexpr
):  # fmt: skip
    i_stage = 0
    i_phase = 1
    for i in range(gl.program_id(0), 40 * NC * N, gl.num_programs(0)):
        _, _, block_0, block_1, scale_0, scale_1 = _unit(i % 40)
        i_n = i // 40 % NC
        i_h = i // 40 // NC
        for step in range(0, R * (C // BT)):
            i_x = i_h * R + step // (C // BT)
            i_t = i_n * C + step % (C // BT) * BT
            mbarrier.wait(empty.index(i_stage), i_phase)
            bar = full.index(i_stage)
            mbarrier.expect(bar, 2 * d_x.block_type.nbytes + 2 * d_row.block_type.nbytes + d_u.block_type.nbytes)
            s_halves = reinterpret(s_x.index(i_stage), d_x.dtype, [2] + d_x.block_type.shape, d_x.layout)
            tma_load(d_x, [i_x, block_0 * 32, i_t], bar, s_halves.index(0))
            tma_load(d_x, [i_x, block_1 * 32, i_t], bar, s_halves.index(1))
            tma_load(d_row, [i_x, scale_0, i_t], bar, s_row.index(2 * i_stage))
            tma_load(d_row, [i_x, scale_1, i_t], bar, s_row.index(2 * i_stage + 1))
            tma_load(d_u, [i_x, i_t, 0], bar, s_u.index(i_stage))
            i_stage, i_phase = advance(i_stage, i_phase, RING)


@gluon.jit
def _scaled(b_x, s_row0, s_row1, i, BT: gl.constexpr, LA: gl.constexpr):
    """x times row i of the scales, of which the lower half of a tile may have its own."""
    L: gl.constexpr = gl.SliceLayout(0, LA)
    b_0 = _rows(s_row0, 4, BT).index(i).load(L)  # [BT]
    b_1 = _rows(s_row1, 4, BT).index(i).load(L)  # [BT]
    m_0 = gl.arange(0, M, gl.SliceLayout(1, LA)) < 32
    return b_x * gl.where(m_0[:, None], b_0[None, :], b_1[None, :])


@gluon.jit
def _operands(s_x, s_row, i_stage, W: gl.constexpr, BT: gl.constexpr, LA: gl.constexpr):
    """[M, BT] of two tiles: the same rows of x, scaled by two different ones."""
    b_x = s_x.index(i_stage).load(LA)
    s_row0, s_row1 = s_row.index(2 * i_stage), s_row.index(2 * i_stage + 1)
    return _scaled(b_x, s_row0, s_row1, 2 * W, BT, LA), _scaled(b_x, s_row0, s_row1, 2 * W + 1, BT, LA)


@gluon.jit
def _sum_multiply(
    d_s, s_x, s_row, s_u, s_s, full, empty, NC, N, R, C, W: gl.constexpr, V: gl.constexpr, BT: gl.constexpr,
    RING: gl.constexpr,
):  # fmt: skip
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    LA: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    i_stage = 0
    i_phase = 0
    for i in range(gl.program_id(0), 40 * NC * N, gl.num_programs(0)):
        tile, half, _, _, _, _ = _unit(i % 40)
        b_s0 = gl.zeros([M, V], gl.float32, L)
        b_s1 = gl.zeros([M, V], gl.float32, L)
        mbarrier.wait(full.index(i_stage), i_phase)
        b_a0, b_a1 = _operands(s_x, s_row, i_stage, W, BT, LA)
        for _ in range(1, R * (C // BT)):
            # Operands of a product may not be made while it is under way: the next ones are, then it is awaited
            b_u = as_matrix(s_u.index(i_stage), gl.bfloat16, BT, V)
            b_s0 = warpgroup_mma(b_a0, b_u, b_s0, is_async=True)
            b_s1 = warpgroup_mma(b_a1, b_u, b_s1, is_async=True)
            last = i_stage
            i_stage, i_phase = advance(i_stage, i_phase, RING)
            mbarrier.wait(full.index(i_stage), i_phase)
            b_a0, b_a1 = _operands(s_x, s_row, i_stage, W, BT, LA)
            b_s0, b_s1 = warpgroup_mma_wait(0, [b_s0, b_s1])
            release(empty.index(last))
        b_u = as_matrix(s_u.index(i_stage), gl.bfloat16, BT, V)
        b_s0 = warpgroup_mma(b_a0, b_u, b_s0, is_async=True)
        b_s1 = warpgroup_mma(b_a1, b_u, b_s1, is_async=True)
        b_s0, b_s1 = warpgroup_mma_wait(0, [b_s0, b_s1])
        release(empty.index(i_stage))
        i_stage, i_phase = advance(i_stage, i_phase, RING)
        row = (i // 40 * 80 + tile + 2 * W) * ROWS + half * M
        s_out = s_s.index(W)
        tma.store_wait(0)
        barrier()
        as_matrix(s_out, gl.bfloat16, M, V).store(b_s0.to(d_s.dtype))
        fence_async_shared()
        barrier()
        tma_store(d_s, [row, 0], s_out)
        tma.store_wait(0)
        barrier()
        as_matrix(s_out, gl.bfloat16, M, V).store(b_s1.to(d_s.dtype))
        fence_async_shared()
        barrier()
        tma_store(d_s, [row + ROWS, 0], s_out)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["NC", "N", "R", "C"])
def _sum_kernel(d_x, d_row, d_u, d_s, NC, N, R, C, BT: gl.constexpr, RING: gl.constexpr):
    V: gl.constexpr = d_u.block_type.shape[2]
    matrix: gl.constexpr = gl.NVMMASharedLayout.get_default_for([M, BT], d_x.dtype)
    s_x = gl.allocate_shared_memory(d_x.dtype, [RING, M, BT], matrix)
    s_row = gl.allocate_shared_memory(d_row.dtype, [2 * RING] + d_row.block_type.shape, d_row.layout)
    s_u = gl.allocate_shared_memory(d_u.dtype, [RING] + d_u.block_type.shape, d_u.layout)
    s_s = gl.allocate_shared_memory(d_s.dtype, [2] + d_s.block_type.shape, d_s.layout)
    full, empty = barriers(RING, 1), barriers(RING, 2)
    gl.warp_specialize(
        [
            (_sum_multiply, (d_s, s_x, s_row, s_u, s_s, full, empty, NC, N, R, C, 0, V, BT, RING)),
            (_sum_multiply, (d_s, s_x, s_row, s_u, s_s, full, empty, NC, N, R, C, 1, V, BT, RING)),
            (_sum_load, (d_x, d_row, d_u, s_x, s_row, s_u, full, empty, NC, N, R, C, BT, RING)),
        ],
        [4, 1],
        [240, 24],
    )


# ----------------------------------------------------------------------------------------------------
# What states answer


@gluon.jit
def _place(i, NC, R, TILES):
    """Of tile i: b * H + h, chunk, query head, first of its 128 tokens in the chunk; a state's heads together."""
    m = i % TILES
    i_x = i // TILES % R
    i_n = i // (TILES * R) % NC
    i_h = i // (TILES * R * NC)
    return i_h, i_n, i_h * R + i_x, m * 2 * M


@gluon.jit
def _state_load(
    d_x, d_xT, d_u, d_z, d_s, s_x, s_xT, s_u, s_s, x_full, x_empty, full, empty, NC, N, R, C, TILES, HX,
    NORMALISE: gl.constexpr, GRADIENT: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """One warp: x both ways (and u), then z, then the tiles of the state."""
    i_stage = 0
    i_phase = 1
    x_phase = 1
    for i in range(gl.program_id(0), N * NC * R * TILES, gl.num_programs(0)):
        i_h, i_n, i_x, m = _place(i, NC, R, TILES)
        i_t = i_n * C + m
        for w in gl.static_range(2):
            bar = x_full.index(w)
            mbarrier.wait(x_empty.index(w), x_phase)
            if GRADIENT:
                mbarrier.expect(bar, d_x.block_type.nbytes + d_xT.block_type.nbytes + d_u.block_type.nbytes)
                tma_load(d_u, [i_x, i_t + w * M, 0], bar, s_u.index(w))
            else:
                mbarrier.expect(bar, d_x.block_type.nbytes + d_xT.block_type.nbytes)
            tma_load(d_x, [i_x // HX, i_x % HX, i_t + w * M, 0], bar, s_x.index(w))
            tma_load(d_xT, [i_x, 0, i_t + w * M], bar, s_xT.index(w))
        x_phase ^= 1
        if NORMALISE:
            mbarrier.wait(empty.index(i_stage), i_phase)
            mbarrier.expect(full.index(i_stage), d_z.block_type.nbytes)
            tma_load(d_z, [(i_h * NC + i_n) * ROWS, 0], full.index(i_stage), s_s.index(i_stage))
            i_stage, i_phase = advance(i_stage, i_phase, RING)
        for tile in range(0, 80):
            mbarrier.wait(empty.index(i_stage), i_phase)
            mbarrier.expect(full.index(i_stage), d_s.block_type.nbytes)
            tma_load(d_s, [((i_h * NC + i_n) * 80 + tile) * ROWS, 0], full.index(i_stage), s_s.index(i_stage))
            i_stage, i_phase = advance(i_stage, i_phase, RING)


@gluon.jit
def _window(s_rows, tile, window: gl.constexpr, b_x0, b_x1, b_x2, b_x3, LX: gl.constexpr):
    """The four blocks of a tile's operand. What a state holds once for both S_ij and S_ji counts twice."""
    b_i = s_rows.index(32 * window + tile).load(LX)[:, None]  # [M, 1]
    b_2i = b_i + b_i
    if window == 0:
        return b_x0 * b_i, b_x1 * b_2i, b_x2 * b_2i, b_x3 * b_2i
    elif window == 1:
        b_j = s_rows.index(96 + tile).load(LX)[:, None]
        return b_x1 * b_i, b_x2 * b_2i, b_x3 * b_2i, b_x3 * b_j
    else:
        b_j = s_rows.index(80 + tile).load(LX)[:, None]
        return b_x2 * b_i, b_x3 * b_2i, b_x3 * (b_j + b_j), b_x2 * b_j


@gluon.jit
def _answer_multiply(
    s_x, s_xT, s_s, x_full, x_empty, full, empty, p_a, p_l_inv, p_y, stride_b, stride_t, stride_h,
    NC, N, R, C, TILES, HX, T, W: gl.constexpr, V: gl.constexpr, NORMALISE: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: phi(x) . S of 64 tokens."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    LA: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    LZ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    LX: gl.constexpr = gl.SliceLayout(1, LA)
    LR: gl.constexpr = gl.SliceLayout(1, L)
    i_stage = 0
    i_phase = 0
    x_phase = 0
    s_rows = _rows(s_xT.index(W), 128, M)
    s_xm = as_matrix(s_x.index(W), gl.bfloat16, M, 128)
    for i in range(gl.program_id(0), N * NC * R * TILES, gl.num_programs(0)):
        i_h, i_n, i_x, m = _place(i, NC, R, TILES)
        i_t = i_n * C + m + W * M
        mbarrier.wait(x_full.index(W), x_phase)
        x_phase ^= 1
        b_x0 = s_xm.slice(0, 32, 1).load(LA)  # [M, 32]
        b_x1 = s_xm.slice(32, 32, 1).load(LA)
        b_x2 = s_xm.slice(64, 32, 1).load(LA)
        b_x3 = s_xm.slice(96, 32, 1).load(LA)
        o_t = i_t + gl.arange(0, M, LR)
        m_t = o_t < T
        b_a = gl.load(p_a + i_x.to(gl.int64) * T + o_t, m_t, 0)  # [M]
        if NORMALISE:
            mbarrier.wait(full.index(i_stage), i_phase)
            b_z = as_matrix(s_s.index(i_stage), gl.bfloat16, 128, 128)
            zeros = gl.zeros([M, 128], gl.float32, LZ)
            b_zx = warpgroup_mma(s_xm, b_z, zeros, use_acc=False, is_async=True)
            b_zx = warpgroup_mma_wait(0, [b_zx])
            release(empty.index(i_stage))
            b_l = gl.convert_layout(gl.sum(b_zx * s_xm.load(LZ).to(gl.float32), 1), LR) * b_a  # [M]
            i_stage, i_phase = advance(i_stage, i_phase, RING)
        b_y = gl.zeros([M, V], gl.float32, L)
        for window in gl.static_range(3):
            b_0, b_1, b_2, b_3 = _window(s_rows, 0, window, b_x0, b_x1, b_x2, b_x3, LX)
            for tile in range(1, 33 - 16 * (window // 2)):
                # The next operands are made while this product is under way, which is then awaited
                mbarrier.wait(full.index(i_stage), i_phase)
                b_s = as_matrix(s_s.index(i_stage), gl.bfloat16, ROWS, V)
                b_y = warpgroup_mma(b_0, b_s.slice(0, 32, 0), b_y, is_async=True)
                b_y = warpgroup_mma(b_1, b_s.slice(32, 32, 0), b_y, is_async=True)
                b_y = warpgroup_mma(b_2, b_s.slice(64, 32, 0), b_y, is_async=True)
                b_y = warpgroup_mma(b_3, b_s.slice(96, 32, 0), b_y, is_async=True)
                i = gl.minimum(tile, 31 - 16 * (window // 2))
                b_0, b_1, b_2, b_3 = _window(s_rows, i, window, b_x0, b_x1, b_x2, b_x3, LX)
                b_y = warpgroup_mma_wait(0, [b_y])
                release(empty.index(i_stage))
                i_stage, i_phase = advance(i_stage, i_phase, RING)
        p_t = (
            p_y + (i_x // HX).to(gl.int64) * stride_b + i_x % HX * stride_h + o_t[:, None].to(gl.int64) * stride_t
        )
        p_t += gl.arange(0, V, gl.SliceLayout(0, L))[None, :]
        if NORMALISE:
            p_l = p_l_inv + i_x.to(gl.int64) * T + o_t
            b_l_chunk = 1 / gl.load(p_l, m_t, 1)
            b_l_inv = 1 / (b_l + b_l_chunk)
            b_chunk = gl.load(p_t, m_t[:, None], 0).to(gl.float32)
            b_y = b_y * (b_a * b_l_inv)[:, None] + b_chunk * (b_l_chunk * b_l_inv)[:, None]
            gl.store(p_l, b_l_inv, m_t)
        else:
            b_y = b_y * b_a[:, None]
        gl.store(p_t, b_y.to(p_y.dtype.element_ty), m_t[:, None])
        release(x_empty.index(W))


@gluon.jit(do_not_specialize=["NC", "N", "R", "C", "TILES", "HX"])
def _answer_kernel(
    d_x, d_xT, d_z, d_s, p_a, p_l_inv, p_y, stride_b, stride_t, stride_h, NC, N, R, C, TILES, HX, T,
    NORMALISE: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    V: gl.constexpr = d_s.block_type.shape[1]
    s_x = gl.allocate_shared_memory(d_x.dtype, [2] + d_x.block_type.shape, d_x.layout)
    s_xT = gl.allocate_shared_memory(d_xT.dtype, [2] + d_xT.block_type.shape, d_xT.layout)
    D: gl.constexpr = 128 if NORMALISE else V
    s_s = gl.allocate_shared_memory(d_s.dtype, [RING, ROWS, D], d_z.layout)
    x_full, x_empty = barriers(2, 1), barriers(2, 1)
    full, empty = barriers(RING, 1), barriers(RING, 2)
    gl.warp_specialize(
        [
            (_answer_multiply, (
                s_x, s_xT, s_s, x_full, x_empty, full, empty, p_a, p_l_inv, p_y, stride_b, stride_t, stride_h,
                NC, N, R, C, TILES, HX, T, 0, V, NORMALISE, RING,
            )),
            (_answer_multiply, (
                s_x, s_xT, s_s, x_full, x_empty, full, empty, p_a, p_l_inv, p_y, stride_b, stride_t, stride_h,
                NC, N, R, C, TILES, HX, T, 1, V, NORMALISE, RING,
            )),
            (_state_load, (
                d_x, d_xT, d_x, d_z, d_s, s_x, s_xT, s_x, s_s, x_full, x_empty, full, empty,
                NC, N, R, C, TILES, HX, NORMALISE, False, RING,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# Gradients


@gluon.jit
def _quarters(b_p, L: gl.constexpr):
    """Columns 0 to 31, 32 to 63, ... of [M, 128]; all of it stays in its registers."""
    b_0, b_1 = b_p.reshape([M, 2, 64]).permute((0, 2, 1)).split()
    b_00, b_01 = b_0.reshape([M, 2, 32]).permute((0, 2, 1)).split()
    b_10, b_11 = b_1.reshape([M, 2, 32]).permute((0, 2, 1)).split()
    return (
        gl.convert_layout(b_00, L),
        gl.convert_layout(b_01, L),
        gl.convert_layout(b_10, L),
        gl.convert_layout(b_11, L),
    )


@gluon.jit
def _gradient_multiply(
    s_x, s_xT, s_u, s_s, x_full, x_empty, full, empty, p_w, p_d, NC, N, R, C, TILES, T,
    W: gl.constexpr, V: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: with P_ij = S_ij . u, x_i P_ij belongs to d_j, and x_j P_ij of j in a later block to d_i."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    LA: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    LB: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    LR: gl.constexpr = gl.SliceLayout(1, LB)
    f32: gl.constexpr = gl.float32
    s_rows = _rows(s_xT.index(W), 128, M)
    s_xm = as_matrix(s_x.index(W), gl.bfloat16, M, 128)
    # Once x and u are in registers, their buffers take the columns d_i of the blocks 2, and 0 and 1
    s_d01 = reinterpret(s_u.index(W), f32, [64, M], FLAT)
    s_d2 = reinterpret(s_x.index(W), f32, [32, M], FLAT)
    zeros = gl.zeros([M, 128], f32, L)
    i_stage = 0
    i_phase = 0
    x_phase = 0
    for i in range(gl.program_id(0), N * NC * R * TILES, gl.num_programs(0)):
        i_h, i_n, i_x, m = _place(i, NC, R, TILES)
        o_t = i_n * C + m + W * M + gl.arange(0, M, LR)
        m_t = o_t < T
        b_w = gl.load(p_w + i_x.to(gl.int64) * T + o_t, m_t, 0)  # [M]
        mbarrier.wait(x_full.index(W), x_phase)
        x_phase ^= 1
        b_x1 = s_xm.slice(32, 32, 1).load(LB)  # [M, 32]
        b_x2 = s_xm.slice(64, 32, 1).load(LB)
        b_x3 = s_xm.slice(96, 32, 1).load(LB)
        b_u = as_matrix(s_u.index(W), gl.bfloat16, M, V).load(LA)  # [M, V]
        mbarrier.wait(full.index(i_stage), i_phase)
        b_z = as_matrix(s_s.index(i_stage), gl.bfloat16, 128, 128)
        b_p = warpgroup_mma(s_xm, b_z, zeros, use_acc=False, is_async=True)
        b_p = warpgroup_mma_wait(0, [b_p])  # [M, 128]
        release(empty.index(i_stage))
        i_stage, i_phase = advance(i_stage, i_phase, RING)
        b_d0, b_d1, b_d2, b_d3 = _quarters(b_p * gl.convert_layout(b_w, gl.SliceLayout(1, L))[:, None], LB)
        for window in gl.static_range(3):
            for tile in range(0, 32 - 16 * (window // 2)):
                mbarrier.wait(full.index(i_stage), i_phase)
                b_s = as_matrix(s_s.index(i_stage), gl.bfloat16, ROWS, V).permute((1, 0))
                b_p = warpgroup_mma(b_u, b_s, zeros, use_acc=False, is_async=True)
                b_i = s_rows.index(32 * window + tile).load(LR).to(f32)[:, None]  # [M, 1]
                b_j = (
                    s_rows.index((96 if window == 1 else 80) + gl.minimum(tile, 15 + 16 * (window % 2)))
                    .load(LR)
                    .to(f32)[:, None]
                )
                b_p = warpgroup_mma_wait(0, [b_p])  # [M, 128]
                release(empty.index(i_stage))
                i_stage, i_phase = advance(i_stage, i_phase, RING)
                b_p0, b_p1, b_p2, b_p3 = _quarters(b_p, LB)
                if window == 0:
                    b_d0 += b_p0 * b_i
                    b_d1 += b_p1 * b_i
                    b_d2 += b_p2 * b_i
                    b_d3 += b_p3 * b_i
                    b_r = b_p1 * b_x1.to(f32) + b_p2 * b_x2.to(f32) + b_p3 * b_x3.to(f32)
                    s_d01.index(tile).store(gl.sum(b_r, 1))
                elif window == 1:
                    b_d1 += b_p0 * b_i
                    b_d2 += b_p1 * b_i
                    b_d3 += b_p2 * b_i
                    b_d3 += b_p3 * b_j
                    b_r = b_p1 * b_x2.to(f32) + b_p2 * b_x3.to(f32)
                    s_d01.index(32 + tile).store(gl.sum(b_r, 1))
                else:
                    b_d2 += b_p0 * b_i
                    b_d3 += b_p1 * b_i
                    b_d3 += b_p2 * b_j
                    b_d2 += b_p3 * b_j
                    s_d2.index(tile).store(gl.sum(b_p1 * b_x3.to(f32), 1))
                    s_d2.index(16 + tile).store(gl.sum(b_p2 * b_x3.to(f32), 1))
        barrier()
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        s_01 = reinterpret(s_d01, f32, [64, M], plain)
        b_d0 += s_01.slice(0, 32, 0).permute((1, 0)).load(LB)
        b_d1 += s_01.slice(32, 32, 0).permute((1, 0)).load(LB)
        b_d2 += reinterpret(s_d2, f32, [32, M], plain).permute((1, 0)).load(LB)
        p_t = p_d + (i_x.to(gl.int64) * T + o_t)[:, None] * 128 + gl.arange(0, 32, gl.SliceLayout(0, LB))[None, :]
        gl.store(p_t, 2 * b_d0, m_t[:, None])
        gl.store(p_t + 32, 2 * b_d1, m_t[:, None])
        gl.store(p_t + 64, 2 * b_d2, m_t[:, None])
        gl.store(p_t + 96, 2 * b_d3, m_t[:, None])
        fence_async_shared()
        release(x_empty.index(W))


@gluon.jit(do_not_specialize=["NC", "N", "R", "C", "TILES", "HX"])
def _gradient_kernel(d_x, d_xT, d_u, d_z, d_s, p_w, p_d, NC, N, R, C, TILES, HX, T, RING: gl.constexpr):
    V: gl.constexpr = d_s.block_type.shape[1]
    s_x = gl.allocate_shared_memory(d_x.dtype, [2] + d_x.block_type.shape, d_x.layout)
    s_xT = gl.allocate_shared_memory(d_xT.dtype, [2] + d_xT.block_type.shape, d_xT.layout)
    s_u = gl.allocate_shared_memory(d_u.dtype, [2] + d_u.block_type.shape, d_u.layout)
    s_s = gl.allocate_shared_memory(d_s.dtype, [RING, ROWS, 128], d_z.layout)
    x_full, x_empty = barriers(2, 1), barriers(2, 1)
    full, empty = barriers(RING, 1), barriers(RING, 2)
    gl.warp_specialize(
        [
            (_gradient_multiply, (
                s_x, s_xT, s_u, s_s, x_full, x_empty, full, empty, p_w, p_d, NC, N, R, C, TILES, T, 0, V, RING,
            )),
            (_gradient_multiply, (
                s_x, s_xT, s_u, s_s, x_full, x_empty, full, empty, p_w, p_d, NC, N, R, C, TILES, T, 1, V, RING,
            )),
            (_state_load, (
                d_x, d_xT, d_u, d_z, d_s, s_x, s_xT, s_u, s_s, x_full, x_empty, full, empty,
                NC, N, R, C, TILES, HX, True, True, RING,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# Launches


class HopperProducts(Products):
    """See `Products`; K and V 128, bfloat16."""

    expanded = False

    def sums(self, e: Heads) -> Tensor:
        HX, T, V = e.u.shape
        N, NC = HX // e.R, triton.cdiv(T, self.C)
        s = e.u.new_empty(N, NC, self.tiles * 128, V)
        _sum_kernel[num_programs(s, 40 * NC * N)](
            tiles_of(e.xT, 32, 64), tiles_of(e.xT, 4, 64, swizzled=False), tiles_of(e.u, 64, V),
            tiles_of(s.view(-1, V), 64, V), NC, N, e.R, self.C, 64, 4, num_warps=4,
        )  # fmt: skip
        return s

    def query(self, e: Heads, s: Tensor, z: Tensor, a: Tensor, y: Tensor, l_inv: Tensor) -> None:
        self._answer(e, s, self._matrices(z), a, y, l_inv)

    def value_gradient(self, e: Heads, s: Tensor, c: Tensor) -> Tensor:
        B, T, H, _ = e.x.shape
        dv = s.new_empty(B, H, T, self.V, dtype=torch.float32)
        self._answer(e, s, None, c, dv.transpose(1, 2), None)
        return dv.flatten(0, 1)

    def _answer(
        self, e: Heads, s: Tensor, d_z: TensorDescriptor | None, a: Tensor, y: Tensor, l_inv: Tensor | None
    ) -> None:
        d_s = self._matrices(s)
        _answer_kernel[num_programs(s, self._units(e))](
            *self._tokens(e), d_s if d_z is None else d_z, d_s, a, l_inv, y, *y.stride()[:3], *self._sizes(e),
            d_z is not None, 3, num_warps=4,
        )  # fmt: skip

    def gradient(self, e: Heads, s: Tensor, z: Tensor, w: Tensor) -> Tensor:
        HX, T, V = e.u.shape
        d = s.new_empty(HX, T, self.K, dtype=torch.float32)
        _gradient_kernel[num_programs(s, self._units(e))](
            *self._tokens(e), tiles_of(e.u, 64, V), self._matrices(z), self._matrices(s), w, d,
            *self._sizes(e), 2, num_warps=4,
        )  # fmt: skip
        return d

    def _tokens(self, e: Heads) -> tuple[TensorDescriptor, TensorDescriptor]:
        return tiles_of(e.x.transpose(1, 2), 64, 128), tiles_of(e.xT, 128, 64, swizzled=False)

    def _matrices(self, s: Tensor) -> TensorDescriptor:
        """States as tiles of 128 rows."""
        return tiles_of(s.to(torch.bfloat16).view(-1, s.shape[-1]), 128, s.shape[-1])

    def _sizes(self, e: Heads) -> tuple[int, ...]:
        """NC, N, R, C, TILES, HX, T."""
        B, T, HX, _ = e.x.shape
        return triton.cdiv(T, self.C), B * e.H, e.R, self.C, triton.cdiv(min(self.C, T), 128), HX, T

    def _units(self, e: Heads) -> int:
        NC, N, R, _, tiles, _, _ = self._sizes(e)
        return N * NC * R * tiles
