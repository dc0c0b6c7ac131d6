"""Stream text from a model folder."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed
from transformers.utils.logging import disable_progress_bar

import brumby.model  # noqa: F401  (registers the architecture)


def generate(
    model: str,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Print the prompt and its continuation, token by token.

    Args:
        model: folder of a converted or exported checkpoint.
        temperature: 0 takes the likeliest token; above 0 samples.

    Raises:
        ValueError: `model` is no folder with a checkpoint.
    """
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"model: {model} holds no checkpoint (no config.json)")
    disable_progress_bar()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(model)
    # A CPU without bf16 units is faster in float32.
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    network.to(torch.device(device))
    set_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature > 0
        else {"do_sample": False}
    )
    network.generate(
        **tokenizer(prompt, return_tensors="pt").to(device),
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
