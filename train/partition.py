"""Where DeepSpeed keeps a model: the pieces of float32 weights and of the optimizer's moments on this rank.

ZeRO flattens a group's parameters and cuts the result into a part a rank (stages 1, 2), or cuts every parameter
(stage 3); stage 0 keeps all on each. Here these are views by parameter name, so that a checkpoint looks the same
whichever stage wrote it. Everything that knows DeepSpeed's insides for the sake of checkpoints is in this file.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from brumby.convert.pieces import Piece, PiecesReader

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def pieces(engine: "DeepSpeedEngine") -> list[Piece]:
    """What this rank is to save of the model, as views: all ranks' together are every element once.

    But momenta at stages 1 and 2, of which each rank keeps whole matrices, so that two may have the same.
    """
    stage = engine.zero_optimization_stage()
    apart = (trained(engine) if stage > 0 else []) + (frozen(engine) if stage == 3 else [])
    whole = (trained(engine) if stage == 0 else []) + (frozen(engine) if stage < 3 else [])
    found = apart + [share(piece, dist.get_rank(), dist.get_world_size()) for piece in whole]
    return [piece for piece in found if len(piece)]


def trained(engine: "DeepSpeedEngine") -> list[Piece]:
    """All that this rank's optimizer updates, as views."""
    found = []
    for name, parameter in named_parameters(engine):
        if not parameter.requires_grad:
            continue
        for start, flat, offset, length in _places(engine, parameter):
            whole = {"weight": flat.detach()}
            if not getattr(parameter, "use_muon", False):
                state = _state(engine, flat)
                whole |= {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            elif engine.zero_optimization_stage() in (1, 2):
                found.append(Piece(name, 0, {"momentum_buffer": _whole_momentum(engine, parameter, flat)}))
            else:
                whole["momentum_buffer"] = _momentum(engine, flat)
            parts = {kind: tensor.view(-1).narrow(0, offset, length) for kind, tensor in whole.items()}
            found.append(Piece(name, start, parts))
    return found


def frozen(engine: "DeepSpeedEngine") -> list[Piece]:
    """What this rank has of the parameters that are not trained, as views: all of them but under ZeRO-3."""
    found = []
    for name, parameter in named_parameters(engine):
        if parameter.requires_grad:
            continue
        if engine.zero_optimization_stage() == 3:
            part, (start, length) = parameter.ds_tensor, _part(parameter)  # type: ignore[attr-defined]
            found.append(Piece(name, start, {"weight": part[:length]}))
        else:
            found.append(Piece(name, 0, {"weight": parameter.detach().view(-1)}))
    return found


def share(piece: Piece, rank: int, world_size: int) -> Piece:
    """This rank's part of a piece that all ranks have."""
    length = len(piece)
    start, end = length * rank // world_size, length * (rank + 1) // world_size
    return Piece(piece.name, piece.start + start, {k: tensor[start:end] for k, tensor in piece.tensors.items()})


def named_parameters(engine: "DeepSpeedEngine") -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by their names in the model's own checkpoint."""
    for name, parameter in engine.module.named_parameters():
        yield name.removeprefix("model."), parameter  # the objective's own name for it


def shapes(engine: "DeepSpeedEngine") -> dict[str, list[int]]:
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in named_parameters(engine)}


def num_updates(engine: "DeepSpeedEngine") -> int:
    """How often AdamW has stepped since its moments were begun; its bias correction depends on it."""
    states = engine.basic_optimizer.state.values()
    return max((int(state["step"].item()) for state in states if "step" in state), default=0)


@torch.no_grad()
def forget_moments(engine: "DeepSpeedEngine") -> None:
    """Begin the optimizer's moments and AdamW's bias correction anew."""
    for state in engine.basic_optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()


@torch.no_grad()
def restore(engine: "DeepSpeedEngine", reader: PiecesReader, updates: int) -> None:
    """Take weights, moments and the number of updates from a checkpoint of any stage and number of ranks.

    Raises:
        ValueError: a parameter of the model is not in it.
    """
    _write(engine, reader.read)
    for state in engine.basic_optimizer.state.values():
        if "step" in state:
            state["step"].fill_(updates)


@torch.no_grad()
def set_weights(engine: "DeepSpeedEngine", weights: dict[str, Tensor]) -> None:
    """Give trained parameters new values, by name, each in the parameter's shape; all ranks the same ones."""

    def read(kind: str, name: str, start: int, length: int) -> Tensor | None:
        found = weights.get(name) if kind == "weight" else None
        return None if found is None else found.flatten()[start : start + length]

    _write(engine, read)


