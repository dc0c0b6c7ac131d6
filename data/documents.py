"""The rows of a source, one after the other: local files, or those of a Hub dataset, as a stream."""

import errno
import glob
import json
import logging
import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from brumby.data.config import SourceConfig

log = logging.getLogger(__name__)

KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
READ_ROWS = 256  # rows of a parquet file decoded at a time
MAX_CHARACTERS = 10_000_000  # of a document: 20 times Tolstoy's longest would be a damaged one
MAX_RETRIES = 10  # of a network error in a row: about six minutes
CONDITIONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda value, values: value in values,
    "not in": lambda value, values: value not in values,
}
T = TypeVar("T")


class Fate(IntEnum):
    """What became of a row. All but the first are dropped."""

    KEPT = 0
    FILTERED = 1
    DUPLICATE = 2
    CONTAMINATED = 3
    EMPTY = 4
    TOO_LONG = 5
    NO_TEXT = 6  # a null, a number, invalid UTF-8, a line that is no JSON object


class Row(NamedTuple):
    """A row of a source's `file`-th file; `text` is empty unless it is kept, and `why` says why not."""

    text: str
    fate: Fate
    file: int
    row: int
    why: str = ""


@dataclass
class Files:
    """What a source is read from. `kind` is parquet, json, text, or other: a dataset streamed by `datasets`."""

    kind: str
    urls: list[str]
    names: list[str]
    dataset: Any = None


def kind_of(path: Path) -> str:
    """What a file is, by its suffix before that of a compression: parquet, json or text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return KINDS.get(suffixes[-1], "text") if suffixes else "text"


def find_files(path: str) -> tuple[str, list[Path]]:
    """The kind and the files, sorted, of a file, folder or glob.

    In a folder parquet or JSON files are the data and other files beside them are not; hidden files
    never are.

    Raises:
        ValueError: nothing there, or parquet and JSON mixed.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return kind_of(root), [root]
    if root.is_dir():
        found = [file for file in root.rglob("*") if not _hidden(file.relative_to(root))]
    else:
        found = [Path(file) for file in glob.glob(str(root), recursive=True)]
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise ValueError(f"path {path!r} matches no file; expected a file, a folder with files or a glob")
    kinds = {kind_of(file) for file in files}
    if len(kinds) > 1:
        kinds.discard("text")
    if len(kinds) > 1:
        raise ValueError(f"path {path!r} matches both parquet and JSON files; name one kind with a glob")
    kind = kinds.pop()
    return kind, [file for file in files if kind_of(file) == kind]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def describe(source: SourceConfig) -> dict[str, Any]:
    """What a source's rows depend on, as plain JSON values.

    Local files count by name and size, wherever they lie.

    Raises:
        ValueError: no files.
    """
    values = asdict(source)
    keep = {"text_column": source.text_column, "filters": values["filters"]}
    if source.path is None:
        return {name: values[name] for name in ("hub", "subset", "split", "revision")} | keep
    kind, files = find_files(source.path)
    root = Path(source.path).expanduser()
    names = [str(file.relative_to(root)) if root.is_dir() else file.name for file in files]
    sizes = [file.stat().st_size for file in files]
    return {"format": kind, "files": [[n, size] for n, size in zip(names, sizes, strict=True)], **keep}


def newest_revision(source: SourceConfig) -> str | None:
    """The commit that a hub source's `revision` names now, so that it can be recorded and read again.

    Raises:
        ValueError: the dataset cannot be reached, or is gated and this account has no access.
    """
    if source.hub is None:
        return None
    from huggingface_hub import HfApi

    api, hub = HfApi(), source.hub
    try:
        if source.gated:
            retrying(lambda: api.auth_check(hub, repo_type="dataset"))
        return retrying(lambda: api.dataset_info(hub, revision=source.revision).sha)
    except Exception as error:
        raise ValueError(_message(source, error)) from error


