"""Power retention on a GPU: the Triton forms as operators of PyTorch, with autograd, compilation and checks.

Each form is a custom operator with a fake implementation, so that `torch.compile(fullgraph=True)` sees through it,
and so is its backward. What they save is their inputs, y and 1 / l: states are made again in backward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import triton
from torch import Tensor

from brumby.kernels import attention_form, state_form
from brumby.kernels.ahead import compile_ahead
from brumby.kernels.gates import cumulate, gate_gradient, spans
from brumby.kernels.power_retention import FORMS, RetentionState, _documents, _empty

CHUNK = 128  # chunks are multiples of it: what a chunk is does not change the result


def _kernels(body: Callable[..., Any]) -> Callable[..., Any]:
    """Of an operator: run on its tensors' device, with all kernels compiled before the first starts."""

    @wraps(body)
    def operator(*args: Any) -> Any:
        if not args[0].is_cuda:  # Triton's interpreter
            return body(*args)
        with torch.cuda.device_of(args[0]):
            kinds = ((x.dtype, x.shape[2:] if x.dim() == 4 else 0) if isinstance(x, Tensor) else x for x in args)
            compile_ahead((body.__name__, args[0].device, *kinds), lambda: body(*args))
            return body(*args)

    return operator


# ----------------------------------------------------------------------------------------------------
# The attention form


@torch.library.custom_op("brumby::attention_form", mutates_args=())
@_kernels
def _attention(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, cu_seqlens: Tensor | None, power: int, eps: float
) -> tuple[Tensor, Tensor]:
    """y [B, T, HQ, V] and 1 / l [B, HQ, T] float32."""
    G = None if log_g is None else cumulate(log_g)
    return attention_form.forward(q, k, v, G, spans(q.shape[1], cu_seqlens, None, q.device), power, eps)


@_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_g: Any, cu_seqlens: Any, power: int, eps: float
) -> tuple[Tensor, Tensor]:
    B, T, HQ, _ = q.shape
    return v.new_empty(B, T, HQ, v.shape[-1]), q.new_empty(B, HQ, T, dtype=torch.float32)


@torch.library.custom_op("brumby::attention_form_backward", mutates_args=())
@_kernels
def _attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, cu_seqlens: Tensor | None, power: int,
    y: Tensor, l_inv: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv and dlog_g (empty without gates)."""
    G = None if log_g is None else cumulate(log_g)
    span = spans(q.shape[1], cu_seqlens, None, q.device)
    sums = attention_form.row_sums(dy, q, k, v, y, l_inv, G, span, power)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    qdq, kdk = attention_form.backward(dy, q, k, v, dq, dk, dv, l_inv, sums, G, span, power)
    dlog_g = l_inv.new_empty(0) if log_g is None else gate_gradient(qdq, kdk, cu_seqlens, power)
    return dq, dk, dv, dlog_g


@_attention_backward.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, log_g: Any, cu_seqlens: Any, power: int, y: Tensor, l_inv: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dlog_g = l_inv.new_empty(0 if log_g is None else k.shape[:3])
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dlog_g


def _attention_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_g, cu_seqlens, ctx.power, _ = inputs
    ctx.save_for_backward(q, k, v, log_g, cu_seqlens, *output)


def _attention_differentiate(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_g, cu_seqlens, y, l_inv = ctx.saved_tensors
    dq, dk, dv, dlog_g = _attention_backward(dy.contiguous(), q, k, v, log_g, cu_seqlens, ctx.power, y, l_inv)
    return dq, dk, dv, None if log_g is None else dlog_g, None, None, None


_attention.register_autograd(_attention_differentiate, setup_context=_attention_save)


# ----------------------------------------------------------------------------------------------------
# The state form


def _state(s: Tensor | None, z: Tensor | None) -> RetentionState | None:
    return None if s is None or z is None else RetentionState(s, z)


def _parts(state: RetentionState | None, like: Tensor) -> tuple[Tensor, Tensor]:
    return (like.new_empty(0), like.new_empty(0)) if state is None else (state.s, state.z)


@torch.library.custom_op("brumby::state_form", mutates_args=())
@_kernels
def _chunks(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, s: Tensor | None, z: Tensor | None,
    cu_seqlens: Tensor | None, chunk: int, eps: float, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y [B, T, HQ, V], 1 / l [B, HQ, T] float32, and the final s and z (empty unless `keep`)."""
    y, l_inv, final = state_form.forward(q, k, v, log_g, cu_seqlens, chunk, eps, _state(s, z), keep)
    return y, l_inv, *_parts(final, l_inv)


@_chunks.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Any,
    s: Any,
    z: Any,
    cu_seqlens: Any,
    chunk: int,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, HQ, _ = q.shape
    l_inv = q.new_empty(B, HQ, T, dtype=torch.float32)
    final = _parts(_empty(B, k, v, 2) if keep else None, l_inv)
    return v.new_empty(B, T, HQ, v.shape[-1]), l_inv, *final


