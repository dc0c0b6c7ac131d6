"""Power retention beside softmax attention and other operators: time, memory and error, on one GPU.

    python -m benchmarks.kernels [--cases 2k 8k ...] [--peers retention fla] [--activations MODEL TEXT]

prints a table and writes `kernels.json`: rows of `case`, `implementation`, `direction`, `ms`, `tflops`,
`peak_bytes` and `error`; rows of other cases stay. Every time is the GPU's, of the whole operator, gates included:
the median over replays of a CUDA graph. What the CPU takes to launch an operator is the case "launch". `tflops`
counts softmax attention's matrix products for every implementation, so that it compares times. Shapes are
Qwen3-14B's: 40 query heads, 8 key-value heads, head_dim 128, bfloat16. The case "first call" is the first of all,
forward and backward, with nothing compiled. `--activations` adds errors on q, k, v and log_g of a real model's
middle layer: a converted checkpoint, and JSONL (.gz) with the text that it reads, such as `make demo` leaves in
`.cache/demo`. `--plot docs/kernels.png` draws time per token from what is there, without a GPU.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from functools import partial
from itertools import islice, pairwise, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
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
ALL = ["first call", "launch", "activations", *CASES, "decode"]
DIRECTIONS = ("forward", "backward")
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
    """Linear attention, one constant decay a head: phi(x) = x, a state 65 times smaller. fla refuses gates that
    depend on the input with Triton 3.4 to 3.7.0 on Hopper, where it found their gradient wrong."""
    from fla.ops.simple_gla import chunk_simple_gla

    k, v = (x.repeat_interleave(HQ // H, 2) for x in (k, v))
    return chunk_simple_gla(q, k, v, g_gamma=log_g.detach().mean((0, 1)).repeat_interleave(HQ // H))[0]


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
        if T <= SWITCH:
            found["retention, attention form"] = retention(None)
    if "fla" in peers:
        found["fla simple_gla (constant decay)"] = simple_gla
    return found


def graph_us(functions: list[Callable[[], object]]) -> float:
    """Microseconds a call: the functions one after the other in a CUDA graph, the median of its replays."""
    for function in functions:
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for function in functions:
            function()

    def replay(repeats: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        return sorted(a.elapsed_time(b) * 1e3 for a, b in pairwise(events))

    once = replay(2)[0]
    times = replay(max(5, min(100, int(2e5 / once))))
    return times[len(times) // 2] / len(functions)


def differentiable(form: Form, made: tuple[Tensor, ...]) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
    """Forward and backward of a form as functions without arguments."""
    *tensors, dy = made
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = form(*leaves)
    return lambda: form(*leaves), lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True, allow_unused=True)


def measure(form: Form, made: tuple[Tensor, ...]) -> dict[str, float]:
    """Milliseconds forward and backward, and the bytes that both need beyond inputs and gradients."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward, backward = differentiable(form, made)
    gradients = backward()
    peak = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in gradients if x is not None)
    del gradients
    return {"forward": graph_us([forward]) / 1e3, "backward": graph_us([backward]) / 1e3, "peak_bytes": peak}


def launch_us(function: Callable[[], object], repeats: int = 200) -> float:
    """Microseconds that the CPU takes for a call."""
    for _ in range(10):
        function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    us = (time.perf_counter() - start) * 1e6 / repeats
    torch.cuda.synchronize()
    return us


def first_call() -> None:
    """Print the seconds that forward and backward take; in a process of its own."""
    B, T = CASES["64k"]
    made = inputs(B, T, WEAK)
    torch.cuda.synchronize()
    start = time.perf_counter()
    _, backward = differentiable(brumby(chunk_size=CHUNK), made)
    torch.cuda.synchronize()
    middle = time.perf_counter()
    backward()
    torch.cuda.synchronize()
    print(json.dumps({"forward": middle - start, "backward": time.perf_counter() - middle}))


