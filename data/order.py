"""Which tokens the samples of a step are: a function of the seed and the sample's number alone.

Each phase is a row of samples. How many a source gives follows from its weight exactly, in every window
of `WINDOW` samples as in the whole phase; where in the window they stand is shuffled. A source's samples
go through its blocks in a shuffled order, from phase to phase, and begin a new epoch in another order
only when every block has been seen. Nothing is held but a table of counts a window, so that the memory
does not grow with the data.
"""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from brumby.data.config import RAMP, DataConfig

WINDOW = 1 << 16  # samples
ROUNDS = 6


@dataclass(frozen=True)
class Phase:
    """A phase cut into steps.

    Attributes:
        name: As configured, or `RAMP`.
        first_step: Its first step.
        num_steps: How many it has.
        first_token: Tokens of all steps before it.
        sequence_length: Tokens in a sample.
        sequences_per_step: Samples in a step.
        blend: Its weights.
        quotas: Samples of each source, by largest remainders: off by less than one from its share.
    """

    name: str
    first_step: int
    num_steps: int
    first_token: int
    sequence_length: int
    sequences_per_step: int
    blend: dict[str, float]
    quotas: dict[str, int]

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.sequences_per_step

    @property
    def num_samples(self) -> int:
        return self.num_steps * self.sequences_per_step


