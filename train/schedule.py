"""Stages and learning rates as functions of the tokens seen, so that they do not depend on the batch size."""

import math
from dataclasses import dataclass

from brumby.data import Phase
from brumby.data import schedule as phases_of
from brumby.train.config import RunConfig, ScheduleConfig, StageConfig


@dataclass(frozen=True)
class Stage:
    """A stage in steps.

    Args:
        name: As configured.
        index: Its place in the order of training.
        first_step: Its first step.
        first_token: Tokens of all steps before it.
        num_tokens: Tokens of its steps.
        config: What is trained in it.
    """

    name: str
    index: int
    first_step: int
    first_token: int
    num_tokens: int
    config: StageConfig

    def rates(self, tokens_seen: int) -> dict[str, float]:
        """The learning rate of each kind of parameter; `tokens_seen` counts from the run's start.

        Muon's matrices are kinds of their own, which there are with a `muon_lr`.
        """
        c = self.config
        ratio = lr_ratio(c.schedule, tokens_seen - self.first_token, self.num_tokens)
        rates = {
            "gates": c.gate_lr * ratio,
            "mixers": (c.lr if c.mixer_lr is None else c.mixer_lr) * ratio,
            "rest": 0.0 if c.aligns else c.lr * ratio,
        }
        if c.muon_lr is not None:
            rates["mixer_matrices"] = c.muon_lr * ratio
            rates["mlp_matrices"] = 0.0 if c.aligns else c.muon_lr * ratio
        return rates


def plan(config: RunConfig) -> list[Stage]:
    """The stages of a run in steps. A stage starts at the first step at or after the tokens of those before it.

    Raises:
        ValueError: the stages do not fit the data, or a schedule does not fit its stage; naming the field.
    """
    phases = phases_of(config.data)
    ordered = sorted(config.stages.items(), key=lambda item: not item[1].aligns)
    starts, end = [(0, 0)], 0
    for name, stage in ordered:
        last = name == ordered[-1][0]
        if stage.tokens is None and not last:
            raise ValueError(f"stages.{name}.tokens is missing; only the last stage may lack it")
        total = phases[-1].first_token + phases[-1].num_steps * phases[-1].tokens_per_step
        end = total if stage.tokens is None else end + stage.tokens
        start = _step_at(phases, end)
        if start is None:
            raise ValueError(
                f"stages.{name}.tokens is {stage.tokens:,}, so that it ends after {end:,} tokens; the data has "
                f"{total:,}"
            )
        if start == starts[-1]:
            raise ValueError(f"stages.{name}: no step starts in it; lengthen it, or the phases")
        starts.append(start)
    if starts[-1][1] < total:
        raise ValueError(
            f"stages.{name}.tokens is {stage.tokens:,}, so that the stages end after {end:,} tokens; the data's "
            f"phases have {total:,}. Leave out the last stage's to train to the end"
        )
    stages = [
        Stage(name, i, *starts[i], starts[i + 1][1] - starts[i][1], stage)
        for i, (name, stage) in enumerate(ordered)
    ]
    for planned in stages:
        try:
            planned.rates(planned.first_token)
        except ValueError as error:
            raise ValueError(f"stages.{planned.name}.{error}") from error
    return stages


def _step_at(phases: list[Phase], tokens: int) -> tuple[int, int] | None:
    """The first step at or after `tokens` and the tokens before it; the number of steps counts as one."""
    for phase in phases:
        steps = max(0, -(-(tokens - phase.first_token) // phase.tokens_per_step))
        if steps <= phase.num_steps:
            return phase.first_step + steps, phase.first_token + steps * phase.tokens_per_step
    return None


def lr_ratio(schedule: ScheduleConfig, tokens: int, total_tokens: int) -> float:
    """The learning rate at `tokens` of a stage of `total_tokens`, as a share of its peak.

    Both schedules warm up linearly over `warmup_tokens`. "wsd" (warm-up, stable, decay; arXiv
    2404.06395) then stays at the peak and falls linearly to `min_ratio` over the last
    `decay_tokens`; "cosine" falls along half a cosine over all that follows the warm-up.

    Raises:
        ValueError: warm-up and decay together are longer than the stage.
    """
    decay = schedule.decay_tokens if schedule.name == "wsd" else total_tokens - schedule.warmup_tokens
    if schedule.warmup_tokens + decay > total_tokens or decay < 0:
        raise ValueError(
            f"schedule: warm-up ({schedule.warmup_tokens:,}) and decay ({schedule.decay_tokens:,}) exceed the "
            f"stage's {total_tokens:,} tokens; shorten them or lengthen the stage"
        )
    if tokens < schedule.warmup_tokens:
        return tokens / schedule.warmup_tokens
    if decay == 0:
        return 1.0
    progress = min(max((tokens - (total_tokens - decay)) / decay, 0.0), 1.0)
    fall = progress if schedule.name == "wsd" else (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - (1.0 - schedule.min_ratio) * fall
