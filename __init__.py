"""Turn an attention LLM into an attention-free one with power retention."""

__version__ = "0.1.0"
