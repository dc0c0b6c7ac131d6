"""Power retention beside softmax attention and other operators: time, memory and error, on one GPU.

    python -m benchmarks.kernels [--cases 2k 8k ...] [--peers retention fla] [--out FOLDER]

prints a table and writes `kernels.json`: rows of `case`, `implementation`, `direction`, `ms`, `tflops`,
`peak_bytes` and `error`. Every time is the median of repeated runs of the whole operator, gates included, in one
process on one device. `tflops` counts softmax attention's matrix products for every implementation, so that it
compares times. Shapes are Qwen3-14B's: 40 query heads, 8 key-value heads, head_dim 128, bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from brumby.kernels import RetentionBuffer, RetentionState, decode, power_retention

HQ, H, D = 40, 8, 128
CASES = {
    "2k": (4, 2**11),
    "8k": (1, 2**13),
    "16k": (1, 2**14),
    "32k": (1, 2**15),
    "64k": (1, 2**16),
    "128k": (1, 2**17),
}
CHUNK = 1024
SWITCH = 8192  # the longest sequence that runs in the attention form
WEAK, STRONG = 10.0, 4.53  # mean logits of gates: half-lives of 15,000 tokens, and of 64
Form = Callable[..., Tensor]


def inputs(B: int, T: int, gates: float, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """q, k, v, log_g and the gradient of y."""
    q, k, v, dy = (torch.randn(B, T, heads, D, device="cuda", dtype=dtype) for heads in (HQ, H, H, HQ))
    return q, k, v, F.logsigmoid(torch.randn(B, T, H, device="cuda") + gates), dy


def brumby(**options: Any) -> Form:
    return lambda *x: power_retention(*x, **options)  # type: ignore[return-value]  # no state is asked for


def softmax(backend: SDPBackend) -> Form:
    def form(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return form


def retention(chunk: int | None) -> Form:
    import retention

    return lambda q, k, v, log_g: retention.power_retention(q, k, v, log_g, deg=2, chunk_size=chunk)


def simple_gla(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor) -> Tensor:
    """Gated linear attention, one gate a head: the same recurrence with phi(x) = x, a state 65 times smaller."""
    from fla.ops.simple_gla import chunk_simple_gla

    k, v, log_g = (x.repeat_interleave(HQ // H, 2) for x in (k, v, log_g))
    return chunk_simple_gla(q, k, v, log_g)[0]


def forms(T: int, peers: list[str]) -> dict[str, Form]:
    found: dict[str, Form] = {"brumby": brumby(chunk_size=CHUNK if T > SWITCH else None)}
    if T == SWITCH:
        found["brumby, chunks"] = brumby(chunk_size=CHUNK)
    if T == 2 * SWITCH:
        found["brumby, attention form"] = brumby()
    if T <= 2**16:
        found["cudnn"] = softmax(SDPBackend.CUDNN_ATTENTION)
    if T <= 2**15:
        found["flash-attention-2"] = softmax(SDPBackend.FLASH_ATTENTION)
    if "retention" in peers:
        found["retention"] = retention(CHUNK)
    if "fla" in peers:
        found["fla simple_gla"] = simple_gla
    return found


def median_ms(function: Callable[[], object]) -> float:
    return triton.testing.do_bench(function, warmup=25, rep=100, return_mode="median")


def measure(form: Form, made: tuple[Tensor, ...]) -> dict[str, float]:
    """Milliseconds forward and backward, and the bytes that both need beyond inputs and gradients."""
    *tensors, dy = made
    leaves = [x.detach().requires_grad_() for x in tensors]

    def backward() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(y, leaves, dy, retain_graph=True, allow_unused=True)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = form(*leaves)
    gradients = backward()
    peak = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in gradients if x is not None)
    del gradients
    forward_ms = median_ms(lambda: form(*leaves))
    return {"forward": forward_ms, "backward": median_ms(backward), "peak_bytes": peak}


def errors(form: Form, made: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative RMS error of y and of every gradient against float64."""
    *tensors, dy = made

    def run(form: Form, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(torch.promote_types(x.dtype, dtype)).requires_grad_() for x in tensors]
        y = form(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    exact = run(brumby(implementation="reference"), torch.float64)
    names = ("y", "dq", "dk", "dv", "dlog_g")
    return {
        name: float((x.double() - e).norm() / e.norm())
        for name, x, e in zip(names, run(form, torch.bfloat16), exact, strict=True)
    }


def floors() -> dict[str, float]:
    """What the device does: TFLOP/s of a large matrix product, GB/s of a large copy, reads and writes counted."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(2**30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return {
        "matrix_tflops": 2 * 8192**3 / median_ms(lambda: a @ b) / 1e9,
        "copy_gbps": 2 * x.nbytes / median_ms(lambda: y.copy_(x)) / 1e6,
    }


def graph_us(functions: list[Callable[[], object]], repeats: int = 10) -> float:
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
    return sorted(a.elapsed_time(b) for a, b in pairwise(events))[repeats // 2] * 1e3 / len(functions)


def decoding(B: int, C: int = 64) -> dict[str, float]:
    """Microseconds a layer: one token, a fold of C tokens, and a copy of the state over 2: a read of it.

    Several layers in turn, so that no state is found in L2.
    """
    layers = max(2, 8 // B)
    q, k, v = (torch.randn(B, n, D, device="cuda", dtype=torch.bfloat16) for n in (HQ, H, H))
    log_g = -torch.rand(B, H, device="cuda") * 0.1
    size = D * (D + 1) // 2
    states = [
        RetentionState(torch.randn(B, H, size, D, device="cuda"), torch.rand(B, H, size, device="cuda"))
        for _ in range(layers)
    ]
    buffers = [RetentionBuffer.empty(k, v, C) for _ in range(layers)]
    for buffer in buffers:
        buffer.k.normal_()
        buffer.v.normal_()
        buffer.G.copy_(-torch.rand_like(buffer.G).cumsum(1))
        buffer.num_tokens = C // 2
    pairs = list(zip(states, buffers, strict=True)) * math.ceil(8 / layers)
    out = torch.empty_like(states[0].s)
    return {
        "step": graph_us([partial(decode.step, q, k, v, log_g, s, b, 2, D**-0.5) for s, b in pairs]),
        "fold": graph_us([partial(decode.fold, s, b, 2) for s, b in pairs]),
        "read": graph_us([partial(out.copy_, s.s) for s, _ in pairs]) / 2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "decode"], default=[*CASES, "decode"])
    parser.add_argument("--peers", nargs="*", choices=["retention", "fla"], default=[])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device; these are measurements of one")
    device = torch.cuda.get_device_name()
    out = args.out or Path(__file__).parent / "results" / device.lower().replace(" ", "-")
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    head = {
        "device": device, "date": str(date.today()), "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), **floors(),
    }  # fmt: skip
    print(head, flush=True)
    for case in args.cases:
        if case == "decode":
            for B in (1, 32):
                us = decoding(B)
                rows += [
                    {"case": f"decode b={B}", "implementation": "brumby", "direction": name, "ms": t / 1e3}
                    for name, t in us.items()
                ]
                print(f"decode b={B}", *(f"{name} {t:.1f} us" for name, t in us.items()), flush=True)
            continue
        B, T = CASES[case]
        made = inputs(B, T, WEAK)
        todo = [(case, name, form, made) for name, form in forms(T, args.peers).items()]
        if case == "8k":
            todo.append(("8k, strong gates", "brumby", forms(T, [])["brumby"], inputs(B, T, STRONG)))
        for label, name, form, tensors in todo:
            found = measure(form, tensors)
            error = errors(form, tensors) if name.startswith("brumby") and T <= SWITCH else None
            flop = 4 * B * HQ * T * T / 2 * D
            for direction, products in (("forward", 1.0), ("backward", 2.5)):
                ms = found[direction]
                rows.append(
                    {"case": label, "implementation": name, "direction": direction, "ms": ms,
                     "tflops": products * flop / ms / 1e9, "peak_bytes": found["peak_bytes"], "error": error}
                )  # fmt: skip
            print(
                f"{label:18s} {name:24s} {found['forward']:9.3f} ms {found['backward']:9.3f} ms "
                f"{found['peak_bytes'] / 2**30:6.2f} GiB",
                "" if error is None else " ".join(f"{k} {v:.1e}" for k, v in error.items()),
                flush=True,
            )
    out.mkdir(parents=True, exist_ok=True)
    part = out / ".kernels.json.part"
    part.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
    part.rename(out / "kernels.json")


if __name__ == "__main__":
    main()
