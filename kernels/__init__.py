"""The operator: power retention."""

from brumby.kernels.power_retention import RetentionState, power_retention, power_retention_step

__all__ = ["RetentionState", "power_retention", "power_retention_step"]
