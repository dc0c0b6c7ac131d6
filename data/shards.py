"""Token shards on disk: the manifest, and random access to the tokens.

A source is a folder:

    manifest.json        what the tokens are and where they come from (`Manifest`)
    shard-00000.bin      token ids, little-endian uint16 (vocabularies up to 65,536) or uint32
    shard-00000.idx.npy  int64 [num_documents + 1], where each document starts, and the end
    shard-00000.hash.npy uint64 [num_documents], hashes of the texts, to find duplicates by
    dropped.jsonl        the rows that were contaminated or unusable: file, row, fate and why

Every document ends with the tokenizer's EOS and lies in one shard. To readers the shards are one
long array of tokens.
"""

import functools
import hashlib
import json
import mmap
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
DROPPED = "dropped.jsonl"
OPEN_SHARDS = 512  # that a source keeps mapped; Linux allows a process 65,530 maps
NPY_HEADER = 128  # bytes that NumPy writes before a row of numbers


@dataclass(slots=True)
class Shard:
    """One pair of files.

    Attributes:
        name: Of its files, without suffix.
        num_documents: Documents in it.
        num_tokens: Tokens in it.
        sha256: Of the tokens' file.
        index_sha256: Of the index.
        fates: How many of the rows read for it were kept or dropped, by `Fate`.
        file: Where the next shard goes on: the source's file,
        row: and its row.
        dropped_bytes: Length of `dropped.jsonl` up to here.
    """

    name: str
    num_documents: int
    num_tokens: int
    sha256: str
    index_sha256: str
    fates: dict[str, int]
    file: int
    row: int
    dropped_bytes: int


SHARD_FIELDS = {field.name for field in fields(Shard)}


@dataclass
class Manifest:
    """What a folder of shards holds. `source` and `tokenizer_sha256` say what it was made from.

    `exhausted` says that the source has no more.
    """

    source: dict[str, Any]
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eos_token_id: int
    dtype: str
    shard_tokens: int
    exhausted: bool = False
    hub_revision: str | None = None
    shards: list[Shard] = field(default_factory=list)
    created: str = ""
    brumby_version: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def numpy_dtype(self) -> np.dtype:
        """Little-endian, whatever the machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)

    @property
    def fates(self) -> dict[str, int]:
        """Rows kept and dropped, by `Fate`."""
        names = dict.fromkeys(name for shard in self.shards for name in shard.fates)
        return {name: sum(shard.fates.get(name, 0) for shard in self.shards) for name in names}

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over the tokens, their cut into documents and the tokenizer; no dates, no paths."""
        parts = [self.tokenizer_sha256, *(s.sha256 + s.index_sha256 for s in self.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        values = asdict(self) | {"num_documents": self.num_documents, "num_tokens": self.num_tokens}
        temporary = folder / (MANIFEST + ".tmp")
        temporary.write_text(json.dumps(values, indent=2) + "\n")
        temporary.replace(folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read `folder/manifest.json` and check that the files beside it have the sizes it names.

        Raises:
            ValueError: no manifest, one of another format, or a shard missing, truncated or too long.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(f"{folder} holds no {MANIFEST}, so no token shards; make them with `brumby prepare`")
        try:
            values = json.loads(path.read_bytes(), object_hook=_shard_or_dict)
            version = values["format_version"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove {folder} and prepare it again") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has format version {version}, this is version {FORMAT_VERSION}; "
                f"remove {folder} and prepare it again"
            )
        try:
            totals = values.pop("num_documents"), values.pop("num_tokens")
            values["shards"] = [s if isinstance(s, Shard) else Shard(**s) for s in values["shards"]]
            manifest = cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove {folder} and prepare it again") from error
        if totals != (manifest.num_documents, manifest.num_tokens):
            raise ValueError(f"{path} is damaged: its totals {totals} are not the sum over its shards")
        manifest._check_sizes(folder)
        return manifest

    def _check_sizes(self, folder: Path) -> None:
        for shard in self.shards:
            for name, expected in (
                (f"{shard.name}.bin", shard.num_tokens * self.numpy_dtype.itemsize),
                (f"{shard.name}.idx.npy", NPY_HEADER + 8 * (shard.num_documents + 1)),
                (f"{shard.name}.hash.npy", NPY_HEADER + 8 * shard.num_documents),
            ):
                path = folder / name
                size = _size(path)
                if size != expected:
                    state = "is missing" if size is None else f"has {size} bytes"
                    raise ValueError(
                        f"{path} {state}; the manifest names {expected}. "
                        f"Copy the file again, or remove {folder} and prepare it again"
                    )


def _shard_or_dict(values: dict[str, Any]) -> Shard | dict[str, Any]:
    """A shard's object as soon as it is read: of tens of thousands, dictionaries would take twice the memory."""
    return Shard(**values) if values.keys() == SHARD_FIELDS else values


def _size(path: Path) -> int | None:
    """Bytes, or None where there is no file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


class _MappedShard:
    """A shard's tokens and document starts. What was read is not kept in memory."""

    def __init__(self, folder: Path, shard: Shard, dtype: np.dtype) -> None:
        index = folder / f"{shard.name}.idx.npy"
        self._map, self._index_map = _map(folder / f"{shard.name}.bin"), _map(index)
        self._tokens = np.frombuffer(self._map, dtype)
        self._offsets = np.frombuffer(self._index_map, "<i8", offset=NPY_HEADER)
        if self._offsets[-1] != shard.num_tokens:
            raise ValueError(f"{index} does not match the manifest; remove {folder} and prepare it again")

    def read(self, low: int, high: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        tokens = self._tokens[low:high].astype(np.int64)
        offsets = self._offsets[:-1]  # a binary search reads a few pages
        start, end = np.searchsorted(offsets, [low, high], side="left")
        starts = offsets[start:end] - low
        size = self._tokens.itemsize
        first = low * size // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, first, high * size - first)
        self._index_map.madvise(mmap.MADV_DONTNEED)
        return tokens, starts


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class TokenSource:
    """The tokens of one source as one array, memory-mapped.

    Args:
        folder: A folder written by `prepare`.

    Raises:
        ValueError: see `Manifest.read`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        # [num_shards + 1], the first token of each shard, and the end
        self._starts = np.cumsum([0, *(shard.num_tokens for shard in self.manifest.shards)])
        self._shard = functools.lru_cache(maxsize=OPEN_SHARDS)(self._map)

    def _map(self, shard: int) -> _MappedShard:
        return _MappedShard(self.folder, self.manifest.shards[shard], self.manifest.numpy_dtype)

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self._starts[-1])

    def window(self, start: int, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens [start, start + length), across shards.

        Returns:
            tokens: int64 [length].
            document_starts: int64 [n], positions in the window at which a document starts, ascending.

        Raises:
            ValueError: the window leaves the source.
        """
        origin, end = start, start + length
        if start < 0 or length < 1 or end > len(self):
            raise ValueError(f"tokens [{start}, {end}) are not within the {len(self)} tokens of {self.folder}")
        tokens, starts = [], []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < end:
            base = int(self._starts[shard])
            low, high = start - base, min(end - base, int(self._starts[shard + 1]) - base)
            read, found = self._shard(shard).read(low, high)
            tokens.append(read)
            starts.append(found + (start - origin))
            start, shard = base + high, shard + 1
        if len(tokens) == 1:
            return tokens[0], starts[0]
        return np.concatenate(tokens), np.concatenate(starts)
