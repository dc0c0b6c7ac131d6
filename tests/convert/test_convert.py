"""Conversions that succeed: what is in the new folder, and what it computes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from brumby.convert import GATES_FILE, ConversionError, convert
from brumby.convert.checkpoint import open_checkpoint
from brumby.convert.parity import compare_tensors
from brumby.model import BrumbyForCausalLM

from .conftest import BASES

CODE = "for i in range(3):\n    print(i)  # " + "a stone, a leaf, an unfound door; " * 6


def load_all(folder) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "one-file"])
@pytest.mark.parametrize("kind", BASES)
def test_parity(kind, sharded, make_base, tmp_path):
    base, out = make_base(kind, sharded=sharded), tmp_path / "out"
    report = convert(base, out, verbose=False)

    logits = report["parity"]["logits"]
    assert logits["max_abs_difference"] <= 1e-4
    assert logits["tokens"] == "text"
    assert logits["num_tokens"] > 500
    assert logits["loss_after_swap"] != pytest.approx(logits["loss_base"], abs=1e-3)

    # The same again without the report: the Auto class, another text, and the base's own class.
    input_ids = torch.tensor([AutoTokenizer.from_pretrained(out)(CODE)["input_ids"]])
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(base)(input_ids).logits
        found = AutoModelForCausalLM.from_pretrained(out, use_exp=True)(input_ids).logits
    assert (found - wanted).abs().max() <= 1e-4
    assert wanted.std() > 0.5  # logits that could differ


@pytest.mark.parametrize("sharded", [True, False], ids=["sharded", "one-file"])
@pytest.mark.parametrize("kind", ["qwen2", "llama3", "llama-bias", "smollm2"])
def test_wide_heads_are_the_same_function(kind, sharded, make_base, tmp_path):
    base, out = make_base(kind, sharded=sharded), tmp_path / "out"
    before = load_all(base)
    report = convert(base, out, wide_heads=True, verbose=False)
    assert "widened" in report["notes"][0]
    assert (
        AutoConfig.from_pretrained(out).head_dim
        == 2 * before["model.layers.0.self_attn.k_proj.weight"].shape[0] // 3
    )
    assert all(torch.equal(load_all(base)[name], tensor) for name, tensor in before.items())

    input_ids = torch.tensor([AutoTokenizer.from_pretrained(out)(CODE)["input_ids"]])
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(base)(input_ids).logits
        found = AutoModelForCausalLM.from_pretrained(out, use_exp=True)(input_ids).logits
    assert (found - wanted).abs().max() <= 1e-4

    layer = load_all(out)
    keys, queries, values = (layer[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "kqv")
    assert not keys[1::2].any()
    spread = before["model.layers.1.self_attn.q_proj.weight"].std().item()
    assert all(new[1::2].std().item() == pytest.approx(spread, rel=0.2) for new in (queries, values))


@pytest.mark.parametrize(
    ("kind", "options", "sink"),
    [("smollm2", {}, 20.0), ("smollm2", {"add_qk_norm": False}, 0.0), ("qwen3", {"sink": 0.0}, 0.0)],
)
def test_a_sink_where_norms_give_weights_their_size(kind, options, sink, make_base, tmp_path):
    convert(make_base(kind), tmp_path / "out", verbose=False, **options)
    assert AutoConfig.from_pretrained(tmp_path / "out").sink == sink


@pytest.mark.parametrize("p", [2, 4])
def test_a_sink_is_as_large_as_the_layers_norms_make_weights(p, make_base, tmp_path):
    base, logits = make_base("qwen3", sharded=False), []
    tensors = load_file(base / "model.safetensors")
    input_ids = torch.tensor([AutoTokenizer.from_pretrained(base)(CODE)["input_ids"]])
    for factor in (1.0, 3.0):  # retention does not see the size of weights, only the sink beside them
        scaled = {
            name: t * factor if "layers.1" in name and "k_norm" in name else t for name, t in tensors.items()
        }
        save_file(scaled, base / "model.safetensors", metadata={"format": "pt"})
        out = tmp_path / str(factor)
        convert(base, out, p=p, sink=None if p == 2 else 20.0, link=False, verbose=False)
        model = AutoModelForCausalLM.from_pretrained(out)
        with torch.no_grad():
            logits.append(model(input_ids).logits)
        q, k = (load_all(out)[f"model.layers.0.self_attn.{x}_norm.weight"] for x in "qk")
        assert model.config.sink[0] == pytest.approx(20 * (q * k).square().mean().item() ** (p / 2))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    without = AutoModelForCausalLM.from_pretrained(out, sink=0.0)
    with torch.no_grad():
        assert (without(input_ids).logits - logits[0]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["qwen2", "llama3", "smollm2"])
def test_norms_that_the_base_has_not_are_retentions_alone(kind, make_base, tmp_path):
    base = make_base(kind)
    with_norms, without = (tmp_path / name for name in ("with", "without"))
    report = convert(base, with_norms, sink=0.0, verbose=False)
    assert "QK norms" in report["notes"][0]
    convert(base, without, add_qk_norm=False, verbose=False)
    new = load_all(with_norms).keys() - load_all(without).keys()
    assert sorted(new) == sorted(f"model.layers.{i}.self_attn.{x}_norm.weight" for i in (0, 1) for x in "qk")
    assert all((load_all(with_norms)[name] == 1).all() for name in new)
    assert [AutoConfig.from_pretrained(out).qk_norm for out in (with_norms, without)] == ["retention", False]

    input_ids = torch.tensor([AutoTokenizer.from_pretrained(base)(CODE)["input_ids"]])

    def logits(folder, scale=1.0, **options):
        model = BrumbyForCausalLM.from_pretrained(folder, dtype=torch.float64, **options)
        for name, p in model.named_parameters():
            if name in new:
                p.data *= scale
        with torch.no_grad():
            return model(input_ids).logits

    softmax = logits(without, use_exp=True)
    assert torch.equal(logits(with_norms, use_exp=True), softmax)
    normalised = logits(with_norms)
    assert (normalised - logits(without)).abs().max() > 0.1
    torch.testing.assert_close(logits(with_norms, scale=3.0), normalised, rtol=0, atol=1e-5)


def test_new_folder_holds_the_same_tensors_and_gates(make_base, tmp_path):
    base, out = make_base("qwen3", dtype=torch.bfloat16), tmp_path / "out"
    report = convert(base, out, verbose=False)
    old, new = load_all(base), load_all(out)
    gates = {name for name in new if ".g_proj." in name}
    assert set(new) - gates == set(old)
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert new["model.layers.1.self_attn.g_proj.weight"].shape == (3, 64)
    assert new["model.layers.1.self_attn.g_proj.bias"].shape == (3,)
    assert {new[name].dtype for name in gates} == {torch.bfloat16}
    assert (out / GATES_FILE).stat().st_mode & 0o777 == 0o644
    assert report["parameters"] == {
        "total": sum(t.numel() for t in new.values()),
        "carried": sum(t.numel() for t in old.values()),
        "new": 2 * (3 * 64 + 3),
    }
    assert report == json.loads((out / "conversion.json").read_text())
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "brumby"
    assert config["architectures"] == ["BrumbyForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert (out / "generation_config.json").exists()
    assert (
        AutoTokenizer.from_pretrained(out)("abc")["input_ids"]
        == AutoTokenizer.from_pretrained(base)("abc")["input_ids"]
    )
    assert BrumbyForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_links_share_their_file_and_copies_do_not(make_base, tmp_path):
    base = make_base("llama3")
    linked = convert(base, tmp_path / "linked", parity="tensors", verbose=False)
    copied = convert(base, tmp_path / "copied", parity="tensors", link=False, verbose=False)
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        assert (tmp_path / "linked" / shard).stat().st_ino == (base / shard).stat().st_ino
        assert (tmp_path / "copied" / shard).stat().st_ino != (base / shard).stat().st_ino
    assert [file["how"] for file in linked["files"]] == ["linked"] * len(shards) + ["new"]
    assert [file["how"] for file in copied["files"]] == ["copied"] * len(shards) + ["new"]
    num_tensors = len(load_all(base))
    assert linked["parity"]["tensors"] == {"same_file": num_tensors, "same_bytes": 0, "cast": 0}
    assert copied["parity"]["tensors"] == {"same_file": 0, "same_bytes": num_tensors, "cast": 0}
    assert linked["parity"]["logits"] == {"skipped": "as asked"}


def test_symbolic_links_are_followed(make_base, tmp_path):
    """A hub cache is a folder of links; linking those would leave the new checkpoint at the cache's mercy."""
    base, snapshot, out = make_base("qwen2"), tmp_path / "snapshot", tmp_path / "out"
    snapshot.mkdir()
    for path in base.iterdir():
        (snapshot / path.name).symlink_to(path)
    convert(snapshot, out, parity="tensors", verbose=False)
    assert not any(path.is_symlink() for path in out.iterdir())
    assert load_all(out).keys() > load_all(base).keys()


