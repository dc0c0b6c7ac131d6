"""The training loop. A step: take its batches, sum its stage's loss over them, step, measure, record."""

import faulthandler
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from brumby.data import Batch, Batches, check_divisible
from brumby.data.batches import IGNORE_INDEX
from brumby.train import muon
from brumby.train.calibration import calibrate_gates
from brumby.train.checkpoint import Checkpoints
from brumby.train.config import RunConfig, StageConfig
from brumby.train.engine import build_engine, build_teacher, setup_distributed
from brumby.train.guard import DivergenceError, check_ranks
from brumby.train.objective import inputs
from brumby.train.partition import comparable, forget_moments, num_updates
from brumby.train.plot import plot_loss
from brumby.train.schedule import Stage, plan
from brumby.train.terminal import LiveLog, step_line
from brumby.train.throughput import flops_per_token, peak_flops, slow_in_bf16
from brumby.train.tracking import MetricsFile, Wandb, read_metrics

log = logging.getLogger(__name__)

DRAW_SECONDS = 60.0  # between two pictures of a run: one takes half a second


class Trainer:
    """One rank of a run. `fit` trains from the newest checkpoint, or from the converted model, to the end.

    Args:
        beat: called after every step.

    Raises:
        ValueError: the configuration does not fit the data, the model or the number of ranks.
    """

    def __init__(self, config: RunConfig, beat: Callable[[], None]) -> None:
        self.config, self.beat = config, beat
        self.batches = Batches(config.data)
        self.stages = plan(config)  # fails here, not after the models are loaded
        self.stage = self.stages[0]  # that the optimizer's moments are of
        self.stop = False
        self.checkpoint_seconds = 0.0  # that the training waited for the checkpoint before the next step
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            signal.signal(getattr(signal, name), self._on_signal)

        self._watch()
        self.device = setup_distributed()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        for phase in self.batches.phases:
            check_divisible(phase.sequences_per_step, self.world_size, config.micro_batch)
        self.engine, self.guard = build_engine(config, self.device)
        self.teacher = build_teacher(config, self.device)
        self.checkpoints = Checkpoints(config, self.engine, self.device)
        model = self.engine.module.model
        self.layers, self.model_config = model.model.layers, model.config
        precision = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.peak_flops = peak_flops(self.device, precision) * self.world_size
        if config.precision == "bf16" and slow_in_bf16(self.device):
            log.warning("this CPU has no bfloat16: with precision=fp32 it is faster by far")

    def _on_signal(self, number: int, _frame) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        log.warning("%s: finishing this step, then saving a checkpoint", signal.Signals(number).name)

    def _watch(self) -> None:
        """End this process, showing where each thread stands, if the next call does not come in time.

        The others would wait for a rank that hangs, or whose host cannot be reached, for ever.
        """
        faulthandler.dump_traceback_later(self.config.step_timeout, exit=True)

    def fit(self) -> bool:
        """Train to the end, or until a signal asks to stop. True if the run is complete.

        Raises:
            DivergenceError: too many steps could not be applied, or the ranks' weights differ.
            RuntimeError: the last checkpoint could not be written.
        """
        config, num_steps = self.config, self.batches.num_steps
        state = self.restore(self.checkpoints.load())
        step, started = state["step"], time.monotonic() - state["wall_seconds"]
        recorder = None
        if self.rank == 0:
            recorder = Recorder(config, self.batches, self.stages, step, self.world_size)
        try:
            while step < num_steps:
                row = self.train_step(step)
                step += 1
                try:
                    if self.guard.in_a_row == config.stability.max_in_a_row:
                        row["returned_to"] = self.go_back(step)
                finally:
                    if recorder is not None:
                        recorder.record(row)
                self.beat()
                self._watch()
                save = self.stop_requested or step % config.checkpoint_every == 0 or step == num_steps
                if save or step % config.stability.compare_every == 0:
                    check_ranks(comparable(self.engine), step, self.device)
                if save:
                    before = time.monotonic()
                    self.checkpoints.save(self.state(step, before - started))
                    self.checkpoint_seconds = time.monotonic() - before
                if self.stop_requested:
                    break
            self.checkpoints.wait()
            if self.checkpoints.error is not None:
                raise RuntimeError(f"the checkpoint of step {step} is not written: {self.checkpoints.error}")
        except DivergenceError:  # on all ranks alike
            self.checkpoints.wait()
            raise
        finally:
            if recorder is not None:
                recorder.close(time.monotonic() - started, self.device)
        return step == num_steps

    def state(self, step: int, wall_seconds: float) -> dict:
        """What a checkpoint holds beside weights and moments."""
        return {
            "step": step,  # the data's position: steps not applied count
            "tokens_seen": self.batches.tokens_seen(step),
            "updates": num_updates(self.engine),
            "world_size": self.world_size,
            "zero_stage": self.config.zero_stage,
            "fingerprint": self.batches.fingerprint,
            "wall_seconds": wall_seconds,
            "stage": self.stage.name,
            "guard": self.guard.state(),
        }

    def restore(self, state: dict | None) -> dict:
        """Take up a checkpoint's state, or a new run's."""
        if state is None:
            if self.config.calibrate:
                batches = self.batches.micro_batches(0, self.rank, self.world_size, self.config.micro_batch)
                calibrate_gates(self.engine, self.teacher, (inputs(batch, self.device) for batch in batches))
            return {"step": 0, "wall_seconds": 0.0}
        if changes := self.batches.changes_since(state["fingerprint"]):
            raise ValueError(
                f"the data of {self.config.run_dir} changed since its checkpoint: {'; '.join(changes)}. "
                "A resumed run needs the same"
            )
        self.guard.restore(state["guard"])
        self.stage = next(stage for stage in self.stages if stage.name == state["stage"])
        return state

    def go_back(self, step: int) -> int:
        """Load the last checkpoint from before the bad steps, to go on with the data of `step`; returns its step.

        Raises:
            DivergenceError: there is none, or the run has returned too often already.
        """
        limits, skipped, returns = self.config.stability, self.guard.skipped, self.guard.returns
        first_bad = step - limits.max_in_a_row
        found = f"steps {first_bad + 1} to {step} could not be applied ({self.guard.verdict})"
        if returns == limits.max_returns:
            raise DivergenceError(
                f"{found}, after {returns} returns to a checkpoint. The steps that were not applied and their "
                f"samples are in {self.config.run_dir / 'metrics.jsonl'}; lower the rate or change the data, "
                "as a new run"
            )
        self.checkpoints.wait()
        state = self.checkpoints.load(before=first_bad + 1)
        if state is None:
            raise DivergenceError(f"{found}, and there is no checkpoint from before them")
        self.restore(state)
        self.guard.skipped, self.guard.returns, self.guard.in_a_row = skipped, returns + 1, 0
        self.checkpoints.forget_after(state["step"])
        if self.rank == 0:
            log.warning("%s; back to the weights of step %d, on with step %d", found, state["step"], step + 1)
        return state["step"]

    def train_step(self, step: int) -> dict:
        """One optimizer step over the global batch of `step`; its row of metrics."""
        start = time.perf_counter()
        config, world = self.config, self.world_size
        batches = self.batches.micro_batches(step, self.rank, world, config.micro_batch)
        phase_index, phase = self.batches.phase_of(step)
        stage = [stage for stage in self.stages if stage.first_step <= step][-1]
        tokens_seen = self.batches.tokens_seen(step + 1)  # with this step
        if phase.sequences_per_step != self.engine.train_batch_size():
            self.engine.set_train_batch_size(phase.sequences_per_step)
            self.engine.micro_steps = 0  # DeepSpeed steps where their number is a multiple of the accumulation
        if stage != self.stage:  # another loss: its moments would say nothing of the new one's
            forget_moments(self.engine)
            self.guard.forget()
            self.stage = stage
        if step == phase.first_step:
            self.guard.forget()  # other data, another loss: no spike
        measure = step % config.measure_every == 0 or step == self.batches.num_steps - 1

        local_valid = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
        (num_valid,) = self.all_reduce([local_valid])
        rates = stage.rates(tokens_seen)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rates[group["kind"]] * group["rate_factor"]

        measuring = time.perf_counter()
        sums = self.measure(stage.config, batches) if measure else {}
        start += time.perf_counter() - measuring  # throughput is that of training alone
        gates = GateStatistics(self.layers) if measure else None
        for i, batch in enumerate(batches):
            if i > 0:
                self.engine.step()  # within the accumulation: counts micro-batches
            objective = self.accumulate(sums, stage.config, batch, measure)
            # DeepSpeed averages over ranks and micro-batches; the loss is a mean over all valid tokens.
            self.engine.backward(objective / num_valid * world * len(batches))
        flags = [float(self.stop), float(self.checkpoints.pending)]
        *totals, stop, pending = self.all_reduce([*(value.item() for value in sums.values()), *flags])
        self.stop_requested = stop > 0  # all ranks decide alike, whichever got the signal
        means = {name: total / num_valid for name, total in zip(sums, totals, strict=True)}
        grad_norm, verdict = self.guard.step(self.engine, means["objective"], plain_grad_norm(self.engine, config))
        self.checkpoints.settle(pending > 0)

        seconds = time.perf_counter() - start
        rate = phase.tokens_per_step / seconds
        flops = flops_per_token(self.model_config, phase.sequence_length, stage.config)
        row: dict = {
            "step": step + 1,
            "tokens_seen": tokens_seen,
            "phase": phase.name,
            "phase_index": phase_index,
            "stage": stage.name,
            "stage_index": stage.index,
            **{name: finite(means.get(name)) for name in ("objective", "loss", "base_loss")},
            "lr": rates["rest"],
            "mixer_lr": rates["mixers"],
            "gate_lr": rates["gates"],
            **({"muon_lr": rates["mixer_matrices"]} if config.optimizer.name == "muon" else {}),
            "grad_norm": finite(grad_norm),
            "valid_tokens": int(num_valid),
            "skipped_steps": self.guard.skipped,
            "tokens_per_second": rate,
            "mfu": rate * flops / self.peak_flops,
            "step_seconds": seconds,
            "checkpoint_seconds": self.checkpoint_seconds,
            "memory_bytes": memory_bytes(self.device),
        }
        self.checkpoint_seconds = 0.0
        if verdict is not None:
            (whole,) = self.batches.micro_batches(step, 0, 1, phase.sequences_per_step)
            row |= {"not_applied": verdict, "sample_ids": whole.sample_ids}
            if self.rank == 0:
                log.warning("step %d is not applied: %s", step + 1, verdict)
        return row | (gates.row() if gates is not None else {})

    def accumulate(self, sums: dict[str, Tensor], stage: StageConfig, batch: Batch, measure: bool) -> Tensor:
        """A micro-batch's objective, with its graph; what is known of its losses is added to `sums`."""
        tensors, taught = inputs(batch, self.device), None
        if stage.needs_teacher:
            taught = self.teacher(tensors, attentions=stage.aligns, loss=measure)
        with self.teacher.whole_head() if stage.kl else nullcontext():
            objective, loss = self.engine(**tensors, stage=stage, taught=taught)
        add(sums, objective=objective.detach(), loss=loss, base_loss=taught.ce if taught else None)
        return objective

    @torch.no_grad()
    def measure(self, stage: StageConfig, batches: list[Batch]) -> dict[str, Tensor]:
        """The losses of model and base on a step's batches, as far as its training does not show them."""
        sums: dict[str, Tensor] = {}
        for batch in batches:
            tensors = inputs(batch, self.device)
            if stage.aligns:
                add(sums, loss=self.engine(**tensors)[1])
            elif not stage.needs_teacher:
                add(sums, base_loss=self.teacher(tensors, loss=True).ce)
        return sums

    def all_reduce(self, values: list[float]) -> list[float]:
        """Sums over all ranks, in float64."""
        total: Tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


