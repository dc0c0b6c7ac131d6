"""wandb against a loopback server, against none, and against one that dies."""

import gzip
import http.server
import json
import os
import signal
import threading
import time

import pytest

from brumby.train import tracking
from brumby.train.config import load
from brumby.train.tracking import MetricsFile, Wandb, read_metrics
from tests.conftest import start_ranks, train

KEY = "0" * 40


class WandbServer(http.server.ThreadingHTTPServer):
    """Answers what wandb asks at a run's start, and keeps the rows of history it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.run_ids: set[str] = set()
        self.history: list[dict] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": KEY}


class Handler(http.server.BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict = {}
        if self.path == "/graphql":
            request = json.loads(body)
            answer = {"data": self.graphql(request["query"], request.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"content": []})
            self.server.history += [json.loads(line) for line in history["content"]]
        self.answer(answer)

    do_PUT = do_POST  # noqa: N815

    def graphql(self, query: str, variables: dict) -> dict:
        if "upsertBucket" in query:
            self.server.run_ids.add(variables["name"])
            project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": variables["name"], "displayName": "x", "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            url = f"http://127.0.0.1:{self.server.server_port}/upload/"
            files = [{"name": name, "uploadUrl": url + name} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def answer(self, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server():
    server = WandbServer()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_online_run_keeps_its_id_through_a_resume(make_run, long_data, server):
    run_dir = make_run(wandb={"mode": "auto", "project": "p"}, data=long_data)
    process = start_ranks(run_dir, 1, **server.environment)
    while len(read_metrics(run_dir / "metrics.jsonl")) < 5 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert read_metrics(run_dir / "metrics.jsonl")[-1]["step"] < 60, output
    train(run_dir, **server.environment)
    assert server.run_ids == {(run_dir / "wandb" / "run-id").read_text()}
    sent = {row["step"]: row for row in server.history if "loss" in row}
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert sorted(sent) == [row["step"] for row in rows] == list(range(1, 61))
    for row in rows:
        assert sent[row["step"]]["loss"] == pytest.approx(row["loss"])
        assert sent[row["step"]]["tokens_seen"] == row["tokens_seen"]
    assert {"base_loss", "grad_norm", "lr", "gates/layer_00/mean", "tokens_per_second", "memory_bytes"} <= sent[
        1
    ].keys()
    assert KEY not in (run_dir / "config.yaml").read_text() + output


@pytest.mark.slow
def test_a_server_that_refuses_does_not_stop_the_training(make_run):
    run_dir = make_run(wandb={"mode": "online"})
    refusing = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "3"}
    assert "wandb failed and is off" in train(run_dir, **refusing)
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 12


@pytest.mark.slow
def test_offline_is_what_happens_without_a_key(make_run):
    run_dir = make_run(wandb={"mode": "auto"})
    train(run_dir, WANDB_API_KEY="", HOME=str(run_dir))
    (recorded,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    assert recorded.stat().st_size > 1000


def test_a_server_that_dies_does_not_hold_the_end(make_run, server, monkeypatch):
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 2)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    config = load(make_run(wandb={"mode": "online"}))
    wandb = Wandb(config, {})
    wandb.log({"loss": 1.0, "tokens_seen": 1})
    server.shutdown()
    server.server_close()
    wandb.log({"loss": 2.0, "tokens_seen": 2})
    start = time.monotonic()
    wandb.finish({"loss_end": 2.0})
    assert time.monotonic() - start < 10


def test_metrics_file_drops_rows_after_a_checkpoint_and_a_line_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    file = MetricsFile(path, steps=2)
    file.write({"step": 3, "again": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
