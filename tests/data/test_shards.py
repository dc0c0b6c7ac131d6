"""Reading shards: windows across them, and damage."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from brumby.data import TokenSource, prepare


@pytest.fixture
def folder(make_config, texts) -> Path:
    config = make_config({"wiki": texts(40, seed=20)})
    prepare(config, shard_tokens=150)
    return Path(config.root) / "wiki"


def test_windows_cross_shards(folder: Path):
    source = TokenSource(folder)
    shards = source.manifest.shards
    assert len(shards) > 5
    everything = np.concatenate([np.fromfile(folder / f"{s.name}.bin", np.uint16) for s in shards])
    starts = np.flatnonzero(everything[:-1] == source.manifest.eos_token_id) + 1
    starts = {0, *starts.tolist()}
    assert len(source) == len(everything)
    assert len(starts) == source.manifest.num_documents
    longest = max(shard.num_tokens for shard in shards)
    for length in (1, 2, 50, longest, 2 * longest + 3):
        for start in range(0, len(everything) - length + 1, 7 if length > 2 else 1):
            tokens, found = source.window(start, length)
            assert tokens.dtype == np.int64
            np.testing.assert_array_equal(tokens, everything[start : start + length])
            assert found.tolist() == [i for i in range(length) if start + i in starts]
    tokens, found = source.window(0, len(source))
    np.testing.assert_array_equal(tokens, everything)
    assert found.tolist() == sorted(starts)


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 0), (0, 10**6), (10**6, 1)])
def test_windows_stay_inside(folder: Path, start: int, length: int):
    with pytest.raises(ValueError, match="are not within the"):
        TokenSource(folder).window(start, length)


def test_damage_is_named(folder: Path):
    manifest = json.loads((folder / "manifest.json").read_text())

    def expect(message: str):
        with pytest.raises(ValueError, match=message):
            TokenSource(folder)

    def rewrite(**values):
        (folder / "manifest.json").write_text(json.dumps(manifest | values))

    rewrite(format_version=1)
    expect("has format version 1, this is version 2")
    first, *others = manifest["shards"]
    rewrite(format_version=1, shards=[first | {"of_another_version": 1}, *others])
    expect("has format version 1, this is version 2")
    rewrite(shards=[{name: value for name, value in first.items() if name != "index_sha256"}, *others])
    expect("manifest.json is damaged .*index_sha256")
    rewrite(num_tokens=7)
    expect("its totals .* are not the sum")
    (folder / "manifest.json").write_text("{")
    expect("manifest.json is damaged")
    rewrite()
    TokenSource(folder)

    shard = folder / "shard-00001.bin"
    size = shard.stat().st_size
    os.truncate(shard, size - 2)
    expect(f"shard-00001.bin has {size - 2} bytes; the manifest names {size}")
    shard.unlink()
    expect("shard-00001.bin is missing")
    os.truncate(os.open(shard, os.O_CREAT | os.O_RDWR), size)
    index = folder / "shard-00002.idx.npy"
    content = index.read_bytes()
    index.write_bytes(content[:-8])
    expect(f"shard-00002.idx.npy has {len(content) - 8} bytes")
    index.write_bytes(content)
    offsets = np.load(index)
    offsets[-1] += 1
    np.save(index, offsets)
    source = TokenSource(folder)  # the index is read where it is used
    with pytest.raises(ValueError, match=r"shard-00002\.idx\.npy does not match the manifest"):
        source.window(0, len(source))
    index.unlink()
    expect("shard-00002.idx.npy is missing")
    (folder / "manifest.json").unlink()
    expect("holds no manifest.json, so no token shards; make them with `brumby prepare`")
