"""The training loss: next-token cross-entropy, summed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brumby.data import Batch
from brumby.data.batches import IGNORE_INDEX
from brumby.model import BrumbyForCausalLM


class CrossEntropy(nn.Module):
    """Sum of the next-token cross-entropy over a batch, in nats, as a float32 scalar.

    A sum and no mean: the caller divides by the number of valid tokens in the whole step, so that
    the result does not depend on how the step is cut into micro-batches and ranks.
    """

    def __init__(self, model: BrumbyForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """All [B, T] but `cu_seqlens` [N + 1]; `labels` are already shifted (`brumby.data.Batch`)."""
        hidden = self.model.model(
            input_ids=input_ids, position_ids=position_ids, cu_seqlens=cu_seqlens, use_cache=False
        ).last_hidden_state
        hidden, labels = hidden.flatten(0, 1), labels.flatten()  # [B * T, hidden], [B * T]
        if hidden.is_cuda:  # logits of 8192 tokens x 152k words would take 5 GB in float32
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            loss = LigerFusedLinearCrossEntropyLoss(
                ignore_index=IGNORE_INDEX, reduction="sum", accum_dtype=torch.float32
            )
            return loss(self.model.lm_head.weight, hidden, labels).float()
        return F.cross_entropy(
            self.model.lm_head(hidden).float(), labels, ignore_index=IGNORE_INDEX, reduction="sum"
        )


def inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The objective's arguments, on `device`."""
    names = ("input_ids", "labels", "position_ids", "cu_seqlens")
    return {name: getattr(batch, name).to(device, non_blocking=True) for name in names}
