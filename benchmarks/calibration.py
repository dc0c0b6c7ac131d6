"""Set what can be set from the teacher's statistics on a few sequences: no gradients, least squares only.

Layers are taken in order, and each is fitted on the student's own residual stream, so that it also makes up for
the errors before it:

1. *gates*: a constant for each key-value head.
2. *q*, *k*: with s = q . k, retention weighs a token by g^(i - j) s^2, softmax by a. The projections are the least
   squares fit of g^((i - j) / 2) s to sqrt(a): the Hellinger distance of the two weightings, linear in q's matrix
   for given keys and in k's for given queries. The root of a probability has one sign, so the even power's
   blindness to the sign of s goes. Only where q and k are linear in the hidden states and the power is 2.
3. *o_proj*, *down_proj*: ridge regression of the teacher's residual stream on the student's outputs.

Shapes: N sequences, T tokens, E hidden size, H key-value heads, R query heads of each, K head_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from brumby.model import BrumbyForCausalLM

GRID = (1.5, 2.5, 3.5, 4.5, 6.0, 8.0)  # gate logits: half-lives of 3, 9, 23, 63, 280 and 2,000 tokens


@dataclass(frozen=True)
class Calibration:
    """`gates`: constant (0.999), spread (logits 1.5 to 6 over a layer's heads), distance (a half-life is the
    median distance of the teacher's attention) or fit (the best of `GRID`). `qk`: rounds of fitting q, then k.
    `outputs`: fit o_proj; `mlp`: fit down_proj."""

    gates: str = "spread"
    logit: float = 6.906768
    qk: int = 0
    steps: int = 8
    outputs: bool = False
    mlp: bool = False
    ridge: float = 0.01
    sequences: int = 8


@torch.no_grad()
def calibrate(student: BrumbyForCausalLM, teacher: BrumbyForCausalLM, ids: Tensor, options: Calibration) -> None:
    """Set the student's gates and, as `options` say, projections from ids [N, T].

    Raises:
        ValueError: the gates have no biases; or q and k are to be fitted and have norms or biases, or the power,
            for which `gates: fit` is meant too, is not 2.
    """
    check(student, options)
    heads = student.config.num_key_value_heads
    for layer in student.model.layers:
        layer.self_attn.g_proj.weight.zero_()
        if options.gates == "constant":
            layer.self_attn.g_proj.bias.fill_(options.logit)
        else:
            layer.self_attn.g_proj.bias.copy_(torch.linspace(1.5, 6.0, heads))
    if not (options.qk or options.outputs or options.mlp or options.gates in ("distance", "fit")):
        return
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotation = student.model.rotary_emb(student.model.embed_tokens.weight[:1, None], positions)
    ours = student.model.embed_tokens(ids)  # [N, T, E]
    theirs = ours
    for s, t in zip(student.model.layers, teacher.model.layers, strict=True):
        h_theirs, h = t.input_layernorm(theirs), s.input_layernorm(ours)
        fit = Attention(s.self_attn, t.self_attn, h, h_theirs, rotation, options)
        fit.set_gates()
        if options.qk:
            fit.set_q_and_k()
        attended = theirs + t.self_attn(h_theirs, position_embeddings=rotation)
        y = fit.outputs()  # [N, T, HQ * K]
        if options.outputs:
            regress(s.self_attn.o_proj, y, attended - ours, options.ridge)
        ours = ours + s.self_attn.o_proj(y)
        theirs = attended + t.mlp(t.post_attention_layernorm(attended))
        x = s.post_attention_layernorm(ours)
        x = s.mlp.act_fn(s.mlp.gate_proj(x)) * s.mlp.up_proj(x)
        if options.mlp:
            regress(s.mlp.down_proj, x, theirs - ours, options.ridge)
        ours = ours + s.mlp.down_proj(x)


def check(student: BrumbyForCausalLM, options: Calibration) -> None:
    config = student.config
    if options.gates not in ("constant", "spread", "distance", "fit"):
        raise ValueError(f"gates is {options.gates!r}; expected constant, spread, distance or fit")
    if not config.gate_bias:
        raise ValueError(
            "calibration sets the gates' biases, and this model has none: convert it with gate_bias=true"
        )
    if options.qk and (config.qk_norm or config.qkv_bias):
        found = "norms" if config.qk_norm else "biases"
        raise ValueError(
            f"qk is {options.qk}, but q and k of this model have {found}, and the fit needs them linear in the "
            "hidden states; set qk to 0: gates, outputs and mlp can still be fitted"
        )
    if (options.qk or options.gates == "fit") and config.p != 2:
        raise ValueError(f"qk and gates=fit are fits of the power 2; this model's is {config.p}")


def regress(linear: nn.Linear, x: Tensor, target: Tensor, ridge: float) -> None:
    """linear's weight becomes the ridge fit of x [N, T, I] to target [N, T, O], drawn towards what it was."""
    missing = (target - linear(x)).flatten(0, 1).double()
    x = x.flatten(0, 1).double()
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    linear.weight += torch.linalg.solve(gram, x.T @ missing).T.to(linear.weight.dtype)


class Attention:
    """One layer's fit of retention's weights to the teacher's probabilities."""

    def __init__(self, ours, theirs, h: Tensor, h_theirs: Tensor, rotation, options: Calibration) -> None:
        self.module, self.h, self.rotation, self.options = ours, h, rotation, options
        K = ours.head_dim
        N, length, _ = h.shape
        self.K = K
        self.H = theirs.k_proj.out_features // K
        self.R = theirs.q_proj.out_features // theirs.k_proj.out_features
        self.q_theirs, self.k_theirs = self.queries(theirs, h_theirs), self.keys(theirs, h_theirs)
        t = torch.arange(length, device=h.device)
        self.distance = (t[:, None] - t).clamp(min=0).float()  # [T, T]
        self.causal = t[:, None] >= t
        gram = torch.einsum("nti,ntj->ij", h, h)
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        self.h_inverse = torch.linalg.inv(gram) * (N * length)  # [E, E]

    def rotate(self, x: Tensor, back: bool = False) -> Tensor:
        cos, sin = self.rotation
        return apply_rotary_pos_emb(x, x, cos, -sin if back else sin, unsqueeze_dim=2)[0]

    def queries(self, module, h: Tensor) -> Tensor:
        """As the mixer sees them, [N, T, HQ, K]."""
        q = module.q_proj(h).unflatten(-1, (-1, self.K))
        return self.rotate(module.q_norm(q) if module.config.normalises_qk else q)

    def keys(self, module, h: Tensor) -> Tensor:
        """As the mixer sees them, [N, T, H, K]."""
        k = module.k_proj(h).unflatten(-1, (-1, self.K))
        return self.rotate(module.k_norm(k) if module.config.normalises_qk else k)

    def root(self, n: int, head: int) -> Tensor:
        """sqrt(a) [R, T, T] of sequence n: the teacher's probabilities for the queries of a key-value head."""
        q = self.q_theirs[n, :, head * self.R : (head + 1) * self.R].transpose(0, 1)  # [R, T, K]
        s = q @ self.k_theirs[n, :, head].T * self.K**-0.5
        return s.masked_fill(~self.causal, -math.inf).softmax(-1).sqrt()

    def decay(self, log_g: float) -> Tensor:
        """g^((i - j) / 2) [T, T], zero above the diagonal."""
        return (0.5 * log_g * self.distance).exp() * self.causal

    def log_g(self, head: int) -> float:
        return F.logsigmoid(self.module.g_proj.bias[head].float()).item()

    def set_gates(self) -> None:
        bias, gates = self.module.g_proj.bias, self.options.gates
        if gates not in ("distance", "fit"):
            return
        for head in range(self.H):
            if gates == "distance":
                by_sequence = [self.root(n, head).square()[..., 1:].sum(0) for n in range(len(self.h))]
                mass = torch.stack(by_sequence).sum(0)  # [T, T - 1]: the first token, a sink, is left out
                by_distance = torch.zeros(len(mass), device=mass.device)
                by_distance.index_add_(0, self.distance[:, 1:].long().flatten(), mass.flatten())
                total = by_distance.cumsum(0)
                median = int((total < total[-1] / 2).sum()) + 0.5
                g = 0.5 ** (1 / median)
                bias[head] = max(0.0, min(8.0, math.log(g / (1 - g))))
            else:
                bias[head] = min(GRID, key=lambda logit: self.distance_to_teacher(head, logit))

    def distance_to_teacher(self, head: int, logit: float) -> float:
        """The squared Hellinger distance that is left on the first sequence if each token has its own best q."""
        decay = self.decay(-math.log1p(math.exp(-logit)))
        k = self.keys(self.module, self.h[:1])[0, :, head]  # [T, K]
        root = self.root(0, head)
        pairs = (k[:, :, None] * k[:, None]).flatten(1)  # [T, K * K]
        gram = (decay.square() @ pairs).view(-1, self.K, self.K)
        gram.diagonal(dim1=1, dim2=2).add_(1e-3 * gram.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) + 1e-9)
        wanted = (decay * root) @ k  # [R, T, K]
        q = torch.linalg.solve(gram[None], wanted[..., None])[..., 0]
        fitted = decay * (q @ k.T)
        fitted = fitted / fitted.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
        return (2 - 2 * (fitted * root).sum(-1)).mean().item()

    def outputs(self) -> Tensor:
        """The student's mixer before o_proj, [N, T, HQ * K]."""
        module, h = self.module, self.h
        q, k, v = self.queries(module, h), self.keys(module, h), module.v_proj(h).unflatten(-1, (-1, self.K))
        return module.retention(q, k, v, module.log_gate(h), None, None, None).flatten(2)

    def set_q_and_k(self) -> None:
        """Each head's matrix keeps its norm: retention does not depend on it, and the step that a learning rate
        makes does."""
        sizes = [(self.module.q_proj.weight, self.H * self.R), (self.module.k_proj.weight, self.H)]
        norms = [weight.view(heads, -1).norm(dim=1, keepdim=True) for weight, heads in sizes]
        for _ in range(self.options.qk):
            self.set_q()
            self.set_k()
        for (weight, heads), norm in zip(sizes, norms, strict=True):
            rows = weight.view(heads, -1)
            rows *= norm / rows.norm(dim=1, keepdim=True)

    def set_q(self) -> None:
        weight = self.module.q_proj.weight.view(self.H, self.R, self.K, -1)
        keys = self.keys(self.module, self.h)
        for head in range(self.H):
            weight[head] = self.fit_q(head, keys[:, :, head], weight[head])

    def set_k(self) -> None:
        weight = self.module.k_proj.weight.view(self.H, self.K, -1)
        queries = self.queries(self.module, self.h)
        for head in range(self.H):
            q = queries[:, :, head * self.R : (head + 1) * self.R].transpose(1, 2)
            weight[head] = self.fit_k(head, q, weight[head])

    def fit_q(self, head: int, k: Tensor, start: Tensor) -> Tensor:
        """Weight [R, K, E] of the queries that fit keys k [N, T, K]."""
        decay = self.decay(self.log_g(head)) * self.K**-0.5

        def back(g: Tensor) -> Tensor:  # [N, T, R, K]
            return torch.einsum("nte,ntrk->rke", self.h, self.rotate(g, back=True))

        def normal(w: Tensor) -> Tensor:
            q = self.rotate(torch.einsum("nte,rke->ntrk", self.h, w))
            scores = decay.square() * (q.transpose(1, 2) @ k[:, None].mT)  # [N, R, T, T]
            return back((scores @ k[:, None]).transpose(1, 2))

        wanted = torch.stack([((decay * self.root(n, head)) @ k[n]).transpose(0, 1) for n in range(len(k))])
        return self.solve(normal, back(wanted), start, self.rotated_gram(k, decay))

    def fit_k(self, head: int, q: Tensor, start: Tensor) -> Tensor:
        """Weight [K, E] of the keys that fit queries q [N, R, T, K]."""
        decay = self.decay(self.log_g(head)) * self.K**-0.5

        def back(g: Tensor) -> Tensor:  # [N, T, K]
            return torch.einsum("nte,ntk->ke", self.h, self.rotate(g[:, :, None], back=True)[:, :, 0])

        def normal(w: Tensor) -> Tensor:
            k = self.rotate(torch.einsum("nte,ke->ntk", self.h, w)[:, :, None])[:, :, 0]
            scores = decay.square() * (q @ k[:, None].mT)  # [N, R, T, T]
            return back((scores.mT @ q).sum(1))

        wanted = torch.stack([((decay * self.root(n, head)).mT @ q[n]).sum(0) for n in range(len(q))])
        grams = torch.stack([self.rotated_gram(q[:, r], decay.T) for r in range(self.R)])
        return self.solve(normal, back(wanted), start, grams.sum(0))

    def rotated_gram(self, k: Tensor, decay: Tensor) -> Tensor:
        """[K, K] second moments of rows k [N, T, K] as queries see them: the same for both dims of a rotation."""
        mass = decay.square().sum(0)  # [T]
        diagonal = torch.einsum("t,ntk->k", mass, k.square())
        pair = diagonal.view(2, -1).mean(0)
        return torch.cat([pair, pair]).diag()

    def solve(self, normal, wanted: Tensor, start: Tensor, gram: Tensor) -> Tensor:
        """Preconditioned conjugate gradients for normal(w) = wanted, from `start`; few steps regularise."""
        gram = gram / (self.h.shape[0] * self.h.shape[1])
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        inverse = torch.linalg.inv(gram)

        def precondition(g: Tensor) -> Tensor:
            return inverse @ g @ self.h_inverse / (self.h.shape[0] * self.h.shape[1])

        w = start.clone()
        w *= (wanted * w).sum() / (w * normal(w)).sum()  # the scale is free
        residual = wanted - normal(w)
        direction = z = precondition(residual)
        product = (residual * z).sum()
        for _ in range(self.options.steps):
            mapped = normal(direction)
            alpha = product / (direction * mapped).sum()
            w = w + alpha * direction
            residual = residual - alpha * mapped
            z = precondition(residual)
            product, before = (residual * z).sum(), product
            direction = z + product / before * direction
        return w
