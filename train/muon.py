"""DeepSpeed's Muon: which matrices it updates, at which rate, and what its ZeRO leaves to us.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces a matrix's momentum by the nearest
semi-orthogonal matrix, which five Newton-Schulz steps come near. As DeepSpeed 0.19 does it:

- At ZeRO 1 to 3 gradients are orthogonalised before their norm is taken: it would be that of the updates, and
  clipping would shrink them to nothing. So the run's gradient norm and its clipping are those of the parameters of
  AdamW alone, at every stage. Muon's update is of one size whatever the gradient's; to clip its matrices as well
  would only change how much a gradient weighs in the momentum.
- At ZeRO 1 to 3 the momentum changes before the optimizer's `step` is called. A step that is not to be taken is
  therefore refused before ZeRO's own, by `discard`.
- At ZeRO 1 to 3 the momentum has the gradients' dtype: in bf16 two bytes a parameter, where AdamW's moments have
  eight, and rounded at each step. A checkpoint has it in float32, which loses nothing.
- ZeRO 1 and 2: a rank keeps and orthogonalises whole each matrix of which it owns a part, so that two ranks may do
  the same one. A second momentum, which counts once the step is known to be good, makes it four bytes. A matrix
  that is cut has its gradient all-reduced, those of the others are reduced to their owners.
- ZeRO 3: the momentum is cut as the weights are. Gradients are all-reduced, not reduce-scattered, twice the
  traffic. At each step gradients and momenta are gathered whole, bucket by bucket, dealt out to the ranks, and
  updates and momenta are gathered again: four times all matrices, where AdamW sends nothing.
- ZeRO 0: every rank keeps and orthogonalises everything, the momentum in float32.
- Matrices of rate 0, as the MLPs' while mixers are aligned, are orthogonalised all the same, except on a CPU.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from brumby.train.throughput import slow_in_bf16

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch.optim import Optimizer


def updates(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates a parameter: the matrices of attention and MLP, but for the gates'."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties what it partitions
    return len(shape) == 2 and (".self_attn." in name or ".mlp." in name) and ".g_proj." not in name


def rate_factor(parameter: nn.Parameter) -> float:
    """What DeepSpeed's rate of a matrix has to be multiplied by for an update of AdamW's usual size.

    A rate is meant for the update 0.2 sqrt(max(rows, columns)) O, O semi-orthogonal, whose RMS is 0.2 (arXiv
    2502.16982, equation 4; `match_rms_adamw` of torch.optim.Muon). DeepSpeed's is sqrt(max(1, rows / columns)) O
    (runtime/zero/muon/original_muon.py). The quotient is 0.2 sqrt(columns), for wide and tall matrices alike.
    """
    return 0.2 * math.sqrt(getattr(parameter, "ds_shape", parameter.shape)[1])


def build(groups: list[dict], adamw: dict) -> "Optimizer":
    """Muon for the groups of matrices, torch's AdamW with the options `adamw` for the others.

    The rate decays weights, too, and there the factor must not count. Newton-Schulz is the "standard" iteration:
    that of torch.optim.Muon, in bfloat16. DeepSpeed's default, "gram", does the same steps on X X^T in float16.
    """
    from deepspeed.runtime.zero.muon import original_muon
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam  # it compiles: see `setup_distributed`

    if not torch.cuda.is_available():
        spare_the_cpu(original_muon)
    for group in groups:
        use_muon = group["kind"].endswith("_matrices")
        group |= {"lr": 0.0, "use_muon": use_muon} | ({"ns_method": "standard"} if use_muon else adamw)
        group["weight_decay"] /= group["rate_factor"]
        for parameter in group["params"]:
            parameter.use_muon = use_muon
    return MuonWithAuxAdam(groups, torch.optim.AdamW, adamw)


def spare_the_cpu(original_muon: Any) -> None:
    """Have DeepSpeed's Newton-Schulz leave zeros alone, and take float32 on a CPU that has no bfloat16.

    There a product in bfloat16 takes some fifty times as long: on 135M parameters a step takes twenty minutes.
    """
    plain = original_muon.zeropower_via_newtonschulz5

    def zeropower(G: Tensor, steps: int) -> Tensor:
        return plain(G, steps) if G.any() else torch.zeros_like(G)

    original_muon.zeropower_via_newtonschulz5 = zeropower
    if slow_in_bf16(torch.device("cpu")):
        original_muon.ns_compute_dtype = lambda ns_method: torch.float32


def adamw_norm(engine: "DeepSpeedEngine") -> Tensor:
    """The norm of the reduced gradients of AdamW's parameters, between the last backward and the step.

    It is NaN if anything of Muon's is not finite.
    """
    if partitioned := engine.zero_optimization_stage() > 0:
        found = [(g, _is_muon(engine, i)) for i, gradients in _gradients(engine) for g in gradients]
    else:
        parameters = [p for p in engine.module.parameters() if p.grad is not None]
        found = [(p.grad, p.use_muon) for p in parameters]
    square = torch.zeros((), device=engine.device)
    for gradient, is_muon in found:
        square += 0 * gradient.float().sum() if is_muon else gradient.float().square().sum()
    if partitioned:
        dist.all_reduce(square)
    return square.sqrt()


@torch.no_grad()
def discard(engine: "DeepSpeedEngine") -> None:
    """Have ZeRO drop the coming step as it does an overflow, before momenta and weights change.

    At stage 0 that is left to whoever stands before the optimizer's `step`.
    """
    if engine.zero_optimization_stage() > 0:
        for _, gradients in _gradients(engine):
            for gradient in gradients:
                gradient.fill_(math.nan)


def _gradients(engine: "DeepSpeedEngine") -> list[tuple[int, list[Tensor]]]:
    """This rank's parts of the gradients by (sub-)group; of Muon's at stages 1 and 2 the updates."""
    return [(i, found) for i, found in engine.optimizer.averaged_gradients.items() if found is not None]


def _is_muon(engine: "DeepSpeedEngine", group: int) -> bool:
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.sub_groups_using_muon[group]
    return engine.optimizer.param_groups[group]["use_muon"]
