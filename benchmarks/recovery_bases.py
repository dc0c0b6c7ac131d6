"""Bases that small public models lack, made of SmolLM2, as checkpoints for benchmarks/recovery.py's `--base`.

    python -m benchmarks.recovery_bases qk-norm --base FOLDER --train train.npy --held-out held-out.npz --out OUT
    python -m benchmarks.recovery_bases {kv-heads,offsets} --base FOLDER --out OUT

`FOLDER`, `train.npy` and `held-out.npz` are those of `benchmarks/recovery.py`.

- `qk-norm`: with QK norms, which Qwen3 has, and the sink of `FOLDER` scaled as `brumby convert` does. Each norm
  starts at the root mean square of what it will divide by it, over the layer's heads and some thousand tokens, so
  that the queries and keys keep their size on average; then the softmax model learns the divergence from the one
  without norms. Prints the excess over that one before and after.
- `kv-heads`: each query head has keys, values and a gate of its own, copies of those that it shared. With softmax
  the same function; as a student its state is as many times larger.
- `offsets`: biases of zero on queries, keys and values.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from brumby.benchmarks.recovery import Model, Run, means
from brumby.benchmarks.recovery_steps import Stage, Steps
from brumby.convert.gates import layer_sinks
from brumby.model import BrumbyConfig, BrumbyForCausalLM


@torch.no_grad()
def with_norms(run: Run, ids: Tensor) -> Model:
    """The teacher with QK norms, whose weights are measured on ids [B, T]."""
    teacher = run.teacher
    config = BrumbyConfig(**teacher.config.to_dict() | {"qk_norm": True})
    made: nn.Module = BrumbyForCausalLM(config)
    model = cast(Model, made.to(run.device))
    model.load_state_dict(teacher.state_dict(), strict=False)
    stream = run.hidden(teacher, ids)
    for ours, theirs, x in zip(model.model.layers, teacher.model.layers, stream, strict=False):
        h = theirs.input_layernorm(x)
        for norm, projection in (
            (ours.self_attn.q_norm, theirs.self_attn.q_proj),
            (ours.self_attn.k_norm, theirs.self_attn.k_proj),
        ):
            norm.weight.fill_(root_mean_square(projection, h))
    return model.train()


def root_mean_square(projection: nn.Linear, h: Tensor) -> float:
    return projection(h).float().square().mean().sqrt().item()


@torch.no_grad()
def with_own_heads(model: Model) -> Model:
    """The model with as many key-value heads as query heads."""
    config, heads = model.config, model.config.num_attention_heads
    made: nn.Module = BrumbyForCausalLM(BrumbyConfig(**config.to_dict() | {"num_key_value_heads": heads}))
    state = model.state_dict()
    for name, tensor in made.state_dict().items():
        rows = 1 if ".g_proj." in name else config.head_dim
        if (copies := len(tensor) // len(state[name])) > 1:
            state[name] = state[name].unflatten(0, (-1, rows)).repeat_interleave(copies, 0).flatten(0, 1)
    made.load_state_dict(state)
    return cast(Model, made)


@torch.no_grad()
def with_offsets(model: Model) -> Model:
    """The model with biases on q, k and v, all zero."""
    made: nn.Module = BrumbyForCausalLM(BrumbyConfig(**model.config.to_dict() | {"qkv_bias": True}))
    made.load_state_dict(model.state_dict(), strict=False)
    for name, p in made.named_parameters():
        if name.endswith("_proj.bias"):
            p.zero_()
    return cast(Model, made)


WITHOUT_TRAINING = {"kv-heads": with_own_heads, "offsets": with_offsets}


def learn_norms(run: Run, num_tokens: int) -> Model:
    """The teacher with QK norms, trained on `num_tokens`."""
    run.student = with_norms(run, run.train_ids[-8:, :-1].long())

    def excess() -> float:
        return means(run.excess(run.held_out, run.base_losses))["all"]

    print(f"norms, untrained: {excess():.4f} nats above the base", flush=True)
    stage = Stage(num_tokens, softmax=True, lr=5e-4, sequences=4)
    steps, rows = Steps(run, stage), run.batches(1, run.train_ids)
    steps.warm_up(run.train_ids[: stage.sequences].long())
    for i in range(steps.num_steps):
        steps.step(i, torch.stack([next(rows) for _ in range(stage.sequences)]).long())
    print(f"after {num_tokens:,} tokens: {excess():.4f}", flush=True)
    config, layers = run.student.config, run.student.model.layers
    config.use_exp = False
    norms = ((layer.self_attn.q_norm.weight, layer.self_attn.k_norm.weight) for layer in layers)
    config.sink = layer_sinks(run.teacher.config.sink_of(0), norms, config.p)
    return run.student


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["qk-norm", *WITHOUT_TRAINING])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(argv)
    if args.kind in WITHOUT_TRAINING:
        loaded: nn.Module = BrumbyForCausalLM.from_pretrained(args.base, dtype=torch.float32)
        model = WITHOUT_TRAINING[args.kind](cast(Model, loaded))
    elif args.train is None or args.held_out is None:
        parser.error("qk-norm needs --train and --held-out")
    else:
        paths = args.base, args.train, args.held_out
        run = Run(*paths, args.device, not args.no_compile, 2**20, args.sequence_length)
        model = learn_norms(run, args.tokens)
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
