"""From a converted checkpoint to a DeepSpeed engine, and the teacher beside it."""

import os
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from brumby.data import schedule
from brumby.model import BrumbyForCausalLM
from brumby.model.modeling_brumby import BrumbyAttention
from brumby.train import muon
from brumby.train.config import OptimizerConfig, RunConfig
from brumby.train.guard import Guard
from brumby.train.objective import Objective
from brumby.train.teacher import Base, Teacher


def setup_distributed() -> torch.device:
    """Join the process group that the launcher describes, or one of a single process."""
    defaults = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    # Saves a minute of compiling at the first start on a CPU, where gloo does without it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It imports Muon, if only to ask whether the optimizer is one, which loads a compiler: three seconds a rank.
    deepspeed.runtime.compiler.compile = lambda: deepspeed.runtime.compiler.dummy_decorator
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo")
    return device


def deepspeed_config(config: RunConfig, world_size: int, train: bool = True) -> dict:
    rows = schedule(config.data)[0].sequences_per_step  # the trainer sets it anew with the phase
    accumulation = rows // (config.micro_batch * world_size)
    zero: dict = {"stage": config.zero_stage if train or config.zero_stage == 3 else 0}
    with_muon = config.optimizer.name == "muon"
    if with_muon and config.zero_stage == 3:
        zero["reduce_scatter"] = False  # or it refuses Muon
    if not torch.cuda.is_available():  # where models are small; the defaults would hold them whole, or twice
        zero |= {"reduce_bucket_size": 2**25, "allgather_bucket_size": 2**25}
        zero |= {"stage3_param_persistence_threshold": 2**9}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": accumulation if train else 1,
        "gradient_clipping": config.optimizer.clip_grad_norm if train and not with_muon else 0.0,
        "bf16": {
            "enabled": config.precision == "bf16",
            "check_grad_overflow": True,
        },  # or it applies what is not finite
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """What is trained, by its kind, with weight decay for matrices other than the gates'.

    The `kind` is that of the rates of a stage: "gates", "mixers" (the rest of the attention) or "rest". What Muon
    updates is apart, as "mixer_matrices" and "mlp_matrices", by the `rate_factor` of the kind's rate.
    """
    groups: dict[tuple[str, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "gates" if ".g_proj." in name else "mixers" if ".self_attn." in name else "rest"
        is_vector, factor = name.endswith(".bias") or "norm." in name, 1.0
        if config.name == "muon" and muon.updates(name, parameter):
            kind, factor = "mixer_matrices" if kind == "mixers" else "mlp_matrices", muon.rate_factor(parameter)
        groups.setdefault((kind, kind != "gates" and not is_vector, factor), []).append(parameter)
    return [
        {
            "kind": kind,
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "rate_factor": factor,
        }
        for (kind, decays, factor), parameters in sorted(groups.items())
    ]


def load_model(config: RunConfig, world_size: int, use_exp: bool, train: bool) -> BrumbyForCausalLM:
    """The converted checkpoint; under ZeRO-3 each rank holds its part from the first byte on."""
    partitioned = (
        HfDeepSpeedConfig(deepspeed_config(config, world_size, train)) if config.zero_stage == 3 else None
    )
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = BrumbyForCausalLM.from_pretrained(config.model, dtype=dtype, use_exp=use_exp)
    del partitioned  # transformers consults it, through a weak reference, while it loads
    if config.zero_stage == 3:
        set_z3_leaf_modules(model, [BrumbyAttention, Qwen3MLP])  # whose parameters are gathered together
    if torch.cuda.is_available():
        use_liger(model)
    return model


def use_liger(model: BrumbyForCausalLM) -> None:
    """Take Liger's kernels for norms, SwiGLU and rotation, which PyTorch makes of many passes over memory."""
    for module in model.modules():
        if isinstance(module, Qwen3RMSNorm):
            module.forward = partial(_norm, module)  # type: ignore[method-assign]
        elif isinstance(module, Qwen3MLP) and model.config.hidden_act == "silu":
            module.forward = partial(_mlp, module)  # type: ignore[method-assign]
        elif isinstance(module, BrumbyAttention):
            module.rotate = _rotate


def _norm(norm: Qwen3RMSNorm, x: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, norm.weight, norm.variance_epsilon)


def _mlp(mlp: Qwen3MLP, x: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return mlp.down_proj(liger_swiglu(mlp.gate_proj(x), mlp.up_proj(x)))


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
    """Of q [B, T, HQ, K] and k [B, T, H, K]; the kernel is written for [B, heads, T, K]."""
    from liger_kernel.transformers.functional import liger_rope

    q, k = liger_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def build_engine(config: RunConfig, device: torch.device) -> tuple[deepspeed.DeepSpeedEngine, Guard]:
    """The model under training, with its optimizer and ZeRO, and what keeps bad steps from it."""
    world_size = dist.get_world_size()
    model = load_model(config, world_size, use_exp=config.softmax, train=True)
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable()
    groups, fused = parameter_groups(model, config.optimizer), device.type == "cuda"
    adamw: dict[str, Any] = {"betas": tuple(config.optimizer.betas), "eps": config.optimizer.eps, "fused": fused}
    with_muon = config.optimizer.name == "muon"
    # Each step sets its stage's rates.
    optimizer = muon.build(groups, adamw) if with_muon else torch.optim.AdamW(groups, lr=0.0, **adamw)
    # From the start: at stage 0 in bf16 DeepSpeed makes a step without gradients, which decays the weights.
    guard = Guard(optimizer, config.stability, config.optimizer.clip_grad_norm if with_muon else None)
    engine, *_ = deepspeed.initialize(
        model=Objective(model.train()), optimizer=optimizer, config=deepspeed_config(config, world_size)
    )
    return engine, guard


def build_teacher(config: RunConfig, device: torch.device) -> Teacher:
    """The base model, frozen: a whole copy on each rank, or under ZeRO-3 its part of one."""
    world_size = dist.get_world_size()
    model = load_model(config, world_size, use_exp=True, train=False).eval().requires_grad_(False)
    if config.zero_stage != 3:
        return Teacher(Base(model).to(device), model)
    engine, *_ = deepspeed.initialize(model=Base(model), config=deepspeed_config(config, world_size, train=False))
    engine.eval()
    return Teacher(engine, model)
