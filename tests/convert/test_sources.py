"""Bases that are not folders of safetensors: a GGUF file, a hub repository."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from brumby.convert import ConversionError, convert

from .conftest import make_model, tokenizer

GGUF_NAMES = {  # llama.cpp's names for ours
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path) -> torch.nn.Module:
    """A random Qwen2 as an unquantized GGUF, written with llama.cpp's own package."""
    gguf = pytest.importorskip("gguf")
    model = make_model("qwen2")
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += ["ab", "cd", *(f"<unused{i}>" for i in range(config.vocab_size - len(tokens) - 2))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "c d"])
    writer.add_eos_token_id(len(tokens) - 1)
    for name, tensor in model.state_dict().items():
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name.replace("model.layers.", "blk."), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_gguf(as_folder, tmp_path):
    pytest.importorskip("accelerate")  # transformers needs it to read a GGUF
    folder, out = tmp_path / "download", tmp_path / "out"
    folder.mkdir()
    model = write_gguf(folder / "tiny.gguf")
    report = convert(folder if as_folder else folder / "tiny.gguf", out, dtype="float32", verbose=False)
    assert report["family"] == "qwen2"
    assert report["parity"]["logits"]["max_abs_difference"] <= 1e-4
    input_ids = torch.arange(200)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out, use_exp=True)(input_ids).logits
        assert (found - model(input_ids).logits).abs().max() <= 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["download", "out"]


def test_gguf_is_bfloat16_by_default(tmp_path):
    pytest.importorskip("accelerate")
    write_gguf(tmp_path / "tiny.gguf")
    report = convert(tmp_path / "tiny.gguf", tmp_path / "out", parity="tensors", verbose=False)
    assert report["dtype"] == "bfloat16"


def test_broken_gguf(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ConversionError, match="cannot load"):
        convert(tmp_path / "broken.gguf", tmp_path / "out", verbose=False)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


class Hub(BaseHTTPRequestHandler):
    """The three answers of huggingface.co that a download needs, for the repository someone/base."""

    folder: Path
    commit = "0123456789abcdef0123456789abcdef01234567"

    def answer(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in {
            "Content-Length": str(len(body)),
            "X-Repo-Commit": self.commit,
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        files = sorted(path.name for path in self.folder.iterdir())
        if path.startswith("/api/models/someone/base/tree"):
            rows = [self.describe(name) for name in files]
            self.answer(json.dumps(rows).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/someone/base"):
            info = {
                "id": "someone/base",
                "sha": self.commit,
                "siblings": [{"rfilename": name} for name in files],
            }
            self.answer(json.dumps(info).encode(), Content_Type="application/json")
        elif path.startswith("/someone/base/resolve/") and path.split("/")[-1] in files:
            body = (self.folder / path.split("/")[-1]).read_bytes()
            self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def describe(self, name: str) -> dict:
        body = (self.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}

    def log_message(self, *args) -> None:
        """Quiet."""


def test_hub(make_base, tmp_path):
    base, cache, out = make_base("qwen2"), tmp_path / "cache", tmp_path / "out"
    (base / "pytorch_model.bin").write_bytes(b"not to be fetched")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BaseHub", (Hub,), {"folder": base}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = f"""
import json
from brumby.convert import ConversionError, convert
try:
    convert("someone/other", {str(tmp_path / "other")!r}, verbose=False)
except ConversionError as error:
    assert "the hub did not give it" in str(error), error
print(json.dumps(convert("someone/base", {str(out)!r}, verbose=False)))
"""
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["revision"] == Hub.commit
    assert report["parity"]["logits"]["max_abs_difference"] <= 1e-4
    assert {file["how"] for file in report["files"]} == {"linked", "new"}
    assert not list(cache.rglob("pytorch_model.bin"))
    assert not (tmp_path / "other").exists()
