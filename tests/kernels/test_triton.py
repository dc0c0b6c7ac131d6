"""The Triton forms against the plain one in float64: on a GPU if there is one, else in Triton's interpreter.

Uninitialised memory is filled with NaN throughout, so that what a kernel does not write is seen.
"""

import json
from itertools import combinations_with_replacement

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from brumby.kernels import RetentionState, power_retention
from brumby.kernels.power_retention import FORMS, _expand

pytest.importorskip("triton")
from brumby.kernels import state_form, triton_forms

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS[DEVICE, "triton"] = triton_forms.retention
F32, BF16 = torch.float32, torch.bfloat16
# Of tensors, and of gates, whose gradients are sums of differences. bfloat16's are the operator's promise.
LIMITS = {F32: (2e-5, 1e-4), BF16: (4e-3, 1e-2)}


@pytest.fixture(autouse=True)
def _poisoned():
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills empty memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


def make(
    size: tuple[int, ...], gates: float | None, dtype: torch.dtype, documents: list[int] | None, states: bool
) -> tuple[list[Tensor | None], RetentionState | None, Tensor, RetentionState | None]:
    """q, k, v, log_g; an initial state; gradients of y and of the final state. `gates` is the logit's mean."""
    B, T, HQ, H, K, V = size
    random = torch.Generator(DEVICE).manual_seed(sum(size))

    def randn(*shape: int, dtype: torch.dtype = F32) -> Tensor:
        return torch.randn(*shape, generator=random, device=DEVICE).to(dtype)

    q, k, v, dy = (randn(B, T, heads, D, dtype=dtype) for heads, D in ((HQ, K), (H, K), (H, V), (HQ, V)))
    log_g = None if gates is None else F.logsigmoid(randn(B, T, H) + gates)
    if not states:
        return [q, k, v, log_g], None, dy, None
    N, D = B if documents is None else len(documents) - 1, K * (K + 1) // 2
    past = _expand(randn(N, H, 8, K), 2)  # [N, H, 8, D]
    initial = RetentionState(past.mT @ randn(N, H, 8, V), past.sum(2))
    return [q, k, v, log_g], initial, dy, RetentionState(randn(N, H, D, V), randn(N, H, D))


def run(
    inputs: list[Tensor | None], initial: RetentionState | None, dy: Tensor, d_final: RetentionState | None,
    dtype: torch.dtype, **options,
) -> dict[str, Tensor]:  # fmt: skip
    """y, the final state, and all gradients."""
    wide = torch.promote_types(dtype, F32)
    leaves = [
        None if x is None else x.detach().to(dtype if name != "log_g" else wide, copy=True).requires_grad_()
        for name, x in zip(("q", "k", "v", "log_g"), inputs, strict=True)
    ]
    state = None
    if initial is not None:
        state = RetentionState(*(x.to(wide, copy=True).requires_grad_() for x in initial))
    out = power_retention(*leaves, initial_state=state, return_final_state=d_final is not None, **options)
    y, final = (out, None) if d_final is None else out
    loss = (y * dy).sum()
    if d_final is not None:
        loss = loss + sum((a * b).sum() for a, b in zip(final, d_final, strict=True))
    loss.backward()
    result = {"y": y.detach()}
    result |= {f"d{n}": x.grad for n, x in zip(("q", "k", "v", "log_g"), leaves, strict=True) if x is not None}
    if state is not None:
        result |= {"s": final.s.detach(), "z": final.z.detach(), "ds": state.s.grad, "dz": state.z.grad}
    return result


def error(x: Tensor, reference: Tensor) -> float:
    """Relative, root mean square; NaN stays NaN."""
    return float((x.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30))


