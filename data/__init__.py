"""Text to batches: sources, token shards, blends, phases."""

from brumby.data.batches import Batch, Batches, check_divisible, phase_quotas, phase_starts
from brumby.data.config import DataConfig, PhaseConfig, SourceConfig
from brumby.data.prepare import prepare
from brumby.data.shards import Manifest, TokenSource
from brumby.data.tokenizing import tokenizer_sha256

__all__ = [
    "Batch",
    "Batches",
    "DataConfig",
    "Manifest",
    "PhaseConfig",
    "SourceConfig",
    "TokenSource",
    "check_divisible",
    "phase_quotas",
    "phase_starts",
    "prepare",
    "tokenizer_sha256",
]