def _write(engine: "DeepSpeedEngine", read: Callable[[str, str, int, int], Tensor | None]) -> None:
    """Fill what this rank has of the model with what `read` gives for kind, name, start, length, unless None."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()  # all parameters back in parts
    for piece in trained(engine) + frozen(engine):
        for kind, tensor in piece.tensors.items():
            if (found := read(kind, piece.name, piece.start, len(tensor))) is not None:
                tensor.copy_(found)
    if engine.zero_optimization_stage() == 3:
        for group in range(len(engine.optimizer.fp16_groups)):
            engine.optimizer._reassign_or_swap_out_partitioned_parameters(group)
        engine.optimizer.checkpoint_event_epilogue()  # the small ones whole again
    else:
        for name, parameter in named_parameters(engine):
            if (found := read("weight", name, 0, parameter.numel())) is not None:
                parameter.copy_(found.view_as(parameter))


def comparable(engine: "DeepSpeedEngine") -> list[Tensor]:
    """The weights that every rank should hold alike: all of them, under ZeRO-3 those kept whole."""
    if engine.zero_optimization_stage() < 3:
        return [parameter.detach() for _, parameter in named_parameters(engine)]
    return [parameter.detach() for parameter in engine.optimizer.persistent_parameters]


def _places(engine: "DeepSpeedEngine", parameter: Any) -> Iterator[tuple[int, Tensor, int, int]]:
    """Each place of a parameter's elements here: (start in it, tensor, start in that, length).

    `parameter` is an nn.Parameter with what DeepSpeed has hung on it.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start, length = _part(parameter)
        if length > 0:
            yield start, optimizer.fp32_partitioned_groups_flat[group], offset, length
    elif stage > 0:
        mapping = parameter._hp_mapping
        if mapping is not None:
            masters = getattr(optimizer, "single_partition_of_fp32_groups", None)
            masters = masters or optimizer.fp32_groups_flat_partition  # BF16_Optimizer's name for them
            place = mapping.hp_fragment_address
            yield mapping.lp_fragment_address.start, masters[mapping.param_group_index], place.start, place.numel
    elif engine.bfloat16_enabled():
        for weights, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for weight, master in zip(weights, masters, strict=True):
                if weight is parameter:
                    yield 0, master, 0, master.numel()
    else:
        yield 0, parameter, 0, parameter.numel()


def _part(parameter: Any) -> tuple[int, int]:
    """Where this rank's part of a parameter begins under ZeRO-3, and its length; the last one is padded."""
    start = parameter.ds_tensor.ds_numel * dist.get_rank()
    return start, max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start))


def _state(engine: "DeepSpeedEngine", flat: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor it updates, made as AdamW would make it if this is before its first step."""
    state = engine.basic_optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state["exp_avg"] = torch.zeros_like(flat)
        state["exp_avg_sq"] = torch.zeros_like(flat)
    return state


def _momentum(engine: "DeepSpeedEngine", flat: Tensor) -> Tensor:
    """Muon's momentum of a tensor, laid out like it, made as DeepSpeed would make it; at stages 0 and 3."""
    state, stage = engine.basic_optimizer.state[flat], engine.zero_optimization_stage()
    if not state:
        dtype = engine.optimizer.communication_data_type if stage == 3 else flat.dtype
        state["momentum_buffer"] = torch.zeros_like(flat, dtype=dtype)
    return state["momentum_buffer"]


def _whole_momentum(engine: "DeepSpeedEngine", parameter: Any, flat: Tensor) -> Tensor:
    """Muon's momentum of a whole matrix, [n], where this rank's partition `flat` has a part of it; at stages 1, 2.

    Those of all such matrices follow one another in a buffer, in the gradients' dtype.
    """
    matrices = engine.optimizer.params_in_partition[parameter._hp_mapping.param_group_index]
    state = engine.basic_optimizer.state[flat]
    if not state:
        num_elements = sum(matrix.numel() for matrix in matrices)
        state["momentum_buffer"] = torch.zeros(num_elements, dtype=parameter.dtype, device=flat.device)
    start = 0
    for matrix in matrices:
        if matrix is parameter:
            break
        start += matrix.numel()
    return state["momentum_buffer"].narrow(0, start, parameter.numel())
