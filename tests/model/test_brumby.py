"""The Hugging Face model, held against transformers' own Qwen3, single sequences and the plain forward."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from brumby.kernels import DECODERS, Decoder, RetentionState
from brumby.model import BrumbyCache, BrumbyConfig, BrumbyForCausalLM

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0,
    "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip


def make(seed: int = 0, **changes) -> BrumbyForCausalLM:
    torch.manual_seed(seed)
    model = BrumbyForCausalLM(BrumbyConfig(**SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the default, so that every part matters
            parameter.normal_(1 if parameter.ndim == 1 else 0, 0.2)
    return model


def cache_of(outputs):
    return getattr(outputs, "cache", None) or outputs.past_key_values


def ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def test_published_names_and_shapes_at_14b():
    """Every tensor of Qwen3-14B under its own name, and a gate per key-value head without a bias."""
    sizes = {
        "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40,
        "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
    }  # fmt: skip
    with torch.device("meta"):
        base = Qwen3ForCausalLM(Qwen3Config(**sizes)).state_dict()
        ours = BrumbyForCausalLM(BrumbyConfig(**sizes)).state_dict()
    gates = {f"model.layers.{i}.self_attn.g_proj.weight": (8, 5120) for i in range(40)}
    assert {n: tuple(t.shape) for n, t in ours.items()} == {n: tuple(t.shape) for n, t in base.items()} | gates
    assert sum(t.numel() for t in ours.values()) == pytest.approx(14.8e9, rel=0.005)


def test_published_config_fields_have_the_published_defaults():
    config = BrumbyConfig().to_dict()
    published = {
        "model_type": "brumby", "p": 2, "chunk_size": 64, "switch_over_seq_len": 8192, "prefill_chunk_size": 1024,
        "use_exp": False,
    }  # fmt: skip
    assert {name: config[name] for name in published} == published


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_save_and_load_through_auto_classes(tmp_path, tie_word_embeddings):
    model = make(tie_word_embeddings=tie_word_embeddings)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BrumbyConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, BrumbyForCausalLM)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    x = ids(2, 9)
    assert torch.equal(model(x).logits, loaded(x).logits)


@pytest.mark.parametrize("mask", [False, True], ids=["dense", "left-padded"])
def test_use_exp_is_qwen3(mask):
    model = make(use_exp=True)
    qwen = Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()
    qwen.load_state_dict({n: t for n, t in model.state_dict().items() if "g_proj" not in n})
    x = ids(2, 17)
    attention_mask = torch.ones_like(x)
    if mask:
        attention_mask[0, :5] = 0
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = model(x, attention_mask=attention_mask).logits
        theirs = qwen(x, attention_mask=attention_mask, position_ids=positions).logits
    real = attention_mask.bool()
    assert (ours - theirs)[real].abs().max() < 1e-5


@pytest.mark.parametrize("use_exp", [False, True], ids=["retention", "softmax"])
@pytest.mark.parametrize("prefill", [1, 2, 7])
def test_prefill_and_decode_equal_the_full_forward(use_exp, prefill):
    model = make(use_exp=use_exp).double()
    x = ids(2, 12)
    with torch.no_grad():
        full = model(x, use_cache=False).logits
        outputs = model(x[:, :prefill], use_cache=True)
        logits, cache = [outputs.logits], cache_of(outputs)
        for t in range(prefill, x.shape[1]):
            outputs = model(x[:, t : t + 1], past_key_values=cache, use_cache=True)
            logits.append(outputs.logits)
    assert (torch.cat(logits, 1) - full).abs().max() < 1e-9


def test_prefill_in_pieces_equals_the_full_forward():
    model = make().double()
    x = ids(2, 20)
    with torch.no_grad():
        cache = cache_of(model(x[:, :8], use_cache=True))
        second = model(x[:, 8:], past_key_values=cache, use_cache=True).logits
        assert (second - model(x, use_cache=False).logits[:, 8:]).abs().max() < 1e-9


def in_pieces(model, x: torch.Tensor, lengths: list[int], cache=None) -> tuple[torch.Tensor, BrumbyCache]:
    """The logits of all tokens, given in pieces, and the cache after them."""
    logits = []
    for piece in x.split(lengths, 1):
        outputs = model(piece, past_key_values=cache, use_cache=True)
        cache = cache_of(outputs)
        logits.append(outputs.logits)
    return torch.cat(logits, 1), cache


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_decoding_before_and_after_folds_equals_the_full_forward(chunk_size):
    """Single tokens across two folds of the buffer of 4, and longer pieces that find it half full."""
    model = make(chunk_size=chunk_size, sink=[0.3, 0.0, 5.0]).double()
    x = ids(2, 30)
    with torch.no_grad():
        full = model(x, use_cache=False).logits
        for lengths in ([5] + [1] * 25, [1, 1, 1, 6] + [1] * 6 + [2, 5] + [1] * 8):
            logits, cache = in_pieces(model, x, lengths)
            assert (logits - full).abs().max() < 1e-9
            assert cache.get_seq_length() == 30
    single = {1: 0, 4: 0, 64: 8}[chunk_size]  # of the last 8 tokens, those that no fold has reached
    assert all(layer.buffer.num_tokens == single for layer in cache.layers)


@torch.no_grad()
def test_the_buffer_is_allocated_once_and_of_a_capped_length():
    model = make(chunk_size=10_000)
    assert all(layer.chunk_size == 512 for layer in BrumbyCache(model.config).layers)
    model = make(chunk_size=3)
    x = ids(1, 12)
    _, cache = in_pieces(model, x[:, :2], [2])
    assert all(layer.buffer is None for layer in cache.layers)
    _, cache = in_pieces(model, x[:, 2:3], [1], cache)
    first = [layer.buffer.k.data_ptr() for layer in cache.layers]
    _, cache = in_pieces(model, x[:, 3:], [1] * 9, cache)
    assert [layer.buffer.k.data_ptr() for layer in cache.layers] == first
    assert all(layer.buffer.k.shape == (1, 3, 2, 8) for layer in cache.layers)


@torch.no_grad()
def test_rows_of_a_half_full_buffer_can_be_selected_and_repeated():
    model = make(chunk_size=4).double()
    x, order = ids(3, 14), torch.tensor([2, 0, 1])
    full = model(x, use_cache=False).logits
    _, cache = in_pieces(model, x[:, :6], [4, 1, 1])
    cache.reorder_cache(order)
    logits, cache = in_pieces(model, x[order, 6:7], [1], cache)
    assert (logits - full[order, 6:7]).abs().max() < 1e-9
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    logits, cache = in_pieces(model, x[[0, 0], 7:], [1] * 7, cache)
    assert (logits - full[[0, 0], 7:]).abs().max() < 1e-9
    cache.reset()
    logits, cache = in_pieces(model, x, [2] + [1] * 12, cache)
    assert (logits - full).abs().max() < 1e-9


def test_decoding_has_gradients_where_they_are_asked_for():
    """It leaves the buffer, whose state is changed in place."""
    model = make(chunk_size=4).double()
    x = ids(1, 9)
    with torch.no_grad():
        _, cache = in_pieces(model, x[:, :6], [3, 1, 1, 1])
    logits, _ = in_pieces(model, x[:, 6:], [1] * 3, cache)
    assert (logits - model(x, use_cache=False).logits[:, 6:]).abs().max() < 1e-9
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_decoding_in_triton(monkeypatch):
    """The model on Triton's kernels, in its interpreter where there is no GPU: a fold, and a prefill later on."""
    triton_decode = pytest.importorskip("brumby.kernels.decode")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setitem(DECODERS, device, Decoder(triton_decode.step, triton_decode.fold))
    model = make(chunk_size=4, num_hidden_layers=1, sink=0.3).to(device)
    x = ids(2, 11).to(device)
    full = model.double()(x, use_cache=False).logits
    logits, _ = in_pieces(model.float(), x, [3, *[1] * 5, 2, 1])
    assert (logits - full).abs().max() < 1e-4 * full.abs().max()


