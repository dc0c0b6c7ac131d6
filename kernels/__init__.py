"""The operator: power retention."""

import torch

from brumby.kernels.power_retention import (
    DECODERS,
    FORMS,
    Decoder,
    RetentionBuffer,
    RetentionState,
    power_retention,
    power_retention_decode,
    power_retention_fold,
    power_retention_step,
)

if torch.cuda.is_available():
    from brumby.kernels import decode
    from brumby.kernels.triton_forms import retention

    FORMS["cuda", "attention"] = FORMS["cuda", "chunk"] = retention
    DECODERS["cuda"] = Decoder(decode.step, decode.fold)

__all__ = [
    "DECODERS",
    "Decoder",
    "RetentionBuffer",
    "RetentionState",
    "power_retention",
    "power_retention_decode",
    "power_retention_fold",
    "power_retention_step",
]
