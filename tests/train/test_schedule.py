import pytest

from brumby.train.config import ScheduleConfig
from brumby.train.schedule import lr_ratio


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
