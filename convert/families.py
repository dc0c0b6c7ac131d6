"""The attention families that can be converted, as data.

A family is a row of `FAMILIES`: what its attention has that another's lacks. What no row may ask for is a row
of `RULES`. From both and a base's config.json follow the `BrumbyConfig` and the tensors that the base must
hold.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from brumby.model import BrumbyConfig

from .errors import ConversionError

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """One architecture. `None` for a bias means: as the config's `attention_bias` says."""

    models: str  # that belong to it, for messages
    qk_norm: bool
    qkv_bias: bool | None  # on q, k and v
    attention_bias: bool | None  # on o, and on q, k and v where `qkv_bias` is None


FAMILIES: Mapping[str, Family] = {
    "qwen3": Family("Qwen3 (dense)", qk_norm=True, qkv_bias=None, attention_bias=None),
    "qwen2": Family("Qwen2, Qwen2.5", qk_norm=False, qkv_bias=True, attention_bias=False),
    "llama": Family("Llama 2 and 3, SmolLM2", qk_norm=False, qkv_bias=None, attention_bias=None),
}


@dataclass(frozen=True)
class Rule:
    """A config field that must satisfy `holds` (it does when the field is absent), and what to do if not."""

    field: str
    holds: Callable[[Any], bool]
    advice: str


RULES: tuple[Rule, ...] = (
    Rule(
        "quantization_config",
        lambda value: value is None,
        "quantized weights cannot be carried; convert the original or a dequantized copy",
    ),
    Rule(
        "layer_types",
        lambda value: value is None or set(value) <= {"full_attention"},
        "every layer must be full attention: power retention has no sliding window. If the base was trained "
        "without one, set use_sliding_window to false in its config.json",
    ),
    Rule("mlp_bias", lambda value: not value, "biases in the MLP are not supported"),
    Rule(
        "rope_parameters",
        lambda value: not value or value.get("partial_rotary_factor", 1.0) == 1.0,
        "rotating a part of each head (partial_rotary_factor) is not supported",
    ),
)

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)

# Fields with one name and one meaning in every family and in Brumby. transformers has by then turned the
# older `rope_theta` and `rope_scaling` into `rope_parameters` and filled in each family's own defaults.
# `attention_dropout` is left out: nothing is dropped in a recurrence.
CARRIED = (
    *REQUIRED,
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def supported() -> str:
    """The families that can be converted, for messages."""
    return "; ".join(f"{model_type} ({family.models})" for model_type, family in FAMILIES.items())


def brumby_config(raw: Mapping[str, Any], *, gate_bias: bool, p: int) -> BrumbyConfig:
    """The Brumby config of a base.

    Args:
        raw: the base's config.json, of any transformers version.
        gate_bias: whether the gate projection gets a bias.
        p: power of the similarity.

    Raises:
        ConversionError: an unknown family, a missing field, or a value that Brumby cannot express.
    """
    model_type = str(raw.get("model_type"))
    if model_type == "brumby":
        raise ConversionError("the source is a Brumby checkpoint already; train it or export it as it is")
    if model_type not in FAMILIES:
        raise ConversionError(f"config.json has model_type {model_type!r}; supported are: {supported()}")
    missing = [field for field in REQUIRED if raw.get(field) is None]
    if missing:
        raise ConversionError(f"config.json lacks {', '.join(missing)}; a {model_type} config must state them")
    family = FAMILIES[model_type]
    try:
        base = AutoConfig.for_model(**raw)
    except Exception as error:  # transformers raises its own classes, by version
        raise ConversionError(f"config.json is not a valid {model_type} config: {error}") from error
    for rule in RULES:
        value = getattr(base, rule.field, None)
        if not rule.holds(value):
            found = sorted(set(value)) if isinstance(value, list) else value
            raise ConversionError(f"config.json has {rule.field} = {found!r}: {rule.advice}")
    attention_bias = bool(base.attention_bias) if family.attention_bias is None else family.attention_bias
    try:
        return BrumbyConfig(
            **{field: getattr(base, field) for field in CARRIED},
            head_dim=head_dim(base),
            qk_norm=family.qk_norm,
            attention_bias=attention_bias,
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            gate_bias=gate_bias,
            p=p,
            architectures=["BrumbyForCausalLM"],
        )
    except Exception as error:
        raise ConversionError(f"config.json does not make a Brumby config: {error}") from error


def head_dim(config: PreTrainedConfig) -> int:
    """K: a field of its own, or the hidden size shared among the query heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def num_kv_heads(config: BrumbyConfig) -> int:
    """H, which transformers declares optional and fills in."""
    assert config.num_key_value_heads is not None
    return config.num_key_value_heads


def carried_tensors(config: BrumbyConfig) -> Shapes:
    """Name and shape of every tensor that the base must hold and that is carried over as it is."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, num_kv_heads(config) * config.head_dim
    # name, shape, whether this config has it
    layer: tuple[tuple[str, tuple[int, ...], bool | None], ...] = (
        ("self_attn.q_proj.weight", (q, hidden), True),
        ("self_attn.k_proj.weight", (kv, hidden), True),
        ("self_attn.v_proj.weight", (kv, hidden), True),
        ("self_attn.o_proj.weight", (hidden, q), True),
        ("self_attn.q_proj.bias", (q,), config.qkv_bias),
        ("self_attn.k_proj.bias", (kv,), config.qkv_bias),
        ("self_attn.v_proj.bias", (kv,), config.qkv_bias),
        ("self_attn.o_proj.bias", (hidden,), config.attention_bias),
        ("self_attn.q_norm.weight", (config.head_dim,), config.qk_norm is True),
        ("self_attn.k_norm.weight", (config.head_dim,), config.qk_norm is True),
        ("mlp.gate_proj.weight", (inner, hidden), True),
        ("mlp.up_proj.weight", (inner, hidden), True),
        ("mlp.down_proj.weight", (hidden, inner), True),
        ("input_layernorm.weight", (hidden,), True),
        ("post_attention_layernorm.weight", (hidden,), True),
    )
    whole = (
        ("model.embed_tokens.weight", (config.vocab_size, hidden), True),
        ("model.norm.weight", (hidden,), True),
        ("lm_head.weight", (config.vocab_size, hidden), not config.tie_word_embeddings),
    )
    rows = [
        (f"model.layers.{i}.{name}", shape, present)
        for i in range(config.num_hidden_layers)
        for name, shape, present in layer
    ]
    return {name: shape for name, shape, present in (*whole, *rows) if present}


def is_redundant(name: str, config: BrumbyConfig) -> bool:
    """Whether the base may hold this tensor though the model does not need it: it is carried and not counted.

    Older Llama checkpoints store the rotary frequencies; some tied ones store the output head.
    """
    tied_head = name == "lm_head.weight" and bool(config.tie_word_embeddings)
    return tied_head or name.endswith(".rotary_emb.inv_freq")
