"""Power retention in plain PyTorch: the definition that every faster form is held against.

    w_ij = exp(G_i - G_j) (scale q_i . k_j)^P  for j <= i, else 0        G = cumsum(log_g)
    y_i  = sum_j w_ij v_j / (sum_j w_ij + sink + EPS)

from "Scaling Context Requires Rethinking Attention" (arXiv 2507.04239). With phi(a) . phi(b) = (a . b)^P the
same sums are a linear recurrence over a state of fixed size:

    S_t = exp(log_g_t) S_{t-1} + phi(k_t) v_t^T      z_t = exp(log_g_t) z_{t-1} + phi(k_t)
    y_t = S_t^T phi(scale q_t) / (z_t . phi(scale q_t) + sink + EPS)

Three forms of one function: "recurrent" (token by token), "attention" (quadratic in T) and "chunk" (attention
inside a chunk, states across). The normaliser is the retention of a value that is always one: v carries a last
column of ones, S carries z as its last column, and one product yields numerator and denominator. The sink is a
weight whose value is zero: with it a query that no key suits answers little, as a softmax head does by looking at
the first token (arXiv 2309.17453).

This file imports nothing but PyTorch, so that it can be shipped beside an exported model.

B batch, T tokens, H key-value heads, HQ = H * R query heads, K and V head dims, C chunk, N states (B, or the
number of documents), P power, D = C(K + P - 1, P) size of the expanded key, G cumulated log gates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, reduce
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Only there to make 0 / 0 a zero: it is far below the square of float32's rounding error in any q . k of use.
EPS = 1e-20
BLOCK = 128  # rows of query tokens in a tile of the attention form
TILE_ELEMENTS = 2**20  # what a tile may hold on a CPU: it should stay in the cache between its passes


class RetentionState(NamedTuple):
    """All that the past contributes, float32 (float64 for float64 inputs).

    `s` [N, H, D, V] is the gated sum of phi(k) v^T, `z` [N, H, D] of phi(k). D counts the monomials of degree
    P in the order of `itertools.combinations_with_replacement(range(K), P)`, each weighted with the square
    root of its multinomial coefficient (P = 2: x_i^2, sqrt(2) x_i x_j), so that phi(a) . phi(b) = (a . b)^P.
    The state holds unscaled keys: `scale` is applied to q.
    """

    s: Tensor
    z: Tensor


class RetentionBuffer:
    """The tokens that decoding has taken in since its state, C at most; B rows, all with as many tokens.

    A state is far larger than a token's key and value. While they are kept beside it the state is only read;
    once C of them have come it is rewritten for all.

    `k` [B, C, H, K], unscaled, and `v` [B, C, H, V] hold `num_tokens` tokens, `G` [B, C, H] (float64) their log
    gates, summed from the first one on.
    """

    def __init__(self, k: Tensor, v: Tensor, G: Tensor, num_tokens: int = 0) -> None:
        self.k, self.v, self.G, self.num_tokens = k, v, G, num_tokens

    @classmethod
    def empty(cls, k: Tensor, v: Tensor, chunk_size: int) -> RetentionBuffer:
        """A buffer of C = chunk_size places for tokens such as k [B, H, K] and v [B, H, V]."""
        k, v = _autocast(k, v)
        B, H, _ = k.shape
        return cls(
            k.new_empty(B, chunk_size, *k.shape[1:]),
            v.new_empty(B, chunk_size, *v.shape[1:]),
            k.new_empty(B, chunk_size, H, dtype=torch.float64),
        )


def power_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None = None,
    *,
    power: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    initial_state: RetentionState | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    sink: float = 0.0,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, RetentionState]:
    """Causal power retention (module docstring: formula and source), differentiable in every tensor.

    Token i's gate decays what came before token i, never its own key. Sums are float32 at least, whatever
    the inputs. A query all of whose keys are zero (padding) answers exactly zero. Under autocast q, k and v
    are cast to its dtype, as for `scaled_dot_product_attention`.

    Args:
        q: [B, T, HQ, K], any float dtype but float16. Query heads h * R to h * R + R - 1 read k's head h.
        k: [B, T, H, K], dtype of q.
        v: [B, T, H, V], dtype of q.
        log_g: [B, T, H] float32 (or float64), <= 0 and finite; None for no gating.
        power: even, at least 2.
        scale: of q . k; K ** -0.5 when None.
        chunk_size: tokens between states. None is the attention form over all of T.
        initial_state: what came before the first token, N rows.
        return_final_state: also return the state after the last token, N rows.
        cu_seqlens: [N + 1] int32 or int64: where the documents packed into one row (B = 1) begin, then T.
            Documents do not see each other; an empty one passes its state through.
        sink: >= 0, what each query's sum of weights has beside them.
        implementation: "recurrent", "attention" or "chunk". None takes "attention" up to chunk_size tokens.
            On GPUs "attention" and "chunk" are kernels, and "reference" is the plain form of both.

    Returns:
        y [B, T, HQ, V] in the dtype of v; with `return_final_state` the pair (y, RetentionState).

    Raises:
        ValueError: shapes, dtypes or options that do not fit; the message says what was found and expected.
    """
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise ValueError(f"chunk_size is {chunk_size!r}; expected a positive int, or None for the attention form")
    if implementation == "chunk" and chunk_size is None:
        raise ValueError('implementation is "chunk" and chunk_size None; pass chunk_size, 1024 for example')
    device = q.device.type
    q, k, v = _autocast(q, k, v)
    _check_inputs(q, k, v, log_g, power, initial_state, cu_seqlens)
    _check_sink(sink)
    T = q.shape[1]
    if implementation is None:
        implementation = "attention" if chunk_size is None or chunk_size >= T else "chunk"
    form = FORMS.get((device, implementation))
    if form is None:
        known = ", ".join(f"{name!r} for {device}" for device, name in FORMS)
        raise ValueError(f"there is no implementation {implementation!r} for {device} tensors; there are {known}")
    with torch.autocast(device, enabled=False):
        y, state = form(
            q,
            k,
            v,
            log_g,
            power=power,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            chunk_size=T if implementation == "attention" or chunk_size is None else chunk_size,
            initial_state=initial_state,
            return_final_state=return_final_state,
            cu_seqlens=cu_seqlens,
            eps=EPS + sink,
        )
    return y if state is None else (y, state)


def power_retention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: RetentionState | None,
    *,
    power: int = 2,
    scale: float | None = None,
    sink: float = 0.0,
) -> tuple[Tensor, RetentionState]:
    """One token of `power_retention`, from one state to the next: decoding.

    Args:
        q: [B, HQ, K]; k: [B, H, K]; v: [B, H, V]; log_g: [B, H] float32 or None.
        state: of B rows; None is the empty past.

    Returns:
        y [B, HQ, V] in the dtype of v, and the new state (a new tensor: `state` is left as it is).

    Raises:
        ValueError: as `power_retention`.
    """
    _check_token(q, k, v, log_g, power, state)
    _check_sink(sink)
    if state is None:
        state = _empty(q.shape[0], k, v, power)
    with torch.autocast(q.device.type, enabled=False):
        return _step(q, k, v, log_g, state, power, q.shape[-1] ** -0.5 if scale is None else scale, EPS + sink)


def power_retention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: RetentionState,
    buffer: RetentionBuffer,
    *,
    power: int = 2,
    scale: float | None = None,
    sink: float = 0.0,
) -> Tensor:
    """One token of `power_retention` from a state and the tokens buffered since, both updated in place.

        y = (exp(G_t) S^T phi(scale q) + sum_j exp(G_t - G_j) (scale q . k_j)^P v_j) / l

    where l is the same of ones, plus sink + EPS. The token is appended to the buffer; a full buffer is folded into
    the state. Not differentiable. Under autocast q, k and v are cast as in `power_retention`.

    Args:
        q: [B, HQ, K]; k: [B, H, K]; v: [B, H, V], all of the buffer's dtype; log_g: [B, H] float32 or None.
        state: of B rows, as of the first buffered token.
        buffer: of B rows, with a free place.

    Returns:
        y [B, HQ, V] in the dtype of v.

    Raises:
        ValueError: as `power_retention`; a buffer that does not fit; tensors that require a gradient.
    """
    q, k, v = _autocast(q, k, v)
    _check_token(q, k, v, log_g, power, state)
    _check_sink(sink)
    _check_buffer(k, v, buffer)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, log_g, *state)):
        raise ValueError("decoding updates its state in place and has no gradient; wrap it in torch.no_grad()")
    decoder = _decoder(q.device.type)
    with torch.autocast(q.device.type, enabled=False):
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        y = decoder.step(q, k, v, log_g, state, buffer, power, scale, EPS + sink)
    buffer.num_tokens += 1
    if buffer.num_tokens == buffer.k.shape[1]:
        power_retention_fold(state, buffer, power=power)
    return y


def power_retention_fold(state: RetentionState, buffer: RetentionBuffer, *, power: int = 2) -> None:
    """Move the buffered tokens into the state, in place: it is then as of the last token, the buffer empty."""
    if buffer.num_tokens:
        with torch.autocast(buffer.k.device.type, enabled=False):
            _decoder(buffer.k.device.type).fold(state, buffer, power)
        buffer.num_tokens = 0


# ----------------------------------------------------------------------------------------------------
# The expanded key


@lru_cache(maxsize=16)
def _monomials(K: int, power: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors [P, D] of each monomial, and the square roots [D] of the multinomial coefficients."""
    with torch.inference_mode(False):  # the cache outlives an inference mode
        factors = torch.combinations(torch.arange(K), power, with_replacement=True)  # [D, P]
        # k equal factors count 1, 2, ..., k: their product is k!
        same = factors[:, :, None] == factors[:, None, :]  # [D, P, P]
        repeats = same.tril().sum(-1).prod(-1)  # [D]
        weights = (math.factorial(power) / repeats.double()).sqrt()
        return factors.T.contiguous().to(device), weights.to(device, dtype)


