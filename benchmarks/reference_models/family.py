"""The shapes of the family: one vocabulary, one context, several sizes."""

from dataclasses import dataclass

import torch

from benchmarks.embedded_model.model import Llama, Shape

VOCABULARY = 8192
CONTEXT = 2048


@dataclass(frozen=True)
class Member:
    """One model and how it is trained.

    Attributes:
        shape: its sizes.
        windows: of `shape.max_position_embeddings` tokens in one step.
        part: windows that are in memory at once; halved where the memory is too small.
        vector_rate: peak rate of AdamW; the matrices' rate is the same for all sizes.
    """

    shape: Shape
    windows: int
    part: int
    vector_rate: float


def _shape(
    width: int, inner: int, layers: int, heads: int, shared: int, context: int = CONTEXT
) -> Shape:
    return Shape(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        head_dim=width // heads,
        max_position_embeddings=context,
    )


FAMILY = {
    "5m": Member(_shape(256, 512, 5, 4, 2), windows=64, part=64, vector_rate=0.003),
    # Fits into 40 MB in bfloat16, where a 30m fits in int8 only.
    "19m": Member(_shape(384, 1024, 10, 6, 2), windows=64, part=64, vector_rate=0.0025),
    "30m": Member(_shape(512, 1408, 9, 8, 4), windows=64, part=64, vector_rate=0.002),
    "110m": Member(_shape(768, 2048, 16, 12, 4), windows=64, part=32, vector_rate=0.0015),
}


# Tries every step of the pipeline on a CPU within a minute.
SMOKE = Member(_shape(64, 128, 2, 2, 1, context=256), windows=4, part=2, vector_rate=0.004)
MEMBERS = FAMILY | {"smoke": SMOKE}


def parameters(shape: Shape) -> int:
    """How many numbers a model of this shape has."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in Llama(shape).parameters())


def flops(shape: Shape) -> float:
    """Floating-point operations to train one token: 6 a parameter, and causal attention's."""
    inner = shape.num_attention_heads * shape.head_dim
    attention = 6 * shape.num_hidden_layers * inner * shape.max_position_embeddings
    return 6 * parameters(shape) + attention
