"""Text to batches: sources, token shards, blends, phases."""

from brumby.data.batches import Batch, Batches, check_divisible
from brumby.data.config import DataConfig, PhaseConfig, SourceConfig
from brumby.data.order import Phase, phase_starts, schedule
from brumby.data.prepare import prepare
from brumby.data.shards import Manifest, TokenSource
from brumby.data.tokenizing import load_tokenizer, tokenizer_sha256

__all__ = [
    "Batch",
    "Batches",
    "DataConfig",
    "Manifest",
    "Phase",
    "PhaseConfig",
    "SourceConfig",
    "TokenSource",
    "check_divisible",
    "load_tokenizer",
    "phase_starts",
    "prepare",
    "schedule",
    "tokenizer_sha256",
]