# (B, T, HQ, H, K, V), gates, documents, power, chunk, states: awkward lengths, head dims, everything at least once
CASES = {
    "T1": ((2, 1, 2, 1, 64, 64), 4.0, None, 2, None, False),
    "R5": ((1, 150, 5, 1, 64, 64), 4.0, None, 2, None, False),
    "B2-R3-no-gates": ((2, 70, 6, 2, 64, 64), None, None, 2, None, False),
    "D96-p4": ((1, 70, 2, 1, 96, 96), 4.0, None, 4, None, False),
    "K64-V128": ((1, 100, 2, 1, 64, 128), 4.0, None, 2, None, False),
    "D256": ((1, 40, 1, 1, 256, 256), 4.0, None, 2, None, False),
    "strong-gates": ((1, 520, 1, 1, 64, 64), -1.0, None, 2, None, False),
    "packed": ((1, 200, 3, 1, 64, 64), 4.0, [0, 1, 3, 3, 90, 200], 2, None, False),
    "packed-no-gates": ((1, 150, 2, 1, 64, 64), None, [0, 70, 71, 150], 2, None, False),
    "chunks": ((1, 300, 2, 1, 64, 64), 6.0, None, 2, 128, False),
    "chunks-of-100": ((2, 150, 1, 1, 64, 64), None, None, 2, 100, False),
    "chunks-packed": ((1, 400, 1, 1, 64, 64), 6.0, [0, 1, 130, 256, 300, 400], 2, 128, False),
    "states": ((2, 150, 2, 1, 64, 64), 4.0, None, 2, 128, True),
    "states-attention": ((1, 5, 2, 1, 64, 128), None, None, 2, None, True),
    "states-packed": ((1, 90, 1, 1, 64, 64), 4.0, [0, 3, 3, 90], 2, None, True),
    "D128-chunks": ((1, 150, 2, 1, 128, 64), 5.0, None, 2, 128, False),
}
# What an interpreter would take too long for
LARGE = {
    "L-2k-b4": ((4, 2048, 10, 2, 128, 128), 6.0, None, 2, None, False),
    "L-D64": ((1, 3000, 6, 2, 64, 64), 8.0, None, 2, None, False),
    "L-D96": ((1, 1111, 6, 2, 96, 96), 8.0, None, 2, None, False),
    "L-D256": ((1, 1111, 4, 2, 256, 256), 8.0, None, 2, None, False),
    "L-p4": ((1, 1500, 10, 2, 128, 128), 8.0, None, 4, None, False),
    "L-no-gates": ((1, 1500, 10, 2, 128, 128), None, None, 2, None, False),
    "L-packed": ((1, 3000, 10, 2, 128, 128), 6.0, [0, 1, 2, 1500, 1501, 2900, 3000], 2, None, False),
    "L-strong-gates": ((1, 4096, 10, 2, 128, 128), 4.5, None, 2, None, False),
    "L-chunks": ((1, 4000, 10, 2, 128, 128), 8.0, None, 2, 1024, False),
    "L-chunks-V64": ((2, 1500, 4, 2, 128, 64), 8.0, None, 2, 512, False),
    "L-chunks-no-gates": ((1, 2500, 10, 2, 128, 128), None, None, 2, 512, False),
    "L-chunks-packed": ((1, 3000, 10, 2, 128, 128), 6.0, [0, 1, 700, 1024, 3000], 2, 512, False),
    "L-states": ((2, 1500, 10, 2, 128, 128), 8.0, None, 2, 512, True),
}
# With a sink beside the tokens, the others without
WITH_SINK = ("R5", "D96-p4", "packed", "chunks", "states", "L-2k-b4", "L-D64", "L-chunks-packed", "L-states")
if DEVICE == "cpu":
    GRID = [pytest.param(name, F32, id=name) for name in CASES]
else:
    GRID = [
        pytest.param(name, dtype, id=f"{name}-{dtype}".replace("torch.", ""), marks=pytest.mark.gpu)
        for name in CASES | LARGE
        for dtype in (F32, BF16)
    ]


