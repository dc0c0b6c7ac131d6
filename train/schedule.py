"""Learning rate as a function of the tokens seen, so that it does not depend on the batch size."""

import math

from brumby.train.config import ScheduleConfig


def lr_ratio(schedule: ScheduleConfig, tokens: int, total_tokens: int) -> float:
    """The learning rate at `tokens`, as a share of its peak.

    Both schedules warm up linearly over `warmup_tokens`. "wsd" (warm-up, stable, decay; arXiv
    2404.06395) then stays at the peak and falls linearly to `min_ratio` over the last
    `decay_tokens`; "cosine" falls along half a cosine over all that follows the warm-up.

    Raises:
        ValueError: warm-up and decay together are longer than the run.
    """
    decay = schedule.decay_tokens if schedule.name == "wsd" else total_tokens - schedule.warmup_tokens
    if schedule.warmup_tokens + decay > total_tokens or decay < 0:
        raise ValueError(
            f"schedule: warm-up ({schedule.warmup_tokens:,}) and decay ({schedule.decay_tokens:,}) exceed the "
            f"run's {total_tokens:,} tokens; shorten them or lengthen the phases"
        )
    if tokens < schedule.warmup_tokens:
        return tokens / schedule.warmup_tokens
    if decay == 0:
        return 1.0
    progress = min(max((tokens - (total_tokens - decay)) / decay, 0.0), 1.0)
    fall = progress if schedule.name == "wsd" else (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - (1.0 - schedule.min_ratio) * fall
