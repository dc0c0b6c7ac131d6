"""The training loop. A step: take its batches, sum the loss over them, step, measure, record."""

import faulthandler
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from brumby.data import Batch, Batches, check_divisible
from brumby.data.batches import IGNORE_INDEX
from brumby.train.checkpoint import Checkpoints
from brumby.train.config import RunConfig
from brumby.train.engine import build_base, build_engine, setup_distributed
from brumby.train.guard import DivergenceError, check_ranks
from brumby.train.objective import inputs
from brumby.train.partition import comparable, num_updates
from brumby.train.plot import plot_loss
from brumby.train.schedule import lr_ratio
from brumby.train.terminal import LiveLog, step_line
from brumby.train.throughput import flops_per_token, peak_flops
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
        self.total_tokens = self.batches.tokens_seen(self.batches.num_steps)
        lr_ratio(config.schedule, 0, self.total_tokens)  # fails here, not after the models are loaded
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
        self.base = build_base(config, self.device)
        self.checkpoints = Checkpoints(config, self.engine, self.device)
        model = self.engine.module.model
        self.layers = model.model.layers
        precision = torch.bfloat16 if config.precision == "bf16" else torch.float32
        lengths = [phase.sequence_length for phase in self.batches.phases]
        self.flops_per_token = [flops_per_token(model.config, length) for length in lengths]  # of each phase
        self.peak_flops = peak_flops(self.device, precision) * self.world_size

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
        recorder = Recorder(config, self.batches, step, self.world_size) if self.rank == 0 else None
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
            "guard": self.guard.state(),
        }

    def restore(self, state: dict | None) -> dict:
        """Take up a checkpoint's state, or a new run's."""
        if state is None:
            return {"step": 0, "wall_seconds": 0.0}
        if changes := self.batches.changes_since(state["fingerprint"]):
            raise ValueError(
                f"the data of {self.config.run_dir} changed since its checkpoint: {'; '.join(changes)}. "
                "A resumed run needs the same"
            )
        self.guard.restore(state["guard"])
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
        tokens_seen = self.batches.tokens_seen(step + 1)  # with this step
        if phase.sequences_per_step != self.engine.train_batch_size():
            self.engine.set_train_batch_size(phase.sequences_per_step)
            self.engine.micro_steps = 0  # DeepSpeed steps where their number is a multiple of the accumulation
        measure = step % config.measure_every == 0 or step == self.batches.num_steps - 1

        local_valid = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
        (num_valid,) = self.all_reduce([local_valid])
        ratio = lr_ratio(config.schedule, tokens_seen, self.total_tokens)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * ratio

        measuring = time.perf_counter()
        base_loss = self.base_loss(batches, num_valid) if measure else None
        start += time.perf_counter() - measuring  # throughput is that of training alone
        gates = GateStatistics(self.layers) if measure else None
        if step == phase.first_step:
            self.guard.forget()  # other data, another loss: no spike
        loss_sum = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            if i > 0:
                self.engine.step()  # within the accumulation: counts micro-batches
            loss = self.engine(**inputs(batch, self.device))
            loss_sum += loss.detach()
            # DeepSpeed averages over ranks and micro-batches; the loss is a mean over all valid tokens.
            self.engine.backward(loss / num_valid * world * len(batches))
        flags = [float(self.stop), float(self.checkpoints.pending)]
        loss, stop, pending = self.all_reduce([loss_sum.item(), *flags])
        self.stop_requested = stop > 0  # all ranks decide alike, whichever got the signal
        loss /= num_valid
        grad_norm, verdict = self.guard.step(self.engine, loss, plain_grad_norm(self.engine))
        self.checkpoints.settle(pending > 0)

        seconds = time.perf_counter() - start
        rate = phase.tokens_per_step / seconds
        row = {
            "step": step + 1,
            "tokens_seen": tokens_seen,
            "phase": phase.name,
            "phase_index": phase_index,
            "loss": finite(loss),
            "base_loss": base_loss,
            "lr": config.optimizer.lr * ratio,
            "gate_lr": config.optimizer.gate_lr * ratio,
            "grad_norm": finite(grad_norm),
            "valid_tokens": int(num_valid),
            "skipped_steps": self.guard.skipped,
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token[phase_index] / self.peak_flops,
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

    @torch.no_grad()
    def base_loss(self, batches: list[Batch], num_valid: float) -> float:
        """The softmax base's loss on the same batches."""
        loss = sum(self.base(**inputs(batch, self.device)).item() for batch in batches)
        return self.all_reduce([loss])[0] / num_valid

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

    def __init__(self, config: RunConfig, batches: Batches, first_step: int, world_size: int) -> None:
        self.config, self.batches = config, batches
        self.metrics = MetricsFile(config.run_dir / "metrics.jsonl", first_step)
        self.wandb = Wandb(config, {"world_size": world_size})
        self.terminal = LiveLog().__enter__()
        self.drawn = time.monotonic()
        measured = [r["base_loss"] for r in read_metrics(config.run_dir / "metrics.jsonl") if r["base_loss"]]
        self.last_base_loss: float | None = measured[-1] if measured else None
        for name, epochs in batches.epochs.items():
            if epochs > 1:
                log.warning("source %s is repeated: %.1f epochs", name, epochs)

    def record(self, row: dict) -> None:
        self.metrics.write(row)
        self.wandb.log(row)
        self.last_base_loss = row["base_loss"] or self.last_base_loss
        self.terminal.write(step_line(row, self.batches.num_steps, self.last_base_loss))
        if time.monotonic() - self.drawn > DRAW_SECONDS:
            self.draw()

    def draw(self) -> list[dict]:
        """Draw `loss.png` from the rows so far, if the disk has space; returns them."""
        self.drawn = time.monotonic()
        run_dir = self.config.run_dir
        rows = read_metrics(run_dir / "metrics.jsonl")
        starts = [(phase.name, phase.first_token) for phase in self.batches.phases]
        try:
            plot_loss(rows, starts, run_dir / "loss.png")
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
            "wall_seconds": wall_seconds,
            "device": device_name(device),
        }
        try:
            write_json(self.config.run_dir / "summary.json", summary)
        except OSError as error:
            log.warning("summary.json is not written: %s", error)
        self.wandb.finish(summary)


def finite(value: float) -> float | None:
    """`value`, or None for what JSON cannot hold."""
    return value if math.isfinite(value) else None


def plain_grad_norm(engine) -> Tensor | None:
    """The gradient's norm where DeepSpeed has no optimizer of its own that keeps it: stage 0 in float32."""
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
