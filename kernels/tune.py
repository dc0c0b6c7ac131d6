"""Find the tiles that are fastest on this GPU, and write them as a table: `brumby tune`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import date
from itertools import product
from pathlib import Path

import torch
import triton
from rich.progress import Progress

from brumby.kernels import attention_form, state_products
from brumby.kernels.ahead import compile_ahead
from brumby.kernels.tiles import KERNELS, TABLES, WIDTHS, Table, key, slug, trial

T, H, R = 4096, 4, 2
DTYPES = (torch.bfloat16, torch.float32)
STATE_WIDTHS = (64, 128)
SUMS = 128  # registers of a thread that sums may take, of 255: tiles beyond spill, and take ptxas minutes
COPIED = 128  # bytes: where the copy engine may write in shared memory, and so the least that a row may have


def candidates(kernel: str, dtype: torch.dtype, width: int) -> Iterator[list[int]]:
    """Tiles worth trying; what does not fit into a GPU's shared memory is passed over when tried."""
    stages = range(1, 3 if dtype == torch.float32 else 4)
    if kernel in ("sum", "query", "gradient"):
        for BT, num_warps, num_stages in product((32, 64, 128), (4, 8), stages):
            if BT * dtype.itemsize >= COPIED:
                yield [BT, num_warps, num_stages]
        return
    for BQ, BK, num_warps, num_stages in product((32, 64, 128), (32, 64, 128), (4, 8), stages):
        # Each walks over blocks of the other kind, which must divide its own
        own, other, sums = (BK, BQ, 2) if kernel == "key_value_gradient" else (BQ, BK, 1)
        if own >= other and sums * own * width <= SUMS * 32 * num_warps:
            yield [BQ, BK, num_warps, num_stages]


def calls(dtype: torch.dtype, width: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """What to time for each kernel."""
    q, k, v, dy = (torch.randn(1, T, heads, width, device=device, dtype=dtype) for heads in (H * R, H, H, H * R))
    # On Hopper these tiles serve only what `hopper/` does not compute
    power = 4 if attention_form.on_hopper(q, v, 2) else 2
    y, l_inv = attention_form.forward(q, k, v, None, None, power, 1e-20)
    sums = attention_form.row_sums(dy, q, k, v, y, l_inv, None, None, power)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    def backward() -> None:
        attention_form.backward(dy, q, k, v, dq, dk, dv, l_inv, sums, None, None, power)

    found: dict[str, Callable[[], object]] = {
        "forward": lambda: attention_form.forward(q, k, v, None, None, power, 1e-20),
        "query_gradient": backward,
        "key_value_gradient": backward,
    }
    if width in STATE_WIDTHS:

        def products() -> state_products.Products:
            return state_products.Products(width, width, 1024, dtype, device)

        ones = torch.ones(1, H * R, T, device=device)
        e = state_products.prepare(q, dy, ones, H, True)
        s = torch.randn(H, T // 1024, state_products.num_tiles(width) * 128, width, device=device).to(dtype)
        z = torch.rand(H, T // 1024, width, width, device=device)
        found |= {
            "sum": lambda: products().sums(e),
            "query": lambda: products().query(e, s, z, ones, y, l_inv),
            "gradient": lambda: products().gradient(e, s, z, ones),
        }
    return found


def median_ms(function: Callable[[], object]) -> float:
    return triton.testing.do_bench(function, warmup=10, rep=40, return_mode="median")


def tune(
    device: torch.device, out: Path | None = None, time: Callable[[Callable[[], object]], float] = median_ms
) -> Path:
    """Time all candidates and write the table, to where `tile_sizes` finds it unless `out` says otherwise.

    What is found is kept beside it as `.part`, from which an interrupted run goes on.

    Raises:
        ValueError: for some kernel no candidate runs on this device.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    out = out or TABLES / f"{slug(name)}.json"
    part = out.with_name(out.name + ".part")
    found: Table = json.loads(part.read_text()) if part.exists() else {kernel: {} for kernel in KERNELS}
    with Progress() as progress:
        task = progress.add_task("tuning", total=len(DTYPES) * (3 * len(WIDTHS) + 3 * len(STATE_WIDTHS)))
        for dtype, width in product(DTYPES, WIDTHS):
            made = calls(dtype, width, device)
            entry = key(dtype, width)
            for kernel, call in made.items():
                if entry not in found[kernel]:
                    progress.update(task, description=f"{kernel}, {entry}")
                    found[kernel][entry] = _fastest(kernel, dtype, width, call, time)
                    part.write_text(json.dumps(found))
                progress.advance(task)
    table = {"device": name, "date": str(date.today()), "triton": triton.__version__, "tiles": found}
    part.write_text(json.dumps(table, indent=1) + "\n")
    part.rename(out)
    return out


def _fastest(
    kernel: str,
    dtype: torch.dtype,
    width: int,
    call: Callable[[], object],
    time: Callable[[Callable[[], object]], float],
) -> list[int]:
    entry, sizes_to_try = key(dtype, width), list(candidates(kernel, dtype, width))

    def call_all() -> None:
        for sizes in sizes_to_try:
            with trial(kernel, entry, sizes):
                call()

    if torch.cuda.is_available():
        compile_ahead(("tune", kernel, entry), call_all)
    times: dict[tuple[int, ...], float] = {}
    for sizes in sizes_to_try:
        with trial(kernel, entry, sizes):
            try:
                times[tuple(sizes)] = time(call)
            except triton.runtime.errors.OutOfResources:
                continue
    if not times:
        raise ValueError(f"no tile of {kernel} runs for {entry} on this device; is its shared memory below 64 KB?")
    return list(min(times.items(), key=lambda item: item[1])[0])
