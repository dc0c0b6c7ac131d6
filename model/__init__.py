"""The Hugging Face model. Importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_brumby import BrumbyConfig
from .modeling_brumby import BrumbyCache, BrumbyForCausalLM, BrumbyModel

AutoConfig.register("brumby", BrumbyConfig, exist_ok=True)
AutoModel.register(BrumbyConfig, BrumbyModel, exist_ok=True)
AutoModelForCausalLM.register(BrumbyConfig, BrumbyForCausalLM, exist_ok=True)

__all__ = ["BrumbyCache", "BrumbyConfig", "BrumbyForCausalLM", "BrumbyModel"]
