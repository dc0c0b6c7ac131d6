"""The steps of benchmarks/recovery.py: what a stage trains, and by which loss, with a teacher beside the student.

Shapes: B sequences, T tokens, N = B * T, E hidden size, W vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brumby.benchmarks.muon import Muon
from brumby.model.modeling_brumby import BrumbyAttention, BrumbyDecoderLayer, softmax_attention

if TYPE_CHECKING:
    from brumby.benchmarks.recovery import Run

CHUNK = 4096  # tokens whose logits are held at once
Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Stage:
    """One way of training for `tokens`.

    `align` matches each layer's mixer to the teacher's attention on the teacher's hidden states, whose loss is
    the relative squared error. With `metric`, the weight of the teacher's Fisher information beside the identity,
    errors count in the metric of `loss_metrics`; with `own` a mixer reads the student's residual stream, and has
    to make up for what is missing there. Otherwise the loss is the weighted sum of `kl` (Kullback-Leibler
    divergence from the teacher's logits at `temperature`), `ce` (cross-entropy) and `hidden` (relative squared
    error of what each layer reads). Rates fall along a cosine to `min_ratio` after a warm-up; `mixer_lr` and
    `gate_lr` are those of the attention's projections and of the gates, by default `lr`.
    """

    tokens: int
    align: bool = False
    metric: float = 0.0
    own: bool = False
    kl: float = 1.0
    ce: float = 0.0
    hidden: float = 0.0
    temperature: float = 1.0
    lr: float = 1e-3
    mixer_lr: float | None = None
    gate_lr: float | None = None
    sequences: int = 8
    warmup: float = 0.02
    min_ratio: float = 0.02
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    optimizer: str = "adamw"  # or muon: the layers' matrices by Muon, at `lr`, the rest by AdamW, at `adam_lr`
    adam_lr: float = 1e-3
    by_head: bool = False  # Muon takes the part of each head in q, k, v and o for a matrix of its own
    row_beta: float = 0.0  # Muon's rows are divided by the root of their mean square; 0: they are not
    sampled: float = 0.0  # share of the sequences that the base wrote itself
    reach: float = 1.0  # how far it goes from its first weights to its last (WiSE-FT, arXiv 2109.01903)
    pieces: int = 1  # in how many steps the tokens of a sequence are taken, each without the ones before
    fade: float = 0.0  # share of the stage in which the outputs change from softmax to power retention
    fade_by_layer: bool = False  # one layer after the other instead of all at once
    softmax: bool = False  # train the softmax base: the control, or, if others follow, their student and teacher


class FadingAttention(BrumbyAttention):
    """Power retention, of whose output the share `fade` is still softmax attention."""

    fade: Tensor

    def retention(self, q, k, v, log_g, mask, cache, cu_seqlens) -> Tensor:
        y = super().retention(q, k, v, log_g, mask, cache, cu_seqlens)
        return y + self.fade.to(y.dtype) * (softmax_attention(q, k, v).to(y.dtype) - y)


def block(layer: BrumbyDecoderLayer, x: Tensor, rotation: Rotation) -> Tensor:
    return layer(x, position_embeddings=rotation)


def teach(layer: BrumbyDecoderLayer, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the attention reads, what it writes, the residual stream with it, and the layer's output."""
    h = layer.input_layernorm(x)
    a = layer.self_attn(h, position_embeddings=rotation)
    x = x + a
    return h, a, x, x + layer.mlp(layer.post_attention_layernorm(x))


def mixer_error(
    layer: BrumbyDecoderLayer, h: Tensor, a: Tensor, attended: Tensor, metric: Tensor | None, rotation: Rotation
) -> Tensor:
    y = layer.self_attn(h, position_embeddings=rotation)
    return relative_error(y, a) if metric is None else metric_error(y - a, a, attended, metric)


