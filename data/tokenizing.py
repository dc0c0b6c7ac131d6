"""Text to token ids, on as many processes as asked for, in the order of the text."""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from brumby.data.contamination import Overlaps
from brumby.data.documents import Fate, Row
from brumby.data.duplicates import text_hash

BATCH_CHARACTERS = 1 << 20  # text handed to a process at a time
BATCH_ROWS = 1024
BATCHES_WAITING = 6  # a process: what the others do while the reader waits for the network
UINT16_VOCAB = 1 << 16


@dataclass
class Encoded:
    """Tokenised rows, R of them.

    Attributes:
        tokens: [sum of `lengths`], the documents one after the other, each with its EOS.
        lengths: int64 [R], 0 for a dropped row.
        hashes: uint64 [R], of the texts.
        fates: uint8 [R], a `Fate` each.
        files: int64 [R], the row's file.
        rows: int64 [R], the row in its file.
        notes: Why a row was dropped, by its place.
    """

    tokens: NDArray[np.unsignedinteger]
    lengths: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    fates: NDArray[np.uint8]
    files: NDArray[np.int64]
    rows: NDArray[np.int64]
    notes: dict[int, str]

    def __len__(self) -> int:
        return len(self.lengths)

    def drop(self, places: NDArray[np.intp], fate: Fate) -> None:
        """Drop kept rows."""
        kept = np.ones(len(self), dtype=bool)
        kept[places] = False
        self.tokens = self.tokens[np.repeat(kept, self.lengths)]
        self.lengths[places], self.fates[places] = 0, fate


@dataclass
class TokenizerSpec:
    """A fast tokenizer in the form that worker processes take.

    `vocab_size` is one above the highest id, so that it bounds the ids of added tokens as well.
    """

    name: str
    json: str
    eos_token_id: int
    vocab_size: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()

    @property
    def dtype(self) -> str:
        return "uint16" if self.vocab_size <= UINT16_VOCAB else "uint32"


def load_tokenizer(name: str) -> TokenizerSpec:
    """Load a folder's or Hub id's tokenizer.

    Raises:
        ValueError: not found, not a fast tokenizer, or without an EOS token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise ValueError(
            f"cannot load tokenizer {name!r} ({type(error).__name__}: {error}); "
            "expected a folder with tokenizer.json or a Hub id"
        ) from error
    return spec_of(tokenizer, name)


def spec_of(tokenizer: Any, name: str) -> TokenizerSpec:
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {name!r} is not a fast one; convert it to a tokenizer.json first")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {name!r} has no EOS token, which ends every document; "
            "set `eos_token` in its tokenizer_config.json"
        )
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    return TokenizerSpec(name, _serialise(tokenizer.backend_tokenizer), int(tokenizer.eos_token_id), vocab_size)


def tokenizer_sha256(tokenizer: Any) -> str:
    """What a manifest records of a (fast, `transformers`) tokenizer, to compare a model's with the data's."""
    return hashlib.sha256(_serialise(tokenizer.backend_tokenizer).encode()).hexdigest()


def _serialise(backend: Tokenizer) -> str:
    values = json.loads(backend.to_str())
    values["truncation"] = values["padding"] = None  # settings of a call, no part of the vocabulary
    return json.dumps(values, sort_keys=True, ensure_ascii=False)


def encode(
    tokenizer: Tokenizer, rows: list[Row], eos_token_id: int, dtype: str, overlaps: Overlaps | None = None
) -> Encoded:
    """Tokenise rows, each document ended by EOS.

    No other special token is added, and text that spells one ("<|endoftext|>") is taken as text, so
    that EOS stands at the ends of documents only.
    """
    texts, fates, files, numbers, whys = map(list, zip(*rows, strict=True))
    notes = {i: why for i, why in enumerate(whys) if why}
    if overlaps is not None:
        for i, text in enumerate(texts):
            if text and (found := overlaps.find(text)):
                texts[i], fates[i], notes[i] = "", Fate.CONTAMINATED, found
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    lengths = np.array([len(document) + 1 if document else 0 for document in ids], dtype=np.int64)
    tokens = np.empty(int(lengths.sum()), dtype=np.dtype(dtype).newbyteorder("<"))
    end = 0
    for i, document in enumerate(ids):
        if document:
            start, end = end, end + len(document) + 1
            tokens[start : end - 1] = document
            tokens[end - 1] = eos_token_id
        elif fates[i] == Fate.KEPT:
            fates[i], notes[i] = Fate.EMPTY, "has no tokens"
    return Encoded(
        tokens,
        lengths,
        np.array([text_hash(text) for text in texts], dtype=np.uint64),
        np.array(fates, dtype=np.uint8),
        np.array(files, dtype=np.int64),
        np.array(numbers, dtype=np.int64),
        notes,
    )


class Encoder:
    """Tokenises a stream of rows on `num_workers` processes; with 1, in this one.

    Use as a context manager. What it yields does not depend on `num_workers`.
    """

    def __init__(self, spec: TokenizerSpec, num_workers: int, overlaps: Overlaps | None = None) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; expected at least 1")
        self._num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None
        if num_workers == 1:
            _start(spec, overlaps)
        else:
            context = multiprocessing.get_context("spawn")  # forking a process with threads can hang
            self._pool = ProcessPoolExecutor(num_workers, context, _start_worker, (spec, overlaps))
            # An interrupt is for this process alone. What it ignores its workers ignore from their first moment on
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            for _ in range(num_workers):
                self._pool.submit(os.getpid)  # each starts a process
            signal.signal(signal.SIGINT, handler)

    def __enter__(self) -> "Encoder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, rows: Iterable[Row]) -> Iterator[Encoded]:
        """Yield `encode`'s result for one batch of rows after the other."""
        if self._pool is None:
            for batch in _batched(rows):
                yield _encode(batch)
            return
        waiting: deque[Future[Encoded]] = deque()  # bounded: the reader may be faster than the processes
        try:
            for batch in _batched(rows):
                waiting.append(self._pool.submit(_encode, batch))
                if len(waiting) > BATCHES_WAITING * self._num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _batched(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += len(row.text)
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


_worker: tuple[Tokenizer, int, str, Overlaps | None] | None = None  # of this process


def _start(spec: TokenizerSpec, overlaps: Overlaps | None) -> None:
    global _worker
    tokenizer = Tokenizer.from_str(spec.json)
    tokenizer.encode_special_tokens = True
    _worker = tokenizer, spec.eos_token_id, spec.dtype, overlaps


def _start_worker(spec: TokenizerSpec, overlaps: Overlaps | None) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _start(spec, overlaps)


def _exit_with_parent() -> None:
    """A killed parent cannot tell its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(rows: list[Row]) -> Encoded:
    assert _worker is not None
    tokenizer, eos_token_id, dtype, overlaps = _worker
    return encode(tokenizer, rows, eos_token_id, dtype, overlaps)
