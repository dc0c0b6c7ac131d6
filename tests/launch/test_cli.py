"""The command line as its user meets it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tokenizers import normalizers
from transformers import AutoTokenizer

import brumby.configs
from brumby.data import DataConfig, phase_starts, schedule
from brumby.launch import cli, runs
from brumby.train import config as run_config
from brumby.train.schedule import plan

EXPERIMENTS = sorted(f.stem for f in (Path(brumby.configs.__file__).parent / "experiment").glob("*.yaml"))


def brumby_command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "brumby.launch.cli", *words], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("command", ["train", "launch", "prepare"])
def test_every_experiment_composes_and_validates(experiment, command):
    composed = cli.compose(command, [f"experiment={experiment}"])
    for name in (
        "hosts",
        "num_hosts",
        "launcher",
        "ranks_per_host",
        "master_port",
        "env",
        "restarts",
        "min_hosts",
        "grace",
        "num_workers",
        "dry_run",
        "resume",
    ):
        composed.pop(name, None)
    run = run_config.from_omegaconf(composed)
    assert DataConfig.from_dict(cli.plain(composed.data)) == run.data
    stages, phases = plan(run), schedule(run.data)
    assert sum(stage.num_tokens for stage in stages) == sum(p.num_steps * p.tokens_per_step for p in phases)
    assert all(phase.sequences_per_step % run.micro_batch == 0 for phase in phases)
    for stage in stages:
        peak, last = stage.config.gate_lr, stage.config.gate_lr * stage.config.schedule.min_ratio
        assert stage.rates(stage.first_token + stage.config.schedule.warmup_tokens)["gates"] == peak
        assert stage.rates(stage.first_token + stage.num_tokens)["gates"] == pytest.approx(last)


def test_the_published_run_is_the_published_run():
    run = run_config.from_omegaconf(without_resume(cli.compose("train", ["experiment=brumby_14b_seed"])))
    assert phase_starts(run.data) == [0, 1000, 2100, 3000]
    assert (run.data.sequences_per_step, run.data.sequence_length) == (736, 8192)
    assert run.data.sequences_per_step % (32 * run.micro_batch) == 0


def test_alignment_is_the_ramp_and_the_tokens_are_the_published_runs():
    ours, published = (
        run_config.from_omegaconf(without_resume(cli.compose("train", [f"experiment={name}"])))
        for name in ("brumby_14b", "brumby_14b_seed")
    )
    align, retrain = plan(ours)
    ramp, *phases = schedule(ours.data)
    assert (align.num_tokens, align.first_step) == (ramp.num_steps * ramp.tokens_per_step, 0)
    assert retrain.first_step == phases[0].first_step
    assert ramp.sequences_per_step % 32 == 0
    assert all(abs(a.first_token - b.first_token) < b.tokens_per_step
               for a, b in zip(phases[1:], schedule(published.data)[1:], strict=True))  # fmt: skip


def test_the_papers_switches_are_an_option():
    composed = cli.compose("train", ["experiment=brumby_14b_seed", "data=nemotron_nano2_60_90"])
    run = run_config.from_omegaconf(without_resume(composed))
    assert phase_starts(run.data) == [0, 1800, 2700, 3000]


def without_resume(composed):
    composed.pop("resume")
    return composed


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_shows_every_field_with_its_comment(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    names = [n for n in cli.compose(command, []) if n not in ("data", "experiment")]
    assert all(f"{name}:" in text for name in names)
    assert "#" in text


def test_cfg_job_shows_the_resolved_configuration(capsys):
    assert cli.main(["train", "experiment=demo", "stages.retrain.lr=0.5", "--cfg", "job"]) == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    assert (shown.name, shown.stages.retrain.lr, shown.data.sequence_length) == ("demo", 0.5, 256)


def test_an_experiment_of_ones_own(tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nname: mine\nmodel: m\n")
    assert cli.main(["train", "experiment=mine", "--config-dir", str(tmp_path), "--cfg", "job"]) == 0
    assert OmegaConf.create(capsys.readouterr().out).name == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["conjure"], "there is no command 'conjure'; the commands are convert, prepare, train"),
        (["train", "--fast"], "cannot read '--fast'"),
        (["train", "experiment=nothing"], "nothing"),
        (["train", "optimiser.lr=1"], "optimiser"),
        (["train"], "name"),
        (["train", "experiment=demo", "stages.retrain.lr=fast"], "stages.retrain.lr"),
        (["train", "experiment=demo", "stages.retrain.lr=-1"], "stages.retrain.lr is -1"),
        (["train", "experiment=demo", "stages.align.objective=agree"], "stages.align.objective is 'agree'"),
        (["train", "experiment=demo", "stages.retrain.kl=-1"], "stages.retrain.kl is -1"),
        (["train", "experiment=demo", "stages.retrain.ce=0", "stages.retrain.kl=0"], "are both 0"),
        (["train", "experiment=demo", "stages.retrain.mixer_lr=0"], "stages.retrain.mixer_lr is 0"),
        (["train", "experiment=demo", "optimizer.name=adamw"], "stages.retrain.muon_lr is 0.001, which only"),
        (["train", "experiment=demo", "optimizer.name=lion"], "optimizer.name is 'lion'; expected 'adamw' or"),
        (["train", "experiment=demo", "stages.retrain.muon_lr=null"], "stages.retrain.muon_lr is missing"),
        (["train", "experiment=demo", "softmax=true"], "from which stages.retrain is to learn"),
        (["train", "experiment=smollm2_135m_base", "calibrate=true"], "no gates for calibrate=true to set"),
        (
            ["train", "experiment=demo", "stages.retrain.mixer_lr=1"],
            "stages.retrain.mixer_lr is 1.0; with optimizer.name=muon",
        ),
        (["train", "experiment=demo", "stages.retrain.schedule.min_ratio=2"], "stages.retrain.schedule.min_ratio"),
        (["train", "experiment=demo", "stages.align.tokens=null"], "stages.align.tokens is missing"),
        (["train", "experiment=demo", "stages.align.tokens=40000"], "stages.align.tokens is 40,000"),
        (["train", "experiment=demo", "stages.align.tokens=2048"], "stages.align.schedule: warm-up"),
        (["train", "experiment=demo", "stages.retrain.tokens=9999"], "stages.retrain.tokens is 9,999"),
        (["train", "experiment=demo", "zero_stage=4"], "zero_stage is 4"),
        (["train", "experiment=demo", "model=/nowhere"], "make one with `brumby convert"),
        (["train", "resume=/nowhere"], "is no run"),
        (["convert"], "brumby convert needs out=..., source=..."),
        (["convert", "source=/nowhere", "out=x"], "/nowhere"),
        (["export", "run=/nowhere", "out=x"], "is no run"),
        (["generate", "model=/nowhere", "prompt=x"], "holds no checkpoint"),
        (["launch", "experiment=demo", "hosts=/nowhere"], "/nowhere"),
        (["launch", "experiment=demo", "launcher=rocket"], "rocket"),
    ],
)
def test_bad_input_says_what_is_wrong_and_exits_with_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_from_text_to_text(tiny_model, tmp_path, monkeypatch, capsys):
    """prepare, launch on two ranks, resume of a finished run, export, generate: by their commands."""
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"a state of size {i}"}) for i in range(300))
    )
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        f"""# @package _global_
name: mine
model: {tiny_model}
precision: fp32
wandb: {{mode: disabled}}
data:
  root: tokens
  sequence_length: 32
  sequences_per_step: 4
  deduplicate: false
  sources: {{wiki: {{path: text.jsonl}}, code: {{path: text.jsonl}}, math: {{path: text.jsonl}}}}
  phases: {{encyclopedia: {{tokens: 256}}, code: {{tokens: 256}}, mathematics: {{tokens: 256}}}}
