"""The softmax base beside the model under training: its loss, and what stages learn from it."""

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch
from torch import Tensor, nn

from brumby.model import BrumbyForCausalLM
from brumby.train.objective import Attention, Taught, cross_entropy, final_hidden


class Base(nn.Module):
    """The base as a module: a DeepSpeed engine's own under ZeRO-3."""

    def __init__(self, model: BrumbyForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, cu_seqlens: Tensor, loss: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Final hidden states [N, hidden], and the summed cross-entropy if `loss`."""
        hidden = final_hidden(self.model, input_ids, position_ids, cu_seqlens)
        return hidden, cross_entropy(self.model.lm_head, hidden, labels.flatten()) if loss else None


class Teacher:
    """The base, frozen: softmax attention with the carried weights.

    It is no part of the module that DeepSpeed trains. There, a second model that runs in the same step can make
    ZeRO-2 in bf16 lose gradients (DeepSpeed's issue 8224).

    Args:
        module: A `Base` or an engine of one.
        model: The base in it.
    """

    def __init__(self, module: nn.Module, model: BrumbyForCausalLM) -> None:
        self.module, self.layers, self.head = module, model.model.layers, model.lm_head.weight

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor], attentions: bool = False, loss: bool = False) -> Taught:
        """What the base gives for a micro-batch (`brumby.train.objective.inputs`).

        Args:
            attentions: Keep what each attention layer reads and gives.
            loss: Take the cross-entropy with the text.
        """
        calls: list[Attention] = []

        def keep(_module, inputs, rest, output) -> None:
            calls.append(Attention(inputs[0], output, rest))

        layers = self.layers if attentions else []
        handles = [layer.self_attn.register_forward_hook(keep, with_kwargs=True) for layer in layers]
        hidden, ce = self.module(**batch, loss=loss)
        for handle in handles:
            handle.remove()
        return Taught(hidden, self.head, calls, ce)

    @contextmanager
    def whole_head(self) -> Iterator[None]:
        """Have the output matrix whole on every rank, as the divergence needs it."""
        with deepspeed.zero.GatheredParameters([self.head], enabled=hasattr(self.head, "ds_id")):
            yield
