"""What a spike is."""

import math
import random
from collections import deque

import pytest

from brumby.train.config import StabilityConfig
from brumby.train.guard import spike

CONFIG = StabilityConfig(window=64, spike=8.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_bad_without_a_history(value):
    assert spike("loss", value, deque(), CONFIG) == f"loss is {value}"


def test_deviations_are_robust_and_of_the_logarithm():
    """e^x, x normal with deviation 0.2: the limit is at e^(8 x 0.2), wherever the median is, with outliers."""
    rng = random.Random(0)
    for scale in (1e-3, 1.0, 1e3):
        values = [scale * math.exp(rng.gauss(0, 0.2)) for _ in range(61)] + [1e6 * scale] * 3
        before = deque(values, maxlen=64)
        assert spike("norm", scale * math.exp(5 * 0.2), before, CONFIG) is None
        assert "deviations above" in spike("norm", scale * math.exp(13 * 0.2), before, CONFIG)
        assert spike("norm", scale * 1e-9, before, CONFIG) is None


def test_a_smooth_curve_makes_no_spikes_of_small_steps():
    before = deque([2.0 - 1e-4 * i for i in range(64)], maxlen=64)
    assert spike("loss", 2.0 * 1.4, before, CONFIG) is None
    assert "above" in spike("loss", 2.0 * 1.6, before, CONFIG)


def test_half_a_window_is_needed():
    before = deque([1.0] * 31, maxlen=64)
    assert spike("loss", 1e6, before, CONFIG) is None
    before.append(1.0)
    assert spike("loss", 1e6, before, CONFIG) is not None
