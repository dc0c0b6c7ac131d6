"""The operator: power retention."""

from importlib.util import find_spec

from brumby.kernels.power_retention import (
    DECODERS,
    Decoder,
    RetentionBuffer,
    RetentionState,
    power_retention,
    power_retention_decode,
    power_retention_fold,
    power_retention_step,
)

if find_spec("triton"):
    from brumby.kernels import decode

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
