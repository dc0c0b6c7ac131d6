"""How much of a base model's quality a recipe recovers, and at what price: one GPU, no DeepSpeed.

    python -m benchmarks.recovery --base FOLDER --train train.npy --held-out held-out.npz [--recipes NAME ...]
        [--tasks tasks.npz] [--confirmation confirmation.npz] [--sampled sampled.npy]
    python -m benchmarks.recovery --plot docs/recovery.png

`python -m benchmarks.recovery_data` makes all but the last, `python -m benchmarks.recovery_sample` that: text
which the base wrote, for stages with `sampled`. `FOLDER` is a checkpoint made by `brumby convert`: the student,
and with softmax the teacher. Recipes are entries of `benchmarks/recovery.yaml`. All of them see the same tokens
in the same order. The excess is the student's loss minus the softmax base's on text from none of the training
sources, and in domain that on text of the training sources, the last that a recipe would see. Rows of `recipe`,
`model`, `seed`, `tokens`, `excess_nats`, `excess_in_domain`, `base_loss`, `gpu_seconds` and `compile_seconds` go
to `benchmarks/results/<device>/recovery.json` as they come; a recipe that is there whole is not run again. The
last row of each recipe has `excess_by_eighth` of the sequence, `excess_of_repeats`, tokens that follow in it what
they followed there before, which attention looks up (arXiv 2312.04927), and `excess_of_others`; with confirmation,
text by which no recipe was chosen, `excess_of_confirmation`. With tasks it has `accuracy` by task and
`accuracy_above_chance`, the mean share of the base's above chance that is left; the row of recipe `base` is the
softmax base's. `gpu_seconds` are those of calibration and steps; what has to be compiled for them is compiled
before they are timed.

Shapes: B sequences, T tokens, N = B * T, E hidden size, W vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from brumby.benchmarks.accuracy import Task, above_chance, accuracy, load_tasks
from brumby.benchmarks.calibration import Calibration, calibrate
from brumby.benchmarks.recovery_steps import (
    CHUNK,
    Rotation,
    Stage,
    Steps,
    block,
    label_loss,
    logits_gradient,
    loss_metrics,
    mixer_error,
    own_error,
    read_error,
    teach,
)
from brumby.kernels.tiles import slug
from brumby.model import BrumbyForCausalLM
from brumby.model.modeling_brumby import BrumbyAttention

HERE = Path(__file__).parent
MODEL = "SmolLM2-135M-Instruct"
EVALUATED = 32  # sequences at once
Model = BrumbyForCausalLM


@dataclass(frozen=True)
class Recipe:
    name: str
    stages: list[Stage]
    calibration: Calibration
    power: int = 2
    evaluate_at: list[int] = field(default_factory=list)  # tokens; 0 and the end always count

    @classmethod
    def from_dict(cls, name: str, raw: dict[str, Any]) -> Recipe:
        """Raises TypeError for a name that no field has."""
        stages = [Stage(**stage) for stage in raw.pop("stages", [])]
        return cls(name, stages, Calibration(**raw.pop("calibration", {})), **raw)

    @property
    def tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def sampled(self) -> bool:
        return any(stage.sampled for stage in self.stages)


def precision(device: torch.device) -> torch.dtype:
    """Of matrix products; weights and moments are float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def rows_of(ids: Tensor, T: int) -> Tensor:
    """ids as rows [T + 1], whose first T tokens predict the last T; their number a multiple of `EVALUATED`."""
    num_rows = len(ids) // (T + 1)
    num_rows -= num_rows % EVALUATED if num_rows > EVALUATED else 0
    return ids[: num_rows * (T + 1)].view(num_rows, T + 1)


def means(values: dict[str, Tensor]) -> dict[str, float]:
    """By source, and the sources' as `all`."""
    found = {name: one.mean().item() for name, one in values.items()}
    return found | {"all": sum(found.values()) / len(found)}


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def repeats(rows: Tensor) -> Tensor:
    """Whether each next token of rows [., T + 1] follows a token that it followed there before, [., T]."""
    pairs, order = (rows[:, :-1].long() << 32 | rows[:, 1:].long()).sort(dim=1, stable=True)
    same = F.pad(pairs[:, 1:] == pairs[:, :-1], (1, 0))
    return same.scatter(1, order, same)


