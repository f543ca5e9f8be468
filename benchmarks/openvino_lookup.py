"""OpenVINO GenAI: whole outputs with its own prompt lookup, over the graph of `openvino_llama`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import openvino_llama

from paceline.models import Model

LONGEST, LOOKED_UP = 3, 5  # tokens matched, tokens drafted: the values of its own samples
NEEDED = ("openvino_genai", "openvino_tokenizers", "transformers")


def missing() -> list[str]:
    """Return the packages that are needed and not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


class OpenVinoLookup:
    """A pipeline with prompt lookup; GenAI runs that with paged attention.

    Args:
        model: a Llama, with a tokenizer that transformers reads (it is asked for, not used).
        threads: of a pass.
        width: see `openvino_llama.Graph`.
    """

    def __init__(self, model: Model, threads: int, width: str) -> None:
        import openvino as ov
        import openvino_genai
        from openvino_tokenizers import convert_tokenizer
        from transformers import AutoTokenizer

        self._ov, self._genai = ov, openvino_genai
        with TemporaryDirectory(prefix="paceline-") as name:
            folder = Path(name)
            openvino_llama.save(model.config, model.weights, width, folder)
            tokenizer = AutoTokenizer.from_pretrained(model.path)
            for kind, graph in zip(
                ("tokenizer", "detokenizer"),
                convert_tokenizer(tokenizer, with_detokenizer=True),
                strict=True,
            ):
                ov.save_model(graph, str(folder / f"openvino_{kind}.xml"))
            (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
            self._pipeline = openvino_genai.LLMPipeline(
                name, "CPU", prompt_lookup=True, INFERENCE_NUM_THREADS=threads
            )

    def generate(self, prompt: list[int], new: int) -> tuple[list[int], float]:
        """Greedy tokens, and seconds after the first of them."""
        settings = self._genai.GenerationConfig(
            max_new_tokens=new,
            ignore_eos=True,
            do_sample=False,
            num_assistant_tokens=LOOKED_UP,
            max_ngram_size=LONGEST,
        )
        ids = np.array([prompt], np.int64)
        seen = self._ov.Tensor(np.ones_like(ids))
        inputs = self._genai.TokenizedInputs(self._ov.Tensor(ids), seen)
        found = self._pipeline.generate(inputs, settings)
        metrics = found.perf_metrics
        spent = metrics.get_generate_duration().mean - metrics.get_ttft().mean
        return list(found.tokens[0]), spent / 1e3
