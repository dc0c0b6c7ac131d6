"""Tokenising beside the tokenizer library and `datasets.map`; the loader's speed, start and memory.

    python -m benchmarks.data [--text FILE ...] [--tokenizer FOLDER] [--cases tokenise load] [--out FOLDER]

prints a table and writes `data.json`: rows of `case`, `implementation`, `tokens_per_second`, `seconds` and
`peak_bytes`. Text and tokenizer are by default those that `make demo` leaves in `.cache/demo`, each text three
times: once is four seconds' work. Tokenising is the best of three rounds, the implementations in turn, on all
cores, with processes that run already; `prepare` is measured from start to end. The loader reads shards of 64M
tokens that are links to one, hence from the page cache, in a process of its own, whose peak memory is that of all
it holds, imports and mapped files included.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from brumby.data import Batches, DataConfig, Manifest, prepare
from brumby.data.config import SourceConfig
from brumby.data.documents import Fate, Row, read_rows, resolve
from brumby.data.duplicates import HashSet
from brumby.data.shards import Shard
from brumby.data.tokenizing import Encoder, TokenizerSpec, load_tokenizer

DEMO = Path(".cache/demo")
SHARD_TOKENS, DOCUMENT_TOKENS = 1 << 26, 1 << 9
T, ROWS = 8192, 32
SHARDS = {"4 shards": 4, "1,000 shards": 1000, "10 TB": 40_000}
ROUNDS, LOAD_STEPS = 3, 200
BATCH = 8192  # documents that the library is given at once, where it is not given all
NUM_WORKERS = os.cpu_count() or 1


def quiet() -> Console:
    return Console(file=open(os.devnull, "w"))


def tokenise(files: list[Path], tokenizer: str) -> Iterator[dict[str, Any]]:
    """The same texts by four implementations."""
    spec = load_tokenizer(tokenizer)
    texts = []
    for file in files:
        source = SourceConfig(path=str(file))
        texts += [row.text for row in read_rows(source, resolve(source), skip_bad_rows=True) if row.text]
    library = Tokenizer.from_str(spec.json)
    num_tokens = sum(len(encoding) + 1 for encoding in library.encode_batch_fast(texts, add_special_tokens=False))
    with tempfile.TemporaryDirectory() as folder, Encoder(spec, NUM_WORKERS) as encoder:
        jsonl = Path(folder) / "text.jsonl"
        jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        contestants: dict[str, Callable[[], Any]] = {
            "tokenizers encode_batch_fast": lambda: library.encode_batch_fast(texts, add_special_tokens=False),
            "tokenizers, batch by batch": lambda: [
                len(library.encode_batch_fast(texts[i : i + BATCH], add_special_tokens=False))
                for i in range(0, len(texts), BATCH)
            ],
            "brumby Encoder": lambda: sum(len(encoded.tokens) for encoded in encoder(rows_of(texts))),
            "brumby read_rows, Encoder": lambda: sum(len(e.tokens) for e in encoder(rows_from(jsonl))),
            "datasets.map": functools.partial(datasets_map, jsonl, spec),
        }
        best = dict.fromkeys(contestants, float("inf"))
        for _ in range(ROUNDS):
            for name, function in contestants.items():
                best[name] = min(best[name], seconds_of(function))
        for name, seconds in best.items():
            yield row("tokenise", name, num_tokens, seconds)
        variants: dict[str, dict[str, Any]] = {
            "brumby prepare": {"deduplicate": False},
            "brumby prepare, duplicates dropped": {},
            "brumby prepare, decontaminated": {
                "decontaminate": {"text": {"path": str(evaluation(folder, texts))}}
            },
        }
        for name, options in variants.items():
            yield row("prepare, from start to end", name, num_tokens, whole(jsonl, tokenizer, folder, options))


def rows_of(texts: list[str]) -> Iterator[Row]:
    return (Row(text, Fate.KEPT, 0, i) for i, text in enumerate(texts))


def rows_from(path: Path) -> Iterator[Row]:
    source = SourceConfig(path=str(path))
    return read_rows(source, resolve(source))


def datasets_map(path: Path, spec: TokenizerSpec) -> float:
    """Seconds of `map` alone, without reading the file and without its cache."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(spec.json))
    with tempfile.TemporaryDirectory() as cache:
        dataset = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        started = time.perf_counter()
        dataset.map(
            lambda batch: {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
            batched=True,
            num_proc=NUM_WORKERS,
            remove_columns=["text"],
        )
        return time.perf_counter() - started


def evaluation(folder: str, texts: list[str]) -> Path:
    """5,000 items of 60 words in the words of the texts, none of them in these."""
    rng = np.random.default_rng(0)
    words = np.array([word[:20] for text in texts[:2000] for word in text.split()])
    path = Path(folder) / "evaluation.jsonl"
    items = (" ".join(rng.choice(words, 60)) for _ in range(5000))
    path.write_text("".join(json.dumps({"text": item}) + "\n" for item in items))
    return path


def whole(path: Path, tokenizer: str, folder: str, options: dict[str, Any]) -> float:
    """Seconds of `prepare`, imports of its processes included."""
    values: dict[str, Any] = {
        "root": f"{folder}/tokens",
        "tokenizer": tokenizer,
        "sequence_length": 512,
        "sequences_per_step": 8,
        "sources": {"text": {"path": str(path)}},
        "phases": {"one": {"tokens": 4096, "blend": {"text": 1.0}}},
        "margin": float("inf"),
    }
    config = DataConfig.from_dict(values | options)
    started = time.perf_counter()
    prepare(config, NUM_WORKERS, console=quiet())
    seconds = time.perf_counter() - started
    shutil.rmtree(config.root)
    return seconds


def duplicates(before: int = 25_000_000, num_documents: int = 1_000_000) -> Iterator[dict[str, Any]]:
    """Finding duplicates among the last of 26 million documents, as many as 18B tokens have at 700 each."""
    rng, seen, seconds = np.random.default_rng(0), HashSet(), 0.0
    seen.add(rng.integers(0, 2**63, before).astype(np.uint64))
    for _ in range(num_documents // 1000):
        hashes = rng.integers(0, 2**63, 1000).astype(np.uint64)
        seconds += seconds_of(functools.partial(seen.add, hashes))
    yield row("duplicates, 26M documents", "brumby", 700 * num_documents, seconds, 8 * len(seen))


def write_source(root: Path, num_shards: int) -> None:
    """A source whose shards are links to one."""
    folder = root / "text"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rng.integers(1, 150_000, SHARD_TOKENS, dtype=np.uint32).tofile(root / "tokens")
    np.save(root / "index.npy", np.arange(0, SHARD_TOKENS + 1, DOCUMENT_TOKENS))
    np.save(root / "hash.npy", np.arange(SHARD_TOKENS // DOCUMENT_TOKENS, dtype=np.uint64))
    num_documents = SHARD_TOKENS // DOCUMENT_TOKENS
    shards = []
    for i in range(num_shards):
        name = f"shard-{i:05d}"
        for file, suffix in (("tokens", ".bin"), ("index.npy", ".idx.npy"), ("hash.npy", ".hash.npy")):
            os.link(root / file, folder / (name + suffix))
        shards.append(
            Shard(name, num_documents, SHARD_TOKENS, "0" * 64, "0" * 64, {"kept": num_documents}, 0, i, 0)
        )
    Manifest({}, "none", "0" * 64, 150_000, 0, "uint32", SHARD_TOKENS, shards=shards).write(folder)


def load(root: Path, num_shards: int) -> None:
    """In a process of its own: print seconds to the first batch, tokens, their seconds and the peak of bytes."""
    samples = int(num_shards * SHARD_TOKENS / T * 0.9)
    config = DataConfig.from_dict(
        {
            "root": str(root),
            "tokenizer": "none",
            "sequence_length": T,
            "sequences_per_step": ROWS,
            "sources": {"text": {"path": "text"}},
            "phases": {"one": {"tokens": samples * T, "blend": {"text": 1.0}}},
        }
    )
    started = time.perf_counter()
    batches = Batches(config)
    batches.micro_batches(0, 0, 1, ROWS)
    first = time.perf_counter() - started
    started, tokens = time.perf_counter(), 0
    for step in range(1, LOAD_STEPS + 1):
        batches.micro_batches(step % batches.num_steps, 0, 1, ROWS)
        tokens += T * ROWS
    seconds = time.perf_counter() - started
    print(json.dumps([first, tokens, seconds, peak_bytes()]))


def peak_bytes() -> int:
    """This process's peak resident memory, pages of mapped files included."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def loading() -> Iterator[dict[str, Any]]:
    for name, num_shards in SHARDS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_source(Path(folder), num_shards)
            for _ in range(2):  # the second finds the files in the page cache
                command = [sys.executable, "-m", "benchmarks.data", "--load", folder, str(num_shards)]
                first, tokens, seconds, peak = json.loads(
                    subprocess.check_output(command, text=True).splitlines()[-1]
                )
        yield row(f"load, {name}", "brumby, to the first batch", None, first, peak)
        yield row(f"load, {name}", "brumby", tokens, seconds, peak)


def seconds_of(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    result = function()
    return result if isinstance(result, float) else time.perf_counter() - started


def row(
    case: str, implementation: str, tokens: int | None, seconds: float, peak: int | None = None
) -> dict[str, Any]:
    speed = tokens / seconds if tokens else None
    return {
        "case": case,
        "implementation": implementation,
        "tokens_per_second": speed,
        "seconds": seconds,
        "peak_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", default=3 * sorted((DEMO / "text").glob("*.gz")))
    parser.add_argument("--tokenizer", default=str(DEMO / "smollm2-brumby"))
    parser.add_argument("--cases", nargs="+", default=["tokenise", "duplicates", "load"])
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/cpu-{NUM_WORKERS}-cores"))
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        return load(Path(options.load[0]), int(options.load[1]))
    cases = {
        "tokenise": lambda: tokenise(options.text, options.tokenizer),
        "duplicates": duplicates,
        "load": loading,
    }
    versions = {name: importlib.metadata.version(name) for name in ("tokenizers", "datasets", "numpy", "torch")}
    head = {
        "device": f"CPU ({platform.machine()}, {NUM_WORKERS} cores)",
        "date": date.today().isoformat(),
        "command": "python -m benchmarks.data",
        "versions": versions | {"python": platform.python_version()},
    }
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        for found in cases[case]():
            rows.append(found)
            speed, peak = found["tokens_per_second"], found["peak_bytes"]
            print(
                f"{found['case']:28s} {found['implementation']:36s} {found['seconds']:8.3f} s",
                f"{speed:15,.0f} tokens/s" if speed else "",
                f"{peak / 1e6:8,.0f} MB" if peak is not None else "",
                flush=True,
            )
    options.out.mkdir(parents=True, exist_ok=True)
    part = options.out / ".data.json.part"
    part.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
    part.rename(options.out / "data.json")


if __name__ == "__main__":
    main()