def test_long_sequences_run_in_chunks_and_agree():
    x = ids(1, 50)
    with torch.no_grad():
        short = make(sink=0.3).double()(x).logits
        chunked = make(sink=0.3, switch_over_seq_len=16, prefill_chunk_size=8).double()(x).logits
    assert (short - chunked).abs().max() < 1e-9


def test_cache_size_does_not_depend_on_length():
    model = make()

    def numbers(length: int) -> int:
        cache = cache_of(model(ids(1, length), use_cache=True))
        assert isinstance(cache, BrumbyCache)
        assert cache.get_seq_length() == length
        return sum(x.numel() for layer in cache.layers for x in layer.state)

    D, K, H, layers = 36, 8, 2, 3
    assert numbers(5) == numbers(200) == layers * H * D * (K + 1)


def greedy(model, prompt: torch.Tensor, steps: int) -> list[int]:
    """Generation by the full forward pass alone, one sequence, no cache."""
    x = prompt
    for _ in range(steps):
        x = torch.cat([x, model(x, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return x[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("use_exp", [False, True], ids=["retention", "softmax"])
@pytest.mark.parametrize("chunk_size", [3, 64])
@torch.no_grad()
def test_generate_with_unequal_prompts_equals_single_prompts(use_exp, chunk_size):
    model = make(use_exp=use_exp, chunk_size=chunk_size).double()
    prompts = [ids(1, length, seed=length) for length in (3, 9, 6)]
    longest = max(p.shape[1] for p in prompts)
    x = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (longest - p.shape[1], 0)) for p in prompts])
    generated = model.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, longest:]
    assert generated.tolist() == [greedy(model, p, 8) for p in prompts]


