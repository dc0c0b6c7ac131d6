"""Text to token shards: of every source of a configuration what its phases take, tokenised once."""

import contextlib
import errno
import fcntl
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from brumby import __version__
from brumby.data.config import DataConfig, SourceConfig
from brumby.data.contamination import Overlaps
from brumby.data.documents import Fate, describe, newest_revision, read_rows, resolve
from brumby.data.duplicates import HashSet
from brumby.data.order import schedule, tokens_drawn
from brumby.data.shards import DROPPED, MANIFEST, Manifest
from brumby.data.tokenizing import Encoder, TokenizerSpec, load_tokenizer
from brumby.data.writer import ShardWriter

SHARD_TOKENS = 1 << 26  # 128 or 256 MiB a shard


@dataclass(frozen=True)
class Demand:
    """Tokens of a source: what the run draws, what it needs to draw none twice, and that with the margin."""

    drawn: int
    enough: int
    wanted: float


def demands(config: DataConfig) -> dict[str, Demand]:
    """What each source that the phases draw from is asked for."""
    longest = max(phase.sequence_length for phase in schedule(config))
    found = {}
    for name, drawn in tokens_drawn(config).items():
        enough = drawn + longest  # blocks leave a rest, and the last token needs a target
        wanted = math.inf if math.isinf(config.margin) else max(enough, math.ceil(drawn * (1 + config.margin)))
        found[name] = Demand(drawn, enough, wanted)
    return {name: found[name] for name in config.sources if name in found}


def prepare(
    config: DataConfig,
    num_workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    console: Console | None = None,
) -> None:
    """Write the token shards of every source below `config.root`, as many tokens as the phases take.

    The files depend on the text and the tokenizer alone, not on `num_workers`. Work goes on in
    `<root>/.<source>.partial`, which is renamed when whole; after an interruption it goes on behind
    the last whole shard. A source that is there already is left as it is, or is read on if the phases
    take more of it now. A document counts as a duplicate if its text is in a source that is there already.

    Args:
        config: The sources, the phases and the tokenizer.
        num_workers: Processes that tokenise; more than 1 must be called below
            `if __name__ == "__main__"`, as everything that starts processes.
        shard_tokens: A shard is closed by the document that reaches this many tokens.
        console: Where to report; stderr by default.

    Raises:
        ValueError: a source cannot be read or has no text, the tokenizer does not serve, the disk is
            full, or a folder holds tokens of another source or tokenizer.
    """
    console = console or Console(stderr=True)
    root = Path(config.root)
    tokenizer = load_tokenizer(config.tokenizer)
    evaluations = {name: named(name, describe, source) for name, source in config.decontaminate.items()}
    todo = {}
    for name, demand in demands(config).items():  # what is wrong should show before the work begins
        manifest = named(name, _new_manifest, config, config.sources[name], tokenizer, shard_tokens)
        manifest.source["decontaminate"] = evaluations
        if not named(name, _finished, root, name, manifest, demand, console):
            manifest.hub_revision = named(name, newest_revision, config.sources[name])
            todo[name] = manifest
    if not todo:
        return
    sizes = [demands(config)[name].wanted * manifest.numpy_dtype.itemsize for name, manifest in todo.items()]
    _check_space(root, sum(sizes) - _written(root, list(todo)))
    overlaps = load_overlaps(config, console) if config.decontaminate else None
    with Encoder(tokenizer, num_workers, overlaps) as encoder:
        for name, manifest in todo.items():
            named(name, _prepare_source, config, name, manifest, encoder, console)


def named(name: str, function: Any, *args: Any) -> Any:
    """The function's result; its errors name the source."""
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(f"source {name!r}: {error}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"source {name!r}: the disk is full. Whole shards are kept: make room and run the command again"
        ) from error


def load_overlaps(config: DataConfig, console: Console) -> Overlaps:
    """The evaluation sets' 13-grams.

    Raises:
        ValueError: a set cannot be read.
    """
    overlaps = Overlaps()
    for name, source in config.decontaminate.items():
        files = named(name, resolve, source, named(name, newest_revision, source))
        overlaps.add(name, (row.text for row in read_rows(source, files, skip_bad_rows=True)))
        count, short = overlaps.items[name]
        console.print(f"evaluation {name}: {count:,} items, {short:,} too short to look for", highlight=False)
    return overlaps


def _new_manifest(
    config: DataConfig, source: SourceConfig, tokenizer: TokenizerSpec, shard_tokens: int
) -> Manifest:
    return Manifest(
        source=describe(source) | {"deduplicate": config.deduplicate, "skip_bad_rows": config.skip_bad_rows},
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        dtype=tokenizer.dtype,
        shard_tokens=shard_tokens,
    )


