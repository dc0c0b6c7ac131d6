"""What training loses to its checkpoints: real steps of a model with random weights, on one device.

    python -m benchmarks.checkpoints [--shape qwen3-0.6b] [--every 40] [--out FOLDER]

trains through three checkpoints and writes `checkpoints.json`. An undisturbed step takes `step_seconds` (median,
from one step's end to the next one's). What the steps from a checkpoint's beginning until it has its name take
beyond that is lost: `lost_seconds`, one value a checkpoint, below zero where steps happened to be faster.
`waited_seconds` is the part of it in which nothing is computed. `share_at_100` is the mean loss over the time of a
hundred steps.
"""

import argparse
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from brumby.data import DataConfig, prepare
from brumby.launch import runs
from brumby.model import BrumbyConfig, BrumbyForCausalLM
from brumby.train import config as run_config
from brumby.train import trainer
from brumby.train.__main__ import quieten
from brumby.train.status import completed
from brumby.train.tracking import read_metrics

WARM_UP = 10  # steps that are not counted: kernels are compiled in the first
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    },
    "tiny": {
        "vocab_size": 257, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
    },
}  # fmt: skip
BATCHES = {  # sequence length, sequences in a step and in a micro-batch
    "qwen3-0.6b": (4096, 4, 2),
    "tiny": (64, 4, 2),
}


def make_model(folder: Path, shape: str) -> int:
    """A Brumby checkpoint with random weights and a tokenizer of bytes; how many parameters it has."""
    words = {c: i for i, c in enumerate(["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = BrumbyConfig(**SHAPES[shape], tie_word_embeddings=True, gate_bias=True, eos_token_id=0)
    model = BrumbyForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def make_data(folder: Path, model: Path, shape: str, steps: int) -> DataConfig:
    """Shards of random letters, which the steps go through as often as they must."""
    rng = random.Random(0)
    lines = (json.dumps({"text": "".join(rng.choices("abcdefghijklmnop ", k=4000))}) for _ in range(200))
    (folder / "text.jsonl").write_text("\n".join(lines))
    length, sequences, _ = BATCHES[shape]
    data = DataConfig.from_dict(
        {
            "root": str(folder / "shards"),
            "tokenizer": str(model),
            "sequence_length": length,
            "sequences_per_step": sequences,
            "sources": {"text": {"path": str(folder / "text.jsonl")}},
            "phases": {"only": {"tokens": steps * sequences * length, "blend": {"text": 1.0}}},
        }
    )
    prepare(data)
    return data


class Clock:
    """When each step ended, and whether a checkpoint was being written then."""

    def __init__(self) -> None:
        self.trainer: trainer.Trainer | None = None
        self.ends: list[float] = []
        self.writing: list[bool] = []

    def beat(self) -> None:
        assert self.trainer is not None
        self.ends.append(time.perf_counter())
        self.writing.append(self.trainer.checkpoints.state is not None)

    def evaluate(self, every: int) -> tuple[float, list[float], list[float]]:
        """Seconds of an undisturbed step, and for each checkpoint those lost and those until it had its name."""
        undisturbed: list[float] = []
        disturbed: dict[int, list[float]] = {}
        for step in range(1, len(self.ends) - 1):  # from this step's end to the next one's; the last one measures
            seconds = self.ends[step] - self.ends[step - 1]
            if self.writing[step - 1] or step % every == 0:
                disturbed.setdefault(step // every * every, []).append(seconds)
            elif step > WARM_UP:
                undisturbed.append(seconds)
        usual = statistics.median(undisturbed)
        return (
            usual,
            [sum(times) - len(times) * usual for times in disturbed.values()],
            [sum(times) for times in disturbed.values()],
        )


def measure(folder: Path, shape: str, every: int) -> dict:
    model, steps = folder / "model", 4 * every - 1
    parameters = make_model(model, shape)
    data = make_data(folder, model, shape, steps)
    config = run_config.RunConfig(
        name="run",
        runs_dir=str(folder),
        model=str(model),
        data=data,
        micro_batch=BATCHES[shape][2],
        checkpoint_every=every,
        keep_checkpoints=1,
        measure_every=steps,
        stages={"retrain": run_config.StageConfig(schedule=run_config.ScheduleConfig(name="cosine"))},
        wandb=run_config.WandbConfig(mode="disabled"),
    )
    run_dir = runs.create(config)
    trainer.DRAW_SECONDS = math.inf  # no pictures between the steps
    clock = Clock()
    clock.trainer = trainer.Trainer(config, clock.beat)
    clock.trainer.fit()
    usual, lost, named = clock.evaluate(every)
    rows = read_metrics(run_dir / "metrics.jsonl")
    waited = [row["checkpoint_seconds"] for row in rows if row["checkpoint_seconds"]]
    files = completed(run_dir)[-1].glob("*")
    return {
        "shape": shape,
        "parameters": parameters,
        "tokens_per_step": rows[0]["tokens_seen"],
        "checkpoint_bytes": sum(file.stat().st_size for file in files),
        "step_seconds": usual,
        "waited_seconds": waited,
        "lost_seconds": lost,
        "seconds_until_named": named,
        "share_at_100": statistics.mean(lost) / (100 * usual),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--every", type=int, default=40, help="steps between checkpoints")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    quieten()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args.shape, args.every)
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"cpu {os.cpu_count()} cores"
    versions = {name: metadata.version(name) for name in ("torch", "deepspeed", "transformers")}
    found = {"device": device, "date": str(date.today()), "python": platform.python_version()} | versions | found
    for name, value in found.items():
        print(f"{name:20s} {value}")
    out = args.out or Path(__file__).parent / "results" / device.lower().replace(" ", "-")
    out.mkdir(parents=True, exist_ok=True)
    part = out / ".checkpoints.json.part"
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.rename(out / "checkpoints.json")


if __name__ == "__main__":
    main()