@torch.no_grad()
def test_generate_prefills_in_pieces():
    """transformers takes the config's prefill_chunk_size for its own chunked prefill."""
    model = make(prefill_chunk_size=4).double()
    prompt = ids(1, 11)
    padded = torch.nn.functional.pad(prompt, (2, 0))
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (2, 0))
    generated = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert generated[0, 13:].tolist() == greedy(model, prompt, 5)


@torch.no_grad()
def test_right_padding_leaves_the_state_as_it_is():
    model = make().double()
    x, mask = ids(1, 10), torch.ones(1, 10)
    mask[:, 7:] = 0
    padded, plain = (
        cache_of(model(x, attention_mask=mask, use_cache=True)),
        cache_of(model(x[:, :7], use_cache=True)),
    )
    for a, b in zip(padded.layers, plain.layers, strict=True):
        assert all(torch.allclose(s, t, atol=1e-12) for s, t in zip(a.state, b.state, strict=True))


@pytest.mark.parametrize("chunk_size", [2, 64])
@torch.no_grad()
def test_beam_search_follows_its_beams(chunk_size):
    """One beam of four equals a search that keeps no cache."""
    model = make(chunk_size=chunk_size).double()
    x = ids(1, 6)
    options = {"max_new_tokens": 6, "num_beams": 4, "do_sample": False}
    assert model.generate(x, **options).tolist() == model.generate(x, use_cache=False, **options).tolist()


def test_packed_documents_do_not_see_each_other():
    model = make().double()
    lengths = [5, 1, 9, 3]
    documents = [ids(1, n, seed=n) for n in lengths]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = torch.cat(documents, dim=1)
    with torch.no_grad():
        apart = torch.cat([model(d).logits for d in documents], dim=1)
        together = model(packed, position_ids=positions, cu_seqlens=bounds).logits
        rows = model(
            packed.view(2, 9),
            position_ids=positions.view(2, 9),
            cu_seqlens=torch.tensor([0, 5, 6, 9, 15, 18]),
        )
    assert (together - apart).abs().max() < 1e-9
    assert (rows.logits.view(1, 18, -1)[:, :6] - apart[:, :6]).abs().max() < 1e-9


def test_activation_checkpointing_changes_no_gradient():
    x = ids(2, 11)
    gradients = []
    for checkpointing in (False, True):
        model = make().double().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(x, labels=x).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-9, atol=1e-12), name
        assert gradient.abs().max() > 0, name


def test_loss_is_transformers_own():
    model, x = make(), ids(2, 11)
    outputs = model(x, labels=x)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_gate_bias_and_qkv_bias_follow_attention_bias_unless_set():
    def biases(**changes) -> set[str]:
        names = make(**changes).state_dict()
        return {n.split(".")[-2] for n in names if n.endswith(".bias")}

    assert biases() == set()
    assert biases(attention_bias=True) == {"q_proj", "k_proj", "v_proj", "o_proj", "g_proj"}
    assert biases(qkv_bias=True) == {"q_proj", "k_proj", "v_proj"}
    assert biases(gate_bias=True) == {"g_proj"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p": 3}, "even power"),
        ({"qk_norm": "softmax"}, "qk_norm is 'softmax'"),
        ({"sink": -1.0}, "sink is -1.0"),
        ({"sink": [1.0, float("inf"), 0.0]}, "finite"),
        ({"sink": [1.0, 2.0]}, "2 numbers for 3 layers"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"use_sliding_window": True, "sliding_window": 64}, "sliding window"),
        ({"num_key_value_heads": 4}, "multiple"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(Exception, match=message) as error:
        BrumbyConfig(**SIZES | changes)
    assert isinstance(error.value, ValueError) or isinstance(error.value.__cause__, ValueError)


def test_a_mask_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="attention_mask has shape"):
        make()(ids(1, 5), attention_mask=torch.ones(1, 4))


def test_a_recurrent_state_refuses_to_be_cropped():
    model = make()
    cache = cache_of(model(ids(1, 5), use_cache=True))
    with pytest.raises(ValueError, match="cannot forget"):
        cache.crop(-1)
    assert isinstance(cache.layers[0].state, RetentionState)
