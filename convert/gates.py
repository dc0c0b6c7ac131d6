"""Where the new parameters start: a gate projection and a sink a layer, and new QK norms, where wanted, at one.

A gate is g = sigmoid(g_proj(x)), one a token and key-value head; a head that holds g forgets with a half-life
of log(1/2) / log(g) tokens. With zero weights the bias alone decides, and the gate does not depend on the
input.
Shapes: H key-value heads.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from brumby.model import BrumbyConfig

from .errors import ConversionError
from .families import num_kv_heads

GATE_0999 = 6.906768  # logit of 0.999


@dataclass(frozen=True)
class GateInit:
    """A start: the bias logits [H] of a layer, and whether the weights are random or zero."""

    bias: Callable[[int], Tensor]
    random_weight: bool
    summary: str


def spread(num_heads: int) -> Tensor:
    """[H] logits from 1.5 to 6: half-lives from 3 to 280 tokens. A single head takes the middle."""
    return torch.linspace(1.5, 6.0, num_heads) if num_heads > 1 else torch.full((1,), 3.75)


GATE_INITS: Mapping[str, GateInit] = {
    "spread": GateInit(spread, random_weight=False, summary="logits from 1.5 to 6 over a layer's heads"),
    "constant": GateInit(
        lambda num_heads: torch.full((num_heads,), GATE_0999),
        random_weight=False,
        summary="0.999 on every head",
    ),
    "normal": GateInit(
        torch.zeros, random_weight=True, summary="weights N(0, initializer_range), gates about 0.5"
    ),
}


def check_gate_init(name: str, gate_bias: bool) -> None:
    """Raise ConversionError unless `name` is a start that a projection with or without bias can hold."""
    if name not in GATE_INITS:
        known = "; ".join(f"{key} ({init.summary})" for key, init in GATE_INITS.items())
        raise ConversionError(f"gate_init is {name!r}; known are: {known}")
    if not gate_bias and not GATE_INITS[name].random_weight:
        raise ConversionError(
            f"gate_init={name} is made of biases, and gate_bias=false leaves none; "
            "use gate_init=normal or gate_bias=true"
        )


def gate_tensors(config: BrumbyConfig, init: str, *, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """The gate projections of all layers: `weight` [H, hidden] and, if the config has it, `bias` [H].

    Args:
        init: a name in `GATE_INITS`.
        seed: of the random weights; the same for any dtype.
    """
    row = GATE_INITS[init]
    num_heads = num_kv_heads(config)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for i in range(config.num_hidden_layers):
        name = f"model.layers.{i}.self_attn.g_proj"
        weight = torch.zeros(num_heads, config.hidden_size)
        if row.random_weight:
            weight.normal_(0.0, config.initializer_range, generator=generator)
        tensors[f"{name}.weight"] = weight.to(dtype)
        if config.gate_bias:
            tensors[f"{name}.bias"] = row.bias(num_heads).to(dtype)
    return tensors


def norm_tensors(config: BrumbyConfig, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights [K] of norms that the base has not; their size makes no difference to retention."""
    names = ("q_norm", "k_norm") if config.qk_norm == "retention" else ()
    return {
        f"model.layers.{i}.self_attn.{name}.weight": torch.ones(config.head_dim, dtype=dtype)
        for i in range(config.num_hidden_layers)
        for name in names
    }


def layer_sinks(sink: float, norms: Iterable[tuple[Tensor, Tensor]], p: int) -> list[float]:
    """A sink for each layer that stands to the tokens' weights as `sink` does where all norms' weights are one.

    There (q . k)^2 / K is one on average, if what is normalised has independent components; with weights of the
    norms a and b it is the mean of (a b)^2.

    Args:
        norms: a layer's weights [K] of q_norm and k_norm.
    """
    return [sink * (q.double() * k.double()).square().mean().item() ** (p / 2) for q, k in norms]
