"""Models written as GGUF files and as folders, read by us, by llama.cpp and by transformers."""

from __future__ import annotations

import json
from collections import Counter

import gguf
import numpy as np
import pytest
import torch
import transformers
from benchmarks.llama_cpp import Library, LlamaCpp, LlamaCppTokenizer

import tiny
import tiny_gguf
from paceline.compress.calibrate import Calibration
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.errors import MethodError, ModelError
from paceline.models import Model, load
from paceline.models.export import assembly
from paceline.models.export.gguf import GGUFExport
from paceline.models.export.gguf_tokenizer import PROBES
from paceline.models.export.gguf_types import NAMES, GGUFFormat, parse_gguf_format
from paceline.models.export.safetensors import SafetensorsExport
from paceline.models.formats.gguf import GGUFFile
from paceline.models.generation import Defaults
from paceline.models.tensors import BlockQuantized, Grouped, Linear
from paceline.models.weights import Weights
from tests.conftest import shared
from tests.models.test_packed_layouts import packed_checkpoint

MODELS = {**tiny.MODELS, **tiny_gguf.MODELS}
# Where llama.cpp computes something else than the model: it ignores these windows, and takes the
# frequencies for long texts as soon as its context is longer than the original one.
OTHER_IN_LLAMA_CPP = ("mistral-window", "phi3", "exaone4", "phi3-longrope")
REFUSED = {
    "llama-dynamic": "the number of positions 128, its rotary embedding would be lost",
    "qwen2-window": "the attention windows of its layers would be lost",
    "gemma3-vision": "the attention scale 0.30",
    "gpt2-unscaled": "the attention scale 1.0 would be lost",
    "bitnet": "the activation relu2 would be lost",
    "gpt_neo": "gpt_neo models have no GGUF architecture, expected one of",
    "opt": "opt models have no GGUF architecture, expected one of",
    "arcee": "its architecture arcee has no bias for up, and this model has",
    "glm": "its architecture chatglm has heads of hidden size / heads, not of 16",
    "hunyuan-alpha": "its architecture hunyuan-dense has no bias for o",
    "olmo2-bias": "its architecture olmo2 has no bias for o",
    "ernie4_5-bias": "its architecture ernie4_5 has no bias for gate",
    "falcon-bias": "its architecture falcon has no bias for q",
}
DESCRIBED = sorted({*tiny_gguf.MODELS, *OTHER_IN_LLAMA_CPP} - REFUSED.keys())


@pytest.fixture(scope="module")
def library():
    return Library()


def saved(name, folder):
    model = MODELS[name]()
    model.save_pretrained(folder)
    return model


def to_gguf(source, path, form="f32"):
    export = GGUFExport(load(source), parse_gguf_format(form))
    assert export.write(path) == path.stat().st_size
    return export


def logits(library, path, ids):
    engine = LlamaCpp(library, path, 64, 1)
    try:
        return np.array(engine.extend(ids, True))
    finally:
        engine.close()


def transformers_logits(folder, ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    return tiny.oracle(model.eval(), ids)


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_gguf_file_is_the_model_that_it_came_from(name, tmp_path, library):
    model = saved(name, tmp_path / "hf")
    path = tmp_path / "a.gguf"
    export = to_gguf(tmp_path / "hf", path)
    source, found = load(tmp_path / "hf"), load(path)
    assert found.config.context == source.config.context
    extra = set(found.weights) - set(source.weights)
    assert all(not found.weights.dense(each).any() for each in extra)  # biases that must be there
    for each in source.weights:
        offset = source.config.norm_offset if each.endswith("norm") else 0
        np.testing.assert_array_equal(
            found.weights.dense(each), source.weights.dense(each) + np.float32(offset), each
        )
    tiny_gguf.write(model, tmp_path / "oracle.gguf")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "oracle.gguf").tensors}
    ours = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert theirs.keys() == ours.keys() - {each for each in ours if not ours[each].data.any()}
    for each, tensor in theirs.items():
        np.testing.assert_allclose(ours[each].data, tensor.data, rtol=2e-6, err_msg=each)
    ids, want = tiny.tokens(20), tiny.oracle(model, tiny.tokens(20))
    assert any("ignores the attention window" in note for note in export.notes) == (
        name in OTHER_IN_LLAMA_CPP[:3]
    )
    if name not in OTHER_IN_LLAMA_CPP:
        got = logits(library, path, ids)
        np.testing.assert_array_equal(got.argmax(1), want.argmax(1))
        np.testing.assert_allclose(got, want, atol=0.02)  # llama.cpp caches keys in half precision


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_folder_from_a_gguf_file_is_the_model_in_transformers(name, tmp_path):
    model = saved(name, tmp_path / "hf")
    to_gguf(tmp_path / "hf", tmp_path / "a.gguf")
    SafetensorsExport(load(tmp_path / "a.gguf"), "f32").write(tmp_path / "out")
    ids = tiny.tokens(20)
    np.testing.assert_allclose(
        transformers_logits(tmp_path / "out", ids), tiny.oracle(model, ids), atol=1e-4
    )
    assert (
        load(tmp_path / "out").defaults.stop_tokens
        == load(tmp_path / "a.gguf").defaults.stop_tokens
    )


