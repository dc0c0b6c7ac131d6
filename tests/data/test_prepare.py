"""Text to shards: what is written, that it does not depend on how, and what is refused."""

import dataclasses
import errno
import fcntl
import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from brumby.data import (
    DataConfig,
    Manifest,
    PhaseConfig,
    SourceConfig,
    TokenSource,
    prepare,
    tokenizer_sha256,
    writer,
)
from brumby.data import documents as documents_module
from brumby.data.duplicates import HashSet

EOS = "<|endoftext|>"


def files(folder: Path) -> dict[str, bytes]:
    """Contents, without the date in the manifest."""
    contents = {file.name: file.read_bytes() for file in folder.iterdir()}
    manifest = json.loads(contents["manifest.json"])
    del manifest["created"]
    return contents | {"manifest.json": json.dumps(manifest).encode()}


def documents(source: TokenSource) -> list[list[int]]:
    tokens, starts = source.window(0, len(source))
    return [list(map(int, part)) for part in np.split(tokens, starts[1:])]


def test_round_trip(make_config, texts, tokenizer):
    written = texts(50, seed=1)
    written.insert(7, "a document that says <|endoftext|> itself")
    config = make_config({"wiki": ["", *written[:20], " \n ", *written[20:], "  "]})
    prepare(config, shard_tokens=500)
    source = TokenSource(Path(config.root) / "wiki")
    reference = AutoTokenizer.from_pretrained(tokenizer)
    found = documents(source)
    assert [reference.decode(d[:-1]) for d in found] == written
    assert all(d[-1] == reference.eos_token_id for d in found)
    assert all(reference.eos_token_id not in d[:-1] for d in found)
    plain = [d for d, text in zip(found, written, strict=True) if EOS not in text]
    expected = [reference(text, add_special_tokens=False).input_ids for text in written if EOS not in text]
    assert [d[:-1] for d in plain] == expected

    manifest = source.manifest
    assert manifest.dtype == "uint16"
    assert manifest.num_documents == 51
    assert manifest.num_tokens == sum(map(len, found)) == len(source)
    assert manifest.tokenizer_sha256 == tokenizer_sha256(reference)
    assert manifest.vocab_size == len(reference)
    assert len(manifest.shards) > 2
    for shard in manifest.shards:
        assert shard.num_tokens >= 500 or shard is manifest.shards[-1]
        binary = (source.folder / f"{shard.name}.bin").read_bytes()
        assert hashlib.sha256(binary).hexdigest() == shard.sha256
        assert len(binary) == 2 * shard.num_tokens


def test_the_number_of_workers_changes_no_byte(make_config, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("brumby.data.tokenizing.BATCH_ROWS", 16)
    config = make_config({"wiki": texts(300, seed=2), "code": texts(100, seed=3)})
    contents = []
    for num_workers in (1, 2):
        config.root = str(tmp_path / f"tokens{num_workers}")
        prepare(config, num_workers, shard_tokens=1000)
        contents.append([files(Path(config.root) / name) for name in ("wiki", "code")])
    assert contents[0] == contents[1]


def test_every_format_gives_the_same_tokens(make_config, texts, tmp_path, jsonl):
    written = texts(40, seed=4)
    lines = jsonl(tmp_path / "plain.jsonl", written, column="body")
    (tmp_path / "zipped.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "README.md").write_text("Not data.")
    for name, part in (("1.parquet", written[:13]), ("deep/2.parquet", written[13:])):
        table = pyarrow.table({"n": range(len(part)), "body": part})
        pyarrow.parquet.write_table(table, tmp_path / "folder" / name, row_group_size=5)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / ".hidden").write_text("Not data.")
    for i, text in enumerate(written):
        (tmp_path / "texts" / f"{i:03d}.md").write_text(text)
    sources = {
        "plain": {"path": str(lines), "text_column": "body"},
        "zipped": {"path": str(tmp_path / "zipped.jsonl.gz"), "text_column": "body"},
        "parquet": {"path": str(tmp_path / "folder"), "text_column": "body"},
        "glob": {"path": str(tmp_path / "texts" / "*.md")},
        "folder": {"path": str(tmp_path / "texts")},
    }
    config = make_config(sources=sources)
    prepare(config)
    found = [documents(TokenSource(Path(config.root) / name)) for name in sources]
    assert len(found[0]) == 40
    assert all(other == found[0] for other in found)


def test_other_columns_may_differ_between_rows_and_files(make_config, tmp_path):
    folder = tmp_path / "ragged"
    folder.mkdir()
    rows = [{"text": "a\u2028b", "n": 1}, {"n": "x", "text": "c"}, {"text": "d", "more": {"x": [1]}}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "0.jsonl").write_text("\n".join(lines[:2]) + "\n\n")
    (folder / "1.json").write_text(lines[2])
    tables = tmp_path / "tables"
    tables.mkdir()
    for i, row in enumerate(rows):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tables / f"{i}.parquet")
    config = make_config(sources={"json": {"path": str(folder)}, "parquet": {"path": str(tables)}})
    prepare(config)
    found = [TokenSource(Path(config.root) / name).manifest for name in config.sources]
    assert found[0].num_documents == 3
    assert found[0].fingerprint == found[1].fingerprint