def errors(form: Form, made: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative RMS error of y and of every gradient against float64, which takes one key-value head at a time."""
    *tensors, dy = made

    def run(form: Form, tensors: Iterable[Tensor], dy: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        y = form(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    found = run(form, tensors, dy)
    reference = brumby(implementation="reference")
    squares = torch.zeros(2, len(found), dtype=torch.float64, device=dy.device)
    heads = tensors[1].shape[2]
    for b, h in product(range(len(dy)), range(heads)):

        def part(x: Tensor, b: int = b, h: int = h) -> Tensor:
            return x[b : b + 1].tensor_split(heads, 2)[h].double()

        for i, e in enumerate(run(reference, map(part, tensors), part(dy))):
            squares[0, i] += (part(found[i]) - e).square().sum()
            squares[1, i] += e.square().sum()
    return dict(zip(("y", "dq", "dk", "dv", "dlog_g"), (squares[0] / squares[1]).sqrt().tolist(), strict=True))


def floors() -> dict[str, float]:
    """What the device does: TFLOP/s of a large matrix product, GB/s of a large copy, reads and writes counted."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(2**30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    return {
        "matrix_tflops": 2 * 8192**3 / graph_us([lambda: a @ b]) / 1e6,
        "copy_gbps": 2 * x.nbytes / graph_us([lambda: y.copy_(x)]) / 1e3,
    }


@triton.jit
def _read_kernel(p_x, p_sum, num_tiles, BN: tl.constexpr):
    """Nothing but reading: program i adds up every num_programs-th tile of BN numbers."""
    b_sum = tl.zeros([BN], tl.float32)
    for i in range(tl.program_id(0).to(tl.int64), num_tiles, tl.num_programs(0)):
        b_sum += tl.load(p_x + i * BN + tl.arange(0, BN))
    tl.store(p_sum + tl.program_id(0), tl.sum(b_sum))


