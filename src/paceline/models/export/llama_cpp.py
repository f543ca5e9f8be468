"""What llama.cpp expects of a file besides the facts of the architecture's row.

Found by loading files of every family; the names are those of `llama-model.cpp`.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from paceline.errors import ModelError
from paceline.models.config import ModelConfig

# Architecture -> modules without whose bias it does not load a file.
_NEEDED_BIASES = {"gptneox": ("attn_qkv", "attn_output")}
# Architecture -> maps whose bias it does not know, so that it does not load the file.
_UNKNOWN_BIASES = {
    "arcee": ("up", "down"),
    "olmo2": ("o",),
    "exaone4": ("o",),
    "ernie4_5": ("gate", "up", "down"),
    "hunyuan-dense": ("o",),
    "falcon": ("q", "k", "v", "o", "up", "down"),
}
# Architectures whose attention window it ignores; EXAONE 4's but in the 32B, of 64 layers.
_NO_WINDOW = ("llama", "phi3", "exaone4")
_EXAONE_LAYERS = 64


def required_biases(name: str, config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield the weight and the bias of modules that need one, zeros if the model has none."""
    for index in range(len(config.layers)):
        for module in _NEEDED_BIASES.get(name, ()):
            yield f"blk.{index}.{module}.weight", f"blk.{index}.{module}.bias"


def check_llama_cpp(name: str, config: ModelConfig, weights: Container[str]) -> None:
    """Refuse a model whose file llama.cpp would not load, or would run as another model.

    Raises:
        ModelError: what is in the way.
    """
    layer = config.layers[0]
    biases = [each for each in _UNKNOWN_BIASES.get(name, ()) if f"layers.0.{each}.bias" in weights]
    if name == "bitnet" and not config.tied:
        why = "it takes the embedding as the head of BitNet models, and this one has its own head"
    elif biases:
        why = f"its architecture {name} has no bias for {biases[0]}, and this model has"
    elif name == "chatglm" and layer.heads * layer.head_dim != config.hidden_size:
        why = f"its architecture {name} has heads of hidden size / heads, not of {layer.head_dim}"
    else:
        return
    raise ModelError(
        f"llama.cpp does not run this model: {why}; write a safetensors folder instead"
    )


def llama_cpp_differences(name: str, config: ModelConfig) -> list[str]:
    """Return in sentences where llama.cpp computes something else than the model."""
    window = next((layer.window for layer in config.layers if layer.window), None)
    ignored = name in _NO_WINDOW and not (
        name == "exaone4" and len(config.layers) == _EXAONE_LAYERS
    )
    if window is None or not ignored:
        return []
    return [
        f"llama.cpp ignores the attention window of this architecture: its results differ from "
        f"the model's behind {window} positions"
    ]
