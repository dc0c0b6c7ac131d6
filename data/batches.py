"""The batch of a step, as a function of the seed and the step alone.

Which tokens a sample is says `brumby.data.order`; here they become tensors.

Legend: B sequences, T tokens in each, N documents.
"""

import bisect
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brumby.data.config import DataConfig
from brumby.data.order import Order, Phase, tokens_drawn
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
            A row's start is a document's start. Without document boundaries each row is one document.
        sample_ids: Where each row begins, as "source:token".
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    sample_ids: list[str]


class Batches:
    """The batches of a run, for any number of ranks.

    Args:
        config: The data of the run; its sources must have been prepared.

    Attributes:
        phases: The phases in steps.
        num_steps: Steps of the whole run.
        sources: The sources' tokens, by name in alphabetical order.
        epochs: How often the run goes through each source; above 1 it sees text again.

    Raises:
        ValueError: a source not prepared, damaged, shorter than a sequence or tokenised by another
            tokenizer than the others.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        names = sorted(tokens_drawn(config))
        self.sources = {name: TokenSource(Path(config.root) / name) for name in names}
        self._sources = list(self.sources.values())
        self._check_tokenizer()
        self._order = Order(config, {name: len(source) for name, source in self.sources.items()})
        self.phases, self.epochs = self._order.phases, self._order.epochs
        self.num_steps = self.phases[-1].first_step + self.phases[-1].num_steps

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
    def phase_starts(self) -> list[int]:
        """The step at which each phase starts."""
        return [phase.first_step for phase in self.phases]

    def phase_of(self, step: int) -> tuple[int, Phase]:
        """Index and phase that a step belongs to."""
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step is {step}; the data has steps 0 to {self.num_steps - 1}")
        index = bisect.bisect_right(self.phase_starts, step) - 1
        return index, self.phases[index]

    def tokens_seen(self, step: int) -> int:
        """Tokens of all steps before `step`, which may be `num_steps`."""
        phase = self.phase_of(min(step, self.num_steps - 1))[1]
        return phase.first_token + (step - phase.first_step) * phase.tokens_per_step

    def count(self, num_steps: int) -> list[dict[str, int]]:
        """Tokens of each source in each phase, of the first steps."""
        found = []
        for index, phase in enumerate(self.phases):
            steps = min(max(num_steps - phase.first_step, 0), phase.num_steps)
            samples = self._order.count(index, steps * phase.sequences_per_step)
            found.append({name: count * phase.sequence_length for name, count in samples.items()})
        return found

    def micro_batches(self, step: int, rank: int, world_size: int, micro_batch: int) -> list[Batch]:
        """The micro-batches of one rank in one step, in the order of accumulation.

        The step's rows go to the ranks micro-batch by micro-batch; all ranks together see the same
        rows whatever their number.

        Raises:
            ValueError: a step or rank out of range, or a step that cannot be divided equally.
        """
        index, phase = self.phase_of(step)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; expected one of 0 to {world_size - 1}")
        num_rows = phase.sequences_per_step
        check_divisible(num_rows, world_size, micro_batch)
        before = (step - phase.first_step) * num_rows
        starts = range(before + rank * micro_batch, before + num_rows, world_size * micro_batch)
        return [self._batch(index, range(start, start + micro_batch)) for start in starts]

    def _batch(self, phase: int, numbers: range) -> Batch:
        B, T = len(numbers), self.phases[phase].sequence_length
        input_ids, labels = np.empty((B, T), np.int64), np.empty((B, T), np.int64)
        position_ids = np.empty((B, T), np.int64)
        boundaries, sample_ids = [], []
        for row, (source, first) in enumerate(self._order.samples(phase, numbers)):
            tokens, starts = self._sources[source].window(first, T + 1)
            input_ids[row], labels[row], position_ids[row] = tokens[:-1], tokens[1:], np.arange(T)
            boundaries.append(np.array([row * T]))
            sample_ids.append(f"{self._order.names[source]}:{first}")
            if self.config.document_boundaries:
                starts = starts[starts > 0]
                labels[row, starts - 1] = IGNORE_INDEX
                starts = starts[starts < T]
                for start, end in itertools.pairwise([*starts.tolist(), T]):
                    position_ids[row, start:end] -= start
                boundaries.append(row * T + starts)
        cu_seqlens = np.concatenate([*boundaries, [B * T]]).astype(np.int32)
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(position_ids),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            sample_ids=sample_ids,
        )

    def _check_tokenizer(self) -> None:
        first = self._sources[0]
        for other in self._sources[1:]:
            if other.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
                raise ValueError(
                    f"{first.folder} was tokenised by {first.manifest.tokenizer} and {other.folder} by "
                    f"{other.manifest.tokenizer}, which differ; prepare them with one tokenizer"
                )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What determines every batch, by name; equal fingerprints, equal batches. No paths, no dates."""
        values: dict[str, Any] = {"seed": self.config.seed, "document_boundaries": self.config.document_boundaries}
        for phase in self.phases:
            where = f"phases.{phase.name}."
            for name in ("first_step", "num_steps", "sequence_length", "sequences_per_step"):
                values[where + name] = getattr(phase, name)
            values |= {f"{where}blend.{name}": weight for name, weight in sorted(phase.blend.items())}
        for name, source in self.sources.items():
            values[f"shards of {name}"] = source.manifest.fingerprint
        return values

    def changes_since(self, fingerprint: dict[str, Any]) -> list[str]:
        """What differs from an earlier fingerprint, each in words; empty if the batches are the same."""
        now = self.fingerprint
        return [
            f"{name} was {fingerprint.get(name, 'not there')}, now {now.get(name, 'not there')}"
            for name in dict.fromkeys([*fingerprint, *now])
            if fingerprint.get(name) != now.get(name)
        ]


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