def resolve(source: SourceConfig, revision: str | None = None) -> Files:
    """The files of a source, in the order in which they are read.

    Args:
        source: Where to read.
        revision: Commit of a hub dataset (`newest_revision`).

    Raises:
        ValueError: the source cannot be reached, or has no such split.
    """
    if source.path is not None:
        kind, files = find_files(source.path)
        return Files(kind, [str(file.resolve()) for file in files], [str(file) for file in files])
    try:
        return retrying(lambda: _resolve_hub(source, revision or source.revision))
    except Exception as error:
        raise ValueError(_message(source, error)) from error


def _resolve_hub(source: SourceConfig, revision: str | None) -> Files:
    from datasets import load_dataset_builder

    builder = load_dataset_builder(source.hub, source.subset, revision=revision)
    splits = builder.config.data_files or {}
    if source.split not in splits:
        raise ValueError(f"there is no split {source.split!r}; there are {', '.join(splits)}")
    urls = [str(file) for file in splits[source.split]]
    kinds = {kind_of(Path(url)) for url in urls}
    if kinds in ({"parquet"}, {"json"}):
        return Files(kinds.pop(), urls, urls)
    return Files("other", [], [str(source.hub)], builder.as_streaming_dataset(split=source.split))


def read_rows(
    source: SourceConfig, files: Files, skip_bad_rows: bool = False, file: int = 0, row: int = 0
) -> Iterator[Row]:
    """The rows of a source from `row` of its `file`-th file on.

    After a network error it waits, longer from time to time, and goes on with the row it was at.

    Raises:
        ValueError: a file cannot be read, or a row cannot be used and `skip_bad_rows` is false;
            with the file and the row.
    """
    failures = 0
    while file < len(files.names):
        try:
            for found in _read(source, files, skip_bad_rows, file, row):
                row, failures = found.row + 1, 0
                yield found
            file, row = file + 1, 0
        except Exception as error:  # pyarrow, fsspec, httpx and datasets each have their own
            if not _transient(error) or failures == MAX_RETRIES:
                where = f"{files.names[file]}, row {row}"
                raise ValueError(f"cannot read {where}: {_cause(error)}") from error
            _wait(failures, error)
            failures += 1


def retrying(function: Callable[[], T]) -> T:
    """The function's result; network errors are waited out."""
    for failures in range(MAX_RETRIES):
        try:
            return function()
        except Exception as error:
            if not _transient(error):
                raise
            _wait(failures, error)
    return function()


def _wait(failures: int, error: Exception) -> None:
    seconds = min(2.0**failures, 60.0)
    log.warning("network: %s; trying again in %.0f s", _cause(error), seconds)
    time.sleep(seconds)


def _transient(error: BaseException | None) -> bool:
    """Whether the network is to blame, so that a second try may help."""
    import httpx

    while error is not None:
        if isinstance(error, httpx.HTTPStatusError):  # huggingface_hub's errors are of its kind
            return error.response.status_code in (408, 429) or error.response.status_code >= 500
        if isinstance(error, httpx.TransportError | ConnectionError | TimeoutError):
            return True
        if isinstance(error, OSError) and error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
            return True
        error = error.__cause__ or error.__context__
    return False


def _read(source: SourceConfig, files: Files, skip_bad_rows: bool, file: int, first: int) -> Iterator[Row]:
    if files.kind == "other":
        records: Iterator[Any] = iter(files.dataset.skip(first))
    else:
        records = READERS[files.kind](files.urls[file], source, first)
    for row, record in enumerate(records, start=first):
        text, fate, why = _judge(record, source)
        if fate > Fate.CONTAMINATED and not skip_bad_rows:
            raise ValueError(f"{why}. Mend the row, or set data.skip_bad_rows=true to drop and count such rows")
        yield Row(text, fate, file, row, why)


