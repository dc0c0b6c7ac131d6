"""What keeps a mixer from giving what attention gave: single layers aligned, with weights that a mixer could have.

    python -m benchmarks.alignment --base FOLDER --train train.npy [--layers 9 16 28] [--variants square ...]

`FOLDER` and `train.npy` are those of `benchmarks/recovery.py`. A layer's mixer learns the base's attention from
the base's own hidden states, a sequence a step, as in the stage `align`; `s = scale q . k` is weighed by a
function of s and a gate. Only `square` is power retention; the others say what its even power costs. Rows of
`variant`, `layer`, `error` (relative and squared, on sequences not trained on), `start` (the same before
training), `steps` and `seconds` go to `benchmarks/results/<device>/alignment.json`.

Shapes: B sequences, T tokens, HQ query heads, K head_dim.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from brumby.benchmarks.muon import Muon
from brumby.benchmarks.recovery_steps import relative_error
from brumby.kernels.tiles import slug
from brumby.model import BrumbyForCausalLM
from brumby.model.modeling_brumby import BrumbyAttention

HERE = Path(__file__).parent
HELD_OUT, BATCH = 64, 32  # sequences
EXPONENT = 20.0  # of exp(s) at most: a row's largest s is not known to its columns
Weights = Callable[[Tensor, Any], Tensor]  # of s [B, HQ, T, T]


@dataclass(frozen=True)
class Variant:
    """`weights` of s; gates' logits from `gates[0]` to `gates[1]` over the heads; `muon`: rate of the matrices."""

    weights: Weights = lambda s, _: s.square()
    gates: tuple[float, float] = (1.5, 6.0)
    lr: float = 4e-3
    muon: float | None = None
    epochs: int = 1
    constant: bool = False  # a constant a head is learnt for `weights`
    sink: bool = False  # a constant a head is learnt, and added to the sum that divides


VARIANTS = {
    "square": Variant(),
    "fourth": Variant(lambda s, _: s.square().square()),
    "rectified": Variant(lambda s, _: s.relu().square()),
    "exponential": Variant(lambda s, _: s.clamp(max=EXPONENT).exp()),
    "shifted": Variant(lambda s, mixer: (s + mixer.constant).square(), constant=True),
    "sink": Variant(sink=True),
    "long-gates": Variant(gates=(2.0, 10.0)),
    "constant-gates": Variant(gates=(6.9, 6.9)),
    "three-times": Variant(epochs=3),
    "slower": Variant(lr=2e-3),
    "faster": Variant(lr=8e-3),
    "muon": Variant(muon=1e-2),
}


def mix(mixer: Any, h: Tensor, rotation: tuple[Tensor, Tensor], variant: Variant) -> Tensor:
    """What the mixer gives for hidden states h [B, T, hidden]."""
    B, T, _ = h.shape
    K = mixer.head_dim
    q, k, v = (p(h).view(B, T, -1, K) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    if mixer.config.normalises_qk:
        q, k = mixer.q_norm(q), mixer.k_norm(k)
    q, k = apply_rotary_pos_emb(q, k, *rotation, unsqueeze_dim=2)
    R = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(R, 2), v.repeat_interleave(R, 2)
    s = torch.einsum("bthk,bshk->bhts", q, k) * K**-0.5
    G = mixer.log_gate(h).cumsum(1).transpose(1, 2).repeat_interleave(R, 1)  # [B, HQ, T]
    future = torch.ones(T, T, dtype=torch.bool, device=h.device).triu(1)
    gates = (G[..., :, None] - G[..., None, :]).masked_fill(future, -math.inf).exp()
    w = variant.weights(s, mixer) * gates
    total = w.sum(-1, keepdim=True)
    if variant.sink:
        total = total + mixer.sink.exp()
    y = torch.einsum("bhts,bshk->bthk", w / (total + 1e-9), v)
    return mixer.o_proj(y.flatten(2))


def fit(
    start: BrumbyAttention, h: Tensor, a: Tensor, rotation: tuple[Tensor, Tensor], variant: Variant
) -> tuple[float, float, int]:
    """Errors on the last sequences before and after a mixer is trained on the others, and the steps.

    Args:
        h, a: what the attention reads and gives, [sequences, T, hidden].
    """
    mixer: Any = copy.deepcopy(start).requires_grad_(True)
    heads = mixer.g_proj.out_features
    nn.init.zeros_(mixer.g_proj.weight)
    mixer.g_proj.bias.data.copy_(torch.linspace(*variant.gates, heads))
    HQ = mixer.q_proj.out_features // mixer.head_dim
    if variant.constant:
        mixer.constant = nn.Parameter(torch.full((HQ, 1, 1), 2.0, device=h.device))
    if variant.sink:
        mixer.sink = nn.Parameter(torch.zeros(HQ, 1, 1, device=h.device))
    matrices = [p for p in mixer.parameters() if variant.muon and p.ndim == 2 and min(p.shape) > 16]
    rest = [p for p in mixer.parameters() if all(p is not m for m in matrices)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)]
    if matrices:
        optimizers.append(Muon([{"params": matrices}]))
    peaks = [variant.lr, variant.muon or 0.0]

    def held_out() -> float:
        with torch.no_grad():
            pairs = zip(h[-HELD_OUT:].split(1), a[-HELD_OUT:].split(1), strict=True)
            return float(
                np.mean([relative_error(mix(mixer, x.float(), rotation, variant), y).item() for x, y in pairs])
            )

    before = held_out()
    num_sequences = len(h) - HELD_OUT
    steps = variant.epochs * num_sequences
    for i in range(steps):
        ratio = min(1.0, (i + 1) / 20) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * i / steps)))
        j = i % num_sequences
        loss = relative_error(mix(mixer, h[j : j + 1].float(), rotation, variant), a[j : j + 1])
        for optimizer, peak in zip(optimizers, peaks, strict=False):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = peak * ratio
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return before, held_out(), steps


