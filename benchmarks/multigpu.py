"""Training on the GPUs of one host: speed, memory and communication by ZeRO stage, and what a failure costs.

    python -m benchmarks.multigpu [--cases zero2 killed] [--layers 4] [--max-layers 12] [--out FOLDER]

A Qwen3-14B of few layers and random weights is converted and trained on sequences of 8192 random tokens, one in
a micro-batch, with activation checkpointing. Each case is a run with ranks of its own. After each,
`multigpu.json` is written anew; in it the rows of cases that are not asked for stay.

`one`: on one GPU; `zero1`, `zero2`, `zero3`: the same layers on all GPUs, and as many sequences for each;
`zero3-kept`: that without activation checkpointing; `zero3-max`: as many layers as fit; `zero1-kl`, `zero3-kl`:
alignment, then the divergence from the base. A row has the speed of a few steps (`mfu` counts nothing that is
recomputed), the largest of the GPUs' peaks of memory, and the shares of a step in which rank 0's GPU runs kernels
of NCCL, waiting for the others included, with nothing beside them (`exposed`) or with other work (`overlapped`),
and in which it runs nothing (`idle`). `scaling` is the speed of a GPU over that of `one` on the same day.

`bandwidth` is the bus's, in an all-reduce of a gigabyte.

`killed` and `moved`: a run of one layer and a small vocabulary under ZeRO-3 with `brumby launch`, whose objectives
are compared with those of the same run undisturbed. A rank of it is killed, and `seconds_lost` pass until the run
has come as far again; or it is interrupted and resumed, on all GPUs, on one, and on all. `on_one` compares a run
undisturbed on one GPU in the same way: what the number of GPUs alone makes.
"""

import argparse
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3Config

from brumby.benchmarks.multigpu_rank import STAGE_STEPS
from brumby.convert import convert
from brumby.convert.families import brumby_config, carried_tensors
from brumby.data import DataConfig, Manifest, PhaseConfig, SourceConfig
from brumby.data.tokenizing import Encoded
from brumby.data.writer import ShardWriter
from brumby.kernels.tiles import slug
from brumby.launch import runs
from brumby.train import status
from brumby.train.config import RunConfig, StageConfig, WandbConfig
from brumby.train.status import EXIT_INTERRUPTED, step_of
from brumby.train.tracking import read_metrics

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-14b": {
        "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 17408, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
    },
}  # fmt: skip
SEQUENCE_LENGTHS = {"qwen3-14b": 8192, "tiny": 64}
CASE_SECONDS = 300.0  # after which a rank that has not finished its case, or a step of a launched run, ends itself
RESTART_VOCABULARY = 256  # so that a checkpoint is small, and the loss falls
RESTART_STEPS, CHECKPOINT_EVERY = 32, 8


@dataclass(frozen=True)
class Case:
    """A training case.

    Args:
        on_all: on all GPUs, or on one.
        deep: with `--max-layers`, not `--layers`.
        distils: in the stages of alignment and of divergence from the base, not with cross-entropy.
        recomputes: with activation checkpointing.
    """

    zero_stage: int
    on_all: bool = True
    deep: bool = False
    distils: bool = False
    recomputes: bool = True


CASES = {
    "one": Case(2, on_all=False),
    "zero1": Case(1),
    "zero2": Case(2),
    "zero3": Case(3),
    "zero3-kept": Case(3, recomputes=False),
    "zero3-max": Case(3, deep=True),
    "zero1-kl": Case(1, distils=True),
    "zero3-kl": Case(3, distils=True),
}


