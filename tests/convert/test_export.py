"""An exported model loads with transformers alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
def checkpoint(tiny_model: Path, tmp_path: Path) -> Path:
    """What DeepSpeed leaves at stage 0, with weights that differ from the start's."""
    torch.manual_seed(1)
    model = BrumbyForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    weights = {
        f"model.{name}": tensor + 0.01 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()
    }
    weights["model.lm_head.weight"] = weights["model.model.embed_tokens.weight"]
    folder = tmp_path / "step-000007"
    folder.mkdir()
    torch.save({"module": weights}, folder / "mp_rank_00_model_states.pt")
    return folder


def test_loads_with_and_without_the_package(checkpoint, tiny_model, tmp_path):
    out = tmp_path / "out"
    export(checkpoint, tiny_model, out, "float32", max_shard_bytes=60_000)
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    model = BrumbyForCausalLM.from_pretrained(out, dtype=torch.float32)
    expected = torch.load(checkpoint / "mp_rank_00_model_states.pt")["module"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[f"model.{name}"]), name

    environment = {"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", WITHOUT_BRUMBY, str(out), str(tmp_path / "answer.pt")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = torch.load(tmp_path / "answer.pt")
    ids = answer["ids"][:, : answer["logits"].shape[1]]
    assert torch.allclose(model(ids).logits, answer["logits"], atol=1e-5)
    assert torch.equal(model.generate(ids, max_new_tokens=5), answer["ids"])


def test_bfloat16_is_a_rounding_of_the_masters(checkpoint, tiny_model, tmp_path):
    export(checkpoint, tiny_model, tmp_path / "out")
    model = BrumbyForCausalLM.from_pretrained(tmp_path / "out")
    expected = torch.load(checkpoint / "mp_rank_00_model_states.pt")["module"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[f"model.{name}"].bfloat16()), name


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
    states = torch.load(checkpoint / "mp_rank_00_model_states.pt")
    del states["module"]["model.model.norm.weight"]
    torch.save(states, checkpoint / "mp_rank_00_model_states.pt")
    fails(r"model\.norm\.weight missing", checkpoint, tiny_model, tmp_path / "out")


def test_shards_are_filled_in_order():
    assert list(plan_shards({"a": 3, "b": 3, "c": 5, "d": 1, "e": 9}, 6)) == [["a", "b"], ["c", "d"], ["e"]]