def test_no_more_is_read_than_the_phases_take(make_config, texts):
    blend = {"wiki": 0.75, "code": 0.25}
    phases = {"one": {"tokens": 1024, "blend": blend}}
    written = {"wiki": ["", *texts(200, seed=5)], "code": texts(200, seed=6), "unused": ["never read"]}
    everything = make_config(written, phases={"one": {"tokens": 256, "blend": blend | {}}})
    prepare(everything, shard_tokens=200)
    config = make_config(written, phases=phases, margin=0.1, root=everything.root + "2")
    prepare(config, shard_tokens=200)
    assert sorted(folder.name for folder in Path(config.root).iterdir()) == ["code", "wiki"]
    for name, drawn in (("wiki", 768), ("code", 256)):
        whole = documents(TokenSource(Path(everything.root) / name))
        lengths = np.cumsum([len(d) for d in whole])
        wanted = max(drawn + 32, int(np.ceil(drawn * 1.1)))
        source = TokenSource(Path(config.root) / name)
        assert documents(source) == whole[: int(np.argmax(lengths >= wanted)) + 1]
        assert not source.manifest.exhausted
        assert TokenSource(Path(everything.root) / name).manifest.exhausted


def test_a_longer_schedule_reads_on(make_config, texts, tmp_path):
    written = {"wiki": texts(300, seed=7)}
    config = make_config(written, margin=0.0)
    prepare(config)
    few = documents(TokenSource(Path(config.root) / "wiki"))
    longer = dataclasses.replace(config, phases={"one": PhaseConfig(4096, {"wiki": 1.0})})
    prepare(longer)
    more = documents(TokenSource(Path(config.root) / "wiki"))
    assert more[: len(few)] == few
    whole = make_config(written, root=str(tmp_path / "whole"))
    prepare(whole)
    assert more == documents(TokenSource(Path(whole.root) / "wiki"))[: len(more)]
    assert sum(map(len, more)) >= 4096 + 32


def test_a_source_too_small_is_announced(make_config, texts):
    config = make_config({"wiki": texts(10, seed=8)}, phases={"one": {"tokens": 8192, "blend": {"wiki": 1}}})
    console = Console(record=True, width=200)
    prepare(config, console=console)
    tokens = len(TokenSource(Path(config.root) / "wiki"))
    assert f"the run draws 8,192 and sees it {8192 / tokens:.1f} times" in console.export_text()


def test_large_vocabularies_take_uint32(make_config, tmp_path):
    words = {f"w{i}": i for i in range(70_000)} | {EOS: 70_000}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS).save_pretrained(tmp_path / "large")
    config = make_config({"wiki": ["w1 w69999", "w65536"]}, tokenizer=str(tmp_path / "large"))
    prepare(config)
    source = TokenSource(Path(config.root) / "wiki")
    assert source.manifest.dtype == "uint32"
    assert documents(source) == [[1, 69_999, 70_000], [65_536, 70_000]]
    assert (source.folder / "shard-00000.bin").stat().st_size == 5 * 4