class Run:
    """Teacher, student and data on one device; recipes run one after another."""

    def __init__(
        self, base: Path, train: Path, held_out: Path, device: str, compile: bool, held_out_tokens: int, T: int,
        tasks: dict[str, Task] | None = None, sampled: Path | None = None,
        base_accuracy: dict[str, float] | None = None, confirmation: Path | None = None,
    ) -> None:  # fmt: skip
        self.T = T
        self.device = torch.device(device)
        self.dtype = precision(self.device)
        if self.device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream())  # graphs are captured on it, and autograd stays on it
        self.teacher = self.load(base, use_exp=True)
        self.teacher.requires_grad_(False)
        self.student = self.load(base, use_exp=False)
        self.start = self.copy_of_student()
        self.corrected: tuple[Any, ...] = ()  # by what the teacher was trained
        self.calibrated: tuple[Any, dict[str, Tensor], float] | None = None
        # What the last stages gave that others followed, with their seconds and losses: many recipes begin alike.
        self.begun: list[tuple[Any, dict[str, Tensor], float, float]] = []
        self.metrics: list[tuple[Tensor, Tensor]] = []
        self.metrics_seconds = 0.0
        wrap: Callable[[Any], Any] = torch.compile if compile else lambda function: function
        torch._dynamo.config.recompile_limit = 128
        torch._dynamo.config.automatic_dynamic_shapes = False
        self.block, self.teach = wrap(block), wrap(teach)
        self.mixer_error, self.own_error = wrap(mixer_error), wrap(own_error)
        self.read_error, self.logits_gradient, self.label_loss = (
            wrap(read_error),
            wrap(logits_gradient),
            wrap(label_loss),
        )
        ids = torch.from_numpy(np.load(train).astype(np.int32))
        self.train_ids = rows_of(ids, T).to(self.device)  # [rows, T + 1]
        written = np.load(sampled).astype(np.int32) if sampled else np.zeros(0, np.int32)
        self.sampled_ids = torch.from_numpy(written).view(-1, T + 1).to(self.device)
        self.held_out = self.rows_by_source(held_out, held_out_tokens)
        self.confirmation = self.rows_by_source(confirmation, held_out_tokens) if confirmation else {}
        self.tasks = tasks or {}
        self.repeats = {name: repeats(rows) for name, rows in self.held_out.items()}
        self.base_losses = self.losses_by_source(self.teacher, self.held_out)
        self.confirmation_losses = self.losses_by_source(self.teacher, self.confirmation)
        self.base_loss = means(self.base_losses)
        self.base_accuracy = base_accuracy or self.answer(self.teacher)

    def load(self, base: Path, **options: Any) -> Model:
        model: nn.Module = BrumbyForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
        return cast(Model, model.to(self.device).train())

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def rotation(self, model: Model, num_tokens: int) -> Rotation:
        position_ids = torch.arange(num_tokens, device=self.device)[None]
        return model.model.rotary_emb(model.model.embed_tokens.weight[:1, None], position_ids)

    def hidden(self, model: Model, input_ids: Tensor) -> list[Tensor]:
        """The residual stream before every layer, and the final norm's output, each [B, T, E]."""
        rotation = self.rotation(model, input_ids.shape[1])
        x = model.model.embed_tokens(input_ids)
        stream = []
        for layer in model.model.layers:
            stream.append(x)
            x = self.block(layer, x, rotation)
        return [*stream, model.model.norm(x)]

    @torch.no_grad()
    def token_losses(self, model: Model, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of each next token of ids [B, T + 1] the cross-entropy [B, T], and whether it is the most likely one."""
        with self.autocast():
            x = self.hidden(model, ids[:, :-1])[-1].flatten(0, 1)
            weight = model.lm_head.weight.to(self.dtype)
            labels = ids[:, 1:].flatten()
            parts = [
                self.label_loss(x[i : i + CHUNK].to(self.dtype) @ weight.T, labels[i : i + CHUNK])
                for i in range(0, len(x), CHUNK)
            ]
        losses, hits = (torch.cat(values).view(len(ids), -1) for values in zip(*parts, strict=True))
        return losses, hits

    def losses(self, model: Model, rows: Tensor) -> Tensor:
        """Nats of each next token of rows [., T + 1], [., T]."""
        return torch.cat([self.token_losses(model, part)[0] for part in rows.split(EVALUATED)])

    def rows_by_source(self, path: Path, num_tokens: int) -> dict[str, Tensor]:
        """The first tokens of each source of an npz, as rows [., T + 1]."""
        with np.load(path) as sources:
            return {
                name: rows_of(torch.from_numpy(ids[:num_tokens].astype(np.int64)), self.T).to(self.device)
                for name, ids in sources.items()
            }

    def losses_by_source(self, model: Model, texts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.losses(model, rows) for name, rows in texts.items()}

    def excess(self, texts: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
        """By source, of each token: the student's loss minus the softmax base's."""
        return {name: one - base[name] for name, one in self.losses_by_source(self.student, texts).items()}

    def where(self, excess: dict[str, Tensor]) -> dict[str, Any]:
        """Where the excess of each token [., T] is, by held-out source; on average over the sources."""
        eighths = [torch.stack([part.mean() for part in one.chunk(8, 1)]) for one in excess.values()]
        repeated = {name: one[self.repeats[name]] for name, one in excess.items()}
        others = {name: one[~self.repeats[name]] for name, one in excess.items()}
        return {
            "excess_by_eighth": [round(value, 4) for value in torch.stack(eighths).mean(0).tolist()],
            "excess_of_repeats": round(means(repeated)["all"], 4),
            "excess_of_others": round(means(others)["all"], 4),
        }

    def answer(self, model: Model) -> dict[str, float]:
        """Accuracy by task."""
        num_tokens = 2**16 if self.device.type == "cuda" else 2**12
        return accuracy(lambda ids: self.token_losses(model, ids.to(self.device)), self.tasks, num_tokens)

    def accuracy_row(self, found: dict[str, float]) -> dict[str, Any]:
        if not found:
            return {}
        share = above_chance(found, self.base_accuracy, self.tasks)
        return {"accuracy": rounded(found), "accuracy_above_chance": round(share, 4)}

    def batches(self, seed: int, ids: Tensor) -> Iterator[Tensor]:
        """Rows [T + 1] of `ids` without end, in an order that the seed alone decides."""
        if not len(ids):
            raise ValueError("a stage is to see text that the base wrote, and there is none")
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from self.shuffled(ids, generator)

    def shuffled(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        return ids[torch.randperm(len(ids), generator=generator).to(self.device)]

    # ------------------------------------------------------------------------------------------------
    # Training

    def recover(self, recipe: Recipe, seed: int, record: Callable[[dict[str, Any]], None]) -> None:
        """Run a recipe from the converted base; `record` takes a row at every measurement."""
        student = self.student
        student.load_state_dict(self.start)
        self.have_for_teacher(self.start, ())
        for layer in student.model.layers:
            layer.self_attn.__class__ = BrumbyAttention
        student.config.p = recipe.power
        student.config.use_exp = bool(recipe.stages) and recipe.stages[0].softmax
        rows, written = (self.batches(seed, ids) for ids in (self.train_ids, self.sampled_ids))
        unseen = self.shuffled(self.train_ids, torch.Generator().manual_seed(seed))[-EVALUATED:].long()
        base_loss = self.losses(self.teacher, unseen).mean().item()
        owed, seen, seconds, compiling = 0.0, 0, 0.0, 0.0

        def take(stage: Stage) -> Tensor:
            """The next row."""
            nonlocal owed
            owed += stage.sampled
            if owed < 1:
                return next(rows)
            owed -= 1
            return next(written)

        def prepare() -> None:
            """From the softmax base, as it is by now, to a student with power retention."""
            nonlocal seconds, compiling
            student.config.use_exp = False
            ids = self.train_ids[-recipe.calibration.sequences :, :-1].long()
            with torch.no_grad():
                compiling += self.timed(
                    student.model.layers[0],
                    student.model.embed_tokens(ids),
                    position_embeddings=self.rotation(student, self.T),
                )
            seconds += self.calibrate(ids, recipe.calibration)

        if not student.config.use_exp:
            prepare()

        def measure(loss: float | None, final: bool) -> None:
            by_token = self.excess(self.held_out, self.base_losses)
            excess = rounded(means(by_token))
            confirmed = {}
            if final and self.confirmation:
                of_confirmation = self.excess(self.confirmation, self.confirmation_losses)
                confirmed = {"excess_of_confirmation": rounded(means(of_confirmation))}
            in_domain = self.losses(student, unseen).mean().item() - base_loss
            record({
                "tokens": seen, "excess_nats": excess.pop("all"), "excess_by_source": excess,
                "excess_in_domain": round(in_domain, 4),
                "base_loss": round(self.base_loss["all"], 4), "train_loss": loss,
                "gpu_seconds": round(seconds, 2), "compile_seconds": round(compiling, 2), "final": final,
                **(self.where(by_token) if final else {}),
                **confirmed,
                **self.accuracy_row(self.answer(student) if final else {}),
            })  # fmt: skip

        measure(None, final=not recipe.stages)
        for n, stage in enumerate(recipe.stages):
            final = stage is recipe.stages[-1]
            if student.config.use_exp and not stage.softmax:
                self.have_for_teacher(self.copy_of_student(), (seed, recipe.stages[:n]))
                prepare()
            key = seed, recipe.calibration, recipe.power, recipe.stages[: n + 1]
            known = next((begun for begun in self.begun if begun[0] == key), None)
            if known and not final and not recipe.evaluate_at:
                _, state, stage_seconds, loss = known
                student.load_state_dict(state)
                num_sequences = max(1, stage.tokens // (stage.sequences * self.T)) * stage.sequences
                for _ in range(num_sequences):
                    take(stage)
                seen, seconds = seen + num_sequences * self.T, seconds + stage_seconds
                measure(loss, final)
                continue
            if stage.metric:
                seconds += self.measure_metrics()
            before, steps = seconds, Steps(self, stage)
            length = self.T // stage.pieces
            compiling += self.timed(steps.warm_up, self.train_ids[: stage.sequences, : length + 1].long())
            for i in range(steps.num_steps):
                started = time.perf_counter()
                first = i % stage.pieces * length
                if not first:
                    ids = torch.stack([take(stage) for _ in range(stage.sequences)]).long()
                found = steps.step(i, ids[:, first : first + length + 1])
                seen += stage.sequences * length
                last = i + 1 == steps.num_steps
                if last or any(seen - stage.sequences * length < at <= seen for at in recipe.evaluate_at):
                    loss = round(found.item(), 4)
                    seconds += time.perf_counter() - started
                    if not math.isfinite(loss):
                        raise FloatingPointError(f"{recipe.name}: the loss is {loss} after {seen} tokens")
                    measure(loss, final and last)
                else:
                    seconds += time.perf_counter() - started
            if not final:
                self.begun[n:] = [(key, self.copy_of_student(), seconds - before, loss)]

    def have_for_teacher(self, weights: dict[str, Tensor], corrected: tuple[Any, ...]) -> None:
        """Take weights that `corrected` describes, () for the base's, for the teacher's."""
        if corrected != self.corrected:
            self.teacher.load_state_dict(weights)
            self.corrected = corrected
            self.metrics.clear()

    def measure_metrics(self) -> float:
        """The teacher's metrics, measured once; their seconds."""
        if not self.metrics:
            ids = self.train_ids[-32:, :-1].long()
            self.metrics_seconds = self.timed(lambda: self.metrics.extend(loss_metrics(self, ids)))
        return self.metrics_seconds

    def copy_of_student(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.student.state_dict().items()}

    def calibrate(self, ids: Tensor, options: Calibration) -> float:
        """Calibrate the student, or take what the last calibration gave if it was the same; its seconds."""
        key = options, self.student.config.p, self.corrected
        if self.calibrated is None or self.calibrated[0] != key:
            seconds = self.timed(calibrate, self.student, self.teacher, ids, options)
            self.calibrated = key, self.copy_of_student(), seconds
        self.student.load_state_dict(self.calibrated[1])
        return self.calibrated[2]

    def timed(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Seconds that a call takes on the device."""
        self.synchronize()
        started = time.perf_counter()
        function(*args, **kwargs)
        self.synchronize()
        return time.perf_counter() - started

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# ----------------------------------------------------------------------------------------------------
# Rows


class Results:
    """`recovery.json`, written anew with every row."""

    def __init__(self, path: Path, model: str, device: str) -> None:
        self.path, self.model = path, model
        self.head = {"device": device, "date": str(date.today()), "torch": torch.__version__}
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []

    def has(self, recipe: Recipe, seed: int) -> bool:
        mine = (recipe.name, self.model, seed)
        return any(r["final"] and (r["recipe"], r["model"], r["seed"]) == mine for r in self.rows)

    def base_accuracy(self, tasks: dict[str, Task]) -> dict[str, float]:
        """The base's by task, where a run before has found it for these tasks; else nothing."""
        mine = (row["accuracy"] for row in self.rows if (row["recipe"], row["model"]) == ("base", self.model))
        return next((accuracy for accuracy in mine if accuracy.keys() == tasks.keys()), {})

    def add(self, recipe: Recipe, seed: int, row: dict[str, Any]) -> None:
        row = {"recipe": recipe.name, "model": self.model, "seed": seed, **row}
        print(json.dumps(row), flush=True)
        same = ("recipe", "model", "seed", "tokens")
        self.rows = [r for r in self.rows if any(r[key] != row[key] for key in same)] + [row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.head | {"rows": self.rows}, indent=1) + "\n")
        unfinished.rename(self.path)


CURVES = {  # models and recipes whose last rows make a line, by what they are
    "the published way": (MODEL, ("seed-5m", "seed-15m", "seed-40m")),
    "stages, Muon": (MODEL, ("pieces4-5m", "distance-muon-klmuon2-ce-15m", "distance-muon-klmuon4-ce-40m")),
    "and QK norms": (
        "SmolLM2-135M-new-QK-norm",
        ("distance-muon-klmuon1-ce-5m", "distance-muon-klmuon2-ce-15m"),
    ),
    "and heads of 128": (
        "SmolLM2-135M-wide-heads-new-QK-norm",
        ("distance-muon-klmuon1-ce-5m", "slower-kl-embed-15m", "part-kl-embed-40m"),
    ),
    "and a sink": (
        "SmolLM2-135M-wide-heads-new-QK-norm-sink20",
        ("distance-muon-klmuon1-ce-5m", "slower-kl-embed-15m", "slower-kl-embed-40m"),
    ),
    "the softmax base, trained on": (MODEL, ("softmax-5m", "softmax-15m", "softmax-40m")),
}


def plot(folder: Path, path: Path) -> None:
    """Excess against tokens, of all rows below `folder`, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for file in sorted(folder.glob("*/recovery.json")) for row in json.loads(file.read_text())["rows"]]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for color, (label, (model, recipes)) in enumerate(CURVES.items()):
        ours = [row for row in rows if row["model"] == model and row["recipe"] in recipes]
        seeds = {recipe: min(row["seed"] for row in ours if row["recipe"] == recipe) for recipe in recipes}
        ours = [row for row in ours if row["seed"] == seeds[row["recipe"]]]
        # Not what stands before the first step, nor a teacher that learns the text before it teaches.
        mine = [row for row in ours if row["tokens"] and (row["excess_nats"] > 0 or "softmax" in row["recipe"])]
        for recipe in recipes:
            points = sorted((row["tokens"] / 1e6, row["excess_nats"]) for row in mine if row["recipe"] == recipe)
            axes.plot(*zip(*points, strict=True), color=f"C{color}", marker=".", linestyle=":", linewidth=1)
        points = sorted((row["tokens"] / 1e6, row["excess_nats"]) for row in mine if row["final"])
        axes.plot(*zip(*points, strict=True), color=f"C{color}", marker="o", label=label)
    axes.set(xscale="log", xlabel="million tokens", ylabel="nats above the base")
    axes.set_xticks([1, 2.5, 5, 15, 40], labels=["1", "2.5", "5", "15", "40"])
    axes.minorticks_off()
    axes.axhline(0, color="black", linewidth=0.5)
    axes.legend()
    figure.savefig(path, dpi=130)


def load_recipes(path: Path, names: list[str]) -> list[Recipe]:
    """Raises ValueError for a name that the file does not have, TypeError for a field that no recipe has."""
    raw = yaml.safe_load(path.read_text())["recipes"]
    unknown = sorted(set(names) - set(raw))
    if unknown:
        raise ValueError(f"{path} has no recipe {', '.join(unknown)}; it has {', '.join(raw)}")
    return [Recipe.from_dict(name, raw[name]) for name in names or raw]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="draw all rows that there are, and nothing else")
    parser.add_argument("--base", type=Path, help="a folder made by `brumby convert`")
    parser.add_argument("--train", type=Path, help="token ids, npy")
    parser.add_argument("--held-out", type=Path, help="token ids by source, npz")
    parser.add_argument("--held-out-tokens", type=int, default=2**20, help="of each source at most")
    parser.add_argument("--confirmation", type=Path, help="as --held-out, measured at a recipe's end alone")
    parser.add_argument("--tasks", type=Path, help="questions of benchmarks/accuracy.py, npz")
    parser.add_argument("--sampled", type=Path, help="token ids that the base wrote, npy")
    parser.add_argument("--recipes", nargs="*", default=[], help="names; by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the order of the tokens")
    parser.add_argument("--recipe-file", type=Path, default=HERE / "recovery.yaml")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="no recipe starts that would end after them"
    )
    parser.add_argument("--out", type=Path, help="by default benchmarks/results/<device>")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(argv)
    if args.plot:
        plot(HERE / "results", args.plot)
        return
    if None in (args.base, args.train, args.held_out):
        parser.error("--base, --train and --held-out are missing")
    started = time.perf_counter()
    recipes = load_recipes(args.recipe_file, args.recipes)
    if not args.sampled:
        recipes = [recipe for recipe in recipes if not recipe.sampled or recipe.name in args.recipes]
        if needy := [recipe.name for recipe in recipes if recipe.sampled]:
            parser.error(f"--sampled is missing, which {', '.join(needy)} needs")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    results = Results((args.out or HERE / "results" / slug(name)) / "recovery.json", args.model, name)
    tasks = load_tasks(args.tasks) if args.tasks else {}
    known = results.base_accuracy(tasks)
    run = Run(
        args.base, args.train, args.held_out, args.device, not args.no_compile, args.held_out_tokens,
        args.sequence_length, tasks, args.sampled, known, args.confirmation,
    )  # fmt: skip
    print(json.dumps({"base_loss": run.base_loss, "train_tokens": run.train_ids.numel()}), flush=True)
    if tasks and not known:
        row = {"tokens": 0, "excess_nats": 0.0, "base_loss": round(run.base_loss["all"], 4), "final": True}
        results.add(Recipe("base", [], Calibration()), args.seeds[0], row | run.accuracy_row(run.base_accuracy))
    rate = math.inf  # tokens a second, the slowest so far
    for seed, recipe in product(args.seeds, recipes):
        if results.has(recipe, seed):
            continue
        left = args.seconds - (time.perf_counter() - started)
        if recipe.tokens / rate > left:
            print(f"{recipe.name}: not started, {left:.0f} s are left", flush=True)
            continue
        begun = time.perf_counter()
        try:
            run.recover(recipe, seed, partial(results.add, recipe, seed))
        except (FloatingPointError, torch.OutOfMemoryError) as error:
            print(f"{recipe.name}: {error}", flush=True)
        if recipe.tokens:
            rate = min(rate, recipe.tokens / (time.perf_counter() - begun))


if __name__ == "__main__":
    main()
