"""transformers: a Llama with the weights that we run, eager, as most of its users run it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter
from typing import Any

import numpy as np

from paceline.core import Floats, Tokens
from paceline.models.config import ModelConfig

_MODULES = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def build() -> str | None:
    """Return the package and its version; None where it or torch is not installed."""
    try:
        return f"transformers {version('transformers')} (torch {version('torch')})"
    except PackageNotFoundError:
        return None


class Transformers:
    """One model and one sequence; see `peers.Runner`.

    Args:
        config: a Llama's shape.
        weights: canonical name -> float32 array; each is read once.
        threads: torch's, of the whole process.
        width: `fp32` or `bf16`.
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Floats], threads: int, width: str
    ) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        layer = config.layers[0]
        if config.family != "llama" or layer.rope is None or layer.rope.scaling != "default":
            raise SystemExit(f"{config.family} cannot be opened here: only a plain Llama can")
        torch.set_num_threads(threads)
        shape = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=layer.intermediate,
            num_hidden_layers=len(config.layers),
            num_attention_heads=layer.heads,
            num_key_value_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": float(layer.rope.theta)},
            tie_word_embeddings=config.tied,
            bos_token_id=config.bos,
            eos_token_id=None,  # the benchmarks go on past the end
            pad_token_id=0,
        )
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[width]
        with torch.device("meta"):
            self.model = LlamaForCausalLM(shape).eval()
        state = {
            _tensor(name): torch.from_numpy(np.array(weights[name], np.float32)).to(kind)
            for name in weights
        }
        read = [name for name in state if name != "model.embed_tokens.weight" or config.tied]
        self.bytes = sum(state[name].nbytes for name in read if state[name].ndim == 2)
        missing, unknown = self.model.load_state_dict(state, strict=False, assign=True)
        if unknown or set(missing) - ({"lm_head.weight"} if config.tied else set()):
            raise SystemExit(f"transformers lacks {missing} and does not know {unknown}")
        self.model.tie_weights()
        rotary = type(self.model.model.rotary_emb)
        self.model.model.rotary_emb = rotary(self.model.config)  # made of numbers, not loaded
        self._torch = torch
        self._cache: Any = None

    def extend(self, tokens: Tokens, logits: bool) -> Floats | None:
        """Run `tokens` [n] in one call and keep them; logits [n, V], or None.

        Without logits the last token's are computed all the same, as its `generate` does.
        """
        with self._torch.inference_mode():
            found = self.model(
                input_ids=self._torch.from_numpy(np.asarray(tokens, np.int64))[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=0 if logits else 1,
            )
        self._cache = found.past_key_values
        return found.logits[0].float().numpy() if logits else None

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        if length == 0:
            self._cache = None
        elif self._cache is not None:
            self._cache.crop(length - self._cache.get_seq_length())

    def generate(self, prompt: list[int], new: int, looked_up: int) -> tuple[list[int], float]:
        """Greedy tokens of its own loop with prompt lookup, and seconds after the prompt."""
        ids = self._torch.tensor([prompt])
        marks = _Marks()
        with self._torch.inference_mode():
            found = self.model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                prompt_lookup_num_tokens=looked_up,
                stopping_criteria=[marks],
            )
        return found[0, len(prompt) :].tolist(), perf_counter() - marks.first


class _Marks:
    """Called after each pass; remembers when the first one, which reads the prompt, ended."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        self.first = self.first or perf_counter()
        return ids.new_zeros(len(ids), dtype=bool)


def _tensor(name: str) -> str:
    """`layers.3.q` -> `model.layers.3.self_attn.q_proj.weight`."""
    layer, _, last = name.rpartition(".")
    return f"{'model.' + layer + '.' if layer else ''}{_MODULES[last]}.weight"