def schedule(config: DataConfig) -> list[Phase]:
    """The phases in steps, a ramp before them. Each starts at the first step at or after the tokens before it.

    Raises:
        ValueError: a phase so short that no step starts in it.
    """
    phases: list[Phase] = []
    step = seen = end = 0
    parts = [
        (name, phase, phase.tokens, phase.sequences_per_step or config.sequences_per_step)
        for name, phase in config.phases.items()
    ]
    if config.ramp:
        name, phase, tokens, rows = parts[0]
        parts[:1] = [
            (RAMP, phase, config.ramp.tokens, config.ramp.sequences_per_step),
            (name, phase, tokens - config.ramp.tokens, rows),
        ]
    for name, phase, tokens, rows in parts:
        length = phase.sequence_length or config.sequence_length
        end += tokens
        num_steps = -(-(end - seen) // (length * rows))
        if num_steps < 1:
            raise ValueError(
                f"phase {name!r} has {tokens} tokens and no step starts in it; "
                f"a step has {length * rows} (sequences_per_step x sequence_length)"
            )
        quotas = _quotas(phase.blend, num_steps * rows)
        phases.append(Phase(name, step, num_steps, seen, length, rows, phase.blend, quotas))
        step, seen = step + num_steps, seen + num_steps * length * rows
    return phases


def phase_starts(config: DataConfig) -> list[int]:
    """The step at which each phase starts, and the number of steps: `len(phases) + 1` numbers."""
    phases = schedule(config)
    return [*(phase.first_step for phase in phases), phases[-1].first_step + phases[-1].num_steps]


def tokens_drawn(config: DataConfig) -> dict[str, int]:
    """The tokens that a run draws from each source, repetitions included, of the sources that it draws from."""
    drawn: dict[str, int] = {}
    for phase in schedule(config):
        for name, count in phase.quotas.items():
            if count:
                drawn[name] = drawn.get(name, 0) + count * phase.sequence_length
    return drawn


def _quotas(blend: Mapping[str, float], num_samples: int) -> dict[str, int]:
    # The decimals as written and no binary fractions of them, so that ties are ties.
    weights = {name: Fraction(str(blend[name])) for name in sorted(blend)}
    shares = {name: num_samples * weight / sum(weights.values()) for name, weight in weights.items()}
    quotas = {name: int(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: quotas[name] - shares[name])  # stable: then by name
    for name in by_remainder[: num_samples - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def window_counts(quotas: list[int], window: int = WINDOW) -> NDArray[np.int64]:
    """How many samples of each source stand before each window, never off by one from its share.

    A share between two whole numbers is rounded up where it reaches the upper one first: then none
    rounded up has to be taken back later (earliest deadline first).

    Returns:
        int64 [num_windows + 1, num_sources], from 0 to `quotas`; rows sum to the samples before the window.
    """
    quota = np.array(quotas, dtype=np.int64)
    total = int(quota.sum())
    ends = [*range(0, total, window), total]
    counts = np.zeros((len(ends), len(quota)), dtype=np.int64)
    for row, end in enumerate(ends[1:], start=1):
        shares = [int(q) * end for q in quota]  # Python's integers: products pass 2^63
        counts[row] = [share // total for share in shares]
        rest = np.array([share % total for share in shares], dtype=np.int64)
        deadline = (total - rest) / np.maximum(quota, 1)
        deadline[rest == 0] = np.inf
        deadline[counts[row - 1] > counts[row]] = -1.0  # rounded up already
        counts[row, np.argsort(deadline, kind="stable")[: end - counts[row].sum()]] += 1
    assert (np.diff(counts, axis=0) >= 0).all()
    assert (counts[-1] == quota).all()
    return counts


def permutation(places: NDArray[np.int64], size: int, *key: int | str) -> NDArray[np.int64]:
    """What a shuffle of `range(size)` has at `places`, without making it.

    A Feistel network over the next power of four, walked until it falls below `size` (Black and
    Rogaway, Ciphers with arbitrary finite domains, 2002). It depends on no library's generator.

    Args:
        places: int64, each in [0, size).
        size: At least 1.
        key: What chooses the shuffle.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def shuffled(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> half, values & mask
        for k in keys:
            mixed = (right + k) * np.uint64(0x9E3779B97F4A7C15)  # modulo 2^64
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return left << half | right

    result = shuffled(places.astype(np.uint64))
    while (outside := np.flatnonzero(result >= size)).size:
        result[outside] = shuffled(result[outside])
    return result.astype(np.int64)


class Order:
    """Where each sample of a run begins.

    Phases of one sequence length share a part of a source, those of another have their own, each in
    proportion to what it draws: no token is seen twice for being cut in two ways.

    Args:
        config: The data of the run.
        lengths: Tokens of each source.

    Attributes:
        phases: In steps.
        names: The sources, sorted.
        epochs: How often the run goes through each; above 1 it sees text again.

    Raises:
        ValueError: a source too short for one sequence.
    """

    def __init__(self, config: DataConfig, lengths: Mapping[str, int]) -> None:
        self.seed = config.seed
        self.phases = schedule(config)
        self.names = sorted(lengths)
        P, S = len(self.phases), len(self.names)
        quotas = np.array([[p.quotas.get(name, 0) for name in self.names] for p in self.phases], dtype=np.int64)
        self._counts = [window_counts(row.tolist()) for row in quotas]  # P of [num_windows + 1, S]
        self._drawn = np.zeros((P, S), dtype=np.int64)  # samples, by earlier phases of the same length
        self._first = np.zeros((P, S), dtype=np.int64)  # token at which the phase's part begins
        self._blocks = np.ones((P, S), dtype=np.int64)  # that the part has
        self.epochs: dict[str, float] = {}
        lengths_of = np.array([phase.sequence_length for phase in self.phases])
        for s, name in enumerate(self.names):
            total = int(quotas[:, s] @ lengths_of)
            first = drawn = there = 0
            for T in dict.fromkeys(lengths_of.tolist()):
                same = np.flatnonzero(lengths_of == T)
                draws = quotas[same, s]
                if not draws.sum():
                    continue
                drawn += int(draws.sum()) * T
                end = lengths[name] * drawn // total
                blocks = (end - first - 1) // T
                if blocks < 1:
                    raise ValueError(
                        f"source {name!r} has {end - first} tokens for sequences of {T}; one and its last target "
                        f"need {T + 1}. Give the source more text or lower sequence_length"
                    )
                self._drawn[same, s] = np.cumsum(draws) - draws
                self._first[same, s], self._blocks[same, s] = first, blocks
                first, there = end, there + blocks * T
            self.epochs[name] = drawn / there
        self._window = functools.lru_cache(maxsize=2)(self._make_window)

    def samples(self, phase: int, numbers: range) -> list[tuple[int, int]]:
        """The source, as an index of `names`, and the first token there, of samples of a phase."""
        found = []
        for number in numbers:
            sources, starts = self._window(phase, number // WINDOW)
            found.append((int(sources[number % WINDOW]), int(starts[number % WINDOW])))
        return found

    def count(self, phase: int, num_samples: int) -> dict[str, int]:
        """How many of a phase's first samples each source gives."""
        windows, rest = divmod(num_samples, WINDOW)
        counts = self._counts[phase][windows].copy()
        if rest:
            counts += np.bincount(self._window(phase, windows)[0][:rest], minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def _make_window(self, phase: int, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        before, after = self._counts[phase][window : window + 2]
        unshuffled = np.repeat(np.arange(len(self.names)), after - before)
        n = len(unshuffled)
        sources = unshuffled[permutation(np.arange(n), n, self.seed, "window", phase, window)]
        starts = np.empty(n, dtype=np.int64)
        for s in np.flatnonzero(after - before):
            places, blocks = np.flatnonzero(sources == s), int(self._blocks[phase, s])
            draws = self._drawn[phase, s] + np.arange(before[s], after[s])
            epochs = draws // blocks
            for epoch in np.unique(epochs):
                now = epochs == epoch
                key = self.seed, self.names[s], self.phases[phase].sequence_length, int(epoch)
                block = permutation(draws[now] % blocks, blocks, *key)
                starts[places[now]] = self._first[phase, s] + block * self.phases[phase].sequence_length
        return sources, starts
