"""The batch of a step, as a function of the seed and the step alone.

Each source is a row of blocks of `sequence_length` tokens (and one more, the last one's target).
Each phase is a row of samples: how many a source gives follows from its weight exactly, in which
order from the seed. A source's samples go through its blocks in a shuffled order, from phase to
phase, and begin a new epoch in another order only when every block has been seen.

Legend: B sequences, T tokens in each, N documents.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from brumby.data.config import DataConfig
from brumby.data.shards import TokenSource

IGNORE_INDEX = -100


@dataclass
class Batch:
    """A micro-batch, on the CPU.

    A document that began in an earlier row goes on at position 0: rows know nothing of each other.

    Attributes:
        input_ids: int64 [B, T].
        labels: int64 [B, T], already shifted: `labels[b, t]` is the target of `input_ids[b, t]`, or
            -100 where the next token belongs to another document.
        position_ids: int64 [B, T], from 0 in each document.
        cu_seqlens: int32 [N + 1], where each document starts in the flattened [B * T], and the end.
            A row's start is a document's start.
        sample_ids: The block of each row, as "source:block".
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    sample_ids: list[str]


def phase_starts(config: DataConfig) -> list[int]:
    """The step at which each phase starts, and the number of steps: `len(phases) + 1` numbers.

    A phase starts at the first step at or after the cumulative tokens of those before it.

    Raises:
        ValueError: a phase so short that no step starts in it.
    """
    starts, tokens = [0], 0
    for name, phase in config.phases.items():
        tokens += phase.tokens
        starts.append(-(-tokens // config.tokens_per_step))
        if starts[-1] == starts[-2]:
            raise ValueError(
                f"phase {name!r} has {phase.tokens} tokens and no step starts in it; "
                f"a step has {config.tokens_per_step} (sequences_per_step x sequence_length)"
            )
    return starts


def phase_quotas(config: DataConfig) -> list[dict[str, int]]:
    """Samples of each source in each phase, by largest remainders: off by less than one from its share."""
    starts = phase_starts(config)
    quotas = []
    for phase, first, last in zip(config.phases.values(), starts, starts[1:], strict=False):
        num_samples = (last - first) * config.sequences_per_step
        # The decimals as written and no binary fractions of them, so that ties are ties.
        weights = {name: Fraction(str(phase.blend[name])) for name in sorted(phase.blend)}
        shares = {name: num_samples * weight / sum(weights.values()) for name, weight in weights.items()}
        quota = {name: int(share) for name, share in shares.items()}
        by_remainder = sorted(shares, key=lambda name: quota[name] - shares[name])  # stable: then by name
        for name in by_remainder[: num_samples - sum(quota.values())]:
            quota[name] += 1
        quotas.append(quota)
    return quotas


class Batches:
    """The batches of a run, for any number of ranks.

    Args:
        config: The data of the run; its sources must have been prepared.

    Attributes:
        num_steps: Steps of the whole run.
        tokens_per_step: `sequences_per_step * sequence_length`.
        phase_starts: The step at which each phase starts.
        quotas: For each phase the number of samples of each source.
        fingerprint: sha256 (hex) over what determines every batch; equal fingerprints, equal batches.

    Raises:
        ValueError: a source not prepared, damaged, shorter than a block or tokenised by another
            tokenizer than the others.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.tokens_per_step = config.tokens_per_step
        *self.phase_starts, self.num_steps = phase_starts(config)
        self.quotas = phase_quotas(config)
        self._names = sorted({name for phase in config.phases.values() for name in phase.blend})
        self._sources = [TokenSource(Path(config.root) / name) for name in self._names]
        self._num_blocks = [self._count_blocks(source) for source in self._sources]
        self._check_tokenizer()
        # int64 [num_steps * sequences_per_step] each: the source of a sample and its block there
        self._source_of, self._block_of = self._order()
        self.fingerprint = self._fingerprint()

    @property
    def vocab_size(self) -> int:
        return self._sources[0].manifest.vocab_size

    @property
    def eos_token_id(self) -> int:
        return self._sources[0].manifest.eos_token_id

    @property
    def tokenizer_sha256(self) -> str:
        """The tokenizer that made the tokens; compare with `brumby.data.tokenizer_sha256`."""
        return self._sources[0].manifest.tokenizer_sha256

    @property
    def epochs(self) -> dict[str, float]:
        """How often the run goes through each source; above 1 it sees text again."""
        drawn = np.bincount(self._source_of, minlength=len(self._names))
        return {
            name: float(count / blocks)
            for name, count, blocks in zip(self._names, drawn, self._num_blocks, strict=True)
        }

    def phase_of(self, step: int) -> tuple[int, str]:
        """Index and name of the phase that a step belongs to."""
        self._check_step(step)
        phase = int(np.searchsorted(self.phase_starts, step, side="right")) - 1
        return phase, list(self.config.phases)[phase]

    def micro_batches(self, step: int, rank: int, world_size: int, micro_batch: int) -> list[Batch]:
        """The micro-batches of one rank in one step, in the order of accumulation.

        The step's rows go to the ranks micro-batch by micro-batch; all ranks together see the same
        rows whatever their number.

        Raises:
            ValueError: a step or rank out of range, or a step that cannot be divided equally.
        """
        self._check_step(step)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; expected one of 0 to {world_size - 1}")
        num_rows = self.config.sequences_per_step
        check_divisible(num_rows, world_size, micro_batch)
        first = step * num_rows + rank * micro_batch
        stride = world_size * micro_batch
        starts = range(first, (step + 1) * num_rows, stride)
        return [self._batch(range(start, start + micro_batch)) for start in starts]

    def _batch(self, samples: Sequence[int]) -> Batch:
        B, T = len(samples), self.config.sequence_length
        input_ids, labels = np.empty((B, T), np.int64), np.empty((B, T), np.int64)
        position_ids = np.empty((B, T), np.int64)
        boundaries, sample_ids = [], []
        for row, sample in enumerate(samples):
            source, block = int(self._source_of[sample]), int(self._block_of[sample])
            tokens, starts = self._sources[source].window(block * T, T + 1)
            input_ids[row], labels[row] = tokens[:-1], tokens[1:]
            starts = starts[starts > 0]
            labels[row, starts - 1] = IGNORE_INDEX
            starts = np.concatenate([[0], starts[starts < T]])
            position_ids[row] = np.arange(T) - np.repeat(starts, np.diff(starts, append=T))
            boundaries.append(row * T + starts)
            sample_ids.append(f"{self._names[source]}:{block}")
        cu_seqlens = np.concatenate([*boundaries, [B * T]]).astype(np.int32)
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(position_ids),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            sample_ids=sample_ids,
        )

    def _order(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        source_of = []
        for phase, quota in enumerate(self.quotas):
            counts = [quota.get(name, 0) for name in self._names]
            rng = np.random.default_rng([self.config.seed, phase])
            source_of.append(rng.permutation(np.repeat(np.arange(len(self._names)), counts)))
        sources = np.concatenate(source_of)
        blocks = np.empty_like(sources)
        for index, (name, num_blocks) in enumerate(zip(self._names, self._num_blocks, strict=True)):
            drawn = np.flatnonzero(sources == index)
            key = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
            for epoch, first in enumerate(range(0, len(drawn), num_blocks)):
                positions = drawn[first : first + num_blocks]
                rng = np.random.default_rng([self.config.seed, key, epoch])
                blocks[positions] = rng.permutation(num_blocks)[: len(positions)]
        return sources, blocks

    def _count_blocks(self, source: TokenSource) -> int:
        num_blocks = (len(source) - 1) // self.config.sequence_length
        if num_blocks < 1:
            raise ValueError(
                f"{source.folder} has {len(source)} tokens; a sequence and its last target need "
                f"{self.config.sequence_length + 1}. Give the source more text or lower sequence_length"
            )
        return num_blocks

    def _check_tokenizer(self) -> None:
        first = self._sources[0]
        for other in self._sources[1:]:
            if other.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
                raise ValueError(
                    f"{first.folder} was tokenised by {first.manifest.tokenizer} and {other.folder} by "
                    f"{other.manifest.tokenizer}, which differ; prepare them with one tokenizer"
                )

    def _check_step(self, step: int) -> None:
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step is {step}; the data has steps 0 to {self.num_steps - 1}")

    def _fingerprint(self) -> str:
        plain = {
            "sequence_length": self.config.sequence_length,
            "sequences_per_step": self.config.sequences_per_step,
            "seed": self.config.seed,
            "phases": [
                [name, phase.tokens, sorted(phase.blend.items())] for name, phase in self.config.phases.items()
            ],
            "sources": [[n, s.manifest.fingerprint] for n, s in zip(self._names, self._sources, strict=True)],
        }
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
        digest.update(self._source_of.tobytes())  # the order itself, should NumPy's generator ever change
        digest.update(self._block_of.tobytes())
        return digest.hexdigest()


def check_divisible(sequences_per_step: int, world_size: int, micro_batch: int) -> None:
    """Raise a ValueError, naming what would work, unless a step divides equally over the ranks."""
    if world_size < 1 or micro_batch < 1:
        raise ValueError(f"world_size is {world_size} and micro_batch {micro_batch}; both must be at least 1")
    if sequences_per_step % (world_size * micro_batch) == 0:
        return
    ranks_times = f"{world_size} ranks x micro_batch {micro_batch}"
    found = f"sequences_per_step is {sequences_per_step}, no multiple of {ranks_times}"
    per_rank, rest = divmod(sequences_per_step, world_size)
    if rest:
        ranks = [n for n in range(1, sequences_per_step + 1) if sequences_per_step % n == 0]
        nearest = world_size * micro_batch * max(1, round(sequences_per_step / (world_size * micro_batch)))
        raise ValueError(f"{found}. Use sequences_per_step {nearest}, or one of these numbers of ranks: {ranks}")
    sizes = [n for n in range(1, per_rank + 1) if per_rank % n == 0]
    raise ValueError(f"{found}. With {world_size} ranks, micro_batch can be one of {sizes}")