"""
    )
    monkeypatch.chdir(tmp_path)
    experiment = ["experiment=mine", "--config-dir", "."]

    def done(*words: str) -> str:
        result = brumby_command(*words)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def refused(*words: str) -> str:
        assert cli.main(list(words)) == 2
        return capsys.readouterr().err

    assert "brumby prepare" in refused("launch", *experiment)
    done("prepare", *experiment)
    assert "sequences_per_step is 4" in refused("launch", *experiment, "ranks_per_host=3")
    assert not (tmp_path / "runs").exists()
    shown = done("launch", *experiment, "ranks_per_host=2")
    assert "step 6/6  phase mathematics" in shown
    assert json.loads((tmp_path / "runs/mine/summary.json").read_text())["steps"] == 6
    assert "go on with `resume=runs/mine`" in refused("launch", *experiment, "ranks_per_host=2")
    done("launch", "resume=runs/mine", "ranks_per_host=2")
    assert "no checkpoint of step 5; it has 6" in refused("export", "run=runs/mine", "out=model", "step=5")
    done("export", "run=runs/mine", "out=model")
    text = done("generate", "model=model", "prompt=a state", "max_new_tokens=8")
    assert text.startswith("a state")
    assert len(text.strip()) > len("a state")


def test_data_of_another_tokenizer_is_refused(make_run, tiny_model, tmp_path):
    other = tmp_path / "model"
    shutil.copytree(tiny_model, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()  # as many words, other tokens
    tokenizer.save_pretrained(other)
    runs.check(run_config.load(make_run()), num_ranks=1)
    with pytest.raises(ValueError, match=f"data: the tokenizer that made .* is not that of {other}"):
        runs.check(run_config.load(make_run("other", model=str(other))), num_ranks=1)
