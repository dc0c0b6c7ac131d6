"""Writes one source's shards, and takes up an interrupted work at its last whole shard."""

import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from brumby.data.documents import Fate
from brumby.data.shards import DROPPED, Manifest, Shard
from brumby.data.tokenizing import Encoded


class ShardWriter:
    """Appends documents to shards, cutting where one reaches `manifest.shard_tokens`.

    The cut depends on the documents alone. The manifest is written after each whole shard, so `file`
    and `row` of the last shard say where to read on after an interruption.

    Args:
        folder: Where to write; exists.
        manifest: The manifest to complete; shards already in it stay.
        max_tokens: Tokens to stop after, at the end of the document that reaches them.
        names: The source's files, for `dropped.jsonl`.
    """

    def __init__(self, folder: Path, manifest: Manifest, max_tokens: float, names: list[str]) -> None:
        self.folder, self.manifest = folder, manifest
        self.num_documents, self.num_tokens = manifest.num_documents, manifest.num_tokens
        self._max_tokens, self._names = max_tokens, names
        last = manifest.shards[-1] if manifest.shards else None
        self.file, self.row = (last.file, last.row) if last else (0, 0)
        self._dropped = open(folder / DROPPED, "ab")  # noqa: SIM115 (open over many calls)
        self._dropped.truncate(last.dropped_bytes if last else 0)
        self._file: BinaryIO | None = None
        self._clear()

    def _clear(self) -> None:
        self._lengths: list[NDArray[np.int64]] = []
        self._hashes: list[NDArray[np.uint64]] = []
        self._fates = np.zeros(len(Fate), dtype=np.int64)
        self._digest = hashlib.sha256()
        self._size = 0  # tokens in the open shard

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.num_tokens >= self._max_tokens

    def add(self, rows: Encoded) -> None:
        """Append rows, up to the limit."""
        ends = np.cumsum(rows.lengths)
        first = token = 0
        while first < len(rows) and not self.full:
            room = min(self.manifest.shard_tokens - self._size, self._max_tokens - self.num_tokens)
            last = min(int(np.searchsorted(ends, token + room)) + 1, len(rows))
            self._write(rows, first, last, rows.tokens[token : ends[last - 1]])
            first, token = last, int(ends[last - 1])
            if self._size >= self.manifest.shard_tokens:
                self.close_shard()

    def _write(self, rows: Encoded, first: int, last: int, tokens: NDArray) -> None:
        """Rows [first, last) and their tokens."""
        self.file, self.row = int(rows.files[last - 1]), int(rows.rows[last - 1]) + 1
        self._fates += np.bincount(rows.fates[first:last], minlength=len(Fate))
        for place, why in rows.notes.items():
            if first <= place < last:
                where = {"file": self._names[rows.files[place]], "row": int(rows.rows[place])}
                line = where | {"fate": Fate(rows.fates[place]).name.lower(), "why": why}
                self._dropped.write(json.dumps(line).encode() + b"\n")
        kept = rows.lengths[first:last] > 0
        if not kept.any():
            return
        if self._file is None:
            self._file = open(self.folder / f"{self._name}.bin", "wb")  # noqa: SIM115
        data = np.ascontiguousarray(tokens).data
        self._file.write(data)
        self._digest.update(data)
        self._lengths.append(rows.lengths[first:last][kept])
        self._hashes.append(rows.hashes[first:last][kept])
        self._size += len(tokens)
        self.num_tokens += len(tokens)
        self.num_documents += int(kept.sum())

    @property
    def _name(self) -> str:
        return f"shard-{len(self.manifest.shards):05d}"

    @property
    def fates(self) -> dict[str, int]:
        """Rows by fate since the last whole shard."""
        return {fate.name.lower(): int(self._fates[fate]) for fate in Fate if self._fates[fate]}

    def close_shard(self) -> None:
        """End the open shard and record it; rows dropped since the last one count as that one's."""
        if self._file is None:
            if self.manifest.shards and self._fates.any():
                last = self.manifest.shards[-1]
                for name, count in self.fates.items():
                    last.fates[name] = last.fates.get(name, 0) + count
                _sync(self._dropped)
                last.file, last.row, last.dropped_bytes = self.file, self.row, self._dropped.tell()
                self.manifest.write(self.folder)
                self._clear()
            return
        _sync(self._file)
        self._file.close()
        _sync(self._dropped)
        offsets = np.cumsum(np.concatenate([[0], *self._lengths]), dtype="<i8")
        index = self.folder / f"{self._name}.idx.npy"
        _save(index, offsets)
        _save(self.folder / f"{self._name}.hash.npy", np.concatenate(self._hashes).astype("<u8"))
        self.manifest.shards.append(
            Shard(
                name=self._name,
                num_documents=len(offsets) - 1,
                num_tokens=self._size,
                sha256=self._digest.hexdigest(),
                index_sha256=hashlib.sha256(index.read_bytes()).hexdigest(),
                fates=self.fates,
                file=self.file,
                row=self.row,
                dropped_bytes=self._dropped.tell(),
            )
        )
        self.manifest.write(self.folder)
        self._file = None
        self._clear()

    def close(self) -> None:
        """Close the files; what is not in a whole shard is not kept."""
        self._dropped.close()
        if self._file is not None:
            self._file.close()


def _save(path: Path, values: NDArray) -> None:
    with open(path, "wb") as file:
        np.save(file, values)
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