@torch.library.custom_op("brumby::state_form_backward", mutates_args=())
@_kernels
def _chunks_backward(
    dy: Tensor, ds_final: Tensor | None, dz_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    log_g: Tensor | None, s: Tensor | None, z: Tensor | None, cu_seqlens: Tensor | None, chunk: int,
    y: Tensor, l_inv: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dlog_g, and the gradients of the initial s and z; empty where there is nothing."""
    dq, dk, dv, dlog_g, d_initial = state_form.backward(
        dy, _state(ds_final, dz_final), q, k, v, log_g, cu_seqlens, chunk, _state(s, z), y, l_inv
    )
    return dq, dk, dv, l_inv.new_empty(0) if dlog_g is None else dlog_g, *_parts(d_initial, l_inv)


@_chunks_backward.register_fake
def _(
    dy: Tensor, ds_final: Any, dz_final: Any, q: Tensor, k: Tensor, v: Tensor, log_g: Any, s: Any, z: Any,
    cu_seqlens: Any, chunk: int, y: Tensor, l_inv: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dlog_g = l_inv.new_empty(0 if log_g is None else k.shape[:3])
    d_initial = _parts(None if s is None else RetentionState(torch.empty_like(s), torch.empty_like(z)), l_inv)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dlog_g, *d_initial


def _chunks_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_g, s, z, cu_seqlens, ctx.chunk, _, ctx.keep = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, log_g, s, z, cu_seqlens, *output[:2])


def _chunks_differentiate(
    ctx: Any, dy: Tensor | None, _: Tensor | None, ds: Tensor | None, dz: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, log_g, s, z, cu_seqlens, y, l_inv = ctx.saved_tensors
    if not ctx.keep or (ds is None and dz is None):
        ds = dz = None
    else:
        zero = _empty(len(k), k, v, 2)
        ds, dz = (zero.s if ds is None else ds), (zero.z if dz is None else dz)
    dy = torch.zeros_like(y) if dy is None else dy.contiguous()
    dq, dk, dv, dlog_g, ds, dz = _chunks_backward(
        dy, ds, dz, q, k, v, log_g, s, z, cu_seqlens, ctx.chunk, y, l_inv
    )
    d_initial = (None, None) if s is None else (ds, dz)
    return dq, dk, dv, None if log_g is None else dlog_g, *d_initial, None, None, None, None


_chunks.register_autograd(_chunks_differentiate, setup_context=_chunks_save)


# ----------------------------------------------------------------------------------------------------
# The forms behind `power_retention`


def _has_state_form(K: int, V: int, power: int) -> bool:
    return power == 2 and K in (64, 128) and V in (64, 128)


def _check(q: Tensor, v: Tensor, power: int) -> None:
    K, V = q.shape[-1], v.shape[-1]
    if q.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f'q is {q.dtype}; on a GPU there are bfloat16 and float32 (implementation "reference" takes more)'
        )
    if max(K, V) > 256 or K % 8 or V % 8:
        raise ValueError(
            f"head_dim is {K} for q and {V} for v; on a GPU they are multiples of 8 up to 256 "
            '(implementation "reference" takes any)'
        )
    if power not in (2, 4):
        raise ValueError(f'power is {power}; on a GPU there are 2 and 4 (implementation "reference" takes any)')


def retention(
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
    """Both forms, with `power_retention`'s arguments after its checks: attention up to `chunk_size` tokens.

    Head dims and powers that have no state form run in the attention form at any length. If they are asked for
    states, plain PyTorch makes them, with a warning.

    Raises:
        ValueError: what these kernels do not compute.
    """
    _check(q, v, power)
    T, K, V = q.shape[1], q.shape[-1], v.shape[-1]
    states = initial_state is not None or return_final_state
    if states and not _has_state_form(K, V, power):
        warnings.warn(
            f"states of head dims {K} and {V}, power {power}, have no kernel: plain PyTorch makes them, slowly",
            stacklevel=3,
        )
        return FORMS[q.device.type, "reference"](
            q, k, v, log_g, power=power, scale=scale, chunk_size=chunk_size, initial_state=initial_state,
            return_final_state=return_final_state, cu_seqlens=cu_seqlens, eps=eps,
        )  # fmt: skip
    if states and cu_seqlens is not None:
        return _by_document(
            q, k, v, log_g, power=power, scale=scale, chunk_size=chunk_size, initial_state=initial_state,
            return_final_state=return_final_state, cu_seqlens=cu_seqlens, eps=eps,
        )  # fmt: skip
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    log_g = None if log_g is None else log_g.float().contiguous()
    if cu_seqlens is not None:
        if cu_seqlens.device.type == "cpu":  # reading values from a GPU would wait for it
            _documents(q.shape[0], T, cu_seqlens)
        cu_seqlens = cu_seqlens.to(q.device)
    eps /= scale**power  # scale cancels everywhere else
    if not states and (chunk_size >= T or not _has_state_form(K, V, power)):
        return _attention(q, k, v, log_g, cu_seqlens, power, eps)[0], None
    s, z = (None, None) if initial_state is None else (x.float().contiguous() for x in initial_state)
    chunk = triton.cdiv(min(chunk_size, T), CHUNK) * CHUNK
    y, _, s, z = _chunks(q, k, v, log_g, s, z, cu_seqlens, chunk, eps, return_final_state)
    return y, RetentionState(s, z) if return_final_state else None


def _by_document(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, *, initial_state: RetentionState | None,
    cu_seqlens: Tensor, **options: Any,
) -> tuple[Tensor, RetentionState | None]:  # fmt: skip
    """Packed documents with states of their own, one after the other. An empty one passes its state through."""
    ys, finals = [], []
    for rows, start, end in _documents(1, q.shape[1], cu_seqlens):
        if initial_state is None:
            state = _empty(1, k, v, options["power"])
        else:
            state = RetentionState(*(x[rows] for x in initial_state))
        if start < end:
            x = slice(start, end)
            y, final = retention(
                q[:, x], k[:, x], v[:, x], None if log_g is None else log_g[:, x],
                initial_state=None if initial_state is None else state, cu_seqlens=None, **options,
            )  # fmt: skip
            ys.append(y)
            state = state if final is None else final
        finals.append(state)
    if not options["return_final_state"]:
        return torch.cat(ys, 1), None
    return torch.cat(ys, 1), RetentionState(*map(torch.cat, zip(*finals, strict=True)))
