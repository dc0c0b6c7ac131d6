"""Power retention's state form in Triton, forward and backward, power 2: attention in chunks, states across.

    num_t = a_t phi(q_t) . S_n + (its chunk's part)      S_{n+1} = g_n S_n + sum_{t in n} c_t phi(k_t) v_t^T

n is t's chunk, S_n the state before it, a_t the gates from there to t, c_t from t to the chunk's end, g_n over all
of it. Backward walks the other way: with dn_t = a_t dy_t / l_t,

    dS_n = g_n dS_{n+1} + sum_{t in n} phi(q_t) dn_t^T      dv_t += c_t phi(k_t) . dS_{n+1}
    dq_ti += 2 sum_j q_tj (S_n,ij . dn_t)                   dk_ti += 2 c_t sum_j k_tj (dS_{n+1},ij . v_t)

`state_products.py` says how a state is stored and multiplied.

B batch, T tokens, H key-value heads, HQ = H * R query heads, K and V head dims, C tokens a chunk, NC chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from brumby.kernels import attention_form
from brumby.kernels.attention_form import FromStates, RowSums, row_sums
from brumby.kernels.gates import cumulate, gate_gradient, spans
from brumby.kernels.power_retention import RetentionState
from brumby.kernels.state_products import Heads, Products, normalisers, num_tiles, prepare, products, scan

# ----------------------------------------------------------------------------------------------------
# Between a `RetentionState` and tiles


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
# Over chunks


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


class States(NamedTuple):
    s: Tensor  # [B * H, NC, rows, V]
    z: Tensor  # [B * H, NC, K, K] float32
    last: tuple[Tensor, Tensor] | None  # both after the last chunk, float32, without NC


def states(
    p: Products, e: Heads, w: Tensor, g: Tensor, first: RetentionState | None, keep: bool, reverse: bool = False
) -> States:
    """s before each chunk (after it, if reverse), of phi(x) u^T, and z of w x x^T; w [B, HX, T], g [B, H, NC]."""
    s, z = p.sums(e), normalisers(p, e, w)
    s_0, z_0 = (None, None) if first is None else (x.flatten(0, 1) for x in to_tiles(first, p.K))
    s_last, z_last = scan(s, g, s_0, reverse, keep), scan(z, g, z_0, reverse, keep)
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
    cu_seqlens: Tensor | None, C: int, initial: RetentionState | None, y: Tensor, l_inv: Tensor,
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
    sums = row_sums(dy, q, k, v, y, l_inv, G, documents, 2, exact=initial is None)
    qdq, kdk = torch.empty_like(l_inv), l_inv.new_empty(B, H, T)
    d_firsts = []
    for b, h in _groups(p, B, H, T):
        hq = slice(h.start * R, h.stop * R)
        n = h.stop - h.start
        c_h, g_h = c[b, h].contiguous(), g[b, h].contiguous()
        l_q, sums_q = l_inv[b, hq], RowSums(*(x[b, hq] for x in sums))
        first = None if initial is None else RetentionState(*(x[b, h] for x in initial))
        d_last = None if d_final is None else RetentionState(*(x[b, h] for x in d_final))
        a_q = a[b, h].repeat_interleave(R, 1) * l_q
        w_q = -a_q * sums_q.delta
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
            dy[b, :, hq], q[b, :, hq], k[b, :, h], v[b, :, h], dq[b, :, hq], dk[b, :, h], dv[b, :, h],
            l_q, sums_q, None if G is None else G[b, h], inside, 2, FromStates(dq_state, dk_state, dv_state),
        )  # fmt: skip
        del dq_state, dk_state, dv_state
    d_initial = _gather(d_firsts, B, H)
    dlog_g = None
    if log_g is not None:
        at_start = None
        if d_final is not None and initial is not None and d_initial is not None:
            at_start = (d_initial.s * initial.s).sum((2, 3)) + (d_initial.z * initial.z).sum(2)
        dlog_g = gate_gradient(qdq, kdk, cu_seqlens, 2, forward=d_final is not None, first=at_start)
    return dq, dk, dv, dlog_g, d_initial
