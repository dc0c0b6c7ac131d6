"""Power retention's plain forms against the bare recurrence, against each other and against `retention`."""

import ast
import importlib.util
import inspect
import itertools
import math
import sys
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from brumby.kernels import RetentionState, power_retention, power_retention_step

module = sys.modules[power_retention.__module__]  # `brumby.kernels.power_retention` names the function

FORMS = {
    "attention": {},
    "chunk16": {"chunk_size": 16},
    "chunk64": {"chunk_size": 64, "implementation": "chunk"},
    "recurrent": {"implementation": "recurrent"},
}
# B, T, H, R, K, V, power: awkward lengths, more than one block of 128 rows, V != K
SIZES = [
    (2, 1, 2, 1, 8, 8, 2),
    (1, 2, 1, 3, 8, 4, 4),
    (2, 63, 2, 3, 8, 5, 2),
    (1, 64, 1, 5, 16, 16, 2),
    (2, 65, 2, 1, 4, 12, 4),
    (1, 144, 2, 5, 8, 8, 2),
    (1, 300, 1, 3, 5, 3, 2),
]
GATES = ["none", "weak", "strong"]


def name(size: tuple[int, ...]) -> str:
    return "-".join(f"{n}{x}" for n, x in zip(("B", "T", "H", "R", "K", "V", "p"), size, strict=True))


def make(
    size: tuple[int, ...], gates: str, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[Tensor]]:
    """(q, k, v, log_g or nothing) and a state (s, z) that some earlier keys and values left, all leaves.

    Queries and keys are of either sign but never orthogonal: the recurrence loses digits where q . k cancels.
    """
    B, T, H, R, K, V, power = size
    random = torch.Generator().manual_seed(sum(size))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    def direction(*shape: int) -> Tensor:
        entries = 0.1 + torch.rand(*shape, generator=random, dtype=torch.float64)
        return entries * randn(*shape[:-1], 1).sign() * torch.tensor([1.0, -1.0]).repeat(shape[-1])[: shape[-1]]

    inputs = [direction(B, T, H * R, K), direction(B, T, H, K), randn(B, T, H, V)]
    if gates == "weak":
        inputs.append(F.logsigmoid(randn(B, T, H) + 3))
    elif gates == "strong":
        inputs.append(-30 * torch.rand(B, T, H, generator=random, dtype=torch.float64) ** 4)
    phi = fold(powers(direction(B, H, 7, K), power), K, power)  # [B, H, 7, D]
    state = [phi.mT @ randn(B, H, 7, V), phi.sum(2)]
    inputs, state = ([x.to(dtype).requires_grad_() for x in xs] for xs in (inputs, state))
    return inputs, state


# The recurrence, written with the full power x (x) x ... of K^P entries instead of the D monomials


def powers(x: Tensor, power: int) -> Tensor:
    full = x
    for _ in range(power - 1):
        full = (full[..., :, None] * x[..., None, :]).flatten(-2)
    return full


def monomials(K: int, power: int) -> tuple[list[tuple[int, ...]], Tensor]:
    rows = list(itertools.combinations_with_replacement(range(K), power))
    counts = [math.prod(math.factorial(row.count(i)) for i in set(row)) for row in rows]
    return rows, torch.tensor([math.factorial(power) / n for n in counts], dtype=torch.float64).sqrt()


def fold(full: Tensor, K: int, power: int) -> Tensor:
    """[..., K^P] -> [..., D]: the documented order and weights of a state."""
    rows, weights = monomials(K, power)
    places = [sum(i * K ** (power - 1 - n) for n, i in enumerate(row)) for row in rows]
    return full[..., places] * weights


def unfold(state: Tensor, K: int, power: int) -> Tensor:
    """[..., D] -> [..., K^P]"""
    rows, weights = monomials(K, power)
    place = {row: n for n, row in enumerate(rows)}
    places = [place[tuple(sorted(row))] for row in itertools.product(range(K), repeat=power)]
    return (state / weights)[..., places]