@pytest.mark.parametrize(("case", "dtype"), GRID)
def test_forms_equal_the_plain_one(case, dtype):
    size, gates, documents, power, chunk, states = (CASES | LARGE)[case]
    made = make(size, gates, dtype, documents, states)
    options = {"power": power, "chunk_size": chunk, "sink": 5.0 if case in WITH_SINK else 0.0}
    if documents is not None:
        options["cu_seqlens"] = torch.tensor(documents, device=DEVICE, dtype=torch.int32)
    found = run(*made, dtype, implementation="triton", **options)
    again = run(*made, dtype, implementation="triton", **options)
    exact = run(*made, torch.float64, implementation="reference", **options)
    assert found.keys() == exact.keys()
    # Where one key is all there is, y does not depend on q and k: what remains of their gradients is rounding
    quiet = {"dq", "dk", "dlog_g"} if size[1] == 1 else set()
    errors = {name: error(found[name], exact[name]) for name in found.keys() - quiet}
    assert all(e < LIMITS[dtype][name == "dlog_g"] for name, e in errors.items()), errors
    for name in found:
        assert torch.equal(found[name], again[name]), f"{name} differs between two runs"
        assert found[name].isfinite().all(), name


@pytest.mark.parametrize("part", ["s", "z"])
def test_a_loss_of_one_part_of_the_final_state(part):
    inputs, initial, _, _ = make((1, 40, 2, 1, 64, 64), 4.0, F32, None, True)
    found = []
    for dtype, implementation in ((F32, "triton"), (torch.float64, "reference")):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        state = RetentionState(*(x.to(dtype) for x in initial))
        options = {"initial_state": state, "return_final_state": True, "chunk_size": 128}
        _, final = power_retention(*leaves, **options, implementation=implementation)
        getattr(final, part).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for name, ours, exact in zip(("q", "k", "v", "log_g"), *found, strict=True):
        if exact is None or not exact.any():
            assert ours is None or not ours.any(), name
        else:
            assert error(ours, exact) < LIMITS[F32][name == "log_g"], name


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_offsets_beyond_two_to_the_31():
    """The last of many rows equals the same row alone."""
    B, T, HQ, H, D = 9, 2**16, 32, 4, 128
    assert B * T * HQ * D > 2**31
    q, k, v = (torch.randn(B, T, heads, D, device=DEVICE, dtype=BF16) for heads in (HQ, H, H))
    log_g = F.logsigmoid(torch.randn(B, T, H, device=DEVICE) + 8)
    y = power_retention(q, k, v, log_g, chunk_size=1024)
    alone = power_retention(q[-1:], k[-1:], v[-1:], log_g[-1:], chunk_size=1024)
    assert torch.equal(y[-1:], alone)


