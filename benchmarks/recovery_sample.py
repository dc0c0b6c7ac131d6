"""Text that a base writes by itself, for `--sampled` of benchmarks/recovery.py and for `experiment=smollm2_135m`.

    python -m benchmarks.recovery_sample --base FOLDER --tokens 16000000 --out sampled.npy

`FOLDER` is a checkpoint made by `brumby convert`, run with softmax. Each row begins with a token drawn from all of
the vocabulary alike, as in arXiv 2305.17888: after `<|endoftext|>`, which its training on dialogues has left
without text to follow, SmolLM2-Instruct mostly writes broken code. Every next token is drawn from the base's own
distribution without those whose probability is below `--min-p` times the largest (min-p, arXiv 2407.01082).
`sampled.npy` has uint16 ids of rows of `--sequence-length` + 1 tokens, one after the other, and `sampled.jsonl.gz`
beside it has their text, a row a document, for `brumby prepare`.

Shapes: B rows, T tokens, H key-value heads, R query heads to each, K head_dim, W vocabulary.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor, nn

from brumby.benchmarks.recovery_data import content_of
from brumby.launch.demo import write
from brumby.model import BrumbyForCausalLM
from brumby.model.modeling_brumby import BrumbyAttention

BUCKET = 256  # positions that share a graph, and read as many keys


class Sampler:
    """A model with softmax, and the keys and values of B rows of T tokens."""

    def __init__(self, model: BrumbyForCausalLM, B: int, T: int, min_p: float) -> None:
        config, device = model.config, model.lm_head.weight.device
        self.model, self.margin = model, -math.log(min_p)
        H = config.num_key_value_heads or config.num_attention_heads
        shape = (config.num_hidden_layers, B, H, T, config.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(2))
        self.rows = torch.zeros(B, T + 1, dtype=torch.int64, device=device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def logits(self, num_keys: int) -> Tensor:
        """[B, W] after the token at `position`, which is below `num_keys`."""
        model, at = self.model.model, self.position.view(1)
        x = model.embed_tokens(self.rows.index_select(1, at))  # [B, 1, hidden]
        rotation = model.rotary_emb(x, at[None])
        seen = torch.arange(num_keys, device=at.device) <= at
        for i, layer in enumerate(model.layers):
            x = x + self.attend(i, layer.self_attn, layer.input_layernorm(x), rotation, seen)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(model.norm(x))[:, 0].float()

    def attend(self, i: int, layer: BrumbyAttention, x: Tensor, rotation, seen: Tensor) -> Tensor:
        """The query heads of one key-value head stand where several tokens of one head would."""
        B, num_keys = len(x), len(seen)
        q, k, v = (
            project(x).view(B, 1, -1, layer.head_dim) for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        if layer.config.normalises_qk:
            q, k = layer.q_norm(q), layer.k_norm(k)
        q, k = layer.rotate(q, k, *rotation, unsqueeze_dim=2)
        for kept, new in ((self.k[i], k), (self.v[i], v)):
            kept.index_copy_(2, self.position.view(1), new.transpose(1, 2))
        q = q.view(B, self.k.shape[2], -1, layer.head_dim)  # [B, H, R, K]
        y = F.scaled_dot_product_attention(q, self.k[i, :, :, :num_keys], self.v[i, :, :, :num_keys], seen[None])
        return layer.o_proj(y.reshape(B, 1, -1))

    def step(self, num_keys: int) -> None:
        """Draw the token after `position`, by Gumbel's maximum, and go there."""
        z = self.logits(num_keys)
        z = z.masked_fill(z < z.amax(-1, keepdim=True) - self.margin, -math.inf)
        drawn = (z - torch.empty_like(z).exponential_().log()).argmax(-1)
        self.position += 1
        self.rows.index_copy_(1, self.position.view(1), drawn[:, None])

    def write(self, num_words: int) -> Tensor:
        """New rows [B, T + 1], each from a first token below `num_words`."""
        T = self.k.shape[3]
        self.position.zero_()
        self.rows[:, 0].random_(num_words)
        for start in range(0, T, BUCKET):
            end = min(start + BUCKET, T)
            if not self.rows.is_cuda:
                for _ in range(start, end):
                    self.step(end)
                continue
            graph = self.captured(end)
            for _ in range(start, end):
                graph.replay()
        return self.rows

    def captured(self, num_keys: int) -> torch.cuda.CUDAGraph:
        """`step`, to be replayed: launching it takes longer than running it."""
        here = self.position.clone()
        self.step(num_keys)  # what is made at a first call
        self.position.copy_(here)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(num_keys)
        return graph


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1024, help="at once; SmolLM2-135M takes 48 MB for each")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--min-p", type=float, default=0.002, help="makes SmolLM2 as sure of it as of real text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 0 < args.min_p <= 1:
        parser.error(f"--min-p is {args.min_p}; expected a share above 0, of 1 at most")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: nn.Module = BrumbyForCausalLM.from_pretrained(args.base, dtype=dtype, use_exp=True)
    T, started = args.sequence_length, time.perf_counter()
    torch.manual_seed(args.seed)
    sampler = Sampler(cast(BrumbyForCausalLM, model.to(device).eval()), args.rows, T, args.min_p)
    num_rounds = -(-args.tokens // (args.rows * (T + 1)))
    tokenizer = Tokenizer.from_file(str(args.base / "tokenizer.json"))
    num_words = tokenizer.get_vocab_size()  # fewer than the model has embeddings, in Qwen3
    parts = [sampler.write(num_words).cpu().numpy().astype(np.uint16) for _ in track(range(num_rounds), "Writing")]
    rows = np.concatenate(parts)
    texts = tokenizer.decode_batch(rows.tolist(), skip_special_tokens=False)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    write(args.out.with_suffix(".jsonl.gz"), gzip.compress(lines.encode(), mtime=0))
    write(args.out, content_of(np.save, rows.ravel()))
    print(f"{num_rounds * args.rows * (T + 1):,} tokens in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