class Bench:
    """What the cases share: checkpoints, made once for each number of layers, tokens and runs, in `folder`."""

    def __init__(self, folder: Path, shape: str, gpus: int, accumulation: int) -> None:
        self.folder, self.gpus, self.accumulation = folder, gpus, accumulation
        self.shape, self.sequence_length = SHAPES[shape], SEQUENCE_LENGTHS[shape]

    def model(self, layers: int, vocab_size: int) -> Path:
        """A converted checkpoint with random weights; checkpoints share the files of the layers they have."""
        name = f"{layers}-layers-{vocab_size}"
        base, converted = self.folder / f"base-{name}", self.folder / f"brumby-{name}"
        if converted.exists():
            return converted
        config = Qwen3Config(**self.shape | {"num_hidden_layers": layers, "vocab_size": vocab_size})
        config.architectures, config.dtype = ["Qwen3ForCausalLM"], torch.bfloat16
        config.save_pretrained(base)
        shards: dict[str, dict[str, tuple[int, ...]]] = {}
        for key, tensor_shape in carried_tensors(brumby_config(config.to_dict(), gate_bias=True, p=2)).items():
            shard = f"layer-{key.split('.')[2]}" if ".layers." in key else f"ends-{vocab_size}"
            shards.setdefault(f"{shard}.safetensors", {})[key] = tensor_shape
        for seed, (shard, shapes) in enumerate(shards.items()):
            if not (self.folder / shard).exists():
                torch.manual_seed(seed)
                save_file({key: random_weight(shape) for key, shape in shapes.items()}, self.folder / shard)
            os.link(self.folder / shard, base / shard)
        weight_map = {key: shard for shard, shapes in shards.items() for key in shapes}
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the ranks need it
        convert(base, converted, parity="tensors", verbose=False)
        return converted

    def data(self, vocab_size: int, steps: int, sequences: int) -> DataConfig:
        """Random tokens, one document, low ids more often than high ones: there is something to learn."""
        root, num_tokens = self.folder / f"tokens-{vocab_size}", 64 * self.sequence_length
        if not root.exists():
            (root / "random").mkdir(parents=True)
            tokens = (np.random.default_rng(0).random(num_tokens) ** 3 * vocab_size).astype(np.uint32)
            manifest = Manifest({}, "none", "0" * 64, vocab_size, 0, "uint32", num_tokens)
            zero = np.zeros(1, np.int64)
            hashes, fates = zero.astype(np.uint64), zero.astype(np.uint8)
            writer = ShardWriter(root / "random", manifest, math.inf, ["random"])
            writer.add(Encoded(tokens, zero + num_tokens, hashes, fates, files=zero, rows=zero, notes={}))
            writer.close_shard()
            writer.close()
        return DataConfig(
            root=str(root),
            tokenizer="none",
            sequence_length=self.sequence_length,
            sequences_per_step=sequences,
            sources={"random": SourceConfig(path="random")},
            phases={"only": PhaseConfig(steps * sequences * self.sequence_length, {"random": 1.0})},
        )

    def run(self, name: str, model: Path, data: DataConfig, **options: Any) -> Path:
        config = RunConfig(
            name=name,
            runs_dir=str(self.folder / "runs"),
            model=str(model),
            data=data,
            step_timeout=CASE_SECONDS,
            measure_every=10**9,
            wandb=WandbConfig(mode="disabled"),
            **options,
        )
        return runs.create(config)

    def train(self, name: str, layers: int) -> list[dict]:
        """The rows of a training case."""
        case, vocab_size = CASES[name], self.shape["vocab_size"]
        gpus = self.gpus if case.on_all else 1
        sequences = gpus * self.accumulation
        stages = {"retrain": StageConfig()}
        if case.distils:
            tokens = STAGE_STEPS * sequences * self.sequence_length
            stages = {
                "align": StageConfig(tokens=tokens, objective="align"),
                "retrain": StageConfig(ce=0.0, kl=1.0),
            }
        steps = len(stages) * STAGE_STEPS + 1  # the last one of a run measures more
        model, data = self.model(layers, vocab_size), self.data(vocab_size, steps, sequences)
        run_dir = self.run(
            name,
            model,
            data,
            zero_stage=case.zero_stage,
            activation_checkpointing=case.recomputes,
            stages=stages,
        )
        torchrun(gpus, "brumby.benchmarks.multigpu_rank", run_dir)
        head = {"case": name, "zero_stage": case.zero_stage, "gpus": gpus, "layers": layers}
        head |= {"accumulation": self.accumulation}
        return [head | row for row in json.loads((run_dir / "measured.json").read_text())]

    def bandwidth(self) -> list[dict]:
        torchrun(self.gpus, "brumby.launch.bandwidth", self.folder)
        return [{"case": "bandwidth"} | json.loads((self.folder / "bandwidth.json").read_text())]

    def launched_run(self, name: str) -> Path:
        sequences = self.gpus * self.accumulation
        model = self.model(1, RESTART_VOCABULARY)
        data = self.data(RESTART_VOCABULARY, RESTART_STEPS, sequences)
        return self.run(
            name,
            model,
            data,
            zero_stage=3,
            activation_checkpointing=True,
            checkpoint_every=CHECKPOINT_EVERY,
            keep_checkpoints=1,
        )

    @cached_property
    def undisturbed(self) -> list[dict]:
        """The metrics of a launched run that nothing happens to."""
        run = self.launched_run("undisturbed")
        with launched(run, self.gpus):
            pass
        return rows_of(run)

    def killed(self) -> list[dict]:
        expected, run = self.undisturbed, self.launched_run("killed")
        with launched(run, self.gpus) as until:
            until(lambda: last_step(run) > newest_checkpoint(run) > 0)
            os.kill(status.read(run)[-1]["pid"], signal.SIGKILL)
            start, reached, saved = time.monotonic(), last_step(run), newest_checkpoint(run)
            until(lambda: last_step(run) < reached)  # what was done since the checkpoint is done again
            until(lambda: last_step(run) >= reached)
            lost = time.monotonic() - start
        found = {"seconds_lost": lost, "step_seconds": statistics.median(row["step_seconds"] for row in expected)}
        found |= {"killed_after": reached, "resumed_from": saved}
        return [{"case": "killed"} | found | compared(rows_of(run), expected)]

    def moved(self) -> list[dict]:
        expected, run = self.undisturbed, self.launched_run("moved")
        moves = []
        for gpus, step in ((self.gpus, RESTART_STEPS // 4), (1, RESTART_STEPS // 2)):
            with launched(run, gpus, interrupted=True) as until:
                until(lambda step=step: last_step(run) >= step)
            moves.append(last_step(run))
        with launched(run, self.gpus):
            pass
        alone = self.launched_run("alone")
        with launched(alone, 1):
            pass
        found = {"gpus": [self.gpus, 1, self.gpus], "moved_after": moves}
        found |= compared(rows_of(run), expected)
        return [{"case": "moved"} | found | {"on_one": differences(rows_of(alone), expected)}]


def compared(rows: list[dict], expected: list[dict]) -> dict[str, Any]:
    """How far the objectives of a run are from an undisturbed run's."""
    by_step = differences(rows, expected)
    first, last = expected[0]["objective"], expected[-1]["objective"]
    found: dict[str, Any] = {"first_objective": first, "last_objective": last, "max_difference": max(by_step)}
    return found | {"differences": by_step}


def differences(rows: list[dict], expected: list[dict]) -> list[float]:
    """Between the objectives of two runs, by step."""
    return [round(abs(a["objective"] - b["objective"]), 6) for a, b in zip(rows, expected, strict=True)]


def random_weight(shape: tuple[int, ...]) -> Tensor:
    """Ones for a norm, else as transformers begins a matrix."""
    weight = torch.ones(shape, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
    return weight if len(shape) == 1 else weight.normal_(0.0, 0.02)


def torchrun(gpus: int, module: str, folder: Path) -> None:
    """Run a module with an argument on so many ranks.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // gpus))}
    argv += ["-m", module, str(folder)]
    done = subprocess.run(
        argv, env=threads | os.environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        raise RuntimeError(f"{module} failed:\n{done.stdout[-6000:]}")


@contextmanager
def launched(run_dir: Path, gpus: int, interrupted: bool = False) -> Iterator[Callable]:
    """`brumby launch` of a run, to its end; if `interrupted`, that is an interrupt after the block.

    Yields:
        What waits until a condition holds.

    Raises:
        RuntimeError: it ended before it should have, or otherwise than it should have.
    """
    words = ["launch", f"resume={run_dir}", f"ranks_per_host={gpus}"]
    output = run_dir / "logs" / "benchmark.log"
    with output.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "brumby.launch.cli", *words], stdout=file, stderr=subprocess.STDOUT
        )

    def until(condition: Callable[[], bool]) -> None:
        while not condition():
            if process.poll() is not None:
                raise RuntimeError(f"{run_dir.name} ended too early:\n{output.read_text()[-6000:]}")
            time.sleep(0.01)

    try:
        yield until
        if interrupted:
            process.send_signal(signal.SIGTERM)  # a shell's background job ignores SIGINT
        if process.wait() != (EXIT_INTERRUPTED if interrupted else 0):
            raise RuntimeError(
                f"{run_dir.name} ended with code {process.returncode}:\n{output.read_text()[-6000:]}"
            )
    finally:
        if process.poll() is None:  # its ranks end with it: a second interrupt does not wait for them to save
            process.send_signal(signal.SIGTERM)
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            process.wait()


def rows_of(run_dir: Path) -> list[dict]:
    return read_metrics(run_dir / "metrics.jsonl")


def last_step(run_dir: Path) -> int:
    rows = rows_of(run_dir)
    return rows[-1]["step"] if rows else 0


def newest_checkpoint(run_dir: Path) -> int:
    return max(map(step_of, status.completed(run_dir)), default=0)


def set_beside_one(rows: list[dict]) -> None:
    """Give rows of the same layers and day their `scaling`."""
    ones = {(row["layers"], row["date"]): row for row in rows if row["case"] == "one"}
    for row in rows:
        case = CASES.get(row["case"])
        if case and not case.distils and (one := ones.get((row["layers"], row["date"]))):
            row["scaling"] = row["tokens_per_second_per_gpu"] / one["tokens_per_second_per_gpu"]


def write(path: Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.rename(path)


HEADER = (
    "time  case       stage    ZeRO GPUs layers  tokens/s/GPU    MFU  peak GB  exposed overlapped   idle    loss"
)


def line(row: dict, seconds: float) -> str:
    """A row of the table on the terminal."""
    start = f"{seconds:3.0f} s {row['case']:10s}"
    if row["case"] not in CASES:
        return f"{start} {'  '.join(f'{name} {value}' for name, value in row.items() if name != 'case')}"
    shares = row["shares"] or dict.fromkeys(("exposed", "overlapped", "idle"), math.nan)
    loss = row["objective"] if row["loss"] is None else row["loss"]
    return (
        f"{start} {row['stage']:8s} {row['zero_stage']:4d} {row['gpus']:4d} {row['layers']:6d} "
        f"{row['tokens_per_second_per_gpu']:12,.0f} {row['mfu']:6.1%} {row['peak_bytes'] / 1e9:8.1f} "
        f"{shares['exposed']:8.1%} {shares['overlapped']:10.1%} {shares['idle']:6.1%} {loss:7.3f}"
    )


def main() -> int:
    names = [*CASES, "bandwidth", "killed", "moved"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-14b", help="tiny is for a CPU")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count() or 2, help="or ranks on a CPU")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--max-layers", type=int, default=12, help="of zero3-max")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches of a GPU in a step")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no case begins later than this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    started = time.monotonic()
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"cpu {os.cpu_count()} cores"
    folder = args.out or Path(__file__).parent / "results" / f"{slug(device)}-x{args.gpus}"
    path = folder / "multigpu.json"
    packages = ("torch", "triton", "deepspeed", "transformers", "liger-kernel")
    head = {
        "device": device,
        "gpus": args.gpus,
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "shape": args.shape,
        "sequence_length": SEQUENCE_LENGTHS[args.shape],
    }
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    failed = False
    print(HEADER)
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), args.shape, args.gpus, args.accumulation)
        for name in args.cases:
            elapsed = time.monotonic() - started
            if elapsed > args.seconds:
                print(f"{elapsed:3.0f} s {name} is skipped: the time is up", flush=True)
                continue
            try:
                if name in CASES:
                    found = bench.train(name, args.max_layers if CASES[name].deep else args.layers)
                else:
                    found = getattr(bench, name)()
            except RuntimeError as error:  # out of memory, say; the others go on
                failed = True
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                continue
            rows = [row for row in rows if row["case"] != name]
            rows += [row | {"date": str(date.today())} for row in found]
            set_beside_one(rows)
            write(path, head | {"rows": rows})
            for row in found:
                print(line(row, time.monotonic() - started), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
