"""The rows of a source, read through Hugging Face `datasets`: local files or the Hub, as a stream."""

import glob
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from brumby.data.config import SourceConfig

KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
READ_BATCH = 256  # rows asked of `datasets` at a time


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
    """What a source's tokens depend on besides the tokenizer, as plain JSON values.

    Local files count by name and size, wherever they lie.

    Raises:
        ValueError: no files, or a parquet file that is none.
    """
    description = asdict(source)
    if source.path is None:
        del description["path"]
        return description
    kind, files = find_files(source.path)
    if kind == "parquet":
        _check_parquet(files)
    root = Path(source.path).expanduser()
    names = [str(file.relative_to(root)) if root.is_dir() else file.name for file in files]
    sizes = [file.stat().st_size for file in files]
    keep = ("text_column", "max_documents", "max_tokens")
    return {
        "format": kind,
        "files": [[name, size] for name, size in zip(names, sizes, strict=True)],
        **{name: description[name] for name in keep},
    }


def _check_parquet(files: list[Path]) -> None:
    import pyarrow
    import pyarrow.parquet

    for file in files:
        try:
            pyarrow.parquet.read_metadata(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file} is no readable parquet file ({error}); fetch it again") from error


def newest_revision(source: SourceConfig) -> str | None:
    """The commit that a hub source's `revision` names now, so that it can be recorded and read again.

    Raises:
        ValueError: the dataset cannot be reached.
    """
    if source.hub is None:
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(source.hub, revision=source.revision).sha
    except Exception as error:
        raise ValueError(_message(source, error)) from error


def read_texts(source: SourceConfig, revision: str | None = None, skip: int = 0) -> Iterator[str]:
    """The text of each row from row `skip` on, in the order of the files.

    Args:
        source: Where to read.
        revision: Commit of a hub dataset (`newest_revision`).
        skip: Rows to leave out at the beginning. They are read again: a saved state of the stream
            would spare that, but `datasets` 5.0 can start over at its second resume.

    Raises:
        ValueError: the source cannot be opened or read, has no such column, or a row holds no text.
    """
    column, where = source.text_column, source.path or source.hub
    for row, (value, columns) in enumerate(_read(source, revision, skip), start=skip):
        if not isinstance(value, str):
            if value is None and column not in columns:
                raise ValueError(f"{where} has no column {column!r} in row {row}; it has {', '.join(columns)}")
            found = "null" if value is None else f"a {type(value).__name__}"
            raise ValueError(f"row {row} of {where} has {found} in column {column!r}; expected text")
        yield value


def _read(source: SourceConfig, revision: str | None, skip: int) -> Iterator[tuple[Any, list[str]]]:
    """A row's value in the text column, and its columns; errors of other libraries become ValueErrors."""
    column = source.text_column
    try:
        if source.hub is None:
            assert source.path is not None
            kind, files = find_files(source.path)
            dataset = _stream(kind, [str(file.resolve()) for file in files], column)
        else:
            kind, dataset = _stream_hub(source, revision)
        columns = dataset.column_names or list(next(iter(dataset), {}))
        if kind == "json":
            for line in _cells(dataset, "text", skip):
                record = _parse(line) if line.strip() else {column: ""}
                yield record.get(column), list(record)
        elif column in columns:
            for value in _cells(dataset, column, skip):
                yield value, columns
        else:
            yield None, columns
    except Exception as error:  # pyarrow, fsspec, httpx and datasets each have their own
        raise ValueError(_message(source, error)) from error


def _cells(dataset: Any, column: str, skip: int) -> Iterator[Any]:
    for batch in dataset.select_columns([column]).skip(skip).iter(batch_size=READ_BATCH):
        yield from batch[column]


def _parse(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict):
        start = line if len(line) < 60 else line[:57] + "..."
        raise ValueError(f"expected a JSON object in each line, found {start!r}")
    return record


def _stream(kind: str, files: list[str], column: str) -> Any:
    """The files as a stream that reads no more than the text, as other columns may differ between files.

    JSON comes as lines in a column "text".
    """
    from datasets import Features, Value, load_dataset

    if kind == "parquet":
        dataset = load_dataset("parquet", data_files=files, split="train", streaming=True)
        if column not in dataset.column_names:
            return dataset
        return load_dataset("parquet", data_files=files, split="train", streaming=True, columns=[column])
    return load_dataset(
        "text",
        data_files=files,
        split="train",
        streaming=True,
        sample_by="line" if kind == "json" else "document",
        features=Features({"text": Value("string")}),
    )


def _stream_hub(source: SourceConfig, revision: str | None) -> tuple[str, Any]:
    from datasets import load_dataset_builder

    builder = load_dataset_builder(source.hub, source.subset, revision=revision or source.revision)
    splits = builder.config.data_files
    if source.split not in splits:
        raise ValueError(f"there is no split {source.split!r}; there are {', '.join(splits)}")
    files = [str(file) for file in splits[source.split]]
    formats = {kind_of(Path(file)) for file in files}
    if len(formats) == 1 and "text" not in formats:
        kind = formats.pop()
        return kind, _stream(kind, files, source.text_column)
    return "other", builder.as_streaming_dataset(split=source.split)


def _message(source: SourceConfig, error: Exception) -> str:
    cause = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    if source.hub is None:
        return f"cannot read {source.path}: {cause}"
    return (
        f"cannot read hub dataset {source.hub} (subset {source.subset}, split {source.split}, revision "
        f"{source.revision}): {cause}. Check the names and the network; a gated dataset needs its terms "
        "accepted on its page and `hf auth login`"
    )
