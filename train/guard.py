"""Steps that must not be applied, since loss or gradient norm is no number or far above those before."""

import math
import statistics
from collections import deque

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor
from torch.optim import Optimizer

from brumby.train import muon
from brumby.train.config import StabilityConfig

SPREAD = 0.05  # the least spread of a logarithm: a curve that happens to be smooth must not make spikes


class DivergenceError(RuntimeError):
    """The training is wrong in a way that starting it again does not mend."""


class Guard:
    """Stands between ZeRO and the optimizer, where loss and gradient norm are known and nothing is changed yet.

    ZeRO of every stage reduces the gradients, takes their norm, and calls the optimizer's `step`, once or
    for each of its groups. If that does nothing, weights and moments stay as they are, to the bit. A
    norm that is not finite never comes so far: DeepSpeed drops such a step itself. Under Muon the decision falls
    before ZeRO's step, on the norm of AdamW's gradients, which are clipped here: see `brumby.train.muon`.

    The loss and the norm of each applied step are kept; a step is a spike if the logarithm of its own lies more
    than `stability.spike` robust standard deviations (1.4826 x median absolute deviation) above their median.
    """

    def __init__(self, optimizer: Optimizer, config: StabilityConfig, muon_clip: float | None = None) -> None:
        """`muon_clip`: with Muon, the largest norm of AdamW's gradients."""
        self.optimizer, self.config, self.muon_clip = optimizer, config, muon_clip
        self.apply = optimizer.step
        optimizer.step = self._step  # type: ignore[method-assign]
        self.engine: DeepSpeedEngine | None = None
        self.verdict: str | None = "training has not begun"  # why the step is not applied; None: it is
        self.decided = True
        self.losses: deque[float] = deque(maxlen=config.window)
        self.norms: deque[float] = deque(maxlen=config.window)
        self.in_a_row = self.skipped = self.returns = 0

    def state(self) -> dict:
        """What a resumed run needs to decide alike."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
            "returns": self.returns,
        }

    def restore(self, state: dict) -> None:
        self.forget()
        self.losses.extend(state["losses"])
        self.norms.extend(state["norms"])
        self.in_a_row, self.skipped, self.returns = state["in_a_row"], state["skipped"], state["returns"]

    def forget(self) -> None:
        """Begin anew, with another kind of data."""
        self.losses.clear()
        self.norms.clear()

    def step(self, engine: DeepSpeedEngine, loss: float, norm: Tensor | None) -> tuple[float, str | None]:
        """Let `engine` take its step unless it is a bad one.

        Args:
            loss: of the global batch.
            norm: of the global gradient, where DeepSpeed's optimizer does not take it itself.

        Returns:
            The gradient norm, and why the step was not applied or None. Both are the same on all ranks.
        """
        self.engine, self.loss, self.norm = engine, loss, norm
        self.decided, self.verdict = False, None
        if self.muon_clip is not None:
            self._decide()
            if self.verdict:
                muon.discard(engine)
        skipped = engine.skipped_steps
        engine.step()
        grad_norm = float(norm if norm is not None else engine.get_global_grad_norm() or 0.0)
        if self.verdict is None and (engine.skipped_steps > skipped or not engine.was_step_applied()):
            self.verdict = f"DeepSpeed dropped it: loss {loss}, gradient norm {grad_norm}"
        if self.verdict is None:
            self.losses.append(loss)
            self.norms.append(grad_norm)
            self.in_a_row = 0
        else:
            self.in_a_row += 1
            self.skipped += 1
        self.decided = True
        return grad_norm, self.verdict

    def _step(self, closure=None):
        if not self.decided:
            self._decide()
        if self.verdict:
            return None
        if self.muon_clip is not None:
            self._clip(self.muon_clip)
        return self.apply(closure)

    def _clip(self, max_norm: float) -> None:
        assert self.norm is not None
        scale = (max_norm / (self.norm + 1e-6)).clamp(max=1.0)
        for group in self.optimizer.param_groups:
            if not group["use_muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(scale)

    def _decide(self) -> None:
        assert self.engine is not None
        norm = self.norm if self.norm is not None else self.engine.optimizer._global_grad_norm
        norm = float(norm)
        verdict = spike("loss", self.loss, self.losses, self.config)
        verdict = verdict or spike("gradient norm", norm, self.norms, self.config)
        # Norms are sums in an order that may differ by rank: all do what any one of them must.
        flag = torch.tensor(float(verdict is not None), device=self.engine.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.verdict = verdict or ("another rank found it bad" if flag.item() else None)
        self.decided = True


def spike(name: str, value: float, before: deque[float], config: StabilityConfig) -> str | None:
    """Why `value` is bad, or None. With less than half a window before it, only what is not finite is."""
    if not math.isfinite(value):
        return f"{name} is {value}"
    if len(before) < config.window // 2 or value <= 0:
        return None
    logs = [math.log(max(x, 1e-30)) for x in before]
    median = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(x - median) for x in logs)
    deviation = (math.log(value) - median) / max(spread, SPREAD)
    if deviation <= config.spike:
        return None
    return f"{name} {value:.4g} is {deviation:.1f} deviations above {math.exp(median):.4g}"


def check_ranks(weights: list[Tensor], step: int, device: torch.device) -> None:
    """See that all ranks hold the same bits in `weights`.

    Raises:
        DivergenceError: they do not; naming the ranks that differ from the most.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    for i, weight in enumerate(weights):
        bits = weight.view(torch.int16 if weight.dtype == torch.bfloat16 else torch.int32)
        total += bits.sum(dtype=torch.int64) * (2 * i + 1)
    sums = [torch.zeros_like(total) for _ in range(dist.get_world_size())]
    dist.all_gather(sums, total)
    found = [int(value) for value in sums]
    common = statistics.mode(found)
    odd = [rank for rank, value in enumerate(found) if value != common]
    if odd:
        raise DivergenceError(
            f"after step {step} the weights of ranks {odd} differ from the others'. A GPU, its memory or its link "
            "is faulty, or a kernel is not deterministic; the checkpoints before this step are unharmed"
        )
