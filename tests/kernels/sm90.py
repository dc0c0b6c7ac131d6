"""Compile for a Hopper GPU, without one, every kernel that a call would launch; print what each needs.

`python tests/kernels/sm90.py` writes JSON: kernel -> the most registers and bytes of stack (spills) of its
variants, and how often ptxas gave up on asynchronous matrix products. In processes of its own: Triton is told that
there is a GPU, and kernels are compiled where they would be launched. `--update` writes the figures that the test
holds.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction

FIGURES = Path(__file__).with_name("sm90.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64", torch.int32: "i32", torch.int64: "i64"
}  # fmt: skip
VERSION = ".".join(triton.__version__.split(".")[:2])
CASES = (  # K, V, dtype and whether the kernels for Hopper alone are taken
    (128, 128, torch.bfloat16, True),
    (128, 128, torch.bfloat16, False),
    (64, 64, torch.bfloat16, True),
    (128, 128, torch.float32, False),
)
Kernels = dict[tuple[str, str], tuple[str, dict[str, int]]]
compiled: Kernels = {}  # in this process: source and options -> name, and what it needs


class Driver:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Properties:
    multi_processor_count = 132


def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
    """What Triton does at a launch, up to the launch."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in kwargs}
    bound = dict(zip(self.arg_names, args, strict=False)) | kwargs
    constants = {p.name for p in self.params if p.is_constexpr}
    general = {p.name for p in self.params if p.do_not_specialize}
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(self.arg_names):
        x = bound[name]
        if name in constants or x is None or (type(x) is int and x == 1 and name not in general):
            signature[name], values[name] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            signature[name], attributes[i,] = "*" + TYPES[x.dtype], [["tt.divisibility", 16]]
        elif hasattr(x, "block_shape"):
            layout = f",{x.layout!r}" if hasattr(x, "layout") else ""
            signature[name] = f"tensordesc<{TYPES[x.base.dtype]}[{','.join(map(str, x.block_shape))}]{layout}>"
        else:
            signature[name] = "fp32" if isinstance(x, float) else "i32"
            if type(x) is int and x % 16 == 0 and name not in general:
                attributes[i,] = [["tt.divisibility", 16]]
    source = (GluonASTSource if isinstance(self, GluonJITFunction) else ASTSource)(
        self, signature, values, attributes
    )
    if (key := (source.hash(), str(options))) in compiled:
        return
    kernel = triton.compile(source, target=TARGET, options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
        )
        verbose = subprocess.run(
            [TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", "/dev/null"], capture_output=True, text=True
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    name = f"{self.__module__.removeprefix('brumby.kernels.')}.{self.__name__}"
    serialised = "are serialized" in verbose.stderr
    compiled[key] = name, {"registers": registers, "stack": stack, "serialised": int(serialised)}
    print(name, options, registers, stack, kernel.metadata.shared, serialised, file=sys.stderr, flush=True)


def compile_case(K: int, V: int, dtype: torch.dtype, fast: bool) -> Kernels:
    """In a process of its own."""
    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_instead  # type: ignore[method-assign]
    torch.cuda.get_device_properties = lambda _: Properties  # type: ignore[assignment]
    from brumby.kernels import RetentionBuffer, RetentionState, attention_form, decode, hopper, state_form
    from brumby.kernels.gates import cumulate, gate_gradient, spans

    def inputs(K: int, V: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        q, k, v, dy = (
            torch.zeros(1, 2048, heads, D, dtype=dtype) for heads, D in ((10, K), (2, K), (2, V), (10, V))
        )
        return q, k, v, dy, torch.zeros(1, 2048, 2)

    documents = torch.tensor([0, 1000, 2048])
    attention_form.on_hopper = lambda *_: fast
    if fast and K == 128:
        state_form.products = hopper.HopperProducts
    q, k, v, dy, log_g = inputs(K, V, dtype)
    gates = cumulate(log_g)
    for G, cu_seqlens in ((gates, None), (None, None), (gates, documents), (None, documents)):
        span = spans(2048, cu_seqlens, None, q.device)
        y, l_inv = attention_form.forward(q, k, v, G, span, 2, 1e-20)
        sums = attention_form.row_sums(dy, q, k, v, y, l_inv, G, span, 2)
        qdq, kdk = attention_form.backward(dy, q, k, v, q, k, v, l_inv, sums, G, span, 2)
        gate_gradient(qdq, kdk, cu_seqlens, 2)
        gate_gradient(qdq, kdk, cu_seqlens, 2, forward=True)
    y, l_inv, _ = state_form.forward(q, k, v, log_g, None, 1024, 1e-20, None, False)
    state_form.backward(dy, None, q, k, v, log_g, None, 1024, None, y, l_inv)
    state = RetentionState(torch.zeros(1, 2, K * (K + 1) // 2, V), torch.zeros(1, 2, K * (K + 1) // 2))
    buffer = RetentionBuffer.empty(k[:, 0], v[:, 0], 64)
    decode._on_hopper = lambda *_: fast and K == 128
    decode.step(q[:, 0], k[:, 0], v[:, 0], log_g[:, 0], state, buffer, 2, 1.0, 1e-20)
    buffer.num_tokens = 64
    decode.fold(state, buffer, 2)
    return compiled


def main() -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), spawn, max_tasks_per_child=1) as pool:
        for kernels in pool.map(compile_case, *zip(*CASES, strict=True)):
            compiled.update(kernels)
    found: dict[str, dict[str, int]] = {}
    for name, needs in compiled.values():
        row = found.setdefault(name, {"registers": 0, "stack": 0, "serialised": 0})
        row["registers"] = max(row["registers"], needs["registers"])
        row["stack"] = max(row["stack"], needs["stack"])
        row["serialised"] += needs["serialised"]
    if "--update" in sys.argv:
        figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
        figures[VERSION] = dict(sorted(found.items()))
        FIGURES.write_text(json.dumps(dict(sorted(figures.items())), indent=1) + "\n")
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