def test_finished_is_skipped_and_changed_refused(make_config, texts, tmp_path, jsonl, tokenizer):
    config = make_config({"wiki": texts(20, seed=6)})
    prepare(config)
    before = (Path(config.root) / "wiki" / "manifest.json").stat()
    console = Console(record=True, width=200)
    prepare(config, console=console)
    assert "wiki: " in console.export_text()
    assert (Path(config.root) / "wiki" / "manifest.json").stat() == before

    config.sources["wiki"].filters = [["id", "<", 3]]
    with pytest.raises(ValueError, match=r"source 'wiki': .* filters was \[\], now .*. Remove it"):
        prepare(config)
    config.sources["wiki"].filters = []
    copy = AutoTokenizer.from_pretrained(tokenizer)
    copy.add_tokens(["retention "])
    copy.save_pretrained(tmp_path / "other")
    config.tokenizer = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"tokenizer_sha256 was .*, now .*other"):
        prepare(config)
    config.tokenizer = tokenizer
    jsonl(tmp_path / "text" / "wiki.jsonl", texts(21, seed=6))
    with pytest.raises(ValueError, match=r"files changed \(wiki.jsonl\)"):
        prepare(config)


PREPARE = """
import json, sys
from brumby.data import DataConfig, prepare
if __name__ == "__main__":
    prepare(DataConfig.from_dict(json.loads(sys.argv[1])), num_workers=2, shard_tokens=int(sys.argv[2]))
"""


def start(config: DataConfig, root: Path, shard_tokens: int = 200, **options) -> subprocess.Popen:
    """Prepare into `root` in a process of its own, with two workers and tiny shards."""
    script = root.with_suffix(".py")
    script.write_text(PREPARE)
    values = dataclasses.asdict(config) | {"root": str(root)}
    return subprocess.Popen([sys.executable, str(script), json.dumps(values), str(shard_tokens)], **options)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.005)


@pytest.mark.slow
def test_work_killed_at_random_ends_the_same(make_config, texts, tmp_path):
    """Duplicates and contaminated documents among it.

    BRUMBY_PREPARE_KILLS=20 does it on 100 GB in small: 360 shards, as many as that much text makes at 64M tokens.
    """
    kills = int(os.environ.get("BRUMBY_PREPARE_KILLS", "2"))
    rng = random.Random(kills)
    wiki, code = (texts(num_documents, seed) for num_documents, seed in ((1500 * kills, 7), (500 * kills, 8)))
    wiki[100:120], code[100:140] = wiki[:20], wiki[40:80]
    evaluation = tmp_path / "evaluation.txt"
    evaluation.write_text(max(wiki, key=len))
    config = make_config(
        {"wiki": wiki, "code": code}, deduplicate=True, decontaminate={"quiz": {"path": str(evaluation)}}
    )
    for _ in range(kills):
        process = start(config, tmp_path / "killed", shard_tokens=5000)
        goal = progress(tmp_path / "killed") + rng.randint(1, 8)
        while progress(tmp_path / "killed") < goal:
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(rng.random() / 20)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while any(map(running, children)):
            assert time.monotonic() < deadline, "workers outlive their parent"
            time.sleep(0.05)
    assert not (tmp_path / "killed" / "code").exists()
    assert start(config, tmp_path / "killed", shard_tokens=5000).wait() == 0
    assert start(config, tmp_path / "whole", shard_tokens=5000).wait() == 0
    for name in ("wiki", "code"):
        assert files(tmp_path / "killed" / name) == files(tmp_path / "whole" / name)
        fates = Manifest.read(tmp_path / "whole" / name).fates
        assert fates["duplicate"] > 0
        assert sum(fates.values()) == len({"wiki": wiki, "code": code}[name])


def progress(root: Path) -> int:
    """Whole shards so far."""
    return len(list(root.glob("*/*.hash.npy"))) + len(list(root.glob(".*/*.hash.npy")))


