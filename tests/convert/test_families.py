"""config.json, as different versions of transformers write it, becomes a BrumbyConfig."""

import pytest

from brumby.convert import FAMILIES, ConversionError
from brumby.convert.families import brumby_config, carried_tensors

QWEN3_14B = {
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 17408,
    "max_position_embeddings": 32768,
    "max_window_layers": 40,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA3 = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
ROPE = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def make(raw, gate_bias=True):
    return brumby_config(raw, gate_bias=gate_bias, p=2)


def test_qwen3_14b():
    config = make(QWEN3_14B, gate_bias=False)
    assert (config.qk_norm, config.qkv_bias, config.attention_bias, config.gate_bias) == (
        True,
        False,
        False,
        False,
    )
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1000000}
    assert config.head_dim == 128
    shapes = carried_tensors(config)
    num_parameters = sum(a * (b[0] if b else 1) for a, *b in shapes.values())
    assert num_parameters == 14_768_307_200  # what the published model counts
    assert shapes["model.layers.39.self_attn.k_proj.weight"] == (1024, 5120)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **ROPE}},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **ROPE}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **ROPE}},
    ],
    ids=["transformers-4", "older", "transformers-5"],
)
def test_rope_in_every_spelling(rope):
    parameters = make(LLAMA3 | rope).rope_parameters
    assert parameters == parameters | {"rope_type": "llama3", "rope_theta": 500000.0} | ROPE


def test_llama_without_rope_fields_keeps_the_family_default():
    config = make(LLAMA3)
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert config.head_dim == 64
    assert config.qk_norm is False
    assert "lm_head.weight" not in carried_tensors(config)
    assert "model.layers.0.self_attn.q_norm.weight" not in carried_tensors(config)


def test_qwen2_has_biases_on_q_k_v_only():
    raw = QWEN3_14B | {"model_type": "qwen2", "attention_bias": None, "sliding_window": 131072}
    raw.pop("attention_bias")
    shapes = carried_tensors(make(raw))
    assert shapes["model.layers.0.self_attn.v_proj.bias"] == (1024,)
    assert "model.layers.0.self_attn.o_proj.bias" not in shapes


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (QWEN3_14B | {"model_type": "mixtral"}, "supported are: " + next(iter(FAMILIES))),
        ({}, "supported are"),
        (QWEN3_14B | {"model_type": "brumby"}, "already"),
        (QWEN3_14B | {"hidden_size": None}, "lacks hidden_size"),
        (QWEN3_14B | {"hidden_size": "wide"}, "not a valid qwen3 config"),
        (
            QWEN3_14B | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0},
            "sliding window",
        ),
        (QWEN3_14B | {"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        (QWEN3_14B | {"num_key_value_heads": 7}, "num_key_value_heads"),
        (LLAMA3 | {"mlp_bias": True}, "mlp_bias"),
        (LLAMA3 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_configs(raw, message):
    with pytest.raises(ConversionError, match=message):
        make(raw)


def test_odd_power_is_refused():
    with pytest.raises(ConversionError, match="even power"):
        brumby_config(QWEN3_14B, gate_bias=True, p=3)
