"""GGUF files as models: config, weights and logits equal those of the same checkpoint."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
import tiny_gguf
from paceline.engines.reference import ReferenceEngine
from paceline.errors import ModelError
from paceline.models import Model, load
from paceline.models.config import ModelConfig
from paceline.models.formats.gguf_types import TYPES
from paceline.models.tensors import BlockQuantized

BLOCKS_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")
BLOCKS_OF_256 = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ1_0", "TQ2_0")


def logits(model: Model) -> np.ndarray:
    rows: list[np.ndarray] = []
    engine = ReferenceEngine(model.config, model.weights)
    engine.start(tiny.tokens(12), lambda _, __, logits: rows.append(logits))
    return np.concatenate(rows)


def plain(model: Model, **changes: Any) -> ModelConfig:
    """The config without what GGUF cannot tell: names of families, folded norms."""
    return replace(model.config, family="", norm_offset=0.0, **changes)


def architecture(model: Model) -> str:
    return model.gguf.metadata["general.architecture"]


@pytest.mark.parametrize("name", tiny_gguf.MODELS)
def test_a_file_is_its_checkpoint(name: str, tmp_path: Path) -> None:
    model = tiny_gguf.MODELS[name]()
    tiny_gguf.write(model, tmp_path / "tiny.gguf")
    model.save_pretrained(tmp_path / "hf")
    ours, theirs = load(tmp_path / "tiny.gguf"), load(tmp_path / "hf")
    if name in ("llama-llama3", "hunyuan-alpha"):  # their scaling is worked out in the file
        for a, b in zip(ours.config.layers, theirs.config.layers, strict=True):
            np.testing.assert_allclose(a.rope.table(0, 32), b.rope.table(0, 32), atol=1e-6)
        layers = theirs.config.layers
        assert ours.config.context == ours.gguf.metadata[f"{architecture(ours)}.context_length"]
        assert plain(ours, layers=layers, context=theirs.config.context) == plain(theirs)
    else:
        assert plain(ours) == plain(theirs)
    assert ours.config.norm_offset == 0
    assert set(ours.weights) == set(theirs.weights)
    for weight in ours.weights:
        expected = theirs.weights.dense(weight)
        if weight.endswith("norm"):
            expected = expected + np.float32(theirs.config.norm_offset)
        np.testing.assert_array_equal(ours.weights.dense(weight), expected, weight)
        assert ours.weights.dense(weight).flags.c_contiguous
    expected = tiny.oracle(model, tiny.tokens(12))
    np.testing.assert_allclose(logits(ours), expected, atol=1e-4, rtol=0)


def sized(name: str, hidden: int, inner: int):
    settings = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2}
    if name == "GPT2":
        settings |= {"n_embd": hidden, "n_inner": inner, "n_layer": 2, "n_head": 4}
    return tiny._build(name, **settings)()


@pytest.mark.parametrize("kind", ["F16", *BLOCKS_OF_32, *BLOCKS_OF_256])
@pytest.mark.parametrize("name", ["Llama", "Phi3", "GPT2", "GPTNeoX"])
def test_every_type_keeps_its_values_through_fusion_and_pairs(
    name: str, kind: str, tmp_path: Path
) -> None:
    wide = kind in BLOCKS_OF_256
    model = sized(name, 256 if wide else 64, 512 if wide else 96)
    tiny_gguf.write(model, tmp_path / "tiny.gguf", kind)
    model.save_pretrained(tmp_path / "hf")
    ours, theirs = load(tmp_path / "tiny.gguf"), load(tmp_path / "hf")
    for weight in ours.weights:
        expected = theirs.weights.dense(weight)
        np.testing.assert_array_equal(ours.weights.dense(weight), expected, weight)
    matrix = ours.weights.stored("layers.1.q")
    if kind != "F16":
        assert isinstance(matrix, BlockQuantized)
        assert matrix.type == kind
        assert kind.lower() in ours.weights.formats()
    np.testing.assert_allclose(
        logits(ours), tiny.oracle(model, tiny.tokens(12)), atol=2e-4, rtol=1e-4
    )


def test_matrices_of_one_file_may_differ_in_type(tmp_path: Path) -> None:
    def kind(name: str) -> str:
        return "Q6_K" if "attn_v" in name else "Q8_0" if "embd" in name else "Q4_K"

    model = sized("Llama", 256, 512)
    tiny_gguf.write(model, tmp_path / "tiny.gguf", kind)
    ours = load(tmp_path / "tiny.gguf")
    assert ours.weights.formats() == ("f32", "q4_k", "q6_k", "q8_0")
    expected = tiny.oracle(model, tiny.tokens(12))
    np.testing.assert_allclose(logits(ours), expected, atol=2e-4, rtol=1e-4)


def test_architectures_that_transformers_lacks(tmp_path: Path) -> None:
    """Their files are those of others under another name, with defaults of their own."""
    model = tiny_gguf.MODELS["qwen2"]()
    tiny_gguf.write(model, tmp_path / "exaone.gguf", architecture="exaone")
    ours = load(tmp_path / "exaone.gguf")
    assert ours.config.family == "exaone"
    expected = tiny.oracle(model, tiny.tokens(12))
    np.testing.assert_allclose(logits(ours), expected, atol=1e-4, rtol=0)

    model = tiny_gguf.MODELS["llama"]()
    tiny_gguf.write(model, tmp_path / "internlm2.gguf", architecture="internlm2")
    ours = load(tmp_path / "internlm2.gguf")
    assert ours.config.family == "internlm2"
    expected = tiny.oracle(model, tiny.tokens(12))
    np.testing.assert_allclose(logits(ours), expected, atol=1e-4, rtol=0)

    scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 1.7}
    model = tiny._build("Granite", **tiny._GQA, **scales, attention_multiplier=10**-0.5)()
    tiny_gguf.write(model, tmp_path / "minicpm.gguf", architecture="minicpm", attention__scale=None)
    ours = load(tmp_path / "minicpm.gguf")
    expected = tiny.oracle(model, tiny.tokens(12))
    np.testing.assert_allclose(logits(ours), expected, atol=1e-4, rtol=1e-5)
    absent = dict.fromkeys(("attention__scale", "embedding_scale", "residual_scale", "logit_scale"))
    tiny_gguf.write(model, tmp_path / "early.gguf", architecture="minicpm", **absent)
    config = load(tmp_path / "early.gguf").config
    scales = (config.embedding_scale, config.residual_scale, config.logit_scale)
    np.testing.assert_allclose(scales, (12, 1.4 / 3**0.5, 256 / 40))


@pytest.mark.parametrize(
    "changes", [{"attention__temperature_length": 9}, {"rope__scaling__attn_factor": 2.0}]
)
def test_what_a_ministral_cannot_have_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_gguf.MODELS["ministral3"]()
    tiny_gguf.write(model, tmp_path / "tiny.gguf", **changes)
    with pytest.raises(ModelError, match=next(iter(changes)).replace("__", ".")):
        load(tmp_path / "tiny.gguf")


def llama(path: Path, **changes: Any) -> Model:
    model = tiny_gguf.MODELS["llama"]()
    tiny_gguf.write(model, path / "tiny.gguf", **changes)
    return load(path / "tiny.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen3moe"}, r"architecture 'qwen3moe', which Paceline does not run"),
        (
            {"architecture": "gpt-oss"},
            r"architecture 'gpt-oss', which .* expected one of arcee, bitnet",
        ),
        ({"expert_count": 8}, "mixture of 8 experts"),
        ({"attention__causal": False}, r"llama.attention.causal in the metadata of tiny.gguf"),
        ({"logit_scale": 2.0}, "expected 0 for the architecture llama"),
        ({"attention__scale": [1.0, 2.0]}, "attention.scale"),
        ({"attention__value_length": 8}, "expected the length of keys, 10"),
        ({"attention__head_count": [4, 4, 2]}, "the same whole number for every layer"),
        ({"attention__head_count_kv": 3}, "a divisor of the 4 attention heads"),
        ({"attention__head_count": 0}, "head_count"),
        ({"block_count": 4}, r"lacks tensor blk.3.attn_norm.weight"),
        ({"block_count": 2}, r"'blk.2.attn_q.weight', which its metadata does not account for"),
        ({"block_count": 2**31 - 1}, "num_hidden_layers"),
        ({"context_length": None}, "context_length in the metadata of tiny.gguf is missing"),
        ({"context_length": "64"}, "context_length in the metadata of tiny.gguf is '64'"),
        ({"context_length": [1] * 1000}, "context_length"),
        ({"rope__scaling__type": "su"}, "unknown rope.scaling.type 'su'"),
        ({"rope__scaling__factor": [1.0]}, "rope.scaling.factor"),
        ({"rope__scaling__type": "yarn"}, "rope.scaling.factor"),
        ({"rope__scaling__attn_factor": 2.0}, "attn_factor"),
        ({"rope__dimension_count": 7}, "even number of values"),
        ({"rope__freq_base": 0.5}, "a base above 1"),
        ({"feed_forward_length": 51}, "expected 51x40 by its metadata"),
        ({"attention__sliding_window": 2**32 - 1}, "sliding_window"),
        ({"attention__layer_norm_rms_epsilon": None}, "epsilon"),
        ({"tokenizer.ggml.tokens": ["a"] * 68}, "68 tokens and 67 rows"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        llama(tmp_path, **changes)


def test_arrays_of_equal_numbers_are_numbers(tmp_path: Path) -> None:
    equal = {"attention__head_count": [4] * 3, "feed_forward_length": [52] * 3}
    assert llama(tmp_path, **equal).config == llama(tmp_path).config


def test_stop_tokens_are_those_of_the_keys_and_names(tmp_path: Path) -> None:
    tokens = [f"<{i}>" for i in range(tiny.VOCAB)]
    tokens[7], tokens[9], tokens[11] = "<|im_end|>", "<|end|>", "<|return|>"
    keys = {"tokenizer.ggml.eos_token_id": 5, "tokenizer.ggml.eot_token_id": 6}
    changes = {**keys, "tokenizer.ggml.tokens": tokens}
    model = llama(tmp_path, **changes)
    assert model.defaults.stop_tokens == {5, 6, 7, 9, 11}
    assert (model.config.eos, model.config.bos) == ((5,), 1)
    tokens[12] = "<|call|>"  # then <|end|> ends a message only
    assert llama(tmp_path, **changes).defaults.stop_tokens == {5, 6, 7, 11, 12}
    none = {"tokenizer.ggml.eos_token_id": 2**32 - 1, "tokenizer.ggml.bos_token_id": 67}
    model = llama(tmp_path, **none)
    assert (model.config.eos, model.config.bos) == ((), None)
    assert model.defaults.stop_tokens == frozenset()


def test_sampling_defaults(tmp_path: Path) -> None:
    assert llama(tmp_path).defaults.temperature == 0
    own = {"temp": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "penalty_repeat": 1.1}
    defaults = llama(tmp_path, **{f"general.sampling.{k}": v for k, v in own.items()}).defaults
    assert defaults.temperature == 0.6
    assert defaults.samplers() == {"top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1}
    with pytest.raises(ModelError, match=r"general.sampling.top_p in the metadata of tiny.gguf"):
        llama(tmp_path, **own_changes(top_p=1.5))


def own_changes(**values: Any) -> dict[str, Any]:
    return {"general.sampling.temp": 1.0} | {f"general.sampling.{k}": v for k, v in values.items()}


def test_a_folder_with_one_file_stands_for_it(tmp_path: Path) -> None:
    model = llama(tmp_path)
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"GGUF")
    assert load(tmp_path).path == tmp_path / "tiny.gguf"
    assert load(str(tmp_path)).name == model.name == "tiny"
    tiny_gguf.write(tiny_gguf.MODELS["llama"](), tmp_path / "other.gguf")
    with pytest.raises(ModelError, match=r"holds 2 GGUF files \(other.gguf, tiny.gguf"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no model_type"):
        load(tmp_path)


def test_fingerprints_tell_files_apart(tmp_path: Path) -> None:
    prints = {llama(tmp_path, kind=kind).fingerprint() for kind in ("F32", "F16")}
    prints.add(llama(tmp_path, **{"general.name": "other"}).fingerprint())
    assert len(prints) == 3


def test_values_that_are_no_numbers_are_refused_when_read(tmp_path: Path) -> None:
    model = sized("Llama", 64, 96)
    tiny_gguf.write(model, tmp_path / "tiny.gguf", "Q8_0")
    path = tmp_path / "tiny.gguf"
    ours = load(path)
    at = ours.gguf.tensors["blk.1.ffn_up.weight"].data
    data = bytearray(path.read_bytes())
    place = data.find(at.tobytes())
    data[place : place + 2] = b"\x00\x7e"
    path.write_bytes(data)
    ours = load(path)
    assert ours.weights["layers.1.q"] is not None
    with pytest.raises(ModelError, match=r"blk.1.ffn_up.weight of .* holds NaN or infinite values"):
        ours.weights["layers.1.up"]


def test_the_guide_names_all_types() -> None:
    guide = Path(__file__).parents[2] / "docs" / "guides" / "gguf-files.md"
    words = set(re.findall(r"`([^`\n]+)`", guide.read_text()))
    assert words >= TYPES.keys()
