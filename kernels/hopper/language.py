"""What the kernels for Hopper share: Gluon's operations by one name from Triton 3.6 to 3.9, rings, tiles."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

NEW = hasattr(tma, "async_load")
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
tma_load = tma.async_load if NEW else tma.async_copy_global_to_shared
tma_store = tma.async_store if NEW else tma.async_copy_shared_to_global
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@builtin
def tma_add(d_x: Any, coordinates: Any, s_x: Any, _semantic: Any = None) -> None:
    """Add a tile of shared memory to memory by the copy engine; 3.6 has it below Gluon only."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, d_x.handle, coordinates, s_x.handle)


@builtin
def reinterpret(s_x: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """The same shared memory under another type."""
    method = s_x.reinterpret if hasattr(s_x, "reinterpret") else s_x._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)


@gluon.jit
def barriers(N: gl.constexpr, COUNT: gl.constexpr):
    """N barriers, each for COUNT arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def advance(i_stage, i_phase, N: gl.constexpr):
    """The next of a ring's N stages."""
    i_stage += 1
    i_phase = gl.where(i_stage == N, i_phase ^ 1, i_phase)
    return gl.where(i_stage == N, 0, i_stage), i_phase


@gluon.jit
def release(bar):
    """This warpgroup is done with what the barrier guards."""
    barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def as_tile(s_x, d_x):
    """A buffer as TMA reads or writes it."""
    return reinterpret(s_x, d_x.dtype, d_x.block_type.shape, d_x.layout)


@gluon.jit
def as_matrix(s_x, dtype: gl.constexpr, R: gl.constexpr, D: gl.constexpr):
    """A buffer of [R, D] that TMA knows with more dimensions, as wgmma reads it."""
    return reinterpret(s_x, dtype, [R, D], gl.NVMMASharedLayout.get_default_for([R, D], dtype))


@lru_cache
def _layout(shape: tuple[int, ...], dtype: torch.dtype, swizzled: bool) -> gl.NVMMASharedLayout:
    known = {torch.bfloat16: gl.bfloat16, torch.float32: gl.float32, torch.int32: gl.int32}[dtype]
    if swizzled:
        return gl.NVMMASharedLayout.get_default_for(list(shape), known)
    return gl.NVMMASharedLayout(0, known.primitive_bitwidth, len(shape))


def tiles_of(x: Tensor, *block: int, swizzled: bool = True) -> TensorDescriptor:
    """A tensor as TMA reads or writes it, in tiles of the last dimensions."""
    shape = (1,) * (x.dim() - len(block)) + block
    return TensorDescriptor(x, x.shape, x.stride(), list(shape), _layout(shape, x.dtype, swizzled))


def num_programs(x: Tensor, units: int) -> tuple[int]:
    """A persistent grid: one program a multiprocessor."""
    return (min(units, torch.cuda.get_device_properties(x.device).multi_processor_count),)
