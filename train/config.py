"""What a run is: typed, validated once, and kept as `config.yaml` in the run's directory."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from brumby.data import DataConfig


@dataclass
class OptimizerConfig:
    """What turns gradients into updates; the rates are those of the stages.

    Args:
        name: "adamw", or "muon": Muon for the layers' matrices, without the gates', and AdamW for the rest. See
            `brumby.train.muon` for what it costs.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: Of matrices other than the gates', times the rate.
        clip_grad_norm: The largest norm of the gradient, under Muon of that of AdamW's parameters.
    """

    name: str = "adamw"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"optimizer.name is {self.name!r}; expected 'adamw' or 'muon'")
        for name in ("eps", "clip_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas is {self.betas}; expected two numbers in [0, 1)")
        if self.weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay is {self.weight_decay}; it must not be negative")


@dataclass
class ScheduleConfig:
    """Learning rates as a function of a stage's tokens: see `brumby.train.schedule`."""

    name: str = "wsd"
    warmup_tokens: int = 0
    decay_tokens: int = 0
    min_ratio: float = 0.0

    def validate(self, where: str) -> None:
        if self.name not in ("wsd", "cosine"):
            raise ValueError(f"{where}.name is {self.name!r}; expected 'wsd' or 'cosine'")
        for name in ("warmup_tokens", "decay_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{where}.{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"{where}.min_ratio is {self.min_ratio}; expected a number in [0, 1]")


@dataclass
class StageConfig:
    """A stretch of training with one objective: see `brumby.train.objective`.

    Args:
        tokens: Its length; the next stage begins at the first step at or after its end. None, in the last stage:
            to the end of the data.
        objective: "align" trains the mixers alone, each to give what the base's attention gives for the same
            hidden states; "retrain" trains everything on the next token.
        ce: Weight of the cross-entropy with the text, in retraining.
        kl: Weight of the Kullback-Leibler divergence from the base's distribution, in retraining.
        temperature: Of both distributions in that divergence.
        lr: Peak learning rate.
        mixer_lr: That of the mixers, without their gates; None: `lr`. Not under Muon.
        gate_lr: That of the gates.
        muon_lr: That of Muon's matrices, of mixers and MLPs, for updates of AdamW's size (arXiv 2502.16982).
        schedule: Of all of them, over the stage's tokens.
    """

    tokens: int | None = None
    objective: str = "retrain"
    ce: float = 1.0
    kl: float = 0.0
    temperature: float = 1.0
    lr: float = 3e-4
    mixer_lr: float | None = None
    gate_lr: float = 3e-3
    muon_lr: float | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def validate(self, where: str, optimizer: str) -> None:
        """Raises ValueError for a value out of range or not of the optimizer, naming it as a field of `where`."""
        if self.objective not in ("align", "retrain"):
            raise ValueError(f"{where}.objective is {self.objective!r}; expected 'align' or 'retrain'")
        for name in ("tokens", "temperature", "lr", "mixer_lr", "gate_lr", "muon_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{where}.{name} is {value}; it must be above 0")
        if optimizer == "muon" and self.muon_lr is None:
            raise ValueError(f"{where}.muon_lr is missing; with optimizer.name=muon every stage needs it")
        if optimizer == "muon" and self.mixer_lr is not None:
            raise ValueError(
                f"{where}.mixer_lr is {self.mixer_lr}; with optimizer.name=muon make it null: the mixers' "
                "matrices have muon_lr"
            )
        if optimizer != "muon" and self.muon_lr is not None:
            raise ValueError(
                f"{where}.muon_lr is {self.muon_lr}, which only optimizer.name=muon has; it is {optimizer}"
            )
        for name in ("ce", "kl"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{where}.{name} is {getattr(self, name)}; it must not be negative")
        if self.ce == self.kl == 0:
            raise ValueError(f"{where}.ce and {where}.kl are both 0; nothing is left to train on")
        self.schedule.validate(f"{where}.schedule")

    @property
    def aligns(self) -> bool:
        return self.objective == "align"

    @property
    def needs_teacher(self) -> bool:
        return self.aligns or self.kl > 0


@dataclass
class WandbConfig:
    """`mode`: online, offline, disabled, or auto (online with an API key, else offline)."""

    mode: str = "auto"
    project: str = "open-brumby"
    entity: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "online", "offline", "disabled"):
            raise ValueError(f"wandb.mode is {self.mode!r}; expected auto, online, offline or disabled")


@dataclass
class StabilityConfig:
    """Which steps are not applied, and when the run gives up: see `brumby.train.guard`.

    Args:
        spike: Robust deviations above the median of loss or gradient norm from which a step is not applied.
        window: Steps that the median is over.
        max_in_a_row: So many such steps in a row send the run back to the checkpoint before them.
        max_returns: So many returns, and the next one stops the run.
        compare_every: Steps between comparisons of the ranks' weights.
    """

    spike: float = 8.0
    window: int = 64
    max_in_a_row: int = 8
    max_returns: int = 3
    compare_every: int = 100

    def __post_init__(self) -> None:
        if not self.spike > 0:
            raise ValueError(f"stability.spike is {self.spike}; it must be above 0")
        for name in ("window", "max_in_a_row", "compare_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"stability.{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_returns < 0:
            raise ValueError(f"stability.max_returns is {self.max_returns}; it must not be negative")


@dataclass
class RunConfig:
    """One retraining run.

    Args:
        name: The run's name; its directory is `runs_dir/name`.
        model: Folder of a converted checkpoint, as `brumby convert` writes it.
        precision: "bf16" (with float32 master weights, kept by DeepSpeed) or "fp32".
        micro_batch: Sequences a rank puts through the model at once.
        zero_stage: 0 to 3, see DeepSpeed's ZeRO.
        activation_checkpointing: Recompute each layer in the backward pass instead of keeping it.
        softmax: Train the base itself, with its attention: the control for a run, or, exported, a base that knows
            the text before retention learns from it. Gates, and norms that retention alone has, stay as they are.
        calibrate: Before the first step, set the gates from how far back the base's attention looks in that step's
            samples: see `brumby.train.calibration`. The gates need biases.
        checkpoint_every: Steps between checkpoints; the last step always has one.
        keep_checkpoints: How many of the newest stay on disk.
        keep_every: A multiple of `checkpoint_every`; checkpoints of every so many steps stay too.
        step_timeout: Seconds after which a rank that has not finished its step ends itself, with a traceback.
        measure_every: Steps between measurements of the base's loss and the gates on the step's batch, and, while
            mixers are aligned, of the loss.
        stages: By name; see `StageConfig`. Those that align come first, otherwise their order is that of the
            file. Without any: one, `retrain`.

    Raises:
        ValueError: a value out of range, naming the field.
    """

    name: str
    model: str
    data: DataConfig
    runs_dir: str = "runs"
    precision: str = "bf16"
    micro_batch: int = 1
    zero_stage: int = 2
    activation_checkpointing: bool = False
    softmax: bool = False
    calibrate: bool = False
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    keep_every: int | None = None
    step_timeout: float = 1800.0
    measure_every: int = 10
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name is {self.name!r}; expected a plain folder name")
        if self.precision not in ("bf16", "fp32"):
            raise ValueError(f"precision is {self.precision!r}; expected 'bf16' or 'fp32'")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"zero_stage is {self.zero_stage}; expected 0, 1, 2 or 3")
        for name in ("micro_batch", "checkpoint_every", "keep_checkpoints", "measure_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.checkpoint_every):
            raise ValueError(
                f"keep_every is {self.keep_every}; must be a multiple of checkpoint_every={self.checkpoint_every}"
            )
        if not self.step_timeout > 0:
            raise ValueError(f"step_timeout is {self.step_timeout} seconds; it must be above 0")
        self.stages = self.stages or {"retrain": StageConfig()}
        for name, stage in self.stages.items():
            stage.validate(f"stages.{name}", self.optimizer.name)
            if self.softmax and stage.needs_teacher:
                raise ValueError(
                    f"softmax=true trains the base itself, from which stages.{name} is to learn; its stages "
                    "retrain, with kl=0"
                )
        if self.softmax and self.calibrate:
            raise ValueError("softmax=true trains the base itself, which has no gates for calibrate=true to set")

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name


def from_omegaconf(config) -> RunConfig:
    """The typed form of a composed configuration.

    Raises:
        ValueError: an unknown or missing field, a wrong type or a value out of range.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), config)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(
            f"configuration: {str(error).splitlines()[0]} (at {error.full_key or 'the top'})"
        ) from error


def save(config: RunConfig, path: Path) -> None:
    OmegaConf.save(OmegaConf.structured(config), path)


def load(run_dir: Path) -> RunConfig:
    """The configuration of an existing run.

    Raises:
        ValueError: the directory is not a run, or its `config.yaml` no longer fits.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{run_dir} is no run: it has no config.yaml. Runs are made by `brumby train` and `brumby launch`"
        )
    return from_omegaconf(OmegaConf.load(path))
