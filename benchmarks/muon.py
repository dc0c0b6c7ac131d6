"""Muon for many small matrices: those of one shape are orthogonalised together.

The update of torch.optim.Muon with `match_rms_adamw` (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon;
the scale of arXiv 2502.16982), whose loop over matrices is bound by launches at a small model's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """A group's `heads`, (dim, size), takes so many rows (dim 0) or columns (1) for a matrix of its own.

    With `row_beta` a row is divided by the root of its mean square over recent updates (arXiv 2510.05491).
    """

    def __init__(
        self, groups: Iterable[dict], momentum: float = 0.95, weight_decay: float = 0.0, row_beta: float = 0.0
    ) -> None:
        defaults = {"lr": 1e-3, "momentum": momentum, "weight_decay": weight_decay, "heads": None}
        super().__init__(groups, defaults | {"row_beta": row_beta})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(p.shape, []).append(p)
            for shape, matrices in by_shape.items():
                gradients = torch.stack([cast(Tensor, p.grad) for p in matrices])
                state = self.state[matrices[0]]
                if not state:
                    state["momentum"] = torch.zeros_like(gradients)
                state["momentum"].lerp_(gradients, 1 - group["momentum"])
                updates = gradients.lerp(state["momentum"], group["momentum"])
                updates = by_head(updates, group["heads"], orthogonal)
                if beta := group["row_beta"]:
                    updates = updates.float()
                    size = updates.norm(dim=(1, 2), keepdim=True)
                    squares = updates.square().mean(2, keepdim=True)
                    state["rows"] = state.get("rows", torch.zeros_like(squares)).lerp(squares, 1 - beta)
                    updates = updates * (state["rows"] + 1e-12).rsqrt()
                    updates = updates * (size / updates.norm(dim=(1, 2), keepdim=True))
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_add_(matrices, list(updates.to(matrices[0].dtype)), alpha=-rate)


def by_head(x: Tensor, heads: tuple[int, int] | None, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function of the heads' matrices, cut out of x [N, A, B]."""
    if heads is None:
        return function(x)
    dim, size = heads
    x = x if dim == 0 else x.mT
    x = function(x.unflatten(1, (-1, size)).flatten(0, 1)).view(x.shape)
    return x if dim == 0 else x.mT


def orthogonal(x: Tensor) -> Tensor:
    """Near the closest semi-orthogonal matrix of each of x [N, A, B], bfloat16: Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    x = x.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
