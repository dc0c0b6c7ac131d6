"""The kernels for Hopper, in Gluon. Nothing here is imported on other GPUs."""

from brumby.kernels.hopper.backward import backward
from brumby.kernels.hopper.forward import forward
from brumby.kernels.hopper.states import HopperProducts

__all__ = ["HopperProducts", "backward", "forward"]