@pytest.mark.parametrize("name", sorted(tiny.MODELS))
def test_a_folder_from_a_folder_is_the_model_in_transformers(name, tmp_path):
    model = saved(name, tmp_path / "hf")
    export = SafetensorsExport(load(tmp_path / "hf"))
    assert export.dtype == "F32"
    export.write(tmp_path / "out")
    ids = tiny.tokens(20)
    np.testing.assert_allclose(
        transformers_logits(tmp_path / "out", ids), tiny.oracle(model, ids), atol=1e-5
    )


@pytest.mark.parametrize("name", REFUSED)
def test_what_gguf_cannot_describe_is_refused(name, tmp_path):
    saved(name, tmp_path / "hf")
    with pytest.raises(ModelError, match="write a safetensors folder instead") as refusal:
        to_gguf(tmp_path / "hf", tmp_path / "a.gguf")
    assert REFUSED[name] in str(refusal.value)
    assert not (tmp_path / "a.gguf").exists()


def test_a_bitnet_with_a_head_of_its_own_is_refused(tmp_path):
    settings = {**tiny._GQA, "hidden_act": "silu"}
    tiny._build("BitNet", **settings)().save_pretrained(tmp_path / "hf")
    with pytest.raises(ModelError, match="it takes the embedding as the head"):
        to_gguf(tmp_path / "hf", tmp_path / "a.gguf")


def wide(folder, **settings):
    """A Llama whose rows fill blocks of 256."""
    shape = {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2}
    model = tiny._build("Llama", **{**tiny._GQA, **shape, **settings})()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("form", [name for name in NAMES if name not in ("auto", "f32")])
