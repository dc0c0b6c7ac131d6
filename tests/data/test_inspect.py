"""`brumby data inspect` and `brumby prepare dry_run=true`, as they are typed."""

import itertools
import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from brumby.data import Batches, DataConfig
from brumby.launch import cli


def numbers(line: str) -> list[int]:
    return [int(n.replace(",", "")) for n in re.findall(r"(?<![\d.])\d[\d,]*(?![\d.%])", line)]


@pytest.fixture
def run_dir(make_run) -> Path:
    """A run that has done 6 of its 12 steps, the third of which was not applied."""
    folder = make_run()
    rows = [{"step": step} | ({"not_applied": "loss 9.1"} if step == 3 else {}) for step in range(1, 7)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_mixture_of_a_run(run_dir, tiny_data, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["data", "inspect", f"run={run_dir}"]) == 0
    shown = capsys.readouterr().out
    assert "steps 1 to 6 of 12" in shown
    assert "step 3 was not applied: loss 9.1" in shown
    batches = Batches(DataConfig.from_dict(tiny_data))
    counts = {name: [0, 0, 0] for name in batches.sources}
    for step in range(6):
        (batch,) = batches.micro_batches(step, 0, 1, 8)
        for sample in batch.sample_ids:
            counts[sample.split(":")[0]][batches.phase_of(step)[0]] += 32
    for name, expected in counts.items():
        (line,) = (line for line in shown.splitlines() if line.startswith(f"│ {name} "))
        assert numbers(line)[:3] == expected
    assert "in all" in shown


def test_the_text_of_a_step(run_dir, tiny_data, tmp_path, capsys):
    out = tmp_path / "batch.jsonl"
    assert cli.main(["data", "inspect", f"run={run_dir}", "step=3", f"out={out}"]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    config = DataConfig.from_dict(tiny_data)
    (batch,) = Batches(config).micro_batches(2, 0, 1, 8)
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    bounds = batch.cu_seqlens.tolist()
    pieces = [batch.input_ids.flatten()[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    assert [document["text"] for document in found] == [
        tokenizer.decode([token for token in piece if token != tokenizer.eos_token_id]) for piece in pieces
    ]
    assert {f"{d['source']}:{d['token']}" for d in found if d["row"] == 5} == {batch.sample_ids[5]}

    assert cli.main(["data", "inspect", f"run={run_dir}", "step=3", "samples=1"]) == 0
    assert batch.sample_ids[0] in (shown := capsys.readouterr().out)
    assert batch.sample_ids[1] not in shown
    assert cli.main(["data", "inspect", f"run={run_dir}", "step=13"]) == 2
    assert "step is 13; the run has steps 1 to 12" in capsys.readouterr().err


def test_a_plan_writes_nothing(tmp_path, tiny_model, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    lines = [json.dumps({"text": f"document {i} with a few words"}) for i in range(2000)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    words = ["prepare", "data=local", f"model={tiny_model}", "data.sources.text.path=text.jsonl", "dry_run=true"]
    assert cli.main([*words, "data.phases.text.tokens=131072", "data.sources.text.contamination=all of it"]) == 0
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if line.startswith("│ text "))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    there = sum(len(tokenizer(json.loads(text)["text"]).input_ids) + 1 for text in lines)
    estimated = float(line.split("│")[3])
    assert 131072 / there / 2 < estimated < 131072 / there * 1.05  # JSON's marks count as text
    assert "contamination  text: all of it" in shown
    assert cli.main([*words, "data.sources.text.path=nowhere"]) == 1
    assert "cannot be read  text: path 'nowhere' matches no file" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.jsonl"]
