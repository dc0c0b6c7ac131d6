"""Brumby: Qwen3's decoder with power retention in place of softmax attention.

Shapes: B batch, T tokens, HQ query heads, H key-value heads, K head_dim, D expanded key.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from brumby.kernels import (
    RetentionBuffer,
    RetentionState,
    power_retention,
    power_retention_decode,
    power_retention_fold,
)

from .configuration_brumby import BrumbyConfig

# transformers renamed `past_key_values` to `cache` in 5.2x; both names are accepted and the
# installed one is returned.
CACHE_FIELD = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

# Rewriting the state once in so many tokens costs under 1% of reading it for each: longer buffers save nothing
MAX_BUFFERED = 512


class RetentionCacheLayer(CacheLayerMixin):
    """One layer's recurrent state, and the tokens decoded since, which enter it `chunk_size` at a time.

    Their size does not depend on how many tokens the layer has seen.
    """

    def __init__(self, power: int, chunk_size: int, sink: float) -> None:
        super().__init__()
        self.power, self.chunk_size, self.sink = power, chunk_size, sink
        self.state: RetentionState | None = None  # as of the first token in the buffer
        self.buffer: RetentionBuffer | None = None
        self.num_tokens = 0

    def lazy_initialization(self, *args, **kwargs) -> None:
        """The state is made by the first forward pass, the buffer by the first token decoded after it."""

    def update(self, state: RetentionState, num_tokens: int) -> None:  # type: ignore[override]
        """Keep `state`, which has seen `num_tokens` tokens since `fold`."""
        self.state = state
        self.num_tokens += num_tokens
        self.is_initialized = True

    def decode(self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor) -> Tensor:
        """y [B, HQ, V] of one more token: q [B, HQ, K], k [B, H, K], v [B, H, V], log_g [B, H]."""
        assert self.state is not None
        if self.buffer is None:
            self.buffer = RetentionBuffer.empty(k, v, self.chunk_size)
        self.num_tokens += 1
        return power_retention_decode(q, k, v, log_g, self.state, self.buffer, power=self.power, sink=self.sink)

    def fold(self) -> RetentionState | None:
        """The state as of the last token; the buffer is left empty."""
        if self.state is not None and self.buffer is not None:
            power_retention_fold(self.state, self.buffer, power=self.power)
        return self.state

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.buffer, self.num_tokens, self.is_initialized = None, None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.change_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to the first dimension, the batch, of all that the layer keeps."""
        if self.state is not None:
            self.state = RetentionState(*map(change, self.state))
        if self.buffer is not None:
            k, v, G = map(change, (self.buffer.k, self.buffer.v, self.buffer.G))
            self.buffer = RetentionBuffer(k, v, G, self.buffer.num_tokens)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError("a recurrent state cannot forget its last tokens; keep a copy to go back to")


class BrumbyCache(Cache):
    """The recurrent states and buffers of all layers, for `generate` and for decoding by hand."""

    def __init__(self, config: BrumbyConfig) -> None:
        chunk_size, layers = min(config.chunk_size, MAX_BUFFERED), range(config.num_hidden_layers)
        super().__init__(layers=[RetentionCacheLayer(config.p, chunk_size, config.sink_of(i)) for i in layers])


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Causal softmax attention in the layout of `power_retention`: the base model's mixer.

    Args:
        q: [B, T, HQ, K]. k, v: [B, S, H, K] with S >= T; the last T keys are the queries' own tokens.
        mask: bool [B, S], False for padding.
        cu_seqlens: int [N + 1], boundaries of documents packed into one row.
    """
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        documents = [softmax_attention(q[:, i:j], k[:, i:j], v[:, i:j]) for i, j in pairwise(bounds) if j > i]
        return torch.cat(documents, dim=1)
    T, S = q.shape[1], k.shape[1]
    allowed = None  # [B, 1, T, S]
    if mask is not None or (S > T > 1):
        allowed = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        if mask is not None:
            itself = torch.eye(S, dtype=torch.bool, device=q.device)[S - T :]  # padding must not give NaN
            allowed = (allowed & mask[:, None, :].bool() | itself)[:, None]
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=allowed,
        is_causal=allowed is None and T > 1,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)


class BrumbyAttention(nn.Module):
    """Power retention with Qwen3's projections, norms and rotation, and a gate per key-value head."""

    rotate = staticmethod(apply_rotary_pos_emb)

    def __init__(self, config: BrumbyConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.sink = config.sink_of(layer_idx)
        hidden, K = config.hidden_size, config.head_dim
        HQ, H = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        qkv_bias, gate_bias = bool(config.qkv_bias), bool(config.gate_bias)
        self.q_proj = nn.Linear(hidden, HQ * K, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden, H * K, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden, H * K, bias=qkv_bias)
        self.o_proj = nn.Linear(HQ * K, hidden, bias=config.attention_bias)
        self.g_proj = nn.Linear(hidden, H, bias=gate_bias)
        if config.qk_norm:
            self.q_norm = Qwen3RMSNorm(K, eps=config.rms_norm_eps)
            self.k_norm = Qwen3RMSNorm(K, eps=config.rms_norm_eps)

    def log_gate(self, x: Tensor) -> Tensor:
        """log_g [B, T, H], float32, of hidden states [B, T, hidden]."""
        return F.logsigmoid(self.g_proj(x).float())

    def forward(
        self,
        x: Tensor,  # [B, T, hidden]
        position_embeddings: tuple[Tensor, Tensor],
        mask: Tensor | None = None,  # bool [B, S]
        cache: Cache | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # [B, T, HQ, K]
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # [B, T, H, K]
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # [B, T, H, K]
        if self.config.normalises_qk:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotate(q, k, *position_embeddings, unsqueeze_dim=2)
        if self.config.use_exp:
            if cache is not None:
                k, v = (
                    kv.transpose(1, 2) for kv in cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
                )
            y = softmax_attention(q, k, v, mask, cu_seqlens)
        else:
            y = self.retention(q, k, v, self.log_gate(x), mask, cache, cu_seqlens)
        return self.o_proj(y.reshape(B, T, -1))

    def retention(self, q, k, v, log_g, mask, cache, cu_seqlens) -> Tensor:
        """y [B, T, HQ, K], and the layer's new state in `cache`."""
        T = q.shape[1]
        if mask is not None:  # a padding token adds nothing to the state and does not decay it
            own = mask[:, -T:].bool()
            k = k.masked_fill(~own[..., None, None], 0)
            log_g = log_g.masked_fill(~own[..., None], 0)
        if cache is None:
            return power_retention(  # type: ignore[return-value]  # a tensor, where no state is asked for
                q, k, v, log_g,
                power=self.config.p,
                chunk_size=self.chunk_size(T),
                cu_seqlens=cu_seqlens,
                sink=self.sink,
            )  # fmt: skip
        layer = cache.layers[self.layer_idx]
        if T == 1 and layer.is_initialized and not q.requires_grad:  # decoding has no gradient
            return layer.decode(q[:, 0], k[:, 0], v[:, 0], log_g[:, 0])[:, None]
        y, state = power_retention(
            q, k, v, log_g,
            power=self.config.p,
            chunk_size=self.chunk_size(T),
            initial_state=layer.fold(),
            return_final_state=True,
            sink=self.sink,
        )  # fmt: skip
        layer.update(state, T)
        return y

    def chunk_size(self, num_tokens: int) -> int | None:
        """Tokens a chunk, or None for the attention form."""
        config = self.config
        return config.prefill_chunk_size if num_tokens > config.switch_over_seq_len else None


class BrumbyDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: BrumbyConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = BrumbyAttention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), **kwargs)
        return x + self.mlp(self.post_attention_layernorm(x))


