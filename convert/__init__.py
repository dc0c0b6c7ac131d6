"""Attention checkpoint to Brumby checkpoint: same tensors, same names, and a gate for every key-value
head."""

from .convert import GATES_FILE, REPORT_FILE, convert
from .errors import ConversionError
from .families import FAMILIES
from .gates import GATE_INITS

__all__ = ["FAMILIES", "GATES_FILE", "GATE_INITS", "REPORT_FILE", "ConversionError", "convert"]
