"""A base with QK norms, which Qwen3 has and small public models lack: SmolLM2, given norms and trained to keep its
distribution.

    python -m benchmarks.recovery_qk_norm --base FOLDER --train train.npy --held-out held-out.npz --out FOLDER

`FOLDER`, `train.npy` and `held-out.npz` are those of `benchmarks/recovery.py`, and `--out` is a checkpoint for its
`--base`. Each norm starts at the root mean square of what it will divide by it, over the layer's heads and some
thousand tokens, so that the queries and keys keep their size on average; then the softmax model learns the
divergence from the one without norms. Prints the excess over that one before and after.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from brumby.benchmarks.recovery import Model, Run
from brumby.benchmarks.recovery_steps import Stage, Steps
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(argv)
    run = Run(args.base, args.train, args.held_out, args.device, not args.no_compile, 2**20, args.sequence_length)
    ids = run.train_ids[-8:, :-1].long()
    run.student = with_norms(run, ids)

    def excess() -> float:
        return run.evaluate(run.student)["all"] - run.base_loss["all"]

    print(f"norms, untrained: {excess():.4f} nats above the base", flush=True)
    stage = Stage(args.tokens, softmax=True, lr=5e-4, sequences=4)
    steps, rows = Steps(run, stage), run.batches(seed=1)
    steps.warm_up(run.train_ids[: stage.sequences].long())
    for i in range(steps.num_steps):
        steps.step(i, torch.stack([next(rows) for _ in range(stage.sequences)]).long())
    print(f"after {args.tokens:,} tokens: {excess():.4f}", flush=True)
    run.student.config.use_exp = False
    run.student.save_pretrained(args.out)


if __name__ == "__main__":
    main()