def test_every_type_loads_in_llama_cpp_and_its_choices_are_ours(form, tmp_path, library):
    wide(tmp_path / "hf")
    path = tmp_path / "a.gguf"
    export = to_gguf(tmp_path / "hf", path, form)
    found = load(path)
    SafetensorsExport(found, "f32").write(tmp_path / "out")
    ids = tiny.tokens(30)
    want, got = transformers_logits(tmp_path / "out", ids), logits(library, path, ids)
    ranked = np.sort(want, 1)
    # llama.cpp rounds activations to 8 bits: choices that are this close may differ.
    sure = ranked[:, -1] - ranked[:, -2] > 0.15
    assert sure.sum() > 8
    np.testing.assert_array_equal(got.argmax(1)[sure], want.argmax(1)[sure])
    kind = form.upper()
    assert export.types[kind] >= 2 * 6
    fallback = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
    fallback |= {"TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "IQ4_XS": "IQ4_NL"}
    assert export.fallbacks == ({(kind, fallback[kind]): 2} if kind in fallback else {})
    types = {tensor.type for tensor in GGUFFile.open(path).tensors.values()}
    assert types == set(export.types)


def test_types_of_the_head_are_chosen_apart(tmp_path):
    wide(tmp_path / "hf")
    to_gguf(tmp_path / "hf", tmp_path / "a.gguf", "q4_0:head=bf16")
    tensors = GGUFFile.open(tmp_path / "a.gguf").tensors
    assert tensors["output.weight"].type == "BF16"
    assert tensors["token_embd.weight"].type == "BF16"
    assert tensors["blk.0.attn_q.weight"].type == "Q4_0"
    assert tensors["blk.0.attn_norm.weight"].type == "F32"


def test_auto_keeps_the_bytes_of_a_gguf_file(tmp_path):
    wide(tmp_path / "hf")
    to_gguf(tmp_path / "hf", tmp_path / "a.gguf", "q4_k:head=q8_0")
    to_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", "auto")
    one, two = (GGUFFile.open(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert one.tensors.keys() == two.tensors.keys()
    for name, tensor in one.tensors.items():
        assert tensor.type == two.tensors[name].type
        np.testing.assert_array_equal(tensor.data, two.tensors[name].data, name)
    assert {key: str(value) for key, value in two.metadata.items()} == {
        key: str(value) for key, value in one.metadata.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_auto_keeps_floating_point_types(tmp_path, dtype):
    model = wide(tmp_path / "hf")
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "hf")
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    export = to_gguf(tmp_path / "hf", tmp_path / "a.gguf", "auto")
    assert export.types.keys() == {"F32", kind}
    folder = SafetensorsExport(load(tmp_path / "hf"))
    assert folder.dtype == kind
    folder.write(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    for name, value in load(tmp_path / "hf").weights.items():
        np.testing.assert_array_equal(load(tmp_path / "a.gguf").weights[name], value)
        np.testing.assert_array_equal(load(tmp_path / "out").weights[name], value)


def test_importance_reaches_the_matrix_that_it_is_of(tmp_path):
    wide(tmp_path / "hf")
    importance = np.zeros(256, np.float32)
    importance[:8] = 1
    source = load(tmp_path / "hf")
    for path, own in (("a.gguf", None), ("b.gguf", {"layers.1.q": importance})):
        GGUFExport(source, GGUFFormat("Q4_K", "Q6_K"), own).write(tmp_path / path)
    plain, weighted = (load(tmp_path / path).weights for path in ("a.gguf", "b.gguf"))
    errors = [
        float(np.square(each.dense("layers.1.q") - source.weights.dense("layers.1.q"))[:, :8].sum())
        for each in (plain, weighted)
    ]
    assert errors[1] < errors[0] / 1.5
    np.testing.assert_array_equal(plain.dense("layers.0.q"), weighted.dense("layers.0.q"))


def test_a_model_that_has_no_folder_can_be_written(tmp_path, library):
    model = saved("llama", tmp_path / "hf")
    source = load(tmp_path / "hf")
    weights = {name: source.weights.dense(name) for name in source.weights}
    GGUFExport(
        Model(tmp_path / "nowhere", source.config, weights, Defaults(frozenset())),
        GGUFFormat("F16", "F16"),
    ).write(tmp_path / "a.gguf")
    ids = tiny.tokens(20)
    np.testing.assert_allclose(
        logits(library, tmp_path / "a.gguf", ids), tiny.oracle(model, ids), atol=0.05
    )


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_a_packed_checkpoint_is_written_with_the_values_of_its_codes(method, tmp_path):
    (tmp_path / "hf").mkdir()
    packed_checkpoint(tmp_path / "hf", method)
    source = load(tmp_path / "hf")
    export = to_gguf(tmp_path / "hf", tmp_path / "a.gguf", "auto")
    assert export.types["Q5_0"] == 14  # holds the integers of 4 bits with any zero point
    assert export.unsupported is None
    folder = SafetensorsExport(source)
    assert folder.notes == ["quantised matrices are written as F16 numbers, which take more room"]
    folder.write(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    for path in ("a.gguf", "out"):
        found = load(tmp_path / path)
        for name in source.weights:
            expected = source.weights.dense(name)
            np.testing.assert_allclose(found.weights.dense(name), expected, rtol=6e-4, atol=1e-7)
            if path == "a.gguf" and isinstance(source.weights[name], Grouped):
                np.testing.assert_array_equal(found.weights.dense(name), expected)


def test_matrices_that_gguf_has_no_type_for_are_named(tmp_path):
    made = CompressionJob(
        load(shared("models", "TinyStories-656K")), tmp_path / "hf", parse_recipe("svd:keep=0.5")
    )
    made.run(Calibration(np.arange(96).reshape(2, 48), "numbers"))
    export = to_gguf(tmp_path / "hf", tmp_path / "a.gguf", "auto")
    assert (
        "14 quantised matrices are of a kind that GGUF has no type for, e.g. layers.0."
        in (export.notes[-1])
    )
    assert "of low rank), and are written as F16" in export.notes[-1]


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_writing_a_folder_reads_each_matrix_once(method, tmp_path, monkeypatch):
    (tmp_path / "hf").mkdir()
    packed_checkpoint(tmp_path / "hf", method)
    source = load(tmp_path / "hf")
    reads = Counter()
    original = Weights.stored

    def counted(weights, name):
        reads[name] += 1
        return original(weights, name)

    monkeypatch.setattr(Weights, "stored", counted)
    SafetensorsExport(source).write(tmp_path / "out")
    assert set(reads.values()) == {1}


def test_values_that_a_type_cannot_hold_name_their_tensor(tmp_path):
    model = wide(tmp_path / "hf")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e9
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(ModelError, match=r"tensor blk.1.ffn_up.weight cannot be written: .*1e\+09"):
        to_gguf(tmp_path / "hf", tmp_path / "a.gguf", "q4_k")
    assert not (tmp_path / "a.gguf").exists()
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight cannot be written"):
        SafetensorsExport(load(tmp_path / "hf"), "f16").write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q4_k_x", "unknown format 'q4_k_x'; did you mean"),
        ("q4_k:head=q4_k_m", "unknown format 'q4_k_m'"),
        ("iq2_xs", "unknown format 'iq2_xs'"),
        ("q4_k:embed=q8_0", "is not of the form"),
        ("q4_k:head=int8", "unknown format 'int8'"),
    ],
)
def test_unknown_formats_are_refused(text, message):
    with pytest.raises(MethodError, match=message):
        parse_gguf_format(text)


def test_an_unknown_format_of_a_folder_is_refused(tmp_path):
    tiny.save("llama", tmp_path / "hf")
    with pytest.raises(MethodError, match="unknown format of safetensors 'q8_0'"):
        SafetensorsExport(load(tmp_path / "hf"), "q8_0")


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K", "bitstories-1M"])
def test_tokenizers_of_checkpoints_come_back_from_gguf(name, tmp_path, library):
    source = load(shared("models", name))
    path = tmp_path / "a.gguf"
    GGUFExport(source, parse_gguf_format("q8_0")).write(path)
    found = load(path)
    text = "Once upon a time, there was a little girl named Lily. She said: \"It's 3 o'clock!\"\n"
    assert found.tokenizer.encode(text) == source.tokenizer.encode(text)
    assert found.tokenizer.special == source.tokenizer.special
    assert found.defaults.stop_tokens >= source.defaults.stop_tokens
    assert found.defaults.samplers() == source.defaults.samplers()
    if source.tokenizer.template:
        messages = [{"role": "user", "content": "Hello."}]
        assert found.tokenizer.encode_chat(messages) == source.tokenizer.encode_chat(messages)
    SafetensorsExport(found, "f32").write(tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.tokenizer.encode(text) == source.tokenizer.encode(text)
    assert again.defaults == found.defaults
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(text).input_ids == source.tokenizer.encode(text)


@pytest.mark.parametrize("name", ["stories260K", "bitstories-1M"])
def test_llama_cpp_divides_texts_as_the_checkpoint(name, tmp_path, library):
    source = load(shared("models", name))
    GGUFExport(source, parse_gguf_format("q8_0")).write(tmp_path / "a.gguf")
    engine = LlamaCppTokenizer(library, tmp_path / "a.gguf")
    try:
        for text in PROBES:
            assert engine.encode(text) == source.tokenizer.encode(text)
    finally:
        engine.close()


def test_further_ends_of_an_answer_have_a_place_if_they_are_few(tmp_path):
    source = shared("models", "stories260K")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = tmp_path / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": [2, 300, 301]}))
    to_gguf(tmp_path, tmp_path / "a.gguf", "q8_0")
    metadata = GGUFFile.open(tmp_path / "a.gguf").metadata
    ids = [metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("eos", "eot", "eom")]
    assert ids == [2, 300, 301]
    assert load(tmp_path / "a.gguf").defaults.stop_tokens == {2, 300, 301}
    settings.write_text(json.dumps({"eos_token_id": [2, 300, 301, 302]}))
    with pytest.raises(ModelError, match=r"no place for all tokens .* \[302\] would be lost"):
        to_gguf(tmp_path, tmp_path / "b.gguf", "q8_0")


def test_a_tokenizer_that_gguf_cannot_express_is_refused(tmp_path):
    source = shared("models", "stories260K")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="it is neither byte-level BPE nor SentencePiece"):
        to_gguf(tmp_path, tmp_path / "a.gguf")
    values["model"] = {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="its model is 'WordLevel', expected BPE"):
        to_gguf(tmp_path, tmp_path / "a.gguf")


def test_every_stored_form_has_a_name_in_messages():
    plain = {BlockQuantized, Grouped}  # named by their numbers
    forms = {form for form in Linear._forms.values() if form.__module__.startswith("paceline.")}
    assert forms - plain == set(assembly._FORMS)