def _expand(x: Tensor, power: int) -> Tensor:
    """phi: [..., K] -> [..., D] with phi(a) . phi(b) = (a . b)^P. Order and weights: `RetentionState`."""
    factors, weights = _monomials(x.shape[-1], power, x.device, x.dtype)
    phi = x.index_select(-1, factors[0])
    for index in factors[1:]:
        phi = phi * x.index_select(-1, index)
    return phi * weights


def _empty(N: int, k: Tensor, v: Tensor, power: int) -> RetentionState:
    """The state of N pasts without a token; k [..., H, K], v [..., H, V]."""
    D = math.comb(k.shape[-1] + power - 1, power)
    s = v.new_zeros(N, v.shape[-2], D, v.shape[-1], dtype=torch.promote_types(v.dtype, torch.float32))
    return RetentionState(s, s.new_zeros(s.shape[:3]))


# ----------------------------------------------------------------------------------------------------
# The recurrent form


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: RetentionState,
    power: int,
    scale: float,
    eps: float,
) -> tuple[Tensor, RetentionState]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    y_dtype = v.dtype
    q = (q.to(dtype) * scale).unflatten(1, (k.shape[1], -1))  # [B, H, R, K]
    k, v = k.to(dtype), v.to(dtype)
    s, z = (x.to(dtype) for x in state)  # [B, H, D, V] and [B, H, D]
    if log_g is not None:
        g = log_g.to(dtype).exp()[..., None]  # [B, H, 1]
        s, z = s * g[..., None], z * g
    # The token's own weight comes from q . k: through phi it would lose digits to cancellation
    w = (q @ k[..., None]) ** power  # [B, H, R, 1]
    phi_q, phi_k = _expand(q, power), _expand(k, power)  # [B, H, R, D] and [B, H, D]
    y = (phi_q @ s + w * v[..., None, :]) / (phi_q @ z[..., None] + w + eps)  # [B, H, R, V]
    state = RetentionState(torch.addcmul(s, phi_k[..., None], v[..., None, :]), z + phi_k)
    return y.flatten(1, 2).to(y_dtype), state


