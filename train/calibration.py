"""Gates set before anything is trained: a half-life is the distance within which the base has half its attention.

Of each key-value head that is the median over the attention of all its query heads. A document's first token, on
which attention rests when it looks for nothing, does not count.

Shapes: N tokens, HQ query heads, H key-value heads, R = HQ / H, K head_dim.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from brumby.train.partition import set_weights
from brumby.train.teacher import Teacher

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

QUERIES = 1024  # whose probabilities are held at once
MAX_LOGIT = 8.0  # a half-life of 2,000 tokens


@torch.no_grad()
def calibrate_gates(engine: "DeepSpeedEngine", teacher: Teacher, batches: Iterable[dict[str, Tensor]]) -> None:
    """Set all gates' biases from what the base attends to in the batches of all ranks."""
    mass = torch.stack([attention_by_distance(teacher, batch) for batch in batches]).sum(0)
    dist.all_reduce(mass)
    biases = {f"model.layers.{i}.self_attn.g_proj.bias": gate_logits(layer) for i, layer in enumerate(mass)}
    set_weights(engine, biases)


def gate_logits(mass: Tensor) -> Tensor:
    """Logits [H] of gates whose half-life is the median distance of attention `mass` [H, N]; 0 to `MAX_LOGIT`."""
    total = mass.cumsum(1)
    median = (total < total[:, -1:] / 2).sum(1) + 0.5
    g = torch.exp2(-1 / median)
    return (g / (1 - g)).log().clamp(0.0, MAX_LOGIT).float()


def attention_by_distance(teacher: Teacher, batch: dict[str, Tensor]) -> Tensor:
    """How much attention goes how many tokens back in a micro-batch, [layers, H, N], float64."""
    found: list[Tensor] = []
    handles = [handle for layer in teacher.layers for handle in _watch(layer.self_attn, found)]
    teacher(batch)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def _watch(attention: Any, found: list[Tensor]) -> list:
    """Hooks that append the attention by distance of each call of `attention`, a BrumbyAttention, to `found`."""
    seen: list[Tensor] = []  # q, k before their rotation

    def keep(_module, _inputs, output) -> None:
        seen.append(output.clone())  # a rotation may be in place

    def measure(_module, _inputs, rest, _output) -> None:
        q, k = (x.unflatten(-1, (-1, attention.head_dim)) if x.ndim == 3 else x for x in seen)
        q, k = apply_rotary_pos_emb(q, k, *rest["position_embeddings"], unsqueeze_dim=2)
        found.append(by_distance(q[0], k[0], rest["cu_seqlens"]))
        seen.clear()

    kind = "norm" if attention.config.normalises_qk else "proj"
    parts = [attention.get_submodule(f"{name}_{kind}").register_forward_hook(keep) for name in "qk"]
    return [*parts, attention.register_forward_hook(measure, with_kwargs=True)]


def by_distance(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Softmax probabilities of q [N, HQ, K] for k [N, H, K] summed by distance, [H, N], float64."""
    N, H, K = k.shape
    mass = torch.zeros(H, N, dtype=torch.float64, device=k.device)
    q = q.unflatten(1, (H, -1)).permute(1, 2, 0, 3)  # [H, R, N, K]
    k = k.transpose(0, 1)  # [H, N, K]
    for first, end in pairwise(cu_seqlens.tolist()):
        for start in range(first, end, QUERIES):
            stop = min(start + QUERIES, end)
            rows, columns = stop - start, stop - first
            future = torch.ones(rows, columns, dtype=torch.bool, device=k.device).triu(columns - rows + 1)
            for head in range(H):
                s = (q[head, :, start:stop] @ k[head, first:stop].T).float() * K**-0.5  # [R, rows, columns]
                a = s.masked_fill(future, -math.inf).softmax(-1).sum(0)
                a[:, 0] = 0
                # Row i moved right by i, columns turned round: what is equally far back is one above the other.
                a = F.pad(a.flip(1), (0, rows)).flatten()[:-rows].view(rows, -1)
                mass[head, :columns] += a.sum(0, dtype=torch.float64)[rows - 1 :]
    return mass