def test_no_hard_links_to_be_had(make_base, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refuse)
    report = convert(make_base("qwen2"), tmp_path / "out", parity="tensors", verbose=False)
    assert {file["how"] for file in report["files"]} <= {"reflinked", "copied", "new"}
    assert report["parity"]["tensors"]["same_bytes"] > 0


def test_cast(make_base, tmp_path):
    base, out = make_base("qwen3"), tmp_path / "out"
    report = convert(base, out, dtype="bfloat16", verbose=False)
    old, new = load_all(base), load_all(out)
    assert all(torch.equal(new[name], old[name].to(torch.bfloat16)) for name in old)
    assert {t.dtype for t in new.values()} == {torch.bfloat16}
    assert report["dtype"] == "bfloat16"
    assert report["parity"]["tensors"]["cast"] == len(old)
    assert report["parity"]["logits"]["max_abs_difference"] <= 1e-4
    again = convert(base, tmp_path / "again", dtype="float32", parity="tensors", verbose=False)
    assert {file["how"] for file in again["files"]} == {"linked", "new"}  # nothing to cast


def test_float16_overflow_is_an_error(make_base, tmp_path):
    base = make_base("qwen3", sharded=False)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ConversionError, match=r"model.norm.weight .*float16 cannot hold"):
        convert(base, tmp_path / "out", dtype="float16", verbose=False)
    assert list(tmp_path.iterdir()) == [base]


