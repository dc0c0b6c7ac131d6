"""The operator: power retention."""

import torch

from brumby.kernels.power_retention import FORMS, RetentionState, power_retention, power_retention_step

if torch.cuda.is_available():
    from brumby.kernels.triton_forms import retention

    FORMS["cuda", "attention"] = FORMS["cuda", "chunk"] = retention

__all__ = ["RetentionState", "power_retention", "power_retention_step"]
