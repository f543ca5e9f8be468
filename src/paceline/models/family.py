"""What a model family is: names of its settings and tensors, and what its layers do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from paceline.models import layer_variants, scales

Names = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Family:
    """One model family.

    Attributes:
        layer: module of the checkpoint -> canonical name, inside a layer. Several names are fused
            along the output axis.
        shared: canonical name of a layer -> the one whose tensor it has, too.
        outer: the same outside of the layers.
        at: prefix of the tensors of layer i.
        prefixes: removed from the names of tensors, the first that fits; checkpoints saved without
            the head lack them.
        aliases: other names that checkpoints use for a tensor.
        skipped: regular expression of tensors that are no weights of the text model.
        transposed: matrices inside the layers are stored [in, out].
        interleaved: fused q, k, v lie by key/value head: its queries, its key, its value.
        paired: rows of each head of q and k lie in rotary pairs (GGUF).
        biases: (canonical names, setting that switches their biases on, or `always`).
        names: our name of a setting -> this family's.
        defaults: our name of a setting -> its value when absent.
        fixed: settings that would change the computation -> supported values.
        implied: settings that follow from others, whatever config.json says of them.
        nested: key of the text model's settings inside config.json.
        text: `model_type` of that text model.
        windows, ropes: of every layer.
        adjacent_rope: rotary embeddings turn adjacent values of a head.
        scales: factors of embedding, attention, residual stream and logits.
        norm, norm_offset, qk_norm: as in `ModelConfig`.
        norm_bias: layer norms have a bias.
        position_offset: of learned positions.
        variant: returns the family of a config whose settings choose between layouts.
    """

    layer: Names
    shared: Names = field(default_factory=dict)
    outer: Names = field(
        default_factory=lambda: {"embed_tokens": "embed", "norm": "final_norm", "lm_head": "head"}
    )
    at: str = "layers.{i}."
    prefixes: tuple[str, ...] = ("model.",)
    aliases: Names = field(default_factory=dict)
    skipped: str = r"rotary_emb\.inv_freq$"
    transposed: bool = False
    interleaved: bool = False
    paired: bool = False
    biases: tuple[tuple[str, str], ...] = ()
    names: Names = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    nested: str | None = None
    text: str | None = None
    windows: layer_variants.Windows = layer_variants.no_windows
    ropes: layer_variants.Ropes = layer_variants.one_rope
    adjacent_rope: bool = False
    scales: scales.ReadScales = scales.plain
    norm: str = "rms"
    norm_bias: bool = True
    norm_offset: float = 0.0
    qk_norm: str = "head"
    position_offset: int = 0
    variant: Callable[[Mapping[str, Any]], Family] | None = None

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return any("gate" in names.split() for names in self.layer.values())

    @property
    def pre_norm(self) -> bool:
        """Whether norms stand before attention and MLP."""
        return self.norm == "plain" or "attn_norm" in self.layer.values()