def own_error(
    layer: BrumbyDecoderLayer, x: Tensor, a: Tensor, attended: Tensor, metric: Tensor | None, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """The error of the student's stream x after its mixer, and the stream after the layer."""
    y = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotation)
    missing = x + y - attended
    if metric is None:
        error = missing.square().sum() / a.float().square().sum()
    else:
        error = metric_error(missing, a, attended, metric)
    x = (x + y).detach()
    return error, x + layer.mlp(layer.post_attention_layernorm(x))


def metric_error(error: Tensor, a: Tensor, attended: Tensor, metric: Tensor) -> Tensor:
    """Relative squared error in a metric [E, E], of tokens divided by the size of the residual stream."""
    scale = attended.float().square().mean(-1, keepdim=True).rsqrt()
    return ((error * scale) @ metric).float().square().sum() / ((a * scale) @ metric).float().square().sum()


def relative_error(x: Tensor, target: Tensor) -> Tensor:
    return (x.float() - target.float()).square().sum() / target.float().square().sum()


def read_error(layer: BrumbyDecoderLayer, x: Tensor, target: Tensor) -> Tensor:
    """Relative squared error of what `layer` reads of the residual stream."""
    return relative_error(layer.input_layernorm(x), layer.input_layernorm(target))


def logits_gradient(
    z: Tensor, z_teacher: Tensor | None, labels: Tensor, kl: float, ce: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Sum of the losses, and their gradient with respect to the student's logits z [N, W]."""
    z = z.float()
    loss, dz = z.new_zeros(()), torch.zeros_like(z)
    if ce:
        log_p = z.log_softmax(-1)
        words = torch.arange(z.shape[1], device=z.device)
        loss = loss - ce * log_p.gather(1, labels[:, None]).sum()
        dz = dz + ce * (log_p.exp() - (words == labels[:, None]).float())
    if z_teacher is not None:
        log_p = (z / temperature).log_softmax(-1)
        log_t = (z_teacher.float() / temperature).log_softmax(-1)
        loss = loss + kl * temperature**2 * (log_t.exp() * (log_t - log_p)).sum()
        dz = dz + kl * temperature * (log_p.exp() - log_t.exp())
    return loss, dz


def label_loss(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy [N] of logits [N, W], and whether the label is the most likely word [N]."""
    return F.cross_entropy(z.float(), labels, reduction="none"), z.argmax(-1) == labels


def loss_metrics(run: Run, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Eigenvalues [E] (their mean is 1) and eigenvectors [E, E] by layer of the teacher's Fisher information with
    respect to what its attention gives for ids [N, T], each token's times the size of the residual stream.

    A small error e adds e^T F e / 2 to the divergence from the teacher, if tokens are taken for independent.
    """
    teacher, rotation = run.teacher, run.rotation(run.teacher, ids.shape[1])
    generator = torch.Generator(run.device).manual_seed(0)
    E = teacher.config.hidden_size
    grams = [torch.zeros(E, E, device=run.device) for _ in teacher.model.layers]
    for row in ids.split(1):
        x = teacher.model.embed_tokens(row).detach().requires_grad_(True)
        given, sizes = [], []
        with run.autocast():
            for layer in teacher.model.layers:
                _, a, attended, x = teach(layer, x, rotation)
                given.append(a)
                sizes.append(attended.detach().float().square().mean(-1, keepdim=True).sqrt())
            z = teacher.lm_head(teacher.model.norm(x))[0].float()
        labels = torch.multinomial(z.detach().softmax(-1), 1, generator=generator)[:, 0]
        gradients = torch.autograd.grad(F.cross_entropy(z, labels, reduction="sum"), given)
        for gram, g, size in zip(grams, gradients, sizes, strict=True):
            scaled = (g.float() * size)[0]
            gram += scaled.T @ scaled
    return [torch.linalg.eigh(gram / gram.diagonal().mean()) for gram in grams]


class LogitsLoss(torch.autograd.Function):
    """Mean loss over tokens from final hidden states; logits live for `CHUNK` tokens at a time."""

    @staticmethod
    def forward(ctx, x, weight, x_teacher, weight_teacher, labels, stage: Stage, run: Run) -> Tensor:
        N = len(x)
        w, w_teacher = weight.to(run.dtype), weight_teacher.to(run.dtype)
        x_teacher = x_teacher.to(run.dtype) if stage.kl else None
        x, dx, dw = x.to(run.dtype), torch.empty_like(x), torch.zeros_like(weight)
        loss, weights = x.new_zeros((), dtype=torch.float32), (stage.kl, stage.ce, stage.temperature)
        for i in range(0, N, CHUNK):
            rows = slice(i, i + CHUNK)
            teacher = x_teacher[rows] @ w_teacher.T if stage.kl else None
            part, dz = run.logits_gradient(x[rows] @ w.T, teacher, labels[rows], *weights)
            dz = (dz / N).to(run.dtype)
            loss += part / N
            dx[rows] = dz @ w
            dw += dz.T @ x[rows]
        ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dx, dw = ctx.saved_tensors
        return dx * dloss, dw * dloss, None, None, None, None, None


class Steps:
    """The optimizer and the steps of one stage."""

    def __init__(self, run: Run, stage: Stage) -> None:
        self.run, self.stage = run, stage
        self.num_steps = max(1, stage.tokens // (stage.sequences * run.T)) * stage.pieces
        self.metrics: list[Tensor | None] = [None] * len(run.student.model.layers)
        if stage.metric:
            self.metrics = [(v * (1 + stage.metric * values).sqrt()) @ v.T for values, v in run.metrics]
        self.optimizers = self.make_optimizers()
        self.first = run.copy_of_student() if stage.reach != 1.0 else {}
        for layer in run.student.model.layers if stage.fade else ():
            layer.self_attn.__class__ = FadingAttention
            layer.self_attn.fade = torch.ones((), device=run.device)

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        stage, layers = self.stage, self.run.student.model.layers
        gates: list[Tensor] = []
        mixer: list[Tensor] = []
        rest: list[Tensor] = []
        for name, p in self.run.student.named_parameters():
            group = gates if ".g_proj." in name else mixer if ".self_attn." in name else rest
            p.requires_grad_(group is not rest if stage.align else not (stage.softmax and group is gates))
            p.grad = None
            if p.requires_grad:
                group.append(p)
        muon: list[Tensor] = []
        if stage.optimizer == "muon":
            hidden = {id(p) for p in layers.parameters() if p.ndim == 2 and min(p.shape) > 16}
            muon = [p for p in (*mixer, *rest) if id(p) in hidden]
            mixer, rest = ([p for p in group if id(p) not in hidden] for group in (mixer, rest))
        elif stage.optimizer != "adamw":
            raise ValueError(f"optimizer is {stage.optimizer!r}; expected adamw or muon")
        lr = stage.adam_lr if muon else stage.lr
        groups = [
            {"params": params, "lr": rate, "peak_lr": rate, "weight_decay": stage.weight_decay if decay else 0.0}
            for params, rate, decay in (
                (gates, stage.gate_lr or lr, False),
                (mixer, (stage.mixer_lr or stage.lr) if not muon else lr, True),
                (rest, lr, True),
            )
            if params
        ]
        fused = self.run.device.type == "cuda"
        found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=stage.betas, eps=1e-8, fused=fused)]
        if muon:
            found.append(Muon(self.matrices(muon), weight_decay=stage.weight_decay, row_beta=stage.row_beta))
        return found

    def matrices(self, parameters: list[Tensor]) -> list[dict[str, Any]]:
        """Muon's groups."""
        stage, model = self.stage, self.run.student
        names = {id(p): name for name, p in model.named_parameters()}
        found: dict[tuple[tuple[int, int] | None, float], list[Tensor]] = {}
        for p in parameters:
            mixer = ".self_attn." in names[id(p)]
            heads = (int(".o_proj." in names[id(p)]), model.config.head_dim) if mixer and stage.by_head else None
            lr = stage.mixer_lr or stage.lr if mixer else stage.lr
            found.setdefault((heads, lr), []).append(p)
        return [{"params": p, "heads": heads, "lr": lr, "peak_lr": lr} for (heads, lr), p in found.items()]

    def step(self, i: int, ids: Tensor) -> Tensor:
        """Train on ids [B, T + 1]; the loss."""
        run, stage = self.run, self.stage
        done = i / self.num_steps
        warmup = max(1, round(stage.warmup * self.num_steps))
        cosine = stage.min_ratio + (1 - stage.min_ratio) * 0.5 * (1 + math.cos(math.pi * done))
        ratio = min(1.0, (i + 1) / warmup) * cosine
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * ratio
        if stage.fade:
            self.set_fade(done / stage.fade)
        captured = self.run.device.type == "cuda"
        loss = self.replay(ids) if captured else self.gradients(ids)
        parameters = [p for p in run.student.parameters() if p.grad is not None]
        if not stage.align:  # there each layer has a loss of its own
            nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        for optimizer in self.optimizers:
            optimizer.step()
        if not captured:
            self.forget_gradients()
        if self.first and i + 1 == self.num_steps:
            last = run.student.state_dict()
            run.student.load_state_dict({name: p.lerp(last[name], stage.reach) for name, p in self.first.items()})
        return loss

    def gradients(self, ids: Tensor) -> Tensor:
        with self.run.autocast():
            if self.stage.align:
                return self.align(ids[:, :-1])
            return self.retrain(ids[:, :-1], ids[:, 1:].flatten())

    def warm_up(self, ids: Tensor) -> None:
        """Compile what gradients need; on a GPU capture it in a graph, for launching takes longer than running."""
        self.gradients(ids)
        self.forget_gradients()
        if self.run.device.type == "cuda":
            self.ids, self.graph = ids.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.loss = self.gradients(self.ids)

    def replay(self, ids: Tensor) -> Tensor:
        """`gradients`, into the same tensors every time."""
        self.ids.copy_(ids)
        self.graph.replay()
        return self.loss

    def forget_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def set_fade(self, progress: float) -> None:
        layers = self.run.student.model.layers
        for i, layer in enumerate(layers):
            left = 1 - progress * len(layers) + i if self.stage.fade_by_layer else 1 - progress
            layer.self_attn.fade.fill_(min(1.0, max(0.0, left)))

    def align(self, ids: Tensor) -> Tensor:
        """One pass of the teacher trains the mixers of all layers; their mean relative squared error."""
        run = self.run
        teacher, student = run.teacher.model, run.student.model
        rotation = run.rotation(run.teacher, ids.shape[1])
        x = own = teacher.embed_tokens(ids)
        total = x.new_zeros((), dtype=torch.float32)
        for theirs, ours, metric in zip(teacher.layers, student.layers, self.metrics, strict=True):
            with torch.no_grad():
                h, a, attended, x = run.teach(theirs, x, rotation)
            if self.stage.own:
                loss, own = run.own_error(ours, own, a, attended, metric, rotation)
            else:
                loss = run.mixer_error(ours, h, a, attended, metric, rotation)
            loss.backward()
            total += loss.detach()
        return total / len(teacher.layers)

    def retrain(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, divergence from the teacher, or both, and the error of what layers read."""
        run, stage = self.run, self.stage
        wanted: list[Tensor] = []
        if stage.kl or stage.hidden:
            with torch.no_grad():
                wanted = run.hidden(run.teacher, ids)
        stream = run.hidden(run.student, ids)
        head = run.student.lm_head.weight
        x_teacher = wanted[-1].flatten(0, 1) if wanted else None
        x = stream[-1].flatten(0, 1)
        loss = LogitsLoss.apply(x, head, x_teacher, run.teacher.lm_head.weight, labels, stage, run)
        value = loss.detach()
        if stage.hidden:
            layers = run.teacher.model.layers[1:]
            errors = [run.read_error(*part) for part in zip(layers, stream[1:-1], wanted[1:-1], strict=True)]
            loss = loss + stage.hidden * torch.stack(errors).mean()
        loss.backward()
        return value