class GateStatistics:
    """The mean gate of each layer and head over one micro-batch, by hooks on the gate projections."""

    def __init__(self, layers) -> None:
        self.means: dict[int, Tensor] = {}
        self.handles = [
            layer.self_attn.g_proj.register_forward_hook(
                lambda _module, _inputs, output, i=i: self.means.__setitem__(
                    i, output.detach().float().sigmoid().flatten(0, -2).mean(0)
                )
            )
            for i, layer in enumerate(layers)
        ]

    def row(self) -> dict:
        """`gates/layer_NN/{min,mean,max}` over the heads, in [0, 1]; the hooks are taken off."""
        for handle in self.handles:
            handle.remove()
        return {
            f"gates/layer_{i:02d}/{name}": getattr(mean, name)().item()
            for i, mean in sorted(self.means.items())
            for name in ("min", "mean", "max")
        }


class Recorder:
    """Rank 0's side of the run: metrics, wandb, the terminal, the picture and the summary."""

    def __init__(
        self, config: RunConfig, batches: Batches, stages: list[Stage], first_step: int, world_size: int
    ) -> None:
        self.config, self.batches, self.stages = config, batches, stages
        self.metrics = MetricsFile(config.run_dir / "metrics.jsonl", first_step)
        self.wandb = Wandb(config, {"world_size": world_size})
        self.terminal = LiveLog().__enter__()
        self.drawn = time.monotonic()
        self.last: dict[str, float | None] = {"loss": None, "base_loss": None}
        for row in read_metrics(config.run_dir / "metrics.jsonl"):
            self.remember(row)
        for name, epochs in batches.epochs.items():
            if epochs > 1:
                log.warning("source %s is repeated: %.1f epochs", name, epochs)

    def record(self, row: dict) -> None:
        self.metrics.write(row)
        self.wandb.log(row)
        self.remember(row)
        self.terminal.write(step_line(row, self.batches.num_steps, **self.last))
        if time.monotonic() - self.drawn > DRAW_SECONDS:
            self.draw()

    def remember(self, row: dict) -> None:
        self.last |= {name: row[name] for name in self.last if row[name] is not None}

    def draw(self) -> list[dict]:
        """Draw `loss.png` from the rows so far, if the disk has space; returns them."""
        self.drawn = time.monotonic()
        run_dir = self.config.run_dir
        rows = read_metrics(run_dir / "metrics.jsonl")
        phases = [(phase.name, phase.first_token) for phase in self.batches.phases]
        stages = [(stage.name, stage.first_token) for stage in self.stages]
        try:
            plot_loss(rows, phases, stages, run_dir / "loss.png")
        except OSError as error:
            log.warning("loss.png is not drawn: %s", error)
        else:
            self.wandb.log_picture(run_dir / "loss.png")
        return rows

    def close(self, wall_seconds: float, device: torch.device) -> None:
        """Write `summary.json` from what was measured so far."""
        self.terminal.__exit__()
        rows = self.draw()
        if not rows:
            return
        losses = [row["loss"] for row in rows if row["loss"] is not None]
        base_losses = [row["base_loss"] for row in rows if row["base_loss"] is not None]
        summary = {
            "base_loss": base_losses[-1] if base_losses else None,
            "loss_start": losses[0] if losses else None,
            "loss_end": losses[-1] if losses else None,
            "tokens_seen": rows[-1]["tokens_seen"],
            "steps": rows[-1]["step"],
            "skipped_steps": rows[-1]["skipped_steps"],
            "phases": list(dict.fromkeys(row["phase"] for row in rows)),
            "stages": list(dict.fromkeys(row["stage"] for row in rows)),
            "wall_seconds": wall_seconds,
            "device": device_name(device),
        }
        try:
            write_json(self.config.run_dir / "summary.json", summary)
        except OSError as error:
            log.warning("summary.json is not written: %s", error)
        self.wandb.finish(summary)


def add(sums: dict[str, Tensor], **values: Tensor | None) -> None:
    """Add to the sums, which begin at nothing, those values that there are."""
    for name, value in values.items():
        if value is not None:
            sums[name] = sums[name] + value if name in sums else value


def finite(value: float | None) -> float | None:
    """`value`, or None for what JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def plain_grad_norm(engine, config: RunConfig) -> Tensor | None:
    """The gradient's norm where DeepSpeed does not keep it: stage 0 in float32 and, of AdamW's, under Muon."""
    if config.optimizer.name == "muon":
        return muon.adamw_norm(engine)
    if engine.zero_optimization() or engine.bfloat16_enabled():
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


def write_json(path: Path, value: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.rename(path)


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this rank: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    import platform

    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
