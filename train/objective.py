"""What a stage minimises: sums over the tokens that have a target, in float32.

Sums and no means: the caller divides by the number of such tokens in the whole step, so that the result does not
depend on how the step is cut into micro-batches and ranks.

Shapes: B sequences, T tokens, N = B * T, W vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.utils import z3_leaf_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from brumby.data import Batch
from brumby.data.batches import IGNORE_INDEX
from brumby.model import BrumbyForCausalLM
from brumby.train.config import StageConfig

CROSS_ENTROPY = StageConfig()
SUM: dict[str, Any] = {"ignore_index": IGNORE_INDEX, "reduction": "sum"}


@dataclass
class Attention:
    """A call of one of the base's attention layers.

    Args:
        x: What it read, [1, N, hidden].
        y: What it gave, likewise.
        rest: Its other arguments: rotation and document boundaries.
    """

    x: Tensor
    y: Tensor
    rest: dict[str, Any]


@dataclass
class Taught:
    """What the softmax base gives for a micro-batch, without gradients.

    Args:
        hidden: After its final norm, [N, hidden].
        head: Its output matrix, [W, hidden]; under ZeRO-3 whole only within `Teacher.whole_head`.
        attentions: By layer, if they were asked for.
        ce: Its cross-entropy, if it was asked for.
    """

    hidden: Tensor
    head: Tensor
    attentions: list[Attention] = field(default_factory=list)
    ce: Tensor | None = None


class Objective(nn.Module):
    """The model under training with the loss of each stage."""

    def __init__(self, model: BrumbyForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        stage: StageConfig = CROSS_ENTROPY,
        taught: Taught | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The stage's objective, and the cross-entropy with the text in nats; None where mixers are aligned.

        Args:
            input_ids, labels, position_ids: [B, T]; `labels` are already shifted (`brumby.data.Batch`).
            cu_seqlens: [documents + 1].
            taught: What the base gives for the same tokens, if the stage needs it.
        """
        if stage.aligns:
            assert taught is not None
            return self.alignment(taught.attentions, labels.flatten() != IGNORE_INDEX), None
        hidden = final_hidden(self.model, input_ids, position_ids, cu_seqlens)
        return retraining(self.model.lm_head, hidden, labels.flatten(), stage, taught)

    def alignment(self, attentions: list[Attention], valid: Tensor) -> Tensor:
        """The mixers' relative squared error, averaged over the layers; see `mixer_error`."""
        errors = []
        for layer, attention in zip(self.model.model.layers, attentions, strict=True):
            if layer.gradient_checkpointing:
                error = checkpoint(mixer_error, layer.self_attn, attention, valid, use_reentrant=False)
            else:
                error = mixer_error(layer.self_attn, attention, valid)
            errors.append(error)
        return torch.stack(errors).mean()


def mixer_error(mixer: nn.Module, attention: Attention, valid: Tensor) -> Tensor:
    """Sum over the tokens of the squared error of the mixer's output, relative to the base's mean square.

    The mean is over the micro-batch: this much of the loss depends on how a step is cut.

    Args:
        mixer: Called with what the base's attention read.
        valid: Whether a token counts, [N].
    """
    x = attention.x
    if z3_leaf_module(mixer):  # DeepSpeed reduces its gradients once its input has one, and needs it to have one
        x = x.detach().requires_grad_()
    y = mixer(x, **attention.rest)
    error = (y.float() - attention.y.float()).square().sum(-1).flatten() * valid  # [N]
    power = attention.y.float().square().sum(-1).flatten() * valid  # [N]
    return error.sum() * valid.sum() / power.sum().clamp(min=torch.finfo(torch.float32).tiny)


def retraining(
    head: nn.Linear, hidden: Tensor, labels: Tensor, stage: StageConfig, taught: Taught | None
) -> tuple[Tensor, Tensor]:
    """The weighted sum of cross-entropy and divergence from the base, and the cross-entropy alone.

    Args:
        hidden: [N, hidden]. labels: [N].
    """
    if hidden.is_cuda:  # logits of 8192 tokens x 152k words would take 5 GB in float32
        if stage.ce:
            ce = fused_cross_entropy(head.weight, hidden, labels)
        else:
            ce = fused_cross_entropy(head.weight.detach(), hidden.detach(), labels)
        if not stage.kl:
            return stage.ce * ce, ce.detach()
        assert taught is not None
        kl = fused_divergence(head.weight, hidden, taught, labels, stage.temperature)
    else:
        logits = head(hidden).float()  # [N, W]
        ce = F.cross_entropy(logits if stage.ce else logits.detach(), labels, **SUM)
        if not stage.kl:
            return stage.ce * ce, ce.detach()
        assert taught is not None
        valid = labels != IGNORE_INDEX
        target = F.linear(taught.hidden[valid], taught.head).float()
        kl = divergence(logits[valid], target, stage.temperature)
    return stage.ce * ce + stage.kl * stage.temperature**2 * kl, ce.detach()


def cross_entropy(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy of hidden [N, hidden], in nats."""
    if hidden.is_cuda:
        return fused_cross_entropy(head.weight, hidden, labels)
    return F.cross_entropy(head(hidden).float(), labels, **SUM)


def fused_cross_entropy(head: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(**SUM, accum_dtype=torch.float32)(head, hidden, labels).float()


def divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """KL(target || student) of logits [N, W], in nats."""
    log_p, log_t = (logits / temperature).log_softmax(-1), (target / temperature).log_softmax(-1)
    return F.kl_div(log_p, log_t, log_target=True, reduction="sum")


def fused_divergence(head: Tensor, hidden: Tensor, taught: Taught, labels: Tensor, temperature: float) -> Tensor:
    """The same from hidden states [N, hidden], over the tokens that have a target."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    # With beta = 0 it is KL(teacher || student), a mean over the tokens that are not ignored.
    mean = LigerFusedLinearJSD(0.0, IGNORE_INDEX, temperature, accum_dtype=torch.float32)
    return mean(hidden, head, taught.hidden, taught.head, labels) * (labels != IGNORE_INDEX).sum()


def final_hidden(model: BrumbyForCausalLM, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
    """What the output matrix reads, [N, hidden]."""
    outputs = model.model(input_ids=input_ids, position_ids=position_ids, cu_seqlens=cu_seqlens, use_cache=False)
    return outputs.last_hidden_state.flatten(0, 1)


def inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The objective's arguments that are the batch's, on `device`."""
    names = ("input_ids", "labels", "position_ids", "cu_seqlens")
    return {name: getattr(batch, name).to(device, non_blocking=True) for name in names}
