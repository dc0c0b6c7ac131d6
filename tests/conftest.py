"""Small real things that several folders' tests share: a converted model, token shards, run configurations."""

import functools
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. Triton looks when a kernel is defined: this has to
# come before any import of brumby.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# For ranks that run a module of this folder.
WITH_TESTS = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])

TEXT = "a state of constant size keeps what softmax attention would keep of every token it has seen so far"
WORDS = TEXT.split()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Brumby checkpoint of 60,000 parameters with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from brumby.model import BrumbyConfig, BrumbyForCausalLM

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {"<eos>": 0} | {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = BrumbyConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True, gate_bias=True,
        eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    BrumbyForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Prepared shards of three sources and a three-phase schedule of 12 steps, as the `data` part of a run."""
    from brumby.data import DataConfig, prepare

    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    for name in ("wiki", "code", "math"):
        lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))}) for _ in range(120)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    data = {
        "root": str(folder / "shards"),
        "tokenizer": str(tiny_model),
        "sequence_length": 32,
        "sequences_per_step": 8,
        "seed": 1,
        "margin": float("inf"),
        "sources": {name: {"path": str(folder / f"{name}.jsonl")} for name in ("wiki", "code", "math")},
        "phases": {
            "one": {"tokens": 4 * 256, "blend": {"wiki": 0.8, "code": 0.2}},
            "two": {"tokens": 4 * 256, "blend": {"code": 1.0}},
            "three": {"tokens": 4 * 256, "blend": {"math": 0.5, "wiki": 0.5}},
        },
    }
    prepare(DataConfig.from_dict(data))
    return data


@pytest.fixture(scope="session")
def long_data(tiny_data: dict) -> dict:
    """The same through 60 steps, for runs that are interrupted on the way."""
    phases = {name: phase | {"tokens": 20 * 256} for name, phase in tiny_data["phases"].items()}
    return tiny_data | {"phases": phases}


def stage(lr: float = 1e-2, **changes) -> dict:
    """A stage of a run, with one rate for all."""
    schedule = {"name": "wsd", "warmup_tokens": 512, "decay_tokens": 1024}
    return {"lr": lr, "gate_lr": lr, "schedule": schedule} | changes


# Weights decay by 3% a step at the peak, so that it shows in the first step already.
MUON = {"optimizer": {"name": "muon", "weight_decay": 3.0}, "stages": {"retrain": stage(muon_lr=1e-2)}}


@pytest.fixture(scope="session")
def make_run_in(tiny_model: Path, tiny_data: dict) -> Callable[..., Path]:
    """Make a run directory in a folder; keywords override fields of its configuration."""
    from brumby.launch import runs
    from brumby.train import config as run_config

    def make(folder: Path, name: str = "run", **changes) -> Path:
        values = {
            "name": name,
            "runs_dir": str(folder),
            "model": str(tiny_model),
            "data": tiny_data,
            "precision": "fp32",
            "micro_batch": 2,
            "zero_stage": 2,
            "checkpoint_every": 5,
            "measure_every": 4,
            "stages": {"retrain": stage()},
            "wandb": {"mode": "disabled"},
        }
        return runs.create(run_config.from_omegaconf(values | changes))

    return make


@pytest.fixture
def make_run(make_run_in: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    return functools.partial(make_run_in, tmp_path)


@pytest.fixture(scope="session")
def trained(make_run_in: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run that two ranks have trained undisturbed, with all its checkpoints: once in a session for each
    configuration. It is for looking at only."""
    runs: dict[str, Path] = {}

    def run(**changes) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in runs:
            run_dir = make_run_in(tmp_path_factory.mktemp("trained"), **{"keep_checkpoints": 12, **changes})
            train(run_dir, num_ranks=2)
            runs[key] = run_dir
        return runs[key]

    return run


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_ranks(
    run_dir: Path, num_ranks: int, module: str = "brumby.train", **environment: str
) -> subprocess.Popen:
    """Start the ranks of a run with torchrun, as `brumby launch` does on one machine."""
    words = [
        "-m",
        "torch.distributed.run",
        "--master-port",
        str(free_port()),
        "--nproc-per-node",
        str(num_ranks),
    ]
    return subprocess.Popen(
        [sys.executable, *words, "-m", module, str(run_dir)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def train(run_dir: Path, num_ranks: int = 1, expected: int = 0, **options: str) -> str:
    """Train a run with some ranks; their output, or a failure that shows it."""
    process = start_ranks(run_dir, num_ranks, **options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == expected, output
    return output
