"""Sources that cannot be converted: a message, and nothing left behind."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from brumby.convert import ConversionError, convert, heads
from brumby.model import BrumbyForCausalLM

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


NORM = "model.norm.weight"
# name: (what to do to a base in one file, a part of the message)
BROKEN = {
    "no config": (lambda base: (base / "config.json").unlink(), "config.json does not exist"),
    "broken config": (lambda base: (base / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda base: (base / "config.json").write_text("[]"), "expected an object"),
    "other family": (lambda base: edit_json(base / "config.json", model_type="gpt2"), "qwen3.*qwen2.*llama"),
    "brumby already": (lambda base: edit_json(base / "config.json", model_type="brumby"), "already"),
    "quantized": (lambda base: edit_json(base / "config.json", quantization_config={"bits": 4}), "quantized"),
    "adapter": (lambda base: (base / "adapter_config.json").write_text("{}"), "merge"),
    "no weights": (lambda base: (base / SINGLE).unlink(), "expected a checkpoint in safetensors"),
    "pickles": (lambda base: (base / SINGLE).rename(base / "pytorch_model.bin"), "pickled"),
    "truncated": (lambda base: truncate(base / SINGLE), "truncated"),
    "empty": (lambda base: (base / SINGLE).write_bytes(b""), "truncated or not safetensors"),
    "not safetensors": (lambda base: (base / SINGLE).write_bytes(b"\x20" + b"\0" * 99), "no readable"),
    "missing shard": (
        lambda base: (base / INDEX).write_text(json.dumps({"weight_map": {NORM: "model-2.safetensors"}})),
        "model-2.safetensors does not exist",
    ),
    "shard elsewhere": (
        lambda base: (base / INDEX).write_text(json.dumps({"weight_map": {NORM: "../model.safetensors"}})),
        "same folder",
    ),
    "index disagrees": (
        lambda base: (base / INDEX).write_text(json.dumps({"weight_map": {"nothing": SINGLE}})),
        "does not hold it",
    ),
    "empty index": (lambda base: (base / INDEX).write_text("{}"), "no weight_map"),
    "tensor missing": (
        lambda base: edit_tensors(base / SINGLE, lambda tensors: tensors.pop(NORM)),
        "1 missing .model.norm.weight",
    ),
    "tensor unexpected": (
        lambda base: edit_tensors(base / SINGLE, lambda tensors: tensors.update(extra=torch.ones(1))),
        "1 unexpected .extra",
    ),
    "wrong shape": (
        lambda base: edit_tensors(base / SINGLE, lambda tensors: tensors.update({NORM: torch.ones(65)})),
        r"\[65\] where config.json describes \[64\]",
    ),
    "integers": (
        lambda base: edit_tensors(
            base / SINGLE, lambda tensors: tensors.update({NORM: torch.ones(64, dtype=torch.int8)})
        ),
        "dtype I8",
    ),
    "fp8": (
        lambda base: edit_tensors(
            base / SINGLE, lambda tensors: tensors.update({NORM: torch.ones(64).to(torch.float8_e4m3fn)})
        ),
        "dtype F8_E4M3",
    ),
    "broken tokenizer": (lambda base: (base / "tokenizer.json").write_text("{"), "cannot load the tokenizer"),
    "several ggufs": (
        lambda base: [(base / SINGLE).unlink(), *((base / f"{i}.gguf").touch() for i in range(2))],
        "name the one",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_sources(name, make_base, tmp_path):
    breaks, message = BROKEN[name]
    base = make_base("qwen3", sharded=False)
    breaks(base)
    with pytest.raises(ConversionError, match=message):
        convert(base, tmp_path / "deep" / "out", verbose=False)
    assert list(tmp_path.iterdir()) == [base]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_init": "ones"}, "known are: spread"),
        ({"gate_bias": False}, "gate_init=normal"),
        ({"dtype": "int8"}, "expected one of float32"),
        ({"parity": "yes"}, "expected one of auto"),
        ({"device": "quantum"}, "cannot be used"),
        ({"p": 3}, "even power"),
        ({"wide_heads": True}, "QK norms"),
        ({"sink": -1.0}, "sink is -1.0"),
        ({"sink": float("inf")}, "sink is inf"),
        ({"sink": "fast"}, "sink is 'fast'"),
    ],
    ids=str,
)
def test_refused_options(options, message, make_base, tmp_path):
    base = make_base("qwen3")
    with pytest.raises(ConversionError, match=message):
        convert(base, tmp_path / "out", verbose=False, **options)
    assert list(tmp_path.iterdir()) == [base]


def test_a_sink_needs_norms(make_base, tmp_path):
    base = make_base("llama3")
    with pytest.raises(ConversionError, match="no QK norms"):
        convert(base, tmp_path / "out", sink=20.0, add_qk_norm=False, verbose=False)
    assert list(tmp_path.iterdir()) == [base]


def test_heads_that_cannot_be_widened(make_base, tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "WIDE", 32)
    for kind, message in (("qwen2-yarn", "rotation 'yarn'"), ("llama3", "head_dim is 32")):
        with pytest.raises(ConversionError, match=message):
            convert(make_base(kind), tmp_path / "out", wide_heads=True, verbose=False)
        assert not (tmp_path / "out").exists()


def test_existing_target_is_left_alone(make_base, tmp_path):
    base, out = make_base("qwen3"), tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(ConversionError, match="exists already"):
        convert(base, out, verbose=False)
    assert sorted(tmp_path.iterdir()) == [base, out]
    assert [path.name for path in out.iterdir()] == ["mine"]


@pytest.mark.parametrize("source", ["nowhere", "/no/such/folder", "./a/b"])
def test_nothing_there(source, tmp_path):
    with pytest.raises(ConversionError, match="does not exist"):
        convert(source, tmp_path / "out", verbose=False)
    assert not list(tmp_path.iterdir())


def test_mixed_dtypes_are_carried_and_noted(make_base, tmp_path):
    base = make_base("qwen3", sharded=False)
    edit_tensors(base / SINGLE, lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.bfloat16)}))
    report = convert(base, tmp_path / "out", verbose=False)
    assert report["dtype"] == "float32"
    assert any("several dtypes, bfloat16 and float32" in note for note in report["notes"])


def test_stored_frequencies_and_tied_head_are_tolerated(make_base, tmp_path):
    base = make_base("smollm2", sharded=False)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(base / SINGLE, add)
    report = convert(base, tmp_path / "out", verbose=False)
    assert any("not needed" in note for note in report["notes"])


def test_a_difference_in_logits_is_an_error(make_base, tmp_path, monkeypatch):
    """A base that computes something else than its config says: here another norm epsilon."""
    load = BrumbyForCausalLM.from_pretrained

    def altered(*args, **kwargs):
        return load(*args, **kwargs, rms_norm_eps=1e-2)

    monkeypatch.setattr(BrumbyForCausalLM, "from_pretrained", altered)
    base = make_base("llama3")
    with pytest.raises(ConversionError, match="in a logit"):
        convert(base, tmp_path / "out", verbose=False)
    assert list(tmp_path.iterdir()) == [base]