def recurrence(
    inputs: list[Tensor],
    power: int,
    state: list[Tensor] | None = None,
    scale: float | None = None,
    sink: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, log_g = [*inputs, None][:4]
    B, T, H, K = k.shape
    R, scale = q.shape[2] // H, K**-0.5 if scale is None else scale
    if state is None:
        s, z = k.new_zeros(B, H, K**power, v.shape[-1]), k.new_zeros(B, H, K**power)
    else:
        s, z = unfold(state[0].mT, K, power).mT, unfold(state[1], K, power)
    ys = []
    for t in range(T):
        if log_g is not None:
            s, z = s * log_g[:, t, :, None, None].exp(), z * log_g[:, t, :, None].exp()
        phi = powers(k[:, t], power)
        s, z = s + phi[..., None] * v[:, t, :, None, :], z + phi
        query = powers(q[:, t] * scale, power)
        heads = [h // R for h in range(H * R)]
        ys.append((query[..., None] * s[:, heads]).sum(-2) / ((query * z[:, heads]).sum(-1, keepdim=True) + sink))
    return torch.stack(ys, 1), fold(s.mT, K, power).mT, fold(z, K, power)


def cotangents(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.dtype) for x in outputs]


def grads(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(outputs, inputs, cotangents(outputs), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def error(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference over that of what is expected (or 1e-3: some are zero but for rounding)."""
    rms = expected.double().square().mean().sqrt().clamp_min(1e-3)
    return ((found.double() - expected.double()).square().mean().sqrt() / rms).item()


def assert_close(found, expected, tolerance: float = 1e-10) -> None:
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, f"{n}: {a.shape} {b.shape}"
        assert error(a, b) < tolerance, f"tensor {n} is {error(a, b):.1e} off"


@cache
def expected(size: tuple[int, ...], gates: str, with_state: bool) -> tuple[list[Tensor], list[Tensor]]:
    inputs, state = make(size, gates)
    outputs = recurrence(inputs, size[-1], state if with_state else None)
    leaves = inputs + state if with_state else inputs
    return [x.detach() for x in outputs], grads(outputs, leaves)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("size", SIZES, ids=name)
def test_forms_with_states(size, gates, form):
    inputs, state = make(size, gates)
    y, final = power_retention(
        *inputs, power=size[-1], initial_state=RetentionState(*state), return_final_state=True, **FORMS[form]
    )
    outputs, gradients = expected(size, gates, True)
    assert_close((y, *final), outputs)
    assert_close(grads((y, *final), inputs + state), gradients)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("size", SIZES, ids=name)
def test_forms_without_states(size, gates, form):
    inputs, _ = make(size, gates)
    y = power_retention(*inputs, power=size[-1], **FORMS[form])
    outputs, _ = expected(size, gates, False)
    assert_close([y], outputs[:1])
    naive = recurrence(inputs, size[-1])[:1] if size[1] < 100 else None
    if naive is not None:
        assert_close(grads((y,), inputs), grads(naive, inputs))
    y, final = power_retention(*inputs, power=size[-1], return_final_state=True, **FORMS[form])
    assert_close((y, *final), outputs)
    assert_close(grads((y, *final), inputs), expected(size, gates, False)[1])


@cache
def expected_documents(lengths: tuple[int, ...], gates: str, with_state: bool):
    """Each document by itself: inputs, states, outputs, their gradients, the gradients of y alone."""
    inputs, _ = make((1, sum(lengths), 2, 3, 8, 5, 2), gates)
    _, state = make((len(lengths), 1, 2, 3, 8, 5, 2), gates)
    leaves = inputs + state if with_state else inputs
    documents = []
    for n, (end, length) in enumerate(zip(itertools.accumulate(lengths), lengths, strict=True)):
        past = [x[n : n + 1] for x in state] if with_state else None
        if length:
            documents.append(recurrence([x[:, end - length : end] for x in inputs], 2, past))
        else:
            nothing = inputs[2].new_zeros(1, 0, 6, 5)
            documents.append((nothing, *(past or [torch.zeros_like(x[:1]) for x in state])))
    outputs = tuple(map(torch.cat, (*zip(*documents, strict=True),)[1:]))
    outputs = (torch.cat([y for y, _, _ in documents], 1), *outputs)
    return inputs, state, outputs, grads(outputs, leaves), grads(outputs[:1], inputs)


@pytest.mark.parametrize("with_state", [False, True], ids=["fresh", "state"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gates", ["none", "strong"])
@pytest.mark.parametrize(
    "lengths",
    [(1,), (5, 0, 1, 130, 1, 64), (0, 40, 17, 0), (1,) * 9, (50, 100)],
    ids=lambda x: "-".join(map(str, x)),
)
def test_packed_documents_are_separate_documents(lengths, gates, form, with_state):
    inputs, state, outputs, gradients, gradients_of_y = expected_documents(lengths, gates, with_state)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    past = RetentionState(*state) if with_state else None
    y, final = power_retention(
        *inputs, initial_state=past, cu_seqlens=offsets, return_final_state=True, **FORMS[form]
    )
    assert_close((y, *final), outputs)
    assert_close(grads((y, *final), inputs + state if with_state else inputs), gradients)
    y = power_retention(*inputs, initial_state=past, cu_seqlens=offsets.long(), **FORMS[form])
    assert_close([y], outputs[:1])
    assert_close(grads((y,), inputs), gradients_of_y)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("form", ["attention", "chunk16", "recurrent"])
@pytest.mark.parametrize(
    ("size", "chunk"),
    [
        ((2, 144, 2, 3, 16, 16, 2), None),
        ((1, 65, 1, 5, 16, 16, 4), None),
        ((2, 128, 2, 3, 16, 16, 2), 64),
        ((1, 144, 1, 1, 32, 32, 2), 64),
    ],
    ids=lambda x: name(x) if isinstance(x, tuple) else f"chunk{x}",
)
def test_against_the_peer(size, chunk, form, gates):
    """Up to the 1e-6 its reference adds to the normaliser, the 1e-7 to |s|, and its float32 gate sums."""
    peer = pytest.importorskip("retention.reference")
    inputs, _ = make(size, gates)
    if gates != "none":
        inputs[3] = inputs[3].detach().float().requires_grad_()
    y = power_retention(*inputs, power=size[-1], **FORMS[form])
    theirs = peer.power_retention(*inputs, deg=size[-1], chunk_size=chunk)
    assert_close([y], [theirs], 1e-5)
    assert_close(grads((y,), inputs), grads((theirs,), inputs), 3e-5)


def test_state_against_the_peer():
    """With K = 16 the peer's state is the full outer product; it decays by the same convention."""
    peer = pytest.importorskip("retention.reference")
    inputs, _ = make((2, 128, 2, 1, 16, 16, 2), "weak")
    inputs[3] = inputs[3].detach().float()
    _, s, z = peer.power_retention(*inputs, chunk_size=64, return_final_state=True)
    _, state = power_retention(*inputs, return_final_state=True)
    assert_close(state, (fold(s.mT, 16, 2).mT, fold(z, 16, 2)), 1e-5)


def test_chunk_size_chooses_the_form(monkeypatch):
    inputs, _ = make((1, 65, 1, 1, 4, 4, 2), "weak")
    asked = []
    for form in ("attention", "chunk", "recurrent"):
        monkeypatch.setitem(
            module.FORMS,
            ("cpu", form),
            lambda *_, form=form, **kw: (asked.append((form, kw["chunk_size"])), None),
        )
    for chunk_size in (None, 64, 65, 1000):
        power_retention(*inputs, chunk_size=chunk_size)
    assert asked == [("attention", 65), ("chunk", 64), ("attention", 65), ("attention", 65)]


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("start", [None, 20])
@pytest.mark.parametrize("power", [2, 4])
def test_decoding_equals_the_whole(gates, start, power):
    inputs, _ = make((2, 33, 2, 3, 4, 5, power), gates)
    outputs, state = recurrence(inputs, power)[0], None
    if start is not None:  # prefill, then decode
        _, state = power_retention(*(x[:, :start] for x in inputs), power=power, return_final_state=True)
    for t in range(start or 0, 33):
        q, k, v, log_g = [*(x[:, t] for x in inputs), None][:4]
        y, state = power_retention_step(q, k, v, log_g, state, power=power)
        assert_close([y], [outputs[:, t]])


def test_scale():
    inputs, state = make((1, 40, 1, 2, 4, 4, 2), "weak")
    outputs = recurrence(inputs, 2, state, scale=0.3)
    for form in FORMS.values():
        y, final = power_retention(
            *inputs, scale=0.3, initial_state=RetentionState(*state), return_final_state=True, **form
        )
        assert_close((y, *final), outputs)
    y, _ = power_retention_step(*(x[:, 0] for x in inputs), RetentionState(*state), scale=0.3)
    assert_close([y], [outputs[0][:, 0]])


@pytest.mark.parametrize("form", FORMS)
def test_sink(form):
    inputs, state = make((1, 40, 1, 2, 4, 4, 2), "weak")
    leaves, options = inputs + state, {"initial_state": RetentionState(*state), "return_final_state": True}
    outputs = recurrence(inputs, 2, state, sink=0.7)
    found = power_retention(*inputs, sink=0.7, **options, **FORMS[form])
    found = (found[0], *found[1])
    assert_close(found, outputs)
    assert_close(grads(found, leaves), grads(outputs, leaves))
    y, _ = power_retention_step(*(x[:, 0] for x in inputs), RetentionState(*state), sink=0.7)
    assert_close([y], [outputs[0][:, 0]])
    assert error(y, recurrence(inputs, 2, state)[0][:, 0]) > 1e-3


@pytest.mark.parametrize("sink", [-1.0, math.inf, math.nan])
def test_sink_is_a_weight(sink):
    inputs, _ = make((1, 2, 1, 1, 4, 4, 2), "none")
    with pytest.raises(ValueError, match="sink is"):
        power_retention(*inputs, sink=sink)
    with pytest.raises(ValueError, match="sink is"):
        power_retention_step(*(x[:, 0] for x in inputs), None, None, sink=sink)


@pytest.mark.parametrize("power", [2, 4])
def test_state_of_one_token(power):
    """Order and weights of the expanded key, as documented."""
    inputs, _ = make((1, 1, 2, 1, 5, 3, power), "none")
    _, state = power_retention(*inputs, power=power, return_final_state=True)
    rows, weights = monomials(5, power)
    k, v = inputs[1][:, 0], inputs[2][:, 0]
    z = torch.stack([k[..., list(row)].prod(-1) for row in rows], -1) * weights
    assert_close(state, (z[..., None] * v[..., None, :], z))


@cache
def exact() -> tuple[list[Tensor], list[Tensor]]:
    """Inputs that bfloat16 holds, in float64, and then dy; y and the gradients of q, k, v, log_g."""
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 256, heads, 32, generator=random) for heads in (6, 2, 2)]
    inputs.append(F.logsigmoid(torch.randn(1, 256, 2, generator=random) + 3))
    inputs = [x.bfloat16().double().requires_grad_() for x in inputs]
    y = recurrence(inputs, 2)[0]
    dy = torch.randn(y.shape, generator=random).bfloat16().double()
    return [*inputs, dy], [y, *torch.autograd.grad(y, inputs, dy)]


def relative_errors(dtype: torch.dtype, form: dict) -> list[float]:
    (*inputs, log_g, dy), reference = exact()
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    inputs.append(log_g.detach().float().requires_grad_())
    y = power_retention(*inputs, **form)
    assert y.dtype == dtype
    found = torch.autograd.grad(y, inputs, dy.to(dtype))
    return [error(a, b) for a, b in zip((y, *found), reference, strict=True)]


@pytest.mark.parametrize("form", FORMS)
def test_float32_precision(form):
    y, dq, dk, dv, dlog_g = relative_errors(torch.float32, FORMS[form])
    assert max(y, dv) < 2e-6
    assert max(dq, dk) < 1e-5
    assert dlog_g < 3e-5


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_loses_only_the_rounding_of_results(form):
    """That is 1.7e-3 RMS (2^-9 at most); sums in bfloat16 would cost several times as much."""
    y, dq, dk, dv, dlog_g = relative_errors(torch.bfloat16, FORMS[form])
    assert max(y, dq, dk, dv) < 2.5e-3
    assert dlog_g < 1e-5  # of gates that stay float32, taken from dq and dk before they are rounded


def test_gates_keep_their_precision_behind_strong_ones():
    """float32 sums of log gates near -60000 are 4e-3 apart: as much error in every weight, if kept so."""
    inputs, _ = make((1, 2100, 1, 1, 4, 4, 2), "weak", torch.float32)
    with torch.no_grad():
        inputs[3][:, :2000] = -30.0
        y = power_retention(*inputs)
        fresh = power_retention(*(x[:, 1999:] for x in inputs))
    assert error(y[:, 2000:], fresh[:, 1:]) < 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_padding_answers_zero_with_finite_gradients(dtype, form):
    inputs, _ = make((2, 70, 2, 3, 8, 5, 2), "weak", dtype)
    q, k, v = (x.detach() for x in inputs[:3])
    k[:, :33] = 0  # padding on the left, and one query that sees keys but asks for nothing
    q[:, 50] = 0
    leaves = [q, k, v, inputs[3].detach().float()]
    for x in leaves:
        x.requires_grad_()
    y = power_retention(*leaves, **FORMS[form])
    assert y[:, :33].eq(0).all()
    assert y[:, 50].eq(0).all()
    assert y[:, 33].ne(0).any()
    y.float().square().sum().backward()
    for x in leaves:
        assert x.grad.isfinite().all()
    for x in leaves[:3]:
        assert x.grad[:, :33].eq(0).all()
    # that of log_g is a running sum over later tokens, zero but for rounding
    assert leaves[3].grad[:, :33].abs().max() < 1e-4 * leaves[3].grad.abs().max()


@pytest.mark.parametrize("power", [2, 4])
@pytest.mark.parametrize("form", ["attention", "chunk", "recurrent"])
def test_gradcheck(form, power):
    inputs, state = make((1, 5, 1, 2, 2, 2, power), "weak")

    def function(q, k, v, log_g, s, z):
        y, final = power_retention(
            *(q, k, v, log_g),
            power=power,
            chunk_size=2,
            initial_state=RetentionState(s, z),
            return_final_state=True,
            implementation=form,
            cu_seqlens=torch.tensor([0, 5]),
        )
        return (y, *final)

    assert torch.autograd.gradcheck(function, (*inputs, *state))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_activation_checkpointing(form, reentrant):
    inputs, _ = make((1, 40, 2, 3, 8, 5, 2), "weak")

    def function(*inputs):
        return power_retention(*inputs, **FORMS[form])

    y = checkpoint(function, *inputs, use_reentrant=reentrant)
    for x in inputs:
        x.grad = None
    y.sum().backward()
    assert_close([x.grad for x in inputs], torch.autograd.grad(function(*inputs).sum(), inputs), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_casts_inputs_but_no_sum(form):
    inputs, state = make((1, 40, 2, 3, 8, 5, 2), "weak", torch.float32)
    rounded = [x.detach().bfloat16().requires_grad_() for x in inputs[:3]] + inputs[3:]
    options = {"initial_state": RetentionState(*state), "return_final_state": True, **FORMS[form]}
    with torch.autocast("cpu", torch.bfloat16):
        y, final = power_retention(*inputs, **options)
    wanted, final_wanted = power_retention(*rounded, **options)
    assert y.dtype == torch.bfloat16
    assert final.s.dtype == torch.float32
    assert_close((y, *final), (wanted, *final_wanted), 1e-7)
    assert_close(grads((y,), inputs), grads((wanted,), rounded), 1e-2)


def test_nothing_quadratic_is_saved():
    """What autograd keeps of the attention form is linear in T, so 2048 tokens of a whole model fit."""
    kept = []
    inputs, _ = make((1, 512, 1, 3, 8, 8, 2), "weak")
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        power_retention(*inputs)
    assert max(kept) <= 512 * 3 * 9


def test_inference_mode_leaves_training_alone():
    inputs, _ = make((1, 5, 1, 1, 7, 3, 2), "weak")
    with torch.inference_mode():
        power_retention(*inputs, implementation="recurrent")
    power_retention(*inputs, implementation="recurrent").sum().backward()


def test_file_stands_alone(tmp_path):
    """An exported model carries this one file: only the standard library and PyTorch may be imported."""
    source = inspect.getsource(module)
    roots = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert roots - sys.stdlib_module_names == {"torch"}
    path = tmp_path / "power_retention.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("exported_power_retention", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    inputs, _ = make((1, 5, 1, 1, 4, 3, 2), "weak")
    assert torch.equal(copy.power_retention(*inputs), power_retention(*inputs))


ERRORS = {
    "rank": ({"q": torch.zeros(6, 4, 8)}, "q has shape"),
    "no tokens": ({"q": torch.zeros(1, 0, 4, 8)}, "no token"),
    "heads": ({"q": torch.zeros(1, 6, 3, 8)}, "multiple of H"),
    "k": ({"k": torch.zeros(1, 6, 2, 7)}, "k has shape"),
    "v": ({"v": torch.zeros(1, 5, 2, 8)}, "v has shape"),
    "float16": ({"k": torch.zeros(1, 6, 2, 8).half()}, "float16, which overflows"),
    "mixed dtypes": ({"v": torch.zeros(1, 6, 2, 8).bfloat16()}, "one float dtype"),
    "integers": ({n: torch.zeros(1, 6, 2, 8).long() for n in "qkv"}, "one float dtype"),
    "odd power": ({"power": 3}, "power is 3"),
    "zero power": ({"power": 0}, "power is 0"),
    "gate shape": ({"log_g": torch.zeros(1, 6, 4)}, "log_g has shape"),
    "gate dtype": ({"log_g": torch.zeros(1, 6, 2).bfloat16()}, "log_g is torch.bfloat16"),
    "chunk": ({"chunk_size": 0}, "chunk_size is 0"),
    "chunk type": ({"chunk_size": 2.0}, "chunk_size is 2.0"),
    "chunk missing": ({"implementation": "chunk"}, "chunk_size None"),
    "implementation": ({"implementation": "flash"}, "no implementation 'flash' for cpu"),
    "documents dtype": ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens is torch.float32"),
    "documents rank": ({"cu_seqlens": torch.tensor([[0, 6]])}, "cu_seqlens is torch.int64 of shape"),
    "documents end": ({"cu_seqlens": torch.tensor([0, 5])}, "rise from 0 to T = 6"),
    "documents fall": ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "rise from 0 to T = 6"),
    "documents batch": (
        {"cu_seqlens": torch.tensor([0, 6]), **{n: torch.zeros(2, 6, 2, 8) for n in "qkv"}},
        "but B is 2",
    ),
    "state": (
        {"initial_state": RetentionState(torch.zeros(1, 2, 35, 8), torch.zeros(1, 2, 36))},
        "the state has",
    ),
    "state rows": (
        {
            "initial_state": RetentionState(torch.zeros(1, 2, 36, 8), torch.zeros(1, 2, 36)),
            "cu_seqlens": torch.tensor([0, 3, 6]),
        },
        r"expected s \[N, H, D, V\] = \[2, 2, 36, 8\]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_is_wrong(case):
    change, message = ERRORS[case]
    arguments = {"q": torch.zeros(1, 6, 4, 8), "k": torch.zeros(1, 6, 2, 8), "v": torch.zeros(1, 6, 2, 8)}
    with pytest.raises(ValueError, match=message):
        power_retention(**{**arguments, **change})


def test_errors_of_a_step():
    q, k = torch.zeros(1, 4, 8), torch.zeros(1, 2, 8)
    with pytest.raises(ValueError, match="without T"):
        power_retention_step(q[:, None], k, k, None, None)
    with pytest.raises(ValueError, match="the state has shapes"):
        power_retention_step(q, k, k, None, RetentionState(torch.zeros(2, 2, 36, 8), torch.zeros(2, 2, 36)))


def test_no_silent_fallback():
    q, k = torch.zeros(1, 6, 4, 8, device="meta"), torch.zeros(1, 6, 2, 8, device="meta")
    with pytest.raises(ValueError, match="for meta tensors"):
        power_retention(q, k, k)
