"""Configuration of Brumby models: Qwen3's fields and those of power retention."""

import math

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config


@strict
class BrumbyConfig(Qwen3Config):
    """A decoder whose token mixer is power retention instead of softmax attention.

    The first five fields are those of the published Brumby-14B-Base. The next three describe base
    families other than Qwen3; the defaults of all that follow leave the published format as it is.

    Args:
        p: Even power of the similarity `(q . k) ** p`.
        chunk_size: Tokens that decoding keeps beside the state before it folds them in; 512 at most.
        switch_over_seq_len: Longest sequence for which the attention form is used; longer ones run
            in chunks.
        prefill_chunk_size: Tokens a chunk for sequences longer than `switch_over_seq_len`.
        use_exp: Run softmax attention with the same weights: the base model, without its KV format.
        qk_norm: RMS-normalise q and k per head before the rotation (Qwen3: yes; Qwen2, Llama: no).
            "retention": the base does not, and with `use_exp` nor does this model.
        qkv_bias: Biases on the q, k and v projections. `None` means `attention_bias` (Qwen2: yes).
        gate_bias: A bias on the gate projection. `None` means `attention_bias`.
        sink: A weight beside those of the tokens, whose value is zero, or one a layer; 0: there is none.

    Raises:
        ValueError: `p` is odd or below 2, `qk_norm` is another word, a sink or a chunk size is out of range or
            sinks are not as many as layers, a sliding window is set, or the query heads cannot be divided among
            the key-value heads.
    """

    model_type = "brumby"

    p: int = 2
    chunk_size: int = 64
    switch_over_seq_len: int = 8192
    prefill_chunk_size: int = 1024
    use_exp: bool = False
    qk_norm: bool | str = True
    qkv_bias: bool | None = None
    gate_bias: bool | None = None
    sink: float | list[float] = 0.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.qkv_bias is None:
            self.qkv_bias = self.attention_bias
        if self.gate_bias is None:
            self.gate_bias = self.attention_bias
        if self.p < 2 or self.p % 2:
            raise ValueError(f"p is {self.p}; power retention needs an even power of at least 2")
        if self.qk_norm not in (True, False, "retention"):
            raise ValueError(f"qk_norm is {self.qk_norm!r}; expected true, false or retention")
        if isinstance(self.sink, list) and len(self.sink) != self.num_hidden_layers:
            raise ValueError(f"sink has {len(self.sink)} numbers for {self.num_hidden_layers} layers")
        if not all(0 <= self.sink_of(layer) < math.inf for layer in range(self.num_hidden_layers)):
            raise ValueError(f"sink is {self.sink}; expected finite numbers, 0 or more")
        for name in ("chunk_size", "switch_over_seq_len", "prefill_chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.sliding_window is not None:
            raise ValueError("a sliding window has no meaning for power retention; set use_sliding_window=false")
        if self.num_key_value_heads and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )

    def sink_of(self, layer: int) -> float:
        return self.sink[layer] if isinstance(self.sink, list) else self.sink

    @property
    def normalises_qk(self) -> bool:
        """Whether the mixer in use normalises q and k."""
        return self.qk_norm is True or (self.qk_norm == "retention" and not self.use_exp)


__all__ = ["BrumbyConfig"]
