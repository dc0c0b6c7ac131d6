"""Hub datasets, through the real client and a small server on the loopback that speaks the Hub's API."""

import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from brumby.data import TokenSource, prepare

COMMIT = "c0ffee" + "0" * 34
README = b"""---
configs:
- config_name: first
  data_files: [{split: train, path: first/*.parquet}]
- config_name: second
  data_files: [{split: train, path: second/*.parquet}, {split: test, path: first/*.parquet}]
- config_name: lines
  data_files: [{split: train, path: lines/*.jsonl.gz}]
---
"""


class Hub(http.server.ThreadingHTTPServer):
    """Serves `files` as dataset acme/text; acme/gated answers as a gated one does."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests = files, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def entry(self, path: str) -> dict:
        content = self.files[path]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": path, "size": len(content), "oid": oid}

    def tree(self, folder: str, recursive: bool) -> list[dict]:
        prefix = f"{folder}/" if folder else ""
        below = [name.removeprefix(prefix) for name in self.files if name.startswith(prefix)]
        folders = sorted({name.split("/")[0] for name in below if "/" in name})
        entries = [{"type": "directory", "path": prefix + name, "oid": "0", "size": 0} for name in folders]
        return entries + [self.entry(prefix + name) for name in below if recursive or "/" not in name]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append(path)
        files = self.server.files
        if path.startswith(("/api/datasets/acme/gated", "/datasets/acme/gated")):
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif match := re.fullmatch(r"/datasets/acme/text/resolve/(\w+)/(.+)", path):
            self.file(match[2])
        elif re.fullmatch(r"/api/datasets/acme/text(/revision/\w+)?", path):
            siblings = [{"rfilename": name} for name in files]
            self.json({"id": "acme/text", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        elif match := re.fullmatch(r"/api/datasets/acme/text/tree/\w+/?(.*)", path):
            self.json(self.server.tree(match[1], recursive="recursive=true" in self.path.lower()))
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815 (the base class looks for this name)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = re.findall(r"[\w./-]+", body)
        if self.path.startswith("/api/datasets/acme/text/paths-info/"):
            self.json([self.server.entry(name) for name in self.server.files if name in names])
        else:
            self.reply(404, b"{}")

    def file(self, name: str) -> None:
        if name not in self.server.files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = self.server.files[name]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self.reply(206, content[start : end + 1], headers)
        return self.reply(200, content, headers)

    def json(self, value: object) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(table, buffer, row_group_size=7)
    return buffer.getvalue()


@pytest.fixture
def hub(texts) -> Iterator[Hub]:
    written = texts(60, seed=40)
    server = Hub(
        {
            "README.md": README,
            "first/0.parquet": parquet(texts(5, seed=41)),
            "second/0.parquet": parquet(written[:25]),
            "second/1.parquet": parquet(written[25:]),
            "lines/0.jsonl.gz": gzip.compress("\n".join(json.dumps({"text": t}) for t in written).encode()),
        }
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


PREPARE = """
import json, sys
from rich.console import Console
from brumby.data import DataConfig, prepare
from brumby.data.plan import plan
configs = [DataConfig.from_dict(json.loads(values)) for values in sys.argv[1:]]
for config in configs:
    try:
        prepare(config)
    except ValueError as error:
        print(error)
for config in configs[:2]:
    print(plan(config, 2, Console(width=200)))
"""


@pytest.mark.slow
def test_a_hub_dataset_gives_the_tokens_of_its_files(hub: Hub, make_config, texts, tmp_path):
    """In a process of its own: the clients read HF_ENDPOINT when they are imported."""
    columns = {"hub": "acme/text", "subset": "second"}
    lines = {"hub": "acme/text", "subset": "lines"}
    config = make_config(sources={"columns": columns, "lines": lines})
    refused = (
        make_config(sources={"gated": {"hub": "acme/gated", "gated": True}}),
        make_config(sources={"split": {"hub": "acme/text", "subset": "second", "split": "validation"}}),
    )
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    arguments = [json.dumps(dataclasses.asdict(c)) for c in (config, *refused)]
    command = [sys.executable, "-c", PREPARE, *arguments]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert output.startswith("source 'gated': cannot read hub dataset acme/gated (subset None, split train")
    assert "GatedRepoError" in output
    assert "a gated dataset needs its terms accepted on its page" in output
    assert "source 'split': " in output
    assert "there is no split 'validation'; there are train, test" in output
    planned, refused = output.split("True\n")
    assert re.search(r"columns +│ +\d[\d,]+ ", planned)
    assert "gated, no access  gated: cannot read hub dataset acme/gated" in refused
    assert refused.endswith("False\n")
    assert "/api/datasets/acme/gated/auth-check" in hub.requests

    local = make_config({"wiki": texts(60, seed=40)}, root=str(tmp_path / "local"))
    prepare(local)
    expected = TokenSource(Path(local.root) / "wiki").manifest
    for name in ("columns", "lines"):
        found = TokenSource(Path(config.root) / name).manifest
        assert found.fingerprint == expected.fingerprint
        assert found.hub_revision == COMMIT
    assert f"/datasets/acme/text/resolve/{COMMIT}/second/0.parquet" in hub.requests
    assert not any("/first/" in request for request in hub.requests)