class BrumbyPreTrainedModel(PreTrainedModel):
    config: BrumbyConfig
    config_class = BrumbyConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BrumbyDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True


class BrumbyModel(BrumbyPreTrainedModel):
    def __init__(self, config: BrumbyConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(BrumbyDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def new_cache(self) -> Cache:
        """An empty cache of the kind that the configured mixer needs."""
        return DynamicCache() if self.config.use_exp else BrumbyCache(self.config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, hidden] of `input_ids` [B, T].

        Args:
            attention_mask: [B, past + T], 0 for padding, which may stand on either side.
            position_ids: [B, T]; by default the number of real tokens before each one.
            cache, past_key_values: the state to go on from (one argument under two names).
            cu_seqlens: int32 [N + 1], boundaries of documents in the flattened B * T tokens. They do not
                see each other; row ends must be among them. Training only.

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds; a mask that is not [B, past + T];
                `cu_seqlens` together with a cache or a mask.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # [B, T, hidden]
        B, T, _ = x.shape
        cache = past_key_values if cache is None else cache
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if cache is None and use_cache and cu_seqlens is None:
            cache = self.new_cache()
        past = cache.get_seq_length() if cache is not None else 0
        if attention_mask is not None and attention_mask.shape != (B, past + T):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; expected (batch, past + new tokens) = "
                f"{(B, past + T)}"
            )
        if position_ids is None:
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
            else:
                position_ids = torch.arange(past, past + T, device=x.device)[None]
        rotation = self.rotary_emb(x, position_ids)
        if attention_mask is not None and bool(attention_mask.all()):
            attention_mask = None
        if cu_seqlens is not None:
            if attention_mask is not None or cache is not None:
                raise ValueError(
                    "cu_seqlens describes packed training rows; it goes with neither cache nor padding"
                )
            x = x.view(1, B * T, -1)
            rotation = tuple(r.expand(B, -1, -1).reshape(1, B * T, -1) for r in rotation)

        hidden_states = []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(x.view(B, T, -1))
            x = layer(x, position_embeddings=rotation, mask=attention_mask, cache=cache, cu_seqlens=cu_seqlens)
        x = self.norm(x).view(B, T, -1)
        if output_hidden_states:
            hidden_states.append(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=tuple(hidden_states) or None,
            **{CACHE_FIELD: cache if use_cache else None},  # type: ignore[arg-type]
        )


class BrumbyForCausalLM(BrumbyPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: BrumbyConfig) -> None:
        super().__init__(config)
        self.model = BrumbyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` would make a DynamicCache

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]
        if model_kwargs.get(CACHE_FIELD) is None:
            if generation_config.use_cache is False:
                # transformers reads our `prefill_chunk_size` as its own option, which needs a cache
                generation_config.prefill_chunk_size = None
            else:
                model_kwargs[CACHE_FIELD] = self.model.new_cache()

    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocabulary], or of the last `logits_to_keep` tokens, and the loss if `labels` are given.

        Args:
            labels: [B, T], aligned with `input_ids` and shifted here, as always in transformers; -100 is ignored.
            kwargs: see `BrumbyModel.forward`.
        """
        outputs = self.model(input_ids=input_ids, **{k: v for k, v in kwargs.items() if k != "num_items_in_batch"})
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_FIELD: getattr(outputs, CACHE_FIELD)},
        )


__all__ = ["BrumbyCache", "BrumbyForCausalLM", "BrumbyModel", "BrumbyPreTrainedModel"]
