"""Decoding with a buffer: the plain form and Triton's kernels against `power_retention` over the whole sequence.

Without a GPU the kernels run in Triton's interpreter, in float32 (tests/conftest.py asks for it).
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from brumby.kernels import (
    DECODERS,
    Decoder,
    RetentionBuffer,
    RetentionState,
    power_retention,
    power_retention_decode,
    power_retention_fold,
)

module = sys.modules[power_retention.__module__]
PLAIN = Decoder(module._decode, module._fold)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]

# B, T, H, R, K, V, C, prefill: one part or two of R, blocks of K and V that are not full, V != K, two blocks of
# buffered tokens, one fold or several
CASES = [
    *(((1, 9, 1, 1, 8, 8, 3, 2), gates) for gates in ("none", "weak", "strong")),
    ((2, 9, 2, 5, 16, 24, 4, 3), "weak"),
    ((1, 6, 2, 6, 40, 16, 3, 2), "none"),
    ((1, 37, 1, 3, 8, 5, 35, 1), "weak"),
    ((1, 3, 1, 20, 128, 128, 2, 1), "weak"),
    ((1, 3, 1, 2, 96, 64, 2, 1), "strong"),
]


@pytest.fixture(autouse=True)
def poison():
    """What is allocated and not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def triton_decoder(monkeypatch):
    decode = pytest.importorskip("brumby.kernels.decode")
    monkeypatch.setitem(DECODERS, DEVICE, Decoder(decode.step, decode.fold))


def make(size: tuple[int, ...], gates: str, dtype: torch.dtype, device: str = DEVICE) -> list[Tensor | None]:
    """q, k, v and log_g (None without gates) of `dtype`; gates are float32 at least."""
    B, T, H, R, K, V, _, _ = size
    random = torch.Generator().manual_seed(sum(size))
    q, k, v, g = (
        torch.randn(B, T, *shape, generator=random, dtype=torch.float64)
        for shape in ((H * R, K), (H, K), (H, V), (H,))
    )
    log_g = {"none": None, "weak": F.logsigmoid(g + 3), "strong": -30 * g.sigmoid() ** 4}[gates]
    inputs = [x.to(device, dtype) for x in (q, k, v)]
    return [*inputs, None if log_g is None else log_g.to(device, torch.promote_types(dtype, torch.float32))]


def decode(
    inputs: list[Tensor | None], size: tuple[int, ...], power: int = 2, **options
) -> tuple[Tensor, RetentionState]:
    """Prefill, then one token at a time: y [B, T - prefill, HQ, V] and the state after the last token."""
    T, C, prefill = size[1], size[6], size[7]
    _, state = power_retention(
        *(x if x is None else x[:, :prefill] for x in inputs), power=power, return_final_state=True,
        implementation="reference", **options,
    )  # fmt: skip
    buffer, ys = RetentionBuffer.empty(inputs[1][:, 0], inputs[2][:, 0], C), []
    for t in range(prefill, T):
        token = (x if x is None else x[:, t] for x in inputs)
        ys.append(power_retention_decode(*token, state, buffer, power=power, **options))
        assert buffer.num_tokens == (t + 1 - prefill) % C
    power_retention_fold(state, buffer, power=power)
    assert buffer.num_tokens == 0
    return torch.stack(ys, 1), state


def whole(
    inputs: list[Tensor | None], size: tuple[int, ...], power: int = 2, **options
) -> tuple[Tensor, RetentionState]:
    """The same from the attention form in float64."""
    inputs = [x if x is None else x.double() for x in inputs]
    y, state = power_retention(
        *inputs, power=power, return_final_state=True, implementation="reference", **options
    )
    return y[:, size[7] :], state


def errors(found: tuple[Tensor, RetentionState], expected: tuple[Tensor, RetentionState]) -> list[float]:
    """RMS errors of y, s and z, relative to the RMS of what is expected."""
    pairs = zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


@pytest.mark.parametrize("power", [2, 4])
@pytest.mark.parametrize("gates", ["none", "weak", "strong"])
@pytest.mark.parametrize("C", [1, 3, 64])
def test_plain_form_is_exact(C, gates, power):
    size = (2, 33, 2, 3, 4, 5, C, 6)
    inputs = make(size, gates, torch.float64, "cpu")
    for options in ({}, {"scale": 0.3}, {"sink": 0.7}):
        found, expected = decode(inputs, size, power, **options), whole(inputs, size, power, **options)
        assert max(errors(found, expected)) < 1e-10


@pytest.mark.parametrize(("size", "gates"), CASES, ids=str)
def test_kernels_are_float32_exact(size, gates, triton_decoder):
    inputs = make(size, gates, torch.float32)
    expected = whole(inputs, size)
    found = errors(decode(inputs, size), expected)
    DECODERS[DEVICE] = PLAIN  # the fixture puts back what was there
    plain = errors(decode(inputs, size), expected)
    assert all(a < max(2 * b, 1e-6) for a, b in zip(found, plain, strict=True)), (found, plain)