@pytest.mark.parametrize("chunk", [None, 128])
def test_checkpointing_changes_no_gradient(chunk):
    made = make((1, 150, 2, 1, 64, 64), 4.0, F32, None, False)
    leaves = [x.detach().requires_grad_() for x in made[0]]
    wanted = run(*made, F32, implementation="triton", chunk_size=chunk)

    def form(*x: Tensor) -> Tensor:
        return power_retention(*x, chunk_size=chunk, implementation="triton")

    checkpoint(form, *leaves, use_reentrant=False).backward(made[2])
    for name, x in zip(("dq", "dk", "dv", "dlog_g"), leaves, strict=True):
        assert torch.equal(x.grad, wanted[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no bfloat16")
def test_autocast_casts():
    q, k, v, log_g = make((1, 150, 2, 1, 64, 64), 4.0, F32, None, False)[0]
    with torch.autocast(DEVICE, BF16):
        y = power_retention(q, k, v, log_g, implementation="triton")
    assert y.dtype == BF16
    assert torch.equal(y, power_retention(q.to(BF16), k.to(BF16), v.to(BF16), log_g, implementation="triton"))


@pytest.mark.parametrize("chunk", [None, 128])
def test_operators_are_registered_in_full(chunk):
    """Schemas, fake implementations and autograd, by PyTorch's own check."""
    q, k, v, log_g = (x.requires_grad_() for x in make((1, 150, 2, 1, 64, 64), 4.0, F32, None, False)[0])
    if chunk is None:
        torch.library.opcheck(triton_forms._attention, (q, k, v, log_g, None, 2, 1e-20))
    else:
        torch.library.opcheck(triton_forms._chunks, (q, k, v, log_g, None, None, None, chunk, 1e-20, False))
        N, D = 1, 64 * 65 // 2
        s, z = torch.randn(N, 1, D, 64, device=DEVICE), torch.rand(N, 1, D, device=DEVICE)
        torch.library.opcheck(
            triton_forms._chunks, (q, k, v, log_g, s, z, None, chunk, 1e-20, True), test_utils="test_faketensor"
        )


def test_compiles_in_one_graph():
    made = make((1, 150, 2, 1, 64, 64), 4.0, F32, None, False)
    leaves = [x.detach().requires_grad_() for x in made[0]]
    wanted = run(*made, F32, implementation="triton", chunk_size=128)
    form = torch.compile(
        lambda *x: power_retention(*x, chunk_size=128, implementation="triton") * 1,
        fullgraph=True,
        backend="aot_eager",
    )
    y = form(*leaves)
    y.backward(made[2])
    assert torch.equal(y, wanted["y"])
    for name, x in zip(("dq", "dk", "dv", "dlog_g"), leaves, strict=True):
        assert torch.equal(x.grad, wanted[name]), name


def pairs(K: int) -> list[tuple[int, int]]:
    """i and j of every row of the tiles, window by window as `state_products` describes them."""
    if K == 64:
        return [(i, j) for m in range(32) for i in (m, 32 + m) for j in range(64)]
    blocks = [range(32 * n, 32 * n + 32) for n in range(4)]
    found = [(i, j) for i in blocks[0] for j in range(128)]
    for m in range(32):
        found += [(32 + m, j) for j in range(32, 128)] + [(96 + m, j) for j in blocks[3]]
    for m in range(16):
        found += [(64 + m, j) for j in range(64, 128)] + [(80 + m, j) for j in (*blocks[3], *blocks[2])]
    return found


@pytest.mark.parametrize("K", [64, 128])
def test_tiles_hold_what_a_state_holds(K):
    """Rows are sums of k_i k_j v, each pair of blocks once; what comes back is the state."""
    keys, values = torch.randn(1, 1, 9, K, dtype=torch.float64), torch.randn(1, 1, 9, 3, dtype=torch.float64)
    phi = _expand(keys, 2)
    state = RetentionState((phi.mT @ values).float(), phi.sum(2).float())
    s, z = state_form.to_tiles(state, K)
    i, j = torch.tensor(pairs(K)).T
    torch.testing.assert_close(s, ((keys[..., i] * keys[..., j]).mT @ values).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(z, (keys.mT @ keys).float(), rtol=1e-4, atol=1e-4)
    for x, y in zip(state_form.from_tiles(s, z), state, strict=True):
        torch.testing.assert_close(x, y)
    assert {tuple(sorted(pair)) for pair in pairs(K)} == set(combinations_with_replacement(range(K), 2))


def test_states_without_a_kernel_are_made_with_a_warning():
    q, k, v, log_g = make((1, 4, 2, 1, 96, 96), 4.0, F32, None, False)[0]
    with pytest.warns(UserWarning, match="have no kernel"):
        _, state = power_retention(q, k, v, log_g, return_final_state=True, implementation="triton")
    assert state.s.shape == (1, 1, 96 * 97 // 2, 96)


def test_rows_fill_what_the_copy_engine_writes_at_once():
    """TMA writes shared memory at multiples of 128 bytes; a row of the expanded keys has BT numbers."""
    from brumby.kernels import tiles, tune

    sizes = {"bfloat16": 2, "float32": 4}
    for kernel in ("sum", "query", "gradient"):
        rows = [(key, tile) for path in tiles.TABLES.glob("*.json")
                for key, tile in json.loads(path.read_text())["tiles"][kernel].items()]  # fmt: skip
        for dtype in (F32, BF16):
            rows += [(tiles.key(dtype, 64), tile) for tile in tune.candidates(kernel, dtype, 64)]
        assert rows
        for key, tile in rows:
            assert tile[0] * sizes[key.split()[0]] % 128 == 0, (kernel, key, tile)


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_tiles_to_try_leave_registers_beside_their_sums(dtype, width):
    from brumby.kernels import tune

    for kernel, block, sums in (("forward", 0, 1), ("query_gradient", 0, 1), ("key_value_gradient", 1, 2)):
        tried = list(tune.candidates(kernel, dtype, width))
        per_thread = [sums * tile[block] * width / (32 * tile[2]) for tile in tried]
        assert 64 <= max(per_thread) <= 128, (kernel, tried)  # of 255 that a thread has


@pytest.mark.skipif(DEVICE == "cuda", reason="what is tested is the choice, not the time")
def test_tune_writes_the_fastest_tiles_and_resumes(tmp_path, monkeypatch):
    from brumby.kernels import tiles, tune

    monkeypatch.setattr(tune, "T", 256)
    monkeypatch.setattr(tune, "WIDTHS", (64,))
    monkeypatch.setattr(tune, "DTYPES", (F32,))
    sizes = {"forward": [[32, 32, 4, 1], [64, 32, 4, 1]], "sum": [[32, 4, 1], [64, 4, 1]]}
    default = {"query_gradient": [[32, 32, 4, 1]], "key_value_gradient": [[32, 32, 4, 1]]}
    monkeypatch.setattr(tune, "candidates", lambda kernel, *_: (sizes | default).get(kernel, [[32, 4, 1]]))
    monkeypatch.setattr(tune, "calls", lambda *_: {kernel: lambda: None for kernel in tiles.KERNELS})
    timed = []

    def time(_) -> float:
        ((kernel, _entry), chosen) = next(iter(tiles._trial.items()))
        assert tiles.tile_sizes(kernel, F32, 64, torch.device("cpu")) == chosen
        if kernel == "sum" and not timed.count("interrupted"):
            timed.append("interrupted")
            raise KeyboardInterrupt
        timed.append(kernel)
        return -float(chosen[0])  # the largest is the fastest

    out = tmp_path / "table.json"
    with pytest.raises(KeyboardInterrupt):
        tune.tune(torch.device("cpu"), out, time)
    assert not out.exists()
    assert not tiles._trial
    assert tune.tune(torch.device("cpu"), out, time) == out
    assert timed.count("forward") == 2  # not again after the interruption
    table = json.loads(out.read_text())["tiles"]
    assert table["forward"] == {"float32 64": [64, 32, 4, 1]}
    assert table["sum"] == {"float32 64": [64, 4, 1]}
    assert table.keys() == tiles.KERNELS.keys()
    assert list(tmp_path.iterdir()) == [out]


def test_committed_tables_are_complete():
    from brumby.kernels import tiles

    for path in tiles.TABLES.glob("*.json"):
        table = json.loads(path.read_text())["tiles"]
        assert table.keys() == tiles.KERNELS.keys()
        for kernel, names in tiles.KERNELS.items():
            widths = (64, 128) if kernel in ("sum", "query", "gradient") else tiles.WIDTHS
            expected = {tiles.key(dtype, width) for dtype in (F32, BF16) for width in widths}
            assert table[kernel].keys() == expected, (path.name, kernel)
            assert all(len(sizes) == len(names) for sizes in table[kernel].values())


BAD = {
    "head dim": ((1, 4, 1, 1, 60, 60), F32, {}, "multiples of 8"),
    "too wide": ((1, 4, 1, 1, 264, 264), F32, {}, "up to 256"),
    "power": ((1, 4, 1, 1, 64, 64), F32, {"power": 6}, "power is 6"),
    "dtype": ((1, 4, 1, 1, 64, 64), torch.float64, {}, "float64"),
    "half": ((1, 4, 1, 1, 64, 64), torch.float16, {}, "overflows"),
    "documents": ((1, 4, 1, 1, 64, 64), F32, {"cu_seqlens": torch.tensor([0, 9])}, "rise from 0 to T = 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_there_is_no_kernel_for_is_refused(name):
    size, dtype, options, message = BAD[name]
    B, T, HQ, H, K, V = size
    q, k, v = (torch.randn(B, T, heads, D, device=DEVICE).to(dtype) for heads, D in ((HQ, K), (H, K), (H, V)))
    with pytest.raises(ValueError, match=message):
        power_retention(q, k, v, implementation="triton", **options)
