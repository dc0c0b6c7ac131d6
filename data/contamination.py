"""Which documents overlap with evaluation sets: 13 words in a row, as GPT-3's filter (arXiv 2005.14165, C)."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

N = 13  # words
WORD = re.compile(r"\w+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class Overlaps:
    """The 13-grams of evaluation sets; small enough for every tokenising process.

    Attributes:
        items: For each set its number of items, and of those among them too short to have a 13-gram.
    """

    items: dict[str, tuple[int, int]] = field(default_factory=dict)
    _vocabulary: dict[str, int] = field(default_factory=dict)
    _grams: dict[tuple[str, ...], str] = field(default_factory=dict)
    _hashes: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))

    def add(self, name: str, texts: Iterable[str]) -> None:
        """Take the items of an evaluation set."""
        count = short = 0
        for item, text in enumerate(texts):
            words = WORD.findall(text.lower())
            count, short = count + 1, short + (len(words) < N)
            for i in range(len(words) - N + 1):
                self._grams.setdefault(tuple(words[i : i + N]), f"{name}, item {item}")
        self.items[name] = count, short
        self._vocabulary = {w: i for i, w in enumerate(dict.fromkeys(w for gram in self._grams for w in gram))}
        ids = [[self._vocabulary[word] for word in gram] for gram in self._grams]
        self._hashes = np.unique(_hashes(np.array(ids, np.int64).reshape(-1))[::N])

    def find(self, text: str) -> str | None:
        """The first evaluation item that shares a 13-gram with the text: its set, number and the words."""
        if not len(self._hashes):
            return None
        words = WORD.findall(text.lower())
        if len(words) < N:
            return None
        get = self._vocabulary.get
        ids = np.fromiter((get(word, -1) for word in words), np.int64, len(words))
        unknown = np.concatenate([[0], np.cumsum(ids < 0)])
        candidates = np.flatnonzero(unknown[N:] == unknown[:-N])  # most windows hold a word of no evaluation
        if not len(candidates):
            return None
        hashes = _hashes(ids)[candidates]
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        for start in candidates[self._hashes[places] == hashes]:
            gram = tuple(words[start : start + N])
            if gram in self._grams:
                return f"{self._grams[gram]}: {' '.join(gram)}"
        return None


def _hashes(ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A hash of each window of 13 ids: uint64 [len(ids) - 12]."""
    size = max(0, len(ids) - N + 1)
    values = ids.astype(np.uint64)
    total = np.zeros(size, np.uint64)
    for i in range(N):
        total = (total + values[i : i + size] + np.uint64(1)) * MULTIPLIER  # modulo 2^64
    return total ^ (total >> np.uint64(31))
