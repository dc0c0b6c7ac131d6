"""Text to token shards: every source of a configuration, tokenised once."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from brumby import __version__
from brumby.data.config import DataConfig, SourceConfig
from brumby.data.documents import describe, newest_revision, read_texts
from brumby.data.shards import MANIFEST, Manifest
from brumby.data.tokenizing import Encoder, TokenizerSpec, load_tokenizer
from brumby.data.writer import ShardWriter

SHARD_TOKENS = 1 << 26  # 128 or 256 MiB a shard


def prepare(
    config: DataConfig,
    num_workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    console: Console | None = None,
) -> None:
    """Write the token shards of every source below `config.root`.

    The files depend on the text and the tokenizer alone, not on `num_workers`. Work goes on in
    `<root>/.<source>.partial`, which is renamed when whole; after an interruption it goes on behind
    the last whole shard. A source that is there already is left as it is.

    Args:
        config: The sources and the tokenizer.
        num_workers: Processes that tokenise; more than 1 must be called below
            `if __name__ == "__main__"`, as everything that starts processes.
        shard_tokens: A shard is closed by the document that reaches this many tokens.
        console: Where to report; stderr by default.

    Raises:
        ValueError: a source cannot be read or has no text, the tokenizer does not serve, or a
            folder holds tokens of another source or tokenizer.
    """
    console = console or Console(stderr=True)
    tokenizer = load_tokenizer(config.tokenizer)
    todo = {}
    for name, source in config.sources.items():  # what is wrong should show before the work begins
        manifest = _named(name, _new_manifest, source, tokenizer, shard_tokens)
        if not _named(name, _finished, Path(config.root) / name, name, manifest, console):
            todo[name] = manifest
    if not todo:
        return
    with Encoder(tokenizer, num_workers) as encoder:
        for name, manifest in todo.items():
            _named(
                name,
                _prepare_source,
                Path(config.root),
                name,
                config.sources[name],
                manifest,
                encoder,
                console,
            )


def _named(name: str, function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"source {name!r}: {error}") from error


def _new_manifest(source: SourceConfig, tokenizer: TokenizerSpec, shard_tokens: int) -> Manifest:
    return Manifest(
        source=describe(source),
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        dtype=tokenizer.dtype,
        shard_tokens=shard_tokens,
    )


def _finished(folder: Path, name: str, manifest: Manifest, console: Console) -> bool:
    """Whether `folder` holds what is asked for; an error if it holds something else."""
    if not folder.exists():
        return False
    existing = Manifest.read(folder)
    differences = _differences(existing, manifest)
    if differences:
        raise ValueError(
            f"{folder} was prepared from something else: {'; '.join(differences)}. "
            "Remove it to prepare the source again, or give the source another name"
        )
    console.print(f"{name}: {existing.num_tokens:,} tokens are there already", highlight=False)
    return True


def _differences(existing: Manifest, wanted: Manifest) -> list[str]:
    differences = []
    for key in sorted(existing.source.keys() | wanted.source.keys()):
        found, asked = existing.source.get(key), wanted.source.get(key)
        if found == asked:
            continue
        if key == "files" and found is not None and asked is not None:
            changed = sorted(
                {file[0] for file in found if file not in asked} | {f[0] for f in asked if f not in found}
            )
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            differences.append(f"files changed ({', '.join(changed[:3])}{more})")
        else:
            differences.append(f"{key} was {_short(found)}, now {_short(asked)}")
    for key in ("tokenizer_sha256", "eos_token_id"):
        found, asked = getattr(existing, key), getattr(wanted, key)
        if found != asked:
            differences.append(
                f"{key} was {_short(found)} ({existing.tokenizer}), now {_short(asked)} ({wanted.tokenizer})"
            )
    return differences


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def _prepare_source(
    root: Path, name: str, source: SourceConfig, manifest: Manifest, encoder: Encoder, console: Console
) -> None:
    partial = root / f".{name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        manifest = _resumed(partial, manifest)
        if manifest.hub_revision is None:
            manifest.hub_revision = newest_revision(source)
        writer = ShardWriter(partial, manifest, source.max_documents, source.max_tokens)
        if writer.num_rows:
            console.print(f"{name}: going on after {writer.num_tokens:,} tokens", highlight=False)
        texts = read_texts(source, manifest.hub_revision, skip=writer.num_rows)
        with _Report(name, writer, console) as report:
            for tokens, lengths in encoder(texts):
                writer.add(tokens, lengths)
                report.update()
                if writer.full:
                    break
        writer.close_shard()
        if not writer.num_documents:
            rows = f"{writer.num_rows} rows, none with text"
            raise ValueError(f"no documents in {source.path or source.hub}: {rows}")
        manifest.created = datetime.now(UTC).isoformat(timespec="seconds")
        manifest.brumby_version = __version__
        manifest.write(partial)
        partial.rename(root / name)
    console.print(report.line, highlight=False)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder; the lock ends with this process, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(f"another process is preparing it, in {folder}; wait for it or stop it") from error
    finally:
        os.close(descriptor)


def _resumed(partial: Path, manifest: Manifest) -> Manifest:
    """The manifest of the interrupted work in `partial`, or `manifest` and an empty folder if none fits."""
    if (partial / MANIFEST).is_file():
        with contextlib.suppress(ValueError):  # a damaged one is no use
            existing = Manifest.read(partial)
            if existing.shard_tokens == manifest.shard_tokens and not _differences(existing, manifest):
                return existing
    for file in partial.iterdir():
        file.unlink()
    return manifest


class _Report:
    """One line of counts: live on a terminal, in a log every half minute."""

    def __init__(self, name: str, writer: ShardWriter, console: Console) -> None:
        self._name, self._writer, self._console = name, writer, console
        self._tokens, self._started = writer.num_tokens, time.monotonic()
        self._printed = self._started
        self._status = console.status(self.line)

    def __enter__(self) -> "_Report":
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    @property
    def line(self) -> str:
        writer, seconds = self._writer, time.monotonic() - self._started
        speed = (writer.num_tokens - self._tokens) / max(seconds, 1e-3)
        return (
            f"{self._name}: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens "
            f"({speed:,.0f} tokens/s, {seconds:,.0f} s)"
        )

    def update(self) -> None:
        if self._console.is_terminal:
            self._status.update(self.line)
        elif time.monotonic() - self._printed > 30:
            self._printed = time.monotonic()
            self._console.print(self.line, highlight=False)
