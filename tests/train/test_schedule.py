import pytest

from brumby.data import DataConfig
from brumby.train.config import RunConfig, ScheduleConfig, StageConfig
from brumby.train.schedule import Stage, lr_ratio, plan


def test_wsd_warms_up_stays_and_decays():
    schedule = ScheduleConfig("wsd", warmup_tokens=100, decay_tokens=400, min_ratio=0.1)
    found = [lr_ratio(schedule, tokens, 1000) for tokens in (0, 50, 100, 350, 600, 800, 1000)]
    assert found == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0, 0.55, 0.1])


def test_cosine_falls_over_all_that_follows_the_warmup():
    schedule = ScheduleConfig("cosine", warmup_tokens=200, min_ratio=0.0)
    found = [lr_ratio(schedule, tokens, 1000) for tokens in (100, 200, 400, 600, 1000)]
    assert found == pytest.approx([0.5, 1.0, (1 + 2**-0.5) / 2, 0.5, 0.0])


def test_a_schedule_longer_than_the_stage_is_refused():
    with pytest.raises(ValueError, match=r"exceed the stage's 1,000 tokens"):
        lr_ratio(ScheduleConfig("wsd", warmup_tokens=700, decay_tokens=400), 0, 1000)


def test_stages_start_at_the_first_step_after_the_tokens_before_them():
    """Phases of 3 steps of 256 tokens and 4 of 384; alignment comes first, wherever it stands."""
    phases = {
        "one": {"tokens": 768, "blend": {"a": 1.0}},
        "two": {"tokens": 1536, "blend": {"a": 1.0}, "sequence_length": 64, "sequences_per_step": 6},
    }
    data = DataConfig.from_dict(
        {"root": "r", "tokenizer": "t", "sequence_length": 32, "sequences_per_step": 8,
         "sources": {"a": {"path": "p"}}, "phases": phases}
    )  # fmt: skip
    stages = {
        "first": StageConfig(tokens=500, lr=2.0, gate_lr=3.0),
        "last": StageConfig(lr=1.0, mixer_lr=4.0),
        "align": StageConfig(tokens=600, objective="align", lr=5.0, gate_lr=6.0),
    }
    planned = plan(RunConfig(name="n", model="m", data=data, stages=stages))
    found = [(stage.name, stage.first_step, stage.first_token, stage.num_tokens) for stage in planned]
    assert found == [("align", 0, 0, 768), ("first", 3, 768, 384), ("last", 4, 1152, 1152)]
    assert [stage.rates(stage.first_token + 1) for stage in planned] == [
        {"gates": 6.0, "mixers": 5.0, "rest": 0.0},
        {"gates": 3.0, "mixers": 2.0, "rest": 2.0},
        {"gates": 3e-3, "mixers": 4.0, "rest": 1.0},
    ]


def test_muons_matrices_have_one_rate_and_mlps_none_in_alignment():
    schedule = ScheduleConfig("wsd", warmup_tokens=100)
    retrain = StageConfig(lr=1.0, gate_lr=2.0, muon_lr=4.0, schedule=schedule)
    align = StageConfig(objective="align", lr=1.0, gate_lr=2.0, muon_lr=4.0, schedule=schedule)
    found = [Stage("s", 0, 0, 0, 1000, config).rates(50) for config in (retrain, align)]
    assert found == [
        {"gates": 1.0, "mixers": 0.5, "rest": 0.5, "mixer_matrices": 2.0, "mlp_matrices": 2.0},
        {"gates": 1.0, "mixers": 0.5, "rest": 0.0, "mixer_matrices": 2.0, "mlp_matrices": 0.0},
    ]
