"""A small real tokenizer and small real text files."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from brumby.data import DataConfig

EOS = "<|endoftext|>"
WORDS = ["retention", "keeps", "a", "state", "constant", "size;", "Größe", "état", "状態", "\n\n", "{x}"]


def make_texts(num_documents: int, seed: int, longest: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(num_documents)]


def write_jsonl(path: Path, texts: list, column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))
    return path


def save_tokenizer(backend: Tokenizer, folder: Path, **special: str) -> str:
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a byte-level BPE with 400 entries and an EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(make_texts(200, seed=0), trainer)
    return save_tokenizer(backend, tmp_path_factory.mktemp("tokenizer"), eos_token=EOS)


@pytest.fixture
def make_config(tmp_path: Path, tokenizer: str):
    """A configuration over JSONL files made from lists of texts; keywords override its keys."""

    def make(texts: dict[str, list[str]] | None = None, **values) -> DataConfig:
        for name, documents in (texts or {}).items():
            write_jsonl(tmp_path / "text" / f"{name}.jsonl", documents)
        sources = {name: {"path": str(tmp_path / "text" / f"{name}.jsonl")} for name in texts or {}}
        defaults = {
            "root": str(tmp_path / "tokens"),
            "tokenizer": tokenizer,
            "sequence_length": 32,
            "sequences_per_step": 8,
            "seed": 7,
            "margin": float("inf"),
            "deduplicate": False,
            "skip_bad_rows": True,
            "sources": sources,
        }
        values = defaults | values
        values.setdefault(
            "phases",
            {"one": {"tokens": 1024, "blend": dict.fromkeys(values["sources"], 1 / len(values["sources"]))}},
        )
        return DataConfig.from_dict(values)

    return make


@pytest.fixture
def texts():
    """`texts(num_documents, seed)` makes documents."""
    return make_texts


@pytest.fixture
def jsonl():
    """`jsonl(path, texts)` writes them."""
    return write_jsonl