@torch.no_grad()
def collect(
    base: BrumbyForCausalLM, ids: Tensor, layers: list[int], rotation: tuple[Tensor, Tensor]
) -> dict[int, tuple[Tensor, Tensor]]:
    """What the layers' attention reads and gives for ids [sequences, T], each [sequences, T, hidden], bfloat16."""
    found: dict[int, tuple[list[Tensor], list[Tensor]]] = {i: ([], []) for i in layers}
    for part in ids.split(BATCH):
        x = base.model.embed_tokens(part)
        for i, layer in enumerate(base.model.layers[: max(layers) + 1]):
            h = layer.input_layernorm(x)
            a = layer.self_attn(h, position_embeddings=rotation)
            if i in found:
                for kept, tensor in zip(found[i], (h, a), strict=True):
                    kept.append(tensor.bfloat16())
            x = x + a
            x = x + layer.mlp(layer.post_attention_layernorm(x))
    return {i: (torch.cat(h), torch.cat(a)) for i, (h, a) in found.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[9, 16, 28])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--sequences", type=int, default=1024)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = True
    T, device = args.sequence_length, args.device
    loaded: nn.Module = BrumbyForCausalLM.from_pretrained(args.base, dtype=torch.float32, use_exp=True)
    base = cast(BrumbyForCausalLM, loaded.to(device).eval().requires_grad_(False))
    rotation = base.model.rotary_emb(
        base.model.embed_tokens.weight[:1, None], torch.arange(T, device=device)[None]
    )
    tokens = torch.from_numpy(np.load(args.train).astype(np.int64))
    first = torch.randint(
        0, len(tokens) - T, (args.sequences + HELD_OUT,), generator=torch.Generator().manual_seed(0)
    )
    ids = torch.stack([tokens[i : i + T] for i in first.tolist()]).to(device)
    taught = collect(base, ids, args.layers, rotation)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    folder = args.out or HERE / "results" / slug(name)
    folder.mkdir(parents=True, exist_ok=True)
    head = {"device": name, "date": str(date.today()), "torch": torch.__version__, "model": args.base.name}
    rows = []
    for variant in args.variants:
        for layer in args.layers:
            started = time.perf_counter()
            before, after, steps = fit(
                base.model.layers[layer].self_attn, *taught[layer], rotation, VARIANTS[variant]
            )
            row = {"variant": variant, "layer": layer, "error": round(after, 4), "start": round(before, 4)}
            rows.append(row | {"steps": steps, "seconds": round(time.perf_counter() - started, 1)})
            print(json.dumps(rows[-1]), flush=True)
            part = folder / ".alignment.json.part"
            part.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
            part.rename(folder / "alignment.json")


if __name__ == "__main__":
    main()
