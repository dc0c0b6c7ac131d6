"""One token of decoding against a read of the state: time on a GPU, and the error of the result."""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from brumby.kernels import RetentionBuffer, RetentionState, power_retention, power_retention_decode
from brumby.kernels import decode as kernels


@triton.jit
def _read_kernel(p_x, p_y, n, BX: tl.constexpr):
    """Sum a slice of x: the time of reading it."""
    i, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    b_sum = tl.zeros([BX], tl.float32)
    for i_x in range(i * n // programs, (i + 1) * n // programs):
        b_sum += tl.load(p_x + i_x * BX + tl.arange(0, BX))
    tl.store(p_y + i, tl.sum(b_sum, 0))


def read(x: Tensor, y: Tensor, programs: int, block: int, num_warps: int) -> None:
    _read_kernel[programs,](x, y, x.numel() // block, block, num_warps=num_warps)


def time_us(functions: list, repeats: int = 10) -> float:
    """Microseconds a call: the functions one after the other in a CUDA graph, the median of its replays."""
    for function in functions:
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in pairwise(events))
    return times[repeats // 2] * 1e3 / len(functions)


def make(B: int, layers: int, C: int, H: int = 8, R: int = 5, K: int = 128):
    """Inputs of one token, and states and half-full buffers of several layers: together larger than L2."""
    D = K * (K + 1) // 2
    q, k, v = (torch.randn(B, n, K, device="cuda", dtype=torch.bfloat16) for n in (H * R, H, H))
    log_g = -torch.rand(B, H, device="cuda") * 0.1
    states, buffers = [], []
    for _ in range(layers):
        s = torch.randn(B, H, D, K, device="cuda")
        states.append(RetentionState(s, torch.rand(B, H, D, device="cuda")))
        buffer = RetentionBuffer.empty(k, v, C)
        buffer.k.normal_()
        buffer.v.normal_()
        buffer.G.copy_(-torch.rand_like(buffer.G).cumsum(1))
        buffer.num_tokens = C // 2
        buffers.append(buffer)
    return q, k, v, log_g, states, buffers


def decode(B: int, C: int = 64) -> dict[str, float]:
    """Microseconds a layer of reading the state, of a step and of a fold."""
    layers = max(1, 8 // B)
    q, k, v, log_g, states, buffers = make(B, layers, C)
    calls = 8 // layers
    out = torch.empty(4096, device="cuda")
    reads = [
        time_us([lambda s=s, p=p, b=b, w=w: read(s.s, out, p, b, w) for s in states] * calls)
        for p, b, w in ((528, 2048, 4), (1056, 2048, 4), (1056, 4096, 4), (2112, 1024, 4))
    ]
    pairs = list(zip(states, buffers, strict=True)) * calls
    step = time_us([lambda s=s, b=b: kernels.step(q, k, v, log_g, s, b, 2, 128**-0.5) for s, b in pairs])
    fold = time_us([lambda s=s, b=b: kernels.fold(s, b, 2) for s, b in pairs])
    return {"read": min(reads), "sum": time_us([s.s.sum for s in states] * calls), "step": step, "fold": fold}


def errors(dtype: torch.dtype, B: int, T: int, H: int, R: int, K: int, V: int, power: int, C: int, prefill: int):
    """The largest RMS error of a token relative to float64's attention form, and that of the final state."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, *n, device="cuda").to(dtype) for n in ((H * R, K), (H, K), (H, V)))
    log_g = -torch.rand(B, T, H, device="cuda") * 0.1
    expected, final = power_retention(
        q.double(), k.double(), v.double(), log_g, power=power, return_final_state=True
    )
    _, state = power_retention(*(x[:, :prefill] for x in (q, k, v, log_g)), power=power, return_final_state=True)
    buffer = RetentionBuffer.empty(k[:, 0], v[:, 0], C)
    ys = [
        power_retention_decode(q[:, t], k[:, t], v[:, t], log_g[:, t], state, buffer, power=power)
        for t in range(prefill, T)
    ]

    def ratio(x: Tensor, y: Tensor) -> float:
        return ((x.double() - y).norm() / y.norm()).item()

    worst = max(ratio(y, expected[:, prefill + i]) for i, y in enumerate(ys))
    ended = buffer.num_tokens == 0
    return worst, (ratio(state.s, final.s), ratio(state.z, final.z)) if ended else None


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    for B in (1, 32):
        times = decode(B)
        print(f"B={B}:", ", ".join(f"{name} {time:.1f} us" for name, time in times.items()))
        print(f"B={B}: step / read {times['step'] / times['read']:.2f}")
    for dtype in (torch.float32, torch.bfloat16):
        print(dtype, errors(dtype, B=2, T=82, H=2, R=5, K=128, V=128, power=2, C=64, prefill=18))