def decoding(B: int, C: int = 64) -> dict[str, float]:
    """Microseconds a layer: one token, a fold of C tokens, a kernel that only reads the state, half a copy of it.

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
    out, sums = torch.empty_like(states[0].s), torch.empty(2064, device="cuda")
    return {
        "step": graph_us([partial(decode.step, q, k, v, log_g, s, b, 2, D**-0.5) for s, b in pairs]),
        "fold": graph_us([partial(decode.fold, s, b, 2) for s, b in pairs]),
        "read": graph_us([partial(_read_kernel[2064,], s.s, sums, s.s.numel() // 4096, 4096) for s, _ in pairs]),
        "copy": graph_us([partial(out.copy_, s.s) for s, _ in pairs]) / 2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=ALL, default=ALL)
    parser.add_argument("--peers", nargs="*", choices=["retention", "fla"], default=[])
    parser.add_argument("--activations", type=Path, nargs=2, metavar=("MODEL", "TEXT"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.plot:
        for path in Path(__file__).parent.glob("results/*/kernels.json"):
            plot(json.loads(path.read_text()), args.plot)
        return
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device; these are measurements of one")
    device = torch.cuda.get_device_name()
    out = args.out or Path(__file__).parent / "results" / device.lower().replace(" ", "-")
    torch.manual_seed(0)
    torch.cuda.set_stream(torch.cuda.Stream())  # graphs are captured on it, and autograd stays on it
    head = {
        "device": device, "date": str(date.today()), "torch": torch.__version__, "triton": triton.__version__,
        "python": platform.python_version(), **floors(),
    }  # fmt: skip
    print(head, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    if "retention" in args.peers:  # it tunes itself at its first call, for minutes, whatever the length
        print("retention is tuning", flush=True)
        differentiable(retention(CHUNK), inputs(*CASES["2k"], WEAK))[1]()
    path, part = out / "kernels.json", out / ".kernels.json.part"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for case in args.cases:
        rows = [row for row in rows if str(row["case"]).split(",")[0].split(" b=")[0] != case]
        for row in run(case, args.peers, args.activations):
            print(" ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
            rows.append(row)
        part.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
        part.rename(path)


def activations(model: Path, text: Path) -> tuple[Tensor, ...]:
    """q, k, v (bfloat16) and log_g of a model's middle layer that reads 2,048 tokens, and a gradient of y."""
    from transformers import AutoTokenizer

    from brumby.model import BrumbyForCausalLM, modeling_brumby

    lines = (gzip.open if text.suffix == ".gz" else open)(text, "rt")
    with lines:
        words = "\n\n".join(json.loads(line)["text"] for line in islice(lines, 100))
    ids = AutoTokenizer.from_pretrained(model)(words, return_tensors="pt").input_ids[:, :2048]
    found = []
    operator = modeling_brumby.power_retention

    def note(*x: Tensor, **options: Any) -> Any:
        found.append(x)
        return operator(*x, **options)

    modeling_brumby.power_retention = note  # type: ignore[assignment]
    try:
        with torch.no_grad():
            BrumbyForCausalLM.from_pretrained(model, dtype=torch.float32)(ids, use_cache=False)
    finally:
        modeling_brumby.power_retention = operator
    q, k, v, log_g = (x.cuda() for x in found[len(found) // 2])
    return q.bfloat16(), k.bfloat16(), v.bfloat16(), log_g, torch.randn_like(q, dtype=torch.bfloat16)


def run(case: str, peers: list[str], model_and_text: list[Path] | None) -> Iterator[dict[str, object]]:
    """Rows of a case."""
    if case == "first call":
        with tempfile.TemporaryDirectory() as cache:
            code = f"from {__spec__.name} import first_call; first_call()"
            environment = os.environ | {"TRITON_CACHE_DIR": cache}
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True
            )
        for direction, seconds in json.loads(done.stdout).items():
            yield {"case": case, "implementation": "brumby", "direction": direction, "ms": seconds * 1e3}
        return
    if case == "launch":
        for name, form in forms(256, peers).items():
            for direction, function in zip(DIRECTIONS, differentiable(form, inputs(1, 256, WEAK)), strict=True):
                us = launch_us(function)
                yield {"case": case, "implementation": name, "direction": direction, "ms": us / 1e3}
        return
    if case == "decode":
        for B in (1, 32):
            for name, us in decoding(B).items():
                yield {"case": f"{case} b={B}", "implementation": "brumby", "direction": name, "ms": us / 1e3}
        return
    if case == "activations":
        if model_and_text is not None:
            made = activations(*model_and_text)
            for name, form in (("brumby", brumby()), ("brumby, plain", brumby(implementation="reference"))):
                for direction, e in split(errors(form, made)).items():
                    yield {"case": case, "implementation": name, "direction": direction, "error": e}
        return
    B, T = CASES[case]
    todo = [(case, name, form, WEAK) for name, form in forms(T, peers).items()]
    if T == SWITCH:
        todo.append(("8k, strong gates", "brumby", brumby(), STRONG))
    for label, name, form, gates in todo:
        made = inputs(B, T, gates)
        try:
            found = measure(form, made)
        except RuntimeError as problem:  # a peer that cannot
            print(f"{label} {name}: {problem}", file=sys.stderr)
            continue
        error = split(errors(form, made)) if name.startswith("brumby") and T <= SWITCH else {}
        flop = 4 * B * HQ * T * T / 2 * D
        for direction, products in zip(DIRECTIONS, (1.0, 2.5), strict=True):
            ms = found[direction]
            yield {
                "case": label, "implementation": name, "direction": direction, "ms": ms,
                "tflops": products * flop / ms / 1e9, "peak_bytes": found["peak_bytes"],
                "error": error.get(direction),
            }  # fmt: skip


def plot(results: dict[str, Any], path: Path) -> None:
    """Time per token against the sequence length, of each implementation its fastest form, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for panel, direction in zip(axes, DIRECTIONS, strict=True):
        lines: dict[str, dict[int, float]] = {}
        for row in results["rows"]:
            if row["case"] in CASES and row["direction"] == direction:
                B, T = CASES[row["case"]]
                points = lines.setdefault(row["implementation"].split(",")[0], {})
                points[T] = min(points.get(T, math.inf), row["ms"] * 1e3 / (B * T))
        for name, points in lines.items():
            width = 2 if name == "brumby" else 1
            panel.plot(*zip(*sorted(points.items()), strict=True), label=name, marker="o", linewidth=width)
        panel.set(xscale="log", yscale="log", xlabel="tokens in a sequence", ylabel="microseconds a token")
        panel.set_title(direction)
        panel.set_xticks([T for _, T in CASES.values()], labels=list(CASES))
        panel.minorticks_off()
    axes[0].legend()
    figure.suptitle(f"{results['device']}, {HQ} query heads, {H} key-value heads, head_dim {D}, bfloat16")
    figure.savefig(path, dpi=130)


def split(error: dict[str, float]) -> dict[str, dict[str, float]]:
    """Errors by direction."""
    return {"forward": {"y": error.pop("y")}, "backward": error}


if __name__ == "__main__":
    main()