def _judge(record: Any, source: SourceConfig) -> tuple[str, Fate, str]:
    """A record's text and fate, and what is wrong with it."""
    column = source.text_column
    if not isinstance(record, dict):
        return "", Fate.NO_TEXT, str(record)
    for name, condition, value in source.filters:
        if name not in record:
            return "", Fate.NO_TEXT, f"has no column {name!r}; it has {', '.join(record)}"
        try:
            if record[name] is None or not CONDITIONS[condition](record[name], value):
                return "", Fate.FILTERED, ""
        except TypeError as error:
            return "", Fate.NO_TEXT, f"column {name!r} has {record[name]!r:.60}: {error}"
    text = record.get(column)
    if isinstance(text, bytes):
        return "", Fate.NO_TEXT, f"column {column!r} is no valid UTF-8"
    if not isinstance(text, str):
        if column not in record:
            return "", Fate.NO_TEXT, f"has no column {column!r}; it has {', '.join(record)}"
        return "", Fate.NO_TEXT, f"column {column!r} has {_kind(text)}; expected text"
    if not text or text.isspace():
        return "", Fate.EMPTY, f"column {column!r} is empty"
    if len(text) > MAX_CHARACTERS:
        return "", Fate.TOO_LONG, f"column {column!r} has {len(text):,} characters, over {MAX_CHARACTERS:,}"
    return text, Fate.KEPT, ""


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _open(url: str) -> BinaryIO:
    """A file, decompressed, as a stream."""
    import fsspec
    import pyarrow

    if url.endswith(".zst"):  # Python's library has no Zstandard before 3.14
        return pyarrow.CompressedInputStream(fsspec.open(url, "rb").open(), "zstd")
    return fsspec.open(url, "rb", compression="infer").open()


def _parquet(url: str, source: SourceConfig, first: int) -> Iterator[Any]:
    import fsspec
    import pyarrow.parquet

    with fsspec.open(url, "rb").open() as stream:
        table = pyarrow.parquet.ParquetFile(stream, pre_buffer=True)
        columns = list(dict.fromkeys([source.text_column, *(name for name, *_ in source.filters)]))
        for name in columns:
            if name not in table.schema_arrow.names:
                raise ValueError(f"there is no column {name!r}; there are {', '.join(table.schema_arrow.names)}")
        row = 0
        for group in range(table.num_row_groups):
            num_rows = table.metadata.row_group(group).num_rows
            if row + num_rows <= first:
                row += num_rows
                continue
            for batch in table.iter_batches(READ_ROWS, row_groups=[group], columns=columns):
                if row + len(batch) > first:
                    cells = [_values(column) for column in batch.slice(max(0, first - row)).columns]
                    for values in zip(*cells, strict=True):
                        yield dict(zip(batch.schema.names, values, strict=True))
                row += len(batch)


def _values(column: Any) -> list[Any]:
    """A column's values; of text that is no UTF-8 the bytes."""
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        binary = pyarrow.large_binary() if pyarrow.types.is_large_string(column.type) else pyarrow.binary()
        return [_decoded(value) for value in column.view(binary).to_pylist()]


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return value.decode() if value is not None else None
    except UnicodeDecodeError:
        return value


def _json(url: str, source: SourceConfig, first: int) -> Iterator[Any]:
    import io

    with _open(url) as stream:
        lines = (line for line in io.BufferedReader(stream, 1 << 20) if not line.isspace())  # type: ignore[type-var]
        for row, line in enumerate(lines):
            if row >= first:
                yield _parsed(line)


def _parsed(line: bytes) -> dict[str, Any] | str:
    """A line's object, or what is wrong with it."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return "is no valid UTF-8"
    except ValueError:
        record = None
    if isinstance(record, dict):
        return record
    start = line.decode(errors="replace").rstrip("\n")
    return f"expected a JSON object in each line, found {start if len(start) < 60 else start[:57] + '...'!r}"


def _text(url: str, source: SourceConfig, first: int) -> Iterator[Any]:
    if first == 0:
        with _open(url) as stream:
            yield {"text": _decoded(stream.read())}


READERS = {"parquet": _parquet, "json": _json, "text": _text}


def _cause(error: Exception) -> str:
    return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def _message(source: SourceConfig, error: Exception) -> str:
    return (
        f"cannot read hub dataset {source.hub} (subset {source.subset}, split {source.split}, revision "
        f"{source.revision}): {_cause(error)}. Check the names and the network; a gated dataset needs its terms "
        "accepted on its page and `hf auth login`"
    )
