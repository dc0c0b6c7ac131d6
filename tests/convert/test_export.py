"""An exported model loads with transformers alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from brumby.convert import pieces
from brumby.convert.export import export, plan_shards
from brumby.model import BrumbyForCausalLM

WITHOUT_BRUMBY = """
import sys
sys.modules["brumby"] = None  # any import of it fails
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("a state of constant size", return_tensors="pt")
torch.save({"logits": model(**inputs).logits, "ids": model.generate(**inputs, max_new_tokens=5)}, sys.argv[2])
"""


@pytest.fixture
def weights(tiny_model: Path) -> dict[str, torch.Tensor]:
    """Of a model that has moved away from the start."""
    torch.manual_seed(1)
    model = BrumbyForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return {name: p.detach() + 0.01 * torch.randn_like(p) for name, p in model.named_parameters()}


@pytest.fixture
def checkpoint(weights: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """What training leaves, from two ranks that share every weight between them."""
    folder = tmp_path / "step-000007"
    folder.mkdir()
    halves = {name: tensor.flatten().tensor_split(2) for name, tensor in weights.items()}
    files = {}
    for rank in range(2):
        file = pieces.file_name(rank)
        starts = {name: rank * len(halves[name][0]) for name in weights}
        tensors = {f"weight:{name}:{starts[name]}": half[rank] for name, half in halves.items()}
        files[file] = pieces.write(folder / file, tensors)
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    (folder / pieces.MANIFEST).write_text(json.dumps({"files": files, "shapes": shapes}))
    return folder


def test_loads_with_and_without_the_package(checkpoint, weights, tiny_model, tmp_path):
    out = tmp_path / "out"
    export(checkpoint, tiny_model, out, "float32", max_shard_bytes=60_000)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    model = BrumbyForCausalLM.from_pretrained(out, dtype=torch.float32)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, weights[name]), name

    environment = {"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", WITHOUT_BRUMBY, str(out), str(tmp_path / "answer.pt")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = torch.load(tmp_path / "answer.pt")
    ids = answer["ids"][:, : answer["logits"].shape[1]]
    assert torch.allclose(model(ids).logits, answer["logits"], atol=1e-5)
    assert torch.equal(model.generate(ids, max_new_tokens=5), answer["ids"])


def test_bfloat16_is_a_rounding_of_the_masters(checkpoint, weights, tiny_model, tmp_path):
    export(checkpoint, tiny_model, tmp_path / "out")
    model = BrumbyForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, weights[name].bfloat16()), name


def test_bad_input_leaves_nothing_behind(checkpoint, tiny_model, tmp_path):
    def fails(message: str, *arguments) -> None:
        with pytest.raises(ValueError, match=message):
            export(*arguments)
        assert sorted(f.name for f in tmp_path.iterdir()) == before

    (tmp_path / "there").mkdir()
    before = sorted(f.name for f in tmp_path.iterdir())
    fails("exists", checkpoint, tiny_model, tmp_path / "there")
    fails("no checkpoint folder", tmp_path / "nowhere", tiny_model, tmp_path / "out")
    fails("expected 'bfloat16' or 'float32'", checkpoint, tiny_model, tmp_path / "out", "int8")
    described = json.loads((checkpoint / pieces.MANIFEST).read_text())
    del described["shapes"]["model.norm.weight"]
    (checkpoint / pieces.MANIFEST).write_text(json.dumps(described))
    fails(r"model\.norm\.weight missing", checkpoint, tiny_model, tmp_path / "out")


def test_shards_are_filled_in_order():
    assert list(plan_shards({"a": 3, "b": 3, "c": 5, "d": 1, "e": 9}, 6)) == [["a", "b"], ["c", "d"], ["e"]]