def _recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    *,
    power: int,
    scale: float,
    chunk_size: int | None,
    initial_state: RetentionState | None,
    return_final_state: bool,
    cu_seqlens: Tensor | None,
    eps: float,
) -> tuple[Tensor, RetentionState | None]:
    """The definition, token by token. Slow; for reading and for checking the others."""
    ys, states = [], []
    for rows, start, end in _documents(q.shape[0], q.shape[1], cu_seqlens):
        if initial_state is None:
            state = _empty(rows.stop - rows.start, k, v, power)
        else:
            state = RetentionState(*(x[rows] for x in initial_state))
        for t in range(start, end):
            g = None if log_g is None else log_g[:, t]
            y, state = _step(q[:, t], k[:, t], v[:, t], g, state, power, scale, eps)
            ys.append(y)
        states.append(state)
    y = torch.stack(ys, 1) if ys else v.new_empty(*q.shape[:3], v.shape[-1])
    final = RetentionState(*map(torch.cat, zip(*states, strict=True))) if return_final_state else None
    return y, final


# ----------------------------------------------------------------------------------------------------
# Decoding with a buffer


def _decode(
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
    t = buffer.num_tokens
    buffer.k[:, t], buffer.v[:, t] = k, v
    buffer.G[:, t] = (buffer.G[:, t - 1] if t else 0) + (0 if log_g is None else log_g)
    dtype = state.s.dtype
    keys, values = (x[:, : t + 1].transpose(1, 2).to(dtype) for x in (buffer.k, buffer.v))  # [B, H, t + 1, .]
    G = buffer.G[:, : t + 1].transpose(1, 2)  # [B, H, t + 1]
    q = (q.to(dtype) * scale).unflatten(1, (k.shape[1], -1))  # [B, H, R, K]
    phi = _expand(q, power) * G[..., -1, None, None].exp().to(dtype)  # [B, H, R, D]
    w = (q @ keys.mT) ** power * (G[..., -1:] - G).exp().to(dtype)[..., None, :]  # [B, H, R, t + 1]
    y = (phi @ state.s + w @ values) / (phi @ state.z[..., None] + w.sum(-1, keepdim=True) + eps)  # [B, H, R, V]
    return y.flatten(1, 2).to(v.dtype)


def _fold(state: RetentionState, buffer: RetentionBuffer, power: int) -> None:
    dtype = state.s.dtype
    k, v = (x[:, : buffer.num_tokens].transpose(1, 2).to(dtype) for x in (buffer.k, buffer.v))  # [B, H, t, .]
    G = buffer.G[:, : buffer.num_tokens].transpose(1, 2)  # [B, H, t]
    k = k * ((G[..., -1:] - G) / power).exp().to(dtype)[..., None]
    v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    new = _sum_state(k.flatten(0, 1), v.flatten(0, 1), power).unflatten(0, k.shape[:2])  # [B, H, D, V + 1]
    g = G[..., -1, None].exp().to(dtype)  # [B, H, 1]
    state.s.mul_(g[..., None]).add_(new[..., :-1])
    state.z.mul_(g).add_(new[..., -1])


# ----------------------------------------------------------------------------------------------------
# The attention form and the chunk form: attention inside segments, a scan of states over them


class _Tile(NamedTuple):
    """Rows of queries against columns of keys, with the gates between as factors of q, k or the scores."""

    heads: slice
    rows: slice
    cols: slice
    q_decay: Tensor  # [n, rows, 1, 1]
    k_decay: Tensor  # [n, cols, 1]
    s_decay: Tensor | None  # [n, rows, 1, cols], only on the diagonal: zero where a query may not look

    def scores(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decayed q [n, rows * R, K] and k [n, cols, K], and s [n, rows * R, cols]: s^P are the weights."""
        q_t = (q[self.heads, self.rows] * self.q_decay).flatten(1, 2)
        k_t = k[self.heads, self.cols] * self.k_decay
        return q_t, k_t, self.mask(q_t @ k_t.mT)

    def mask(self, s: Tensor) -> Tensor:
        """Multiply s [n, rows * R, cols] in place with what the factors of q and k cannot carry."""
        if self.s_decay is not None:
            s.unflatten(1, (self.s_decay.shape[1], -1)).mul_(self.s_decay)
        return s


def _tiles(q: Tensor, G: Tensor, bounds: list[int], power: int) -> Iterator[_Tile]:
    """Cover every query with the keys up to it in its segment; segment n is from bounds[n] to bounds[n + 1].

    exp(G_i - G_j) overflows where j > i, so only tiles on the diagonal take it element by element. Left of
    them it is exp(G_i - G_a) exp(G_a - G_j), a the tile's first query: two factors <= 1, folded into q and k,
    as P-th roots since scores are raised to P afterwards.
    """
    N, T, R, _ = q.shape
    first = [start for start, end in pairwise(bounds) for _ in range(start, end)]  # of each token's segment
    last = [end for start, end in pairwise(bounds) for _ in range(start, end)]
    segment = torch.tensor(first, device=q.device)  # [T]

    def decay(difference: Tensor) -> Tensor:
        return (difference.to(q.dtype) / power).exp()

    block = BLOCK if q.device.type == "cpu" else 4 * BLOCK  # a GPU wants fewer, larger launches
    for a in range(0, T, block):
        b = min(a + block, T)
        rows, cols = slice(a, min(b, last[a])), slice(first[a], a)
        hidden = (segment[a:b, None] != segment[a:b]).logical_or_(segment.new_ones(b - a, b - a).triu_(1).bool())
        # On a CPU few enough heads at once for a tile to stay in the cache between its passes
        step = max(1, TILE_ELEMENTS // ((b - a) * R * (b - first[a]))) if q.device.type == "cpu" else N
        for n in range(0, N, step):
            heads = slice(n, n + step)
            g = G[heads]
            one = q.new_ones(1, 1, 1, 1)
            s_decay = decay((g[:, a:b, None] - g[:, None, a:b]).masked_fill_(hidden, -torch.inf))[:, :, None]
            yield _Tile(heads, slice(a, b), slice(a, b), one, one[0], s_decay)
            if first[a] < a:
                q_decay = decay(g[:, rows] - g[:, a : a + 1])[:, :, None, None]
                k_decay = decay(g[:, a : a + 1] - g[:, cols])[:, :, None]
                yield _Tile(heads, rows, cols, q_decay, k_decay, None)


class _Attention(torch.autograd.Function):
    """o_i = sum_j w_ij v_j inside each segment, not normalised. No [T, T] tensor is made or saved.

    With ds_ij = P s_ij^(P-1) (do_i . v_j) the gradients of q and k are products, and that of G is free:
    exp(G / P) scales q and exp(-G / P) scales k, so dG_t = (q_t . dq_t - k_t . dk_t) / P.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, G: Tensor, bounds: list[int], power: int) -> Tensor:
        """q [N, T, R, K], k [N, T, K], v [N, T, V], G [N, T] float64 -> o [N, T, R, V]; here N = B * H."""
        ctx.save_for_backward(q, k, v, G)
        ctx.bounds, ctx.power = bounds, power
        o = v.new_zeros(*q.shape[:3], v.shape[-1])
        for tile in _tiles(q, G, bounds, power):
            s = tile.scores(q, k)[-1]
            w = s.square_() if power == 2 else s.pow_(power)  # [n, rows * R, cols]
            o_t = o[tile.heads, tile.rows]  # [n, rows, R, V]
            o_t += (w @ v[tile.heads, tile.cols]).view_as(o_t)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, G = ctx.saved_tensors
        power = ctx.power
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for tile in _tiles(q, G, ctx.bounds, power):
            heads, rows, cols, q_decay, k_decay, _ = tile
            q_t, k_t, s = tile.scores(q, k)
            do_t = do[heads, rows].flatten(1, 2)  # [n, rows * R, V]
            dw = do_t @ v[heads, cols].mT  # [n, rows * R, cols]
            ds = tile.mask(dw.mul_(s if power == 2 else s.pow(power - 1)))  # without its factor P
            w = s.square_() if power == 2 else s.pow_(power)
            dv[heads, cols] += w.mT @ do_t
            dq_t = dq[heads, rows]  # [n, rows, R, K]
            dq_t += (ds @ k_t).view_as(dq_t) * (power * q_decay)
            dk[heads, cols] += (ds.mT @ q_t) * (power * k_decay)
        dG = ((q * dq).sum((2, 3)) - (k * dk).sum(2)).to(G.dtype) / power if ctx.needs_input_grad[3] else None
        return dq, dk, dv, dG, None, None


def _query_state(q: Tensor, s: Tensor, power: int) -> Tensor:
    """q [N, C, R, K], s [N, D, V] -> phi(q) s, [N, C, R, V]."""

    def answer(q: Tensor, s: Tensor) -> Tensor:
        return (_expand(q, power).flatten(1, 2) @ s).unflatten(1, q.shape[1:3])

    return torch.cat([_remade(answer, block, s) for block in q.split(BLOCK, 1)], 1)


def _sum_state(k: Tensor, v: Tensor, power: int) -> Tensor:
    """k [N, C, K], v [N, C, V] -> sum of phi(k) v^T over C, [N, D, V]."""

    def update(k: Tensor, v: Tensor) -> Tensor:
        return _expand(k, power).mT @ v

    blocks = zip(k.split(BLOCK, 1), v.split(BLOCK, 1), strict=True)
    return reduce(torch.add, (_remade(update, *block) for block in blocks))


def _remade(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """function(*args), made again in backward: expanded vectors are too large to save."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _scan(
    pieces: Iterator[tuple[Tensor, ...]],
    chunks: list[range],
    pasts: list[Tensor | None],
    power: int,
    keep_last: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """Walk each document's chunks with its state, [B * H, D, V + 1]; None is the empty past.

    `pieces` are o, q, k, v and G of one chunk after the other. Returns o with what the states answered, and
    each document's last state, to which its last chunk only belongs if `keep_last`.
    """
    outputs, states = [], []
    before: Tensor | float = 0.0  # G just before the chunk
    for s, chunk in zip(pasts, chunks, strict=True):
        for start in chunk:
            o, q, k, v, G = next(pieces)
            since, until = (
                G - before,
                G[:, -1:] - G,
            )  # [B * H, C], the gates to a token and from it to the end
            before = G[:, -1:]
            if s is not None:
                q_decay = (since.to(q.dtype) / power).exp()[:, :, None, None]
                o = o + _query_state(q * q_decay, s, power)
            outputs.append(o)
            if keep_last or start != chunk[-1]:
                new = _sum_state(k * (until.to(k.dtype) / power).exp()[:, :, None], v, power)
                s = new if s is None else torch.addcmul(new, s, since[:, -1:, None].to(s.dtype).exp())
        states.append(s)
    return torch.cat(outputs, 1), states


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    *,
    power: int,
    scale: float,
    chunk_size: int,
    initial_state: RetentionState | None,
    return_final_state: bool,
    cu_seqlens: Tensor | None,
    eps: float,
) -> tuple[Tensor, RetentionState | None]:
    """Attention inside each chunk of each document; what came before a chunk answers through its state."""
    B, T, H, _ = k.shape
    y_dtype, dtype = v.dtype, torch.promote_types(v.dtype, torch.float32)
    documents = _documents(B, T, cu_seqlens)
    chunks = [range(start, end, chunk_size) for _, start, end in documents]
    bounds = [start for chunk in chunks for start in chunk] + [T]

    q = (q.to(dtype) * scale).unflatten(2, (H, -1)).transpose(1, 2).flatten(0, 1)  # [B * H, T, R, K]
    k = k.to(dtype).transpose(1, 2).flatten(0, 1)  # [B * H, T, K]
    v = torch.cat((v.to(dtype), v.new_ones(B, T, H, 1, dtype=dtype)), -1)
    v = v.transpose(1, 2).flatten(0, 1)  # [B * H, T, V + 1]
    # The gates are summed in float64: the difference of two long sums has to be good to float32's precision
    G = k.new_zeros(B, T, H) if log_g is None else log_g
    G = G.transpose(1, 2).flatten(0, 1).double().cumsum(1)  # [B * H, T]

    o = _Attention.apply(q, k, v, G, bounds, power)  # [B * H, T, R, V + 1]
    final = None
    if initial_state is not None or return_final_state or any(len(chunk) > 1 for chunk in chunks):
        pasts: list[Tensor | None] = [None] * len(documents)
        if initial_state is not None:
            past = torch.cat((initial_state.s, initial_state.z[..., None]), -1).to(dtype)  # [N, H, D, V + 1]
            pasts = [past[rows].flatten(0, 1) for rows, _, _ in documents]
        lengths = [end - start for start, end in pairwise(bounds)]
        pieces = zip(*(x.split(lengths, 1) for x in (o, q, k, v, G)), strict=True)
        o, states = _scan(pieces, chunks, pasts, power, return_final_state)
        if return_final_state:
            empty = v.new_zeros(B * H, math.comb(k.shape[-1] + power - 1, power), v.shape[-1])
            s = torch.cat([empty if s is None else s for s in states]).unflatten(0, (-1, H))  # [N, H, D, V + 1]
            final = RetentionState(s[..., :-1].contiguous(), s[..., -1].contiguous())
    y = o[..., :-1] / (o[..., -1:] + eps)  # [B * H, T, R, V]
    return y.to(y_dtype).unflatten(0, (B, H)).transpose(1, 2).flatten(2, 3), final  # [B, T, HQ, V]


def _documents(B: int, T: int, cu_seqlens: Tensor | None) -> list[tuple[slice, int, int]]:
    """What shares a history: rows of the state, first token, end. All B rows at once, or packed documents."""
    if cu_seqlens is None:
        return [(slice(0, B), 0, T)]
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != T or any(a > b for a, b in pairwise(offsets)):
        raise ValueError(f"cu_seqlens is {offsets}; expected it to rise from 0 to T = {T}")
    return [(slice(n, n + 1), start, end) for n, (start, end) in enumerate(pairwise(offsets))]


# ----------------------------------------------------------------------------------------------------
# Dispatch and checks

Form = Callable[..., tuple[Tensor, RetentionState | None]]

# The form that runs for tensors of a device. What is not here is an error: nothing falls back in silence.
# The package puts its kernels in the place of "attention" and "chunk" on GPUs; "reference" stays what is here.
FORMS: dict[tuple[str, str], Form] = {
    (device, name): _recurrent if name == "recurrent" else _chunked
    for device in ("cpu", "cuda")
    for name in ("attention", "chunk", "recurrent", "reference")
}


class Decoder(NamedTuple):
    """The two halves of decoding: `_decode` answers and appends, `_fold` empties the buffer."""

    step: Callable[..., Tensor]
    fold: Callable[..., None]


DECODERS: dict[str, Decoder] = {device: Decoder(_decode, _fold) for device in ("cpu", "cuda")}


def _decoder(device: str) -> Decoder:
    if device not in DECODERS:
        raise ValueError(f"there is no decoding for {device} tensors; there is for {', '.join(DECODERS)}")
    return DECODERS[device]


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    device = tensors[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
    return tensors


def _check_sink(sink: float) -> None:
    if not 0 <= sink < math.inf:
        raise ValueError(f"sink is {sink!r}; expected a weight: a finite number, 0 or more")


def _check_token(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, power: int, state: RetentionState | None
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {list(x.shape)}; one token is [B, heads, head_dim], without T")
    gates = None if log_g is None else log_g.unsqueeze(1)
    _check_inputs(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), gates, power, state, None)


def _check_buffer(k: Tensor, v: Tensor, buffer: RetentionBuffer) -> None:
    C = buffer.k.shape[1]
    for name, x, place in (("k", k, buffer.k), ("v", v, buffer.v)):
        if place.shape != (x.shape[0], C, *x.shape[1:]) or place.dtype != x.dtype:
            raise ValueError(
                f"the buffer's {name} is {place.dtype} of shape {list(place.shape)}; expected {x.dtype} of "
                f"{[x.shape[0], C, *x.shape[1:]]} for tokens of shape {list(x.shape)}"
            )
    if buffer.num_tokens >= C:
        raise ValueError(f"the buffer's {C} places are all taken; fold it into the state first")


def _check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    power: int,
    state: RetentionState | None,
    cu_seqlens: Tensor | None,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {list(x.shape)}; expected four dimensions [B, T, heads, head_dim]")
        if x.dtype == torch.float16:
            raise ValueError(
                f"{name} is float16, which overflows once |scale q . k| > 256; use bfloat16 or float32"
            )
        if not x.is_floating_point() or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"q, k and v are {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, {k.device}, {v.device}; "
                "expected one float dtype on one device"
            )
    B, T, HQ, K = q.shape
    if T == 0:
        raise ValueError(f"q has shape {list(q.shape)}: there is no token in it; expected T >= 1")
    H, V = v.shape[2:]
    if k.shape != (B, T, H, K):
        raise ValueError(f"k has shape {list(k.shape)}; q and v make it [B, T, H, K] = {[B, T, H, K]}")
    if v.shape[:2] != (B, T):
        raise ValueError(f"v has shape {list(v.shape)}; expected [B, T, H, V] with B, T = {B}, {T} as in q")
    if H == 0 or HQ % H:
        raise ValueError(f"{HQ} query heads do not share {H} key-value heads evenly; HQ must be a multiple of H")
    if type(power) is not int or power < 2 or power % 2:
        raise ValueError(f"power is {power!r}; expected an even int >= 2: odd powers would give negative weights")
    if log_g is not None:
        if log_g.shape != (B, T, H):
            raise ValueError(f"log_g has shape {list(log_g.shape)}; expected [B, T, H] = {[B, T, H]}")
        if log_g.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"log_g is {log_g.dtype}; its sums need float32: pass log_g.float()")
    if cu_seqlens is not None:
        if B != 1:
            raise ValueError(f"cu_seqlens packs documents into one row, but B is {B}; reshape to B = 1 or drop it")
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 2:
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}; "
                "expected [N + 1] int32 or int64, N >= 1"
            )
    if state is not None:
        N = B if cu_seqlens is None else len(cu_seqlens) - 1
        D = math.comb(K + power - 1, power)
        if state[0].shape != (N, H, D, V) or state[1].shape != (N, H, D):
            raise ValueError(
                f"the state has shapes {list(state[0].shape)} and {list(state[1].shape)}; "
                f"expected s [N, H, D, V] = {[N, H, D, V]} and z [N, H, D] = {[N, H, D]}"
            )
