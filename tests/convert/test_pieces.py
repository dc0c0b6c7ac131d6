"""Ranges of parameters, whichever rank wrote them, and files that are not what they were."""

import json

import pytest
import torch
from safetensors.torch import load_file

from brumby.convert import pieces
from brumby.convert.pieces import PiecesReader


@pytest.fixture
def checkpoint(tmp_path):
    """A weight of 10 elements on three ranks, 4 + 1 + 5, and a moment that lacks the middle one."""
    whole = torch.arange(10, dtype=torch.float32)
    files = {}
    for rank, (start, end) in enumerate([(0, 4), (4, 5), (5, 10)]):
        tensors = {f"weight:a.b:{start}": whole[start:end], "rng_cpu::0": torch.tensor([rank], dtype=torch.uint8)}
        if rank != 1:
            tensors[f"exp_avg:a.b:{start}"] = -whole[start:end]
        name = pieces.file_name(rank)
        files[name] = pieces.write(tmp_path / name, tensors)
    (tmp_path / pieces.MANIFEST).write_text(json.dumps({"files": files, "shapes": {"a.b": [2, 5]}}))
    return tmp_path


def test_every_range_is_found(checkpoint):
    reader = PiecesReader(checkpoint)
    for start in range(10):
        for end in range(start, 11):
            assert reader.read("weight", "a.b", start, end - start).tolist() == list(range(start, end))
    assert torch.equal(reader.weight("a.b"), torch.arange(10.0).view(2, 5))
    assert [reader.extra(rank, "rng_cpu").item() for rank in range(3)] == [0, 1, 2]
    assert reader.extra(3, "rng_cpu") is None


def test_a_gap_is_no_data(checkpoint):
    reader = PiecesReader(checkpoint)
    assert reader.read("exp_avg", "a.b", 5, 5).tolist() == [-5, -6, -7, -8, -9]
    with pytest.raises(ValueError, match=r"no exp_avg of a\.b from element 4 on"):
        reader.read("exp_avg", "a.b", 3, 4)
    with pytest.raises(ValueError, match="from element 10 on"):
        reader.read("weight", "a.b", 8, 3)
    with pytest.raises(ValueError, match="no weight of c from element 0"):
        reader.read("weight", "c", 0, 1)


def test_the_file_is_a_safetensors_file(checkpoint):
    found = load_file(checkpoint / pieces.file_name(2))
    assert found["weight:a.b:5"].tolist() == [5, 6, 7, 8, 9]


def test_damage_is_seen(checkpoint):
    path = checkpoint / pieces.file_name(0)
    expected = json.loads((checkpoint / pieces.MANIFEST).read_text())["files"][path.name]
    assert pieces.problem(path, expected) is None
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "does not have its checksum" in pieces.problem(path, expected)
    path.write_bytes(content[:-1])
    assert f"has {len(content) - 1} bytes and should have {len(content)}" in pieces.problem(path, expected)
    path.unlink()
    assert "is missing" in pieces.problem(path, expected)
