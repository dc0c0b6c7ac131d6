"""Small random bases, made by transformers' own classes."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,  # wide enough for attention to matter
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
BASES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "tie_word_embeddings": False}),
    "qwen3-tied": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-bias": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16, "attention_bias": True}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"hidden_size": 96}),
    "qwen2-yarn": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {
            "hidden_size": 96,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 512,
            },
        },
    ),
    "llama3": (
        LlamaForCausalLM,
        LlamaConfig,
        {"hidden_size": 96, "head_dim": 32, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama-bias": (
        LlamaForCausalLM,
        LlamaConfig,
        {"hidden_size": 96, "head_dim": 32, "attention_bias": True},
    ),
    "smollm2": (LlamaForCausalLM, LlamaConfig, {"hidden_size": 96, "tie_word_embeddings": True}),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and nothing else."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def make_model(kind: str, seed: int = 0):
    """A random model of `BASES` in float32. Biases and norms are random too, so that none is overlooked."""
    model_class, config_class, own = BASES[kind]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **own}))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    return model.eval()


@pytest.fixture
def make_base(tmp_path: Path):
    """make_base(kind, sharded=..., dtype=...) -> the folder of a base with a tokenizer."""

    def make(kind: str, *, sharded: bool = True, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path / f"base-{kind}"
        make_model(kind).to(dtype).save_pretrained(folder, max_shard_size="60KB" if sharded else "5GB")
        tokenizer().save_pretrained(folder)
        return folder

    return make