def test_a_changed_byte_is_found(make_base, tmp_path):
    base, out = make_base("qwen3", sharded=False), tmp_path / "out"
    convert(base, out, link=False, parity="tensors", verbose=False)
    one, other = open_checkpoint(base), open_checkpoint(out)
    assert compare_tensors(one, other, set(one.tensors))["same_bytes"] == len(one.tensors)
    last = other.tensors["model.norm.weight"]
    with other.path(last.shard).open("r+b") as file:
        position = last.start + last.num_bytes - 1
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ConversionError, match=r"model.norm.weight differs"):
        compare_tensors(one, other, set(one.tensors))


def test_dtype_surprises_are_noted(make_base, tmp_path):
    base = make_base("qwen3", sharded=False)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    report = convert(base, tmp_path / "out", parity="tensors", verbose=False)
    assert report["dtype"] == "float32"
    assert any("bfloat16" in note and "float32" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("init", "expected"),
    [("spread", [1.5, 3.75, 6.0]), ("constant", [6.906768] * 3), ("normal", [0.0] * 3)],
)
def test_gate_inits(init, expected, make_base, tmp_path):
    out = tmp_path / "out"
    convert(make_base("qwen3"), out, gate_init=init, parity="tensors", verbose=False)
    gates = load_file(out / GATES_FILE)
    assert len(gates) == 4
    torch.testing.assert_close(gates["model.layers.0.self_attn.g_proj.bias"], torch.tensor(expected))
    std = gates["model.layers.0.self_attn.g_proj.weight"].std().item()
    assert std == pytest.approx(0.15 if init == "normal" else 0.0, rel=0.3)
    model = BrumbyForCausalLM.from_pretrained(out)
    log_g = model.model.layers[0].self_attn.log_gate(torch.zeros(1, 1, 64))
    torch.testing.assert_close(log_g.exp()[0, 0], torch.tensor(expected).sigmoid())


def test_published_format_has_no_gate_bias(make_base, tmp_path):
    base = make_base("qwen3")
    one, same, other = (
        convert(
            base,
            tmp_path / name,
            gate_init="normal",
            gate_bias=False,
            seed=seed,
            parity="tensors",
            verbose=False,
        )
        and load_file(tmp_path / name / GATES_FILE)
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert list(one) == [f"model.layers.{i}.self_attn.g_proj.weight" for i in range(2)]
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)
    config = AutoConfig.from_pretrained(tmp_path / "one")
    assert config.gate_bias is False


def test_without_tokenizer(make_base, tmp_path):
    base = make_base("qwen2")
    for path in base.glob("tokenizer*"):
        path.unlink()
    report = convert(base, tmp_path / "out", verbose=False)
    assert report["parity"]["logits"]["tokens"] == "bytes (no tokenizer)"


def test_terminal_table(make_base, tmp_path, capsys):
    convert(make_base("qwen3-tied"), tmp_path / "out", parity="tensors")
    printed = capsys.readouterr().out
    assert "carried" in printed
    assert "not compared" in printed