def running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_damaged_partial_work_starts_again(make_config, texts, tmp_path):
    config = make_config({"wiki": texts(50, seed=8)})
    prepare(config, shard_tokens=300)
    finished = Path(config.root) / "wiki"
    expected = files(finished)
    partial = Path(config.root) / ".wiki.partial"
    finished.rename(partial)
    os.truncate(partial / "shard-00001.bin", 10)
    prepare(config, shard_tokens=300)
    assert files(finished) == expected


def test_two_at_once_are_refused(make_config, texts):
    config = make_config({"wiki": texts(5, seed=9)})
    partial = Path(config.root) / ".wiki.partial"
    partial.mkdir(parents=True)
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="source 'wiki': another process is preparing it"):
        prepare(config)
    os.close(descriptor)
    prepare(config)


def test_what_cannot_be_read_is_named(make_config, texts, tmp_path, jsonl):
    def expect(message: str, **source):
        with pytest.raises(ValueError, match="(?s)source 'wiki': .*" + message):
            prepare(make_config(sources={"wiki": source}, skip_bad_rows=False))

    good = str(jsonl(tmp_path / "good.jsonl", texts(5, seed=10)))
    expect("matches no file", path=str(tmp_path / "none.jsonl"))
    expect("good.jsonl, row 0: has no column 'body'; it has id, text", path=good, text_column="body")
    expect("good.jsonl, row 0: has no column 'x'; it has id, text", path=good, filters=[["x", "==", 1]])
    expect("row 0: column 'id' has 0: '<' not supported", path=good, filters=[["id", "<", "a"]])
    null = str(jsonl(tmp_path / "null.jsonl", ["a", None]))
    expect("null.jsonl, row 1: column 'text' has null; expected text. Mend the row, or set data.skip", path=null)
    expect("good.jsonl, row 0: column 'id' has a int", path=good, text_column="id")
    expect("empty.jsonl, row 1: column 'text' is empty", path=str(jsonl(tmp_path / "empty.jsonl", ["a", " "])))
    long = str(jsonl(tmp_path / "long.jsonl", ["a", "b" * 10_000_001]))
    expect("long.jsonl, row 1: column 'text' has 10,000,001 characters, over 10,000,000", path=long)
    (tmp_path / "void.jsonl").write_text("")
    expect("no documents in .*: 0 rows", path=str(tmp_path / "void.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    expect(
        "broken.jsonl, row 1: expected a JSON object in each line, found '{\"text\": '",
        path=str(tmp_path / "broken.jsonl"),
    )
    (tmp_path / "list.json").write_text('["a", "b"]')
    expect("row 0: expected a JSON object in each line", path=str(tmp_path / "list.json"))
    (tmp_path / "latin.txt").write_bytes("état".encode("latin-1"))
    expect("latin.txt, row 0: column 'text' is no valid UTF-8", path=str(tmp_path / "latin.txt"))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "a"}\n{"text": "état"}\n'.encode("latin-1"))
    expect("latin.jsonl, row 1: is no valid UTF-8", path=str(tmp_path / "latin.jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(Path(good).read_bytes())[:-20])
    expect("cut.jsonl.gz, row \\d+: EOFError", path=str(tmp_path / "cut.jsonl.gz"))

    table = pyarrow.table({"text": texts(3000, seed=11)})
    parquet = tmp_path / "broken.parquet"
    pyarrow.parquet.write_table(table, parquet)
    expect("row 0: there is no column 'body'; there are text", path=str(parquet), text_column="body")
    content = bytearray(parquet.read_bytes())
    content[200:20_000] = bytes(19_800)
    parquet.write_bytes(content)
    expect("broken.parquet, row 0", path=str(parquet))
    os.truncate(parquet, 5_000)
    expect("broken.parquet, row 0: ArrowInvalid", path=str(parquet))
    latin = pyarrow.array([b"a", "état".encode("latin-1")]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": latin}), tmp_path / "latin.parquet")
    expect("latin.parquet, row 1: column 'text' is no valid UTF-8", path=str(tmp_path / "latin.parquet"))
    jsonl(tmp_path / "mixed" / "a.jsonl", ["a"])
    (tmp_path / "mixed" / "b.parquet").write_bytes(b"")
    expect("matches both parquet and JSON", path=str(tmp_path / "mixed"))
    assert not (tmp_path / "tokens" / "wiki").exists()


def test_bad_rows_are_dropped_where_allowed_and_counted(make_config, tmp_path, jsonl):
    path = jsonl(tmp_path / "mixed.jsonl", ["one", None, "", "two", 3, "one", "x" * 10_000_001])
    source = {"path": str(path), "filters": [["id", "!=", 3]]}
    config = make_config(sources={"wiki": source}, deduplicate=True)
    prepare(config, shard_tokens=1)
    folder = Path(config.root) / "wiki"
    manifest = TokenSource(folder).manifest
    assert manifest.fates == {"kept": 1, "filtered": 1, "duplicate": 1, "empty": 1, "too_long": 1, "no_text": 2}
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert [(line["row"], line["fate"]) for line in dropped] == [
        (1, "no_text"), (2, "empty"), (4, "no_text"), (6, "too_long")
    ]  # fmt: skip
    assert {line["file"] for line in dropped} == {str(path)}


def test_duplicates_are_dropped_across_sources(make_config, texts):
    wiki, code = texts(80, seed=14), texts(80, seed=15)
    written = {"wiki": [*wiki, *wiki[:30]], "code": [*code[:40], *wiki[10:20], *code[40:], code[3]]}
    config = make_config(written, deduplicate=True)
    prepare(config, shard_tokens=300)
    reference = AutoTokenizer.from_pretrained(config.tokenizer)
    found = {n: [reference.decode(d[:-1]) for d in documents(TokenSource(Path(config.root) / n))] for n in written}
    assert found["wiki"] == list(dict.fromkeys(written["wiki"]))
    assert found["code"] == [text for text in dict.fromkeys(written["code"]) if text not in set(wiki)]


def test_hash_set_is_a_set():
    rng, known, found = np.random.default_rng(0), set(), HashSet()
    for size in rng.integers(1, 200, 300):
        hashes = rng.integers(0, 20_000, size).astype(np.uint64)
        expected = []
        for value in hashes.tolist():
            expected.append(value not in known)
            known.add(value)
        assert found.add(hashes).tolist() == expected
    assert len(found) == len(known)


def test_what_overlaps_with_evaluations_is_dropped(make_config, texts, tmp_path, jsonl):
    question = "A train leaves at nine and covers, in each hour, forty miles more than before; how far?"
    words = question.split()
    written = [
        "Nothing of it.",
        "Before. " + question.upper().replace(",", " -- ") + " And after it.",
        " ".join(words[:12]) + " something else entirely",  # 12 words in a row are too few
        " ".join(words[2:15]),
        " ".join(reversed(words)),
        *texts(30, seed=16),
    ]
    evaluation = jsonl(tmp_path / "evaluation.jsonl", ["Too short?", question], column="question")
    decontaminate = {"quiz": {"path": str(evaluation), "text_column": "question"}}
    config = make_config({"wiki": written}, decontaminate=decontaminate)
    console = Console(record=True, width=200)
    prepare(config, console=console)
    assert "evaluation quiz: 2 items, 1 too short to look for" in console.export_text()
    folder = Path(config.root) / "wiki"
    assert TokenSource(folder).manifest.fates == {"kept": len(written) - 2, "contaminated": 2}
    dropped = [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    assert [line["row"] for line in dropped] == [1, 3]
    assert dropped[0]["why"].startswith("quiz, item 1: a train leaves at nine and covers in each hour")


def test_a_full_disk_is_named_and_the_work_goes_on(make_config, texts, monkeypatch):
    config = make_config({"wiki": texts(100, seed=17)})
    sync = writer._sync
    monkeypatch.setattr(writer, "_sync", full_after(4))
    with pytest.raises(ValueError, match="source 'wiki': the disk is full"):
        prepare(config, shard_tokens=200)
    monkeypatch.setattr(writer, "_sync", sync)
    assert len(Manifest.read(Path(config.root) / ".wiki.partial").shards) == 1
    prepare(config, shard_tokens=200)
    small = dataclasses.replace(
        config, phases={"one": PhaseConfig(10**16, {"wiki": 1.0})}, margin=0.0, root=config.root + "2"
    )
    with pytest.raises(ValueError, match=r"GB free and the shards need 20,000,000.0 GB"):
        prepare(small)


def test_filters(make_config, tmp_path):
    rows = [{"text": f"text {i}", "score": i, "language": "de" if i % 3 else "en"} for i in range(300)]
    rows[5]["score"] = None
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=7)
    filters = [["score", ">=", 4], ["language", "in", ["de"]], ["score", "!=", 8]]
    sources = {kind: {"path": str(tmp_path / f"rows.{kind}"), "filters": filters} for kind in ("jsonl", "parquet")}
    config = make_config(sources=sources)
    prepare(config)
    reference = AutoTokenizer.from_pretrained(config.tokenizer)
    for name in sources:
        source = TokenSource(Path(config.root) / name)
        expected = [f"text {i}" for i in range(4, 300) if i % 3 and i not in (5, 8)]
        assert [reference.decode(d[:-1]) for d in documents(source)] == expected
        assert source.manifest.fates == {"kept": len(expected), "filtered": 300 - len(expected)}


def test_zstandard_in_several_frames(make_config, texts, tmp_path):
    written = texts(60, seed=18)
    parts = ["".join(json.dumps({"text": text}) + "\n" for text in part) for part in (written[:20], written[20:])]
    frames = [pyarrow.compress(part.encode(), "zstd", asbytes=True) for part in parts]
    (tmp_path / "rows.jsonl.zst").write_bytes(b"".join(frames))
    config = make_config({"wiki": written})
    config.sources["zst"] = SourceConfig(path=str(tmp_path / "rows.jsonl.zst"))
    config.phases["one"].blend = {"wiki": 0.5, "zst": 0.5}
    prepare(config)
    wiki, zst = (TokenSource(Path(config.root) / name).manifest.fingerprint for name in ("wiki", "zst"))
    assert wiki == zst


def test_network_errors_are_waited_out(make_config, texts, tmp_path, monkeypatch):
    """Each row is read once, whatever the connection does; what is no network error is not tried again."""
    config = make_config({"wiki": texts(50, seed=19)})
    source, waits, errors = config.sources["wiki"], [], [httpx.ReadTimeout("slow"), ConnectionResetError(), None]
    read = documents_module.READERS["json"]

    def flaky(url, source, first):
        for i, record in enumerate(read(url, source, first)):
            if i == 15 and errors and (error := errors.pop(0)):
                raise error
            yield record

    monkeypatch.setitem(documents_module.READERS, "json", flaky)
    monkeypatch.setattr(time, "sleep", waits.append)
    files = documents_module.resolve(source)
    rows = list(documents_module.read_rows(source, files))
    assert [row.row for row in rows] == list(range(50))
    assert [row.text for row in rows] == texts(50, seed=19)
    assert waits == [1.0, 1.0]
    errors += [ConnectionResetError()] * 11
    monkeypatch.setitem(documents_module.READERS, "json", lambda *_: (_ for _ in ()).throw(errors.pop()))
    waits.clear()
    with pytest.raises(ValueError, match=r"wiki.jsonl, row 0: ConnectionResetError"):
        list(documents_module.read_rows(source, files))
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0]


def full_after(calls: int):
    """A `_sync` that finds the disk full after some calls."""
    left = iter(range(calls))

    def sync(file) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    return sync


def test_tokenizers_that_do_not_serve(make_config, texts, tmp_path, tokenizer):
    config = make_config({"wiki": texts(5, seed=12)}, tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="cannot load tokenizer"):
        prepare(config)
    backend = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "no_eos")
    config.tokenizer = str(tmp_path / "no_eos")
    with pytest.raises(ValueError, match="has no EOS token"):
        prepare(config)


@pytest.mark.slow
def test_an_interrupt_shows_one_traceback_and_no_worker_s(make_config, texts, tmp_path):
    config = make_config({"wiki": texts(1000, seed=13)})
    process = start(config, tmp_path / "interrupted", stderr=subprocess.PIPE, start_new_session=True)
    wait_for(tmp_path / "interrupted" / ".wiki.partial" / "shard-00003.bin", process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.decode().count("Traceback") == 1, errors.decode()