@pytest.mark.parametrize("power", [2, 4])
def test_what_has_no_kernel_is_plain(power, triton_decoder):
    size = (1, 8, 1, 2, 4, 4, 3, 2)
    inputs = make(size, "weak", torch.float64)
    assert max(errors(decode(inputs, size, power), whole(inputs, size, power))) < 1e-10
    if power == 4:
        inputs = [x.float() for x in inputs]
        assert max(errors(decode(inputs, size, power), whole(inputs, size, power))) < 1e-5


def test_inputs_need_not_be_contiguous(triton_decoder):
    size = (2, 5, 2, 2, 8, 8, 2, 1)
    inputs = make(size, "weak", torch.float32)
    strided = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in inputs]
    assert not strided[0][:, 0].is_contiguous()
    assert torch.equal(decode(strided, size)[0], decode(inputs, size)[0])


def test_padding_answers_zero(triton_decoder):
    size = (1, 7, 1, 2, 8, 8, 3, 2)
    q, k, v, log_g = make(size, "weak", torch.float32)
    y, state = decode([q, torch.zeros_like(k), v, log_g], size)
    assert not y.any()
    assert not any(x.any() for x in state)


def test_gates_keep_their_precision_behind_strong_ones(triton_decoder):
    """Sums of log gates grow large between folds; what counts is the difference of the last ones."""
    size = (1, 13, 1, 1, 8, 8, 64, 1)
    q, k, v, _ = make(size, "none", torch.float32)
    log_g = torch.full((1, 13, 1), -3000.0, device=DEVICE)
    log_g[:, -5:] = -0.1
    inputs = [q, k, v, log_g]
    assert max(errors(decode(inputs, size), whole(inputs, size))) < 1e-6


@pytest.mark.parametrize("mark", [pytest.param("", marks=gpu)])
@pytest.mark.parametrize(("size", "gates"), [((2, 150, 8, 5, 128, 128, 64, 18), "weak"), *CASES], ids=str)
def test_kernels_in_bfloat16(size, gates, mark, triton_decoder):
    inputs = make(size, gates, torch.bfloat16)
    y, s, z = errors(decode(inputs, size), whole(inputs, size))
    assert y < 4e-3  # the rounding of y is 1.7e-3
    assert max(s, z) < 1e-5


@pytest.mark.parametrize("mark", [pytest.param("", marks=gpu)])
def test_a_chunk_of_steps_can_be_captured(mark, triton_decoder):
    """In a CUDA graph, with the fold that ends it; and its result is the same in every bit."""
    size = (2, 10, 2, 5, 128, 128, 8, 2)
    inputs = make(size, "weak", torch.bfloat16)
    expected, _ = decode(inputs, size)
    _, start = power_retention(*(x[:, :2] for x in inputs), return_final_state=True, implementation="reference")
    state = RetentionState(*map(torch.clone, start))
    buffer = RetentionBuffer.empty(inputs[1][:, 0], inputs[2][:, 0], 8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys = [power_retention_decode(*(x[:, t] for x in inputs), state, buffer) for t in range(2, 10)]
    for _ in range(2):
        for x, y in zip(state, start, strict=True):
            x.copy_(y)
        graph.replay()
        assert torch.equal(torch.stack(ys, 1), expected)


ERRORS = {
    "rank": ({"q": torch.zeros(1, 1, 4, 8)}, "without T"),
    "state": ({"state": RetentionState(torch.zeros(2, 2, 36, 8), torch.zeros(2, 2, 36))}, "the state has shapes"),
    "buffer rows": ({"buffer": RetentionBuffer(*(torch.zeros(2, 4, 2, 8),) * 2, None)}, "the buffer's k is"),
    "buffer dtype": ({"buffer": RetentionBuffer(*(torch.zeros(1, 4, 2, 8).double(),) * 2, None)}, "torch.float64"),
    "full": ({"buffer": RetentionBuffer(*(torch.zeros(1, 4, 2, 8),) * 2, None, 4)}, "4 places are all taken"),
    "gradient": ({"k": torch.zeros(1, 2, 8, requires_grad=True)}, "no_grad"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_what_is_wrong(case):
    change, message = ERRORS[case]
    k = torch.zeros(1, 2, 8)
    arguments = {
        "q": torch.zeros(1, 4, 8), "k": k, "v": k, "log_g": None, "buffer": RetentionBuffer.empty(k, k, 4),
        "state": RetentionState(torch.zeros(1, 2, 36, 8), torch.zeros(1, 2, 36)),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        power_retention_decode(**arguments | change)


def test_no_silent_fallback():
    k = torch.zeros(1, 2, 8, device="meta")
    state = RetentionState(torch.zeros(1, 2, 36, 8, device="meta"), torch.zeros(1, 2, 36, device="meta"))
    with pytest.raises(ValueError, match="no decoding for meta"):
        power_retention_decode(k, k, k, None, state, RetentionBuffer.empty(k, k, 4))


def test_autocast_casts_the_inputs_and_the_buffer():
    size = (1, 9, 1, 2, 8, 8, 3, 2)
    inputs = make(size, "weak", torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        y, state = decode(inputs, size)
    assert y.dtype == torch.bfloat16
    assert state.s.dtype == torch.float32
    rounded = [*(x.bfloat16() for x in inputs[:3]), inputs[3]]
    assert torch.equal(y, decode(rounded, size)[0])
