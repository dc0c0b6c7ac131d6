"""Which texts came before: a set of 64-bit hashes."""

import numpy as np
import xxhash
from numpy.typing import NDArray


def text_hash(text: str) -> int:
    """64 bits that stand for a text. Of n texts n^2 / 2^65 pairs share one by chance: 2e-5 of 26 million."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))


class HashSet:
    """A growing set of uint64, as sorted arrays of doubling sizes: 8 bytes an entry.

    Merging two of them needs their size once more for a moment.
    """

    def __init__(self) -> None:
        self._levels: list[NDArray[np.uint64]] = []

    def __len__(self) -> int:
        return sum(map(len, self._levels))

    def add(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Add hashes; True for each that was not there, neither before nor earlier among them."""
        unique, first = np.unique(hashes, return_index=True)
        known = np.zeros(len(unique), dtype=bool)
        for level in self._levels:
            places = np.searchsorted(level, unique)
            known |= level[np.minimum(places, len(level) - 1)] == unique
        new = np.zeros(len(hashes), dtype=bool)
        new[first[~known]] = True
        if not known.all():
            self._levels.append(unique[~known])
        while len(self._levels) > 1 and len(self._levels[-2]) < 2 * len(self._levels[-1]):
            merged = np.concatenate([self._levels.pop(), self._levels.pop()])
            merged.sort(kind="stable")  # merges sorted runs
            self._levels.append(merged)
        return new
