"""Loading: from the type that the file holds, and without more memory than the model takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import tiny
from paceline.engines import open_engine
from paceline.engines.native import NativeEngine
from paceline.errors import ModelError
from paceline.models import load
from paceline.models.formats.mapped import is_mapped
from tests.conftest import shared

PEAK = """
import json, re, sys
from pathlib import Path
from paceline.engines.native import NativeEngine
from paceline.models import load

def memory(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

model = load(sys.argv[1])
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
engine = NativeEngine(model.config, model.weights, threads=2, format=sys.argv[2])
print(json.dumps([before, memory("VmHWM"), memory("VmRSS"), engine.weight_bytes]))
"""
LAYERS, MIB = 4, 1 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 66 MB in bf16."""
    folder = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(
        vocab_size=8000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.view(torch.int16).random_(0x3C00, 0x3E00)
    model.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be read")
@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_memory_peaks_at_the_final_size_and_less_than_a_layer(large: Path, storage: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, large, storage], capture_output=True, text=True, check=True
    )
    before, peak, after, size = json.loads(done.stdout)
    layer = 2 * (4 * 768 * 768 + 3 * 768 * 2048)  # bytes in the file
    rounding = (4 * LAYERS + 1) * 2 * MIB  # matrices end somewhere in a huge page
    assert after - before < size + rounding + 4 * MIB
    assert peak - after < layer / 2


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_stored_types_and_layouts_are_read_as_they_are(
    kind: torch.dtype, name: str, tmp_path: Path
) -> None:
    """Turned, fused and interleaved matrices in every type: the values of `Weights`."""
    tiny.MODELS[name]().to(kind).save_pretrained(tmp_path)
    model = load(tmp_path)
    engine = open_engine(model)
    assert isinstance(engine, NativeEngine)
    assert engine.format == {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(
        str(kind), "fp32"
    )
    for weight, values in model.weights.items():
        if values.ndim == 2 and weight != "positions":
            np.testing.assert_array_equal(np.array(engine._model.get(weight)), values)
    plain = NativeEngine(model.config, model.weights.to_arrays(), format="int8")
    read = NativeEngine(model.config, model.weights, format="int8")
    ids = tiny.tokens(20)
    rows: list[np.ndarray] = []
    for each in (plain, read):
        each.start(ids, lambda _, __, logits: rows.append(logits.copy()))
    np.testing.assert_array_equal(rows[0], rows[1])


def test_a_file_can_be_read_again_after_its_pages_were_given_back(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    model = load(tmp_path)
    before = model.weights.dense("layers.0.q").copy()
    assert is_mapped(model.weights.dense("layers.0.q"))
    assert not is_mapped(before)
    for _ in range(2):
        NativeEngine(model.config, model.weights, format="int4")
        np.testing.assert_array_equal(model.weights["layers.0.q"], before)


def test_values_of_a_file_are_checked(tmp_path: Path) -> None:
    tiny.MODELS["llama"]().to(torch.bfloat16).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2:] = (0x7F80).to_bytes(2, "little")
    path.write_bytes(data)
    model = load(tmp_path)
    with pytest.raises(ModelError, match="holds NaN or infinite values"):
        open_engine(model)


def test_auto_is_ternary_for_a_checkpoint_that_is(tmp_path: Path) -> None:
    real = load(shared("models", "bitstories-1M"))
    assert open_engine(real).format == "ternary:head=fp32"
    assert open_engine(load(shared("models", "stories260K"))).format == "fp32"
    tiny.save("bitnet", tmp_path)  # its weights were never rounded
    assert open_engine(load(tmp_path)).format == "fp32"
    with pytest.raises(ModelError, match=r"'layers\.0\.q' is not ternary"):
        open_engine(load(tmp_path), weight_format="ternary")
