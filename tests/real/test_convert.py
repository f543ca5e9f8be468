"""What is converted from a real file: loaded by llama.cpp and by transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from benchmarks.llama_cpp import Library, LlamaCpp

from paceline import LM
from paceline.models import load
from paceline.models.export.gguf import GGUFExport
from paceline.models.export.gguf_tokenizer import PROBES
from paceline.models.export.gguf_types import parse_gguf_format
from paceline.models.export.safetensors import SafetensorsExport
from paceline.models.formats.gguf import GGUFFile
from tests.real.test_transformers import QUESTION, expected, logits_of

TEXT = "The capital of France is a city on the Seine. It is known for its museums, and its name is"


def converted(path: Path, folder: Path, form: str) -> Path:
    out = folder / f"{form}.gguf"
    GGUFExport(load(path), parse_gguf_format(form)).write(out)
    return out


def in_llama_cpp(path: Path, ids: list[int]):
    engine = LlamaCpp(Library(), path, 256, 2)
    try:
        return np.array(engine.extend(np.array(ids), True))
    finally:
        engine.close()


def test_auto_copies_every_tensor_and_llama_cpp_sees_the_same_model(path, lm, tmp_path):
    out = converted(path, tmp_path, "auto")
    one, two = GGUFFile.open(path), GGUFFile.open(out)
    assert one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.type == two.tensors[name].type
        np.testing.assert_array_equal(tensor.data, two.tensors[name].data, name)
    ids = lm.encode(TEXT)
    np.testing.assert_array_equal(in_llama_cpp(out, ids), in_llama_cpp(path, ids))


@pytest.mark.parametrize("form", ["q8_0", "q4_k"])
def test_llama_cpps_first_choices_are_ours(path, tmp_path, form):
    out = converted(path, tmp_path, form)
    with LM(out, threads=2, dtype="fp32") as ours:
        ids = ours.encode(TEXT)
        want = logits_of(ours, ids)
    got = in_llama_cpp(out, ids)
    ranked = np.sort(want, 1)
    sure = ranked[:, -1] - ranked[:, -2] > 0.5  # llama.cpp rounds activations to 8 bits
    assert sure.sum() > len(ids) / 2
    np.testing.assert_array_equal(got.argmax(1)[sure], want.argmax(1)[sure])


def test_a_folder_has_the_logits_and_the_ids_of_the_file(path, lm, oracle, tmp_path):
    SafetensorsExport(load(path), "f32").write(tmp_path / "out")
    ids = lm.encode(TEXT)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    np.testing.assert_allclose(expected(model.eval(), ids), expected(oracle, ids), atol=1e-3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in (*PROBES, TEXT):
        assert tokenizer(text).input_ids == lm.encode(text)
    if lm.tokenizer.template is None:
        return
    talk = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert text == lm.tokenizer.render_chat(talk)
    again = load(tmp_path / "out")
    assert again.tokenizer.encode_chat(talk) == lm.tokenizer.encode_chat(talk)
    assert again.defaults == load(path).defaults


def test_a_folder_becomes_a_gguf_file_with_the_same_metadata(path, tmp_path):
    SafetensorsExport(load(path), "f16").write(tmp_path / "out")
    again = converted(tmp_path / "out", tmp_path, "q8_0")
    one, two = GGUFFile.open(path).metadata, GGUFFile.open(again).metadata
    for key in ("model", "pre", "tokens", "merges", "add_bos_token"):
        key = f"tokenizer.ggml.{key}"  # scores say an order only
        assert (key in one) == (key in two)
        np.testing.assert_array_equal(two.get(key), one.get(key), key)
    types = [each["tokenizer.ggml.token_type"] for each in (one, two)]
    differ = np.flatnonzero(types[0] != types[1]).tolist()
    assert differ in ([], [one.get("tokenizer.ggml.unknown_token_id")])
    assert load(again).defaults.stop_tokens == load(path).defaults.stop_tokens