def _finished(root: Path, name: str, manifest: Manifest, demand: Demand, console: Console) -> bool:
    """Whether the source is there with enough tokens; an error if something else is there."""
    folder = root / name
    if not folder.exists():
        return False
    existing = Manifest.read(folder)
    differences = _differences(existing, manifest)
    if differences:
        raise ValueError(
            f"{folder} was prepared from something else: {'; '.join(differences)}. "
            "Remove it to prepare the source again, or give the source another name"
        )
    if not existing.exhausted and existing.num_tokens < min(demand.enough, demand.wanted):
        console.print(f"{name}: {existing.num_tokens:,} tokens are too few now", highlight=False)
        return False
    console.print(f"{name}: {existing.num_tokens:,} tokens are there already", highlight=False)
    _warn_of_epochs(name, existing, demand, console)
    return True


def _warn_of_epochs(name: str, manifest: Manifest, demand: Demand, console: Console) -> None:
    if manifest.exhausted and manifest.num_tokens < demand.enough:
        console.print(
            f"[yellow]warning[/yellow] {name} has no more than {manifest.num_tokens:,} tokens; the run draws "
            f"{demand.drawn:,} and sees it {demand.drawn / manifest.num_tokens:.1f} times",
            highlight=False,
        )


def _written(root: Path, names: list[str]) -> int:
    """Bytes of tokens that an earlier, interrupted work left."""
    folders = [folder for name in names for folder in (root / f".{name}.partial", root / name)]
    return sum(file.stat().st_size for folder in folders if folder.is_dir() for file in folder.glob("*.bin"))


def _check_space(root: Path, needed: float) -> None:
    parent = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if math.isfinite(needed) and free < needed:
        raise ValueError(
            f"{parent} has {free / 1e9:,.1f} GB free and the shards need {needed / 1e9:,.1f} GB; set data.root to "
            "a folder on another disk"
        )


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


def _prepare_source(config: DataConfig, name: str, manifest: Manifest, encoder: Encoder, console: Console) -> None:
    root, source, demand = Path(config.root), config.sources[name], demands(config)[name]
    partial = root / f".{name}.partial"
    if (root / name).exists():  # with too few tokens
        shutil.rmtree(partial, ignore_errors=True)
        (root / name).rename(partial)
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        manifest = _resumed(partial, manifest)
        seen = _seen(config, name, manifest) if config.deduplicate else None
        files = resolve(source, manifest.hub_revision)
        writer = ShardWriter(partial, manifest, demand.wanted, files.names)
        if writer.num_tokens:
            console.print(f"{name}: going on after {writer.num_tokens:,} tokens", highlight=False)
        rows = read_rows(source, files, config.skip_bad_rows, writer.file, writer.row)
        with contextlib.closing(writer), _Report(name, writer, demand, console) as report:
            for encoded in encoder(rows):
                if seen is not None:
                    kept = np.flatnonzero(encoded.fates == Fate.KEPT)
                    encoded.drop(kept[~seen.add(encoded.hashes[kept])], Fate.DUPLICATE)
                writer.add(encoded)
                report.update()
                if writer.full:
                    break
            else:
                manifest.exhausted = True
            fates = writer.fates
            writer.close_shard()
        if not writer.num_documents:
            why = f"{_counted(fates)}; see {partial / DROPPED}" if fates else "0 rows"
            raise ValueError(f"no documents in {source.path or source.hub}: {why}")
        manifest.created = datetime.now(UTC).isoformat(timespec="seconds")
        manifest.brumby_version = __version__
        manifest.write(partial)
        partial.rename(root / name)
    console.print(report.line + _counted(manifest.fates, ", dropped "), highlight=False)
    _warn_of_epochs(name, manifest, demand, console)


def _counted(fates: dict[str, int], before: str = "") -> str:
    counts = [f"{count:,} {name.replace('_', ' ')}" for name, count in fates.items() if name != "kept"]
    return before + ", ".join(counts) if counts else ""


def _seen(config: DataConfig, name: str, manifest: Manifest) -> HashSet:
    """Hashes of the documents in all sources that are there, and in this one's shards so far."""
    root, seen = Path(config.root), HashSet()
    for other in config.sources:
        folder, found = root / other, None
        if other == name:
            folder, found = root / f".{name}.partial", manifest
        elif (folder / MANIFEST).is_file():
            found = Manifest.read(folder)
        for shard in found.shards if found else ():
            seen.add(np.load(folder / f"{shard.name}.hash.npy"))
    return seen


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

    def __init__(self, name: str, writer: ShardWriter, demand: Demand, console: Console) -> None:
        self._name, self._writer, self._demand, self._console = name, writer, demand, console
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
        left = self._demand.wanted - writer.num_tokens
        eta = f", {left / speed / 60:,.1f} minutes left" if speed and 0 < left < math.inf else ""
        return (
            f"{self._name}: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens "
            f"({speed:,.0f} tokens/s, {seconds:,.0f} s{eta})"
        )

    def update(self) -> None:
        if self._console.is_terminal:
            self._status.update(self.line)
        elif time.monotonic() - self._printed > 30:
            self._printed = time.monotonic()
            self._console.print(self.line, highlight=False)
