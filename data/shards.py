"""Token shards on disk: the manifest, and random access to the tokens.

A source is a folder:

    manifest.json        what the tokens are and where they come from (`Manifest`)
    shard-00000.bin      token ids, little-endian uint16 (vocabularies up to 65,536) or uint32
    shard-00000.idx.npy  int64 [num_documents + 1], where each document starts, and the end

Every document ends with the tokenizer's EOS and lies in one shard. To readers the shards are one
long array of tokens.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass
class Shard:
    """One pair of files. `num_rows` counts the source's rows up to its end, empty ones included."""

    name: str
    num_documents: int
    num_tokens: int
    num_rows: int
    sha256: str
    index_sha256: str


@dataclass
class Manifest:
    """What a folder of shards holds. `source` and `tokenizer_sha256` say what it was made from."""

    source: dict[str, Any]
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    eos_token_id: int
    dtype: str
    shard_tokens: int
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
            values = json.loads(path.read_text())
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
            values["shards"] = [Shard(**shard) for shard in values["shards"]]
            manifest = cls(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove {folder} and prepare it again") from error
        if totals != (manifest.num_documents, manifest.num_tokens):
            raise ValueError(f"{path} is damaged: its totals {totals} are not the sum over its shards")
        manifest._check_sizes(folder)
        return manifest

    def _check_sizes(self, folder: Path) -> None:
        for shard in self.shards:
            path = folder / f"{shard.name}.bin"
            expected = shard.num_tokens * self.numpy_dtype.itemsize
            found = path.stat().st_size if path.is_file() else None
            if found != expected:
                state = "is missing" if found is None else f"has {found} bytes"
                raise ValueError(
                    f"{path} {state}; the manifest names {expected}. "
                    f"Copy the file again, or remove {folder} and prepare it again"
                )
            index = folder / f"{shard.name}.idx.npy"
            try:
                offsets = np.load(index, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{index} cannot be read ({error}). "
                    f"Copy the file again, or remove {folder} and prepare it again"
                ) from error
            if offsets.shape != (shard.num_documents + 1,) or offsets[-1] != shard.num_tokens:
                raise ValueError(f"{index} does not match the manifest; remove {folder} and prepare it again")


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
        names = [self.folder / shard.name for shard in self.manifest.shards]
        dtype = self.manifest.numpy_dtype
        self._tokens = [np.memmap(f"{name}.bin", dtype=dtype, mode="r") for name in names]
        self._offsets = [np.load(f"{name}.idx.npy", mmap_mode="r") for name in names]
        # [num_shards + 1], the first token of each shard, and the end
        self._starts = np.cumsum([0, *(shard.num_tokens for shard in self.manifest.shards)])

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
            low, high = start - base, min(end - base, len(self._tokens[shard]))
            tokens.append(self._tokens[shard][low:high].astype(np.int64))
            offsets = self._offsets[shard][:-1]  # a binary search reads a few pages of a memory map
            first, last = np.searchsorted(offsets, [low, high], side="left")
            starts.append(offsets[first:last] + (base - origin))
            start, shard = base + high, shard + 1
        return np.concatenate(tokens), np.concatenate(starts)
