"""What `prepare` would do: tokens, bytes and hours of each source, estimated from its first rows."""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from brumby.data.config import DataConfig, SourceConfig
from brumby.data.documents import Fate, Files, Row, newest_revision, read_rows, resolve
from brumby.data.prepare import Demand, demands
from brumby.data.tokenizing import TokenizerSpec, encode, load_tokenizer

SAMPLE_ROWS = 500
SAMPLE_CHARACTERS = 500_000


@dataclass
class Estimate:
    """What a source costs.

    Attributes:
        tokens: That will be prepared.
        available: That the source has, as far as its files tell; None if they do not.
        text_bytes: Of UTF-8 that is read for them.
        shard_bytes: Of the shards.
        seconds: Of tokenising.
    """

    tokens: int
    available: int | None
    text_bytes: int
    shard_bytes: int
    seconds: float


def plan(config: DataConfig, num_workers: int, console: Console) -> bool:
    """Print what `prepare` would do, reading no more than the first rows of each source.

    Returns:
        Whether every source can be read.

    Raises:
        ValueError: the tokenizer does not serve.
    """
    spec = load_tokenizer(config.tokenizer)
    table = Table(title=f"{config.root}, {num_workers} processes", title_justify="left")
    for name in ("source", "tokens", "times seen", "text GB", "shards GB", "hours", "license"):
        table.add_column(name, justify="left" if name in ("source", "license") else "right")
    estimates, problems = [], {}
    sources = demands(config)
    for name, demand in sources.items():
        source = config.sources[name]
        try:
            estimate = _estimate(source, demand, spec, num_workers)
        except ValueError as error:
            problems[name] = str(error)
            table.add_row(name, f"{demand.wanted:,.0f}", "", "", "", "", source.license or "")
            continue
        estimates.append(estimate)
        there = estimate.available
        table.add_row(
            name,
            f"{estimate.tokens:,}",
            "?"
            if there is None
            else f"{demand.drawn / max(there, 1):.2f}"
            if there < demand.enough
            else "1 at most",
            f"{estimate.text_bytes / 1e9:.3g}",
            f"{estimate.shard_bytes / 1e9:.3g}",
            f"{estimate.seconds / 3600:.3g}",
            source.license or "",
        )
    table.add_section()
    table.add_row(
        "in all",
        f"{sum(e.tokens for e in estimates):,}",
        "",
        f"{sum(e.text_bytes for e in estimates) / 1e9:.3g}",
        f"{sum(e.shard_bytes for e in estimates) / 1e9:.3g}",
        f"{sum(e.seconds for e in estimates) / 3600:.3g}",
        "",
    )
    console.print(table)
    for name in sources:
        if note := config.sources[name].contamination:
            console.print(f"contamination  {name}: {note}", highlight=False)
    for name, problem in problems.items():
        kind = "gated, no access" if config.sources[name].gated else "cannot be read"
        console.print(f"[red]{kind}[/red]  {name}: {problem}", highlight=False)
    return not problems


def _estimate(source: SourceConfig, demand: Demand, spec: TokenizerSpec, num_workers: int) -> Estimate:
    files = resolve(source, newest_revision(source))
    rows = list(_sample(read_rows(source, files, skip_bad_rows=True)))
    tokenizer = Tokenizer.from_str(spec.json)
    started = time.perf_counter()
    encoded = encode(tokenizer, [row for row in rows if row.fate == Fate.KEPT], spec.eos_token_id, spec.dtype)
    seconds = time.perf_counter() - started
    num_tokens = len(encoded.tokens)
    if not num_tokens:
        raise ValueError(f"none of the first {len(rows)} rows of {source.path or source.hub} is kept")
    text_bytes = sum(len(row.text.encode()) for row in rows)
    available = _available(files, text_bytes / num_tokens, num_tokens / len(rows))
    tokens = demand.wanted if available is None else min(demand.wanted, available)
    tokens = num_tokens if math.isinf(tokens) else tokens
    return Estimate(
        tokens=int(tokens),
        available=available,
        text_bytes=int(tokens * text_bytes / num_tokens),
        shard_bytes=int(tokens * encoded.tokens.itemsize),
        seconds=tokens / num_tokens * seconds / num_workers,
    )


def _sample(rows: Iterator[Row]) -> Iterator[Row]:
    characters = 0
    for row in itertools.islice(rows, SAMPLE_ROWS):
        characters += len(row.text)
        yield row
        if characters > SAMPLE_CHARACTERS:
            return


def _available(files: Files, bytes_per_token: float, tokens_per_row: float) -> int | None:
    """Tokens in all files: from their rows if they are parquet, from their bytes if they are plain."""
    import fsspec
    import pyarrow.parquet

    if not files.urls:
        return None
    filesystem, _ = fsspec.url_to_fs(files.urls[0])
    total = sum(filesystem.size(url) for url in files.urls)
    if files.kind == "parquet":
        with filesystem.open(files.urls[0], "rb") as stream:
            rows = pyarrow.parquet.ParquetFile(stream).metadata.num_rows
        return int(rows * total / filesystem.size(files.urls[0]) * tokens_per_row)
    if files.urls[0].endswith((".gz", ".zst", ".bz2", ".xz")):
        return None
    return int(total / bytes_per_token)
