"""Writes one source's shards, and takes up an interrupted work at its last whole shard."""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from brumby.data.shards import Manifest, Shard


class ShardWriter:
    """Appends documents to shards, cutting where one reaches `manifest.shard_tokens`.

    The cut depends on the documents alone. The manifest is written after each whole shard, so
    `num_rows` of the last shard says where to read on after an interruption.

    Args:
        folder: Where to write; exists.
        manifest: The manifest to complete; shards already in it stay.
        max_documents: Documents to stop after.
        max_tokens: Tokens to stop after, at the end of the document that reaches them.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        max_documents: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self.num_rows = manifest.shards[-1].num_rows if manifest.shards else 0
        self.num_documents, self.num_tokens = manifest.num_documents, manifest.num_tokens
        self._max_documents, self._max_tokens = max_documents, max_tokens
        self._file: BinaryIO | None = None
        self._lengths: list[NDArray[np.int64]] = []
        self._digest = hashlib.sha256()
        self._shard_size = 0  # tokens in the open shard

    @property
    def full(self) -> bool:
        """Whether a limit is reached."""
        return (self._max_documents is not None and self.num_documents >= self._max_documents) or (
            self._max_tokens is not None and self.num_tokens >= self._max_tokens
        )

    def add(self, tokens: NDArray, lengths: NDArray[np.int64]) -> None:
        """Append rows.

        Args:
            tokens: [sum of lengths], the documents one after the other, each with its EOS.
            lengths: int64 [rows]; 0 where a row has no text.
        """
        while len(lengths) and not self.full:
            ends = np.cumsum(lengths)
            num_rows = int(np.searchsorted(ends, self.manifest.shard_tokens - self._shard_size)) + 1
            if self._max_tokens is not None:
                num_rows = min(num_rows, int(np.searchsorted(ends, self._max_tokens - self.num_tokens)) + 1)
            if self._max_documents is not None:
                documents = np.cumsum(lengths > 0)
                num_rows = min(
                    num_rows, int(np.searchsorted(documents, self._max_documents - self.num_documents)) + 1
                )
            num_rows = min(num_rows, len(lengths))
            num_tokens = int(ends[num_rows - 1])
            self._write(tokens[:num_tokens], lengths[:num_rows])
            tokens, lengths = tokens[num_tokens:], lengths[num_rows:]
            if self._shard_size >= self.manifest.shard_tokens:
                self.close_shard()

    def _write(self, tokens: NDArray, lengths: NDArray[np.int64]) -> None:
        self.num_rows += len(lengths)
        lengths = lengths[lengths > 0]
        if not len(lengths):
            return
        if self._file is None:
            self._file = open(self.folder / f"{self._name}.bin", "wb")  # noqa: SIM115 (open over many calls)
        data = np.ascontiguousarray(tokens).data
        self._file.write(data)
        self._digest.update(data)
        self._lengths.append(lengths)
        self._shard_size += len(tokens)
        self.num_tokens += len(tokens)
        self.num_documents += len(lengths)

    @property
    def _name(self) -> str:
        return f"shard-{len(self.manifest.shards):05d}"

    def close_shard(self) -> None:
        """End the open shard, if there is one, and record it."""
        if self._file is None:
            return
        _sync(self._file)
        offsets = np.cumsum(np.concatenate([[0], *self._lengths]), dtype="<i8")
        index = self.folder / f"{self._name}.idx.npy"
        with open(index, "wb") as file:
            np.save(file, offsets)
            _sync(file, close=False)
        self.manifest.shards.append(
            Shard(
                name=self._name,
                num_documents=len(offsets) - 1,
                num_tokens=self._shard_size,
                num_rows=self.num_rows,
                sha256=self._digest.hexdigest(),
                index_sha256=hashlib.sha256(index.read_bytes()).hexdigest(),
            )
        )
        self.manifest.write(self.folder)
        self._file, self._lengths, self._shard_size, self._digest = None, [], 0, hashlib.sha256()


def _sync(file: BinaryIO, close: bool = True) -> None:
    file.flush()
    os.fsync(file.fileno())
    if close:
        file.close()
