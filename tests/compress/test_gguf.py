"""Compression into the block types of GGUF, and into files that llama.cpp runs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks.llama_cpp import Library, LlamaCpp

import tiny
from paceline.compress.base import Statistics
from paceline.compress.calibrate import Calibration
from paceline.compress.gguf_job import GGUFJob
from paceline.compress.quantize.gguf import GGUFBlocks
from paceline.compress.recipe import parse_recipe
from paceline.errors import MethodError, ModelError
from paceline.lm import LM
from paceline.models import load
from paceline.models.export.gguf import GGUFExport
from paceline.models.export.gguf_mixes import MIXES, Position
from paceline.models.formats import gguf_writer
from paceline.models.formats.gguf_codes import BlockGrid, with_codes
from paceline.models.formats.gguf_quantize import quantize
from paceline.models.formats.gguf_types import TYPES, dequantize
from paceline.models.tensors import BlockQuantized, Dense
from tests.conftest import shared

MODEL = "TinyStories-656K"
GRIDS = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"),
    *("iq4_nl", "iq4_xs"),
)


def texts(seed=0):
    return Calibration(np.random.default_rng(seed).integers(0, 2000, (4, 48)), "noise")


def job(out, spec, head="keep"):
    return GGUFJob(load(shared("models", MODEL)), out, parse_recipe(spec, head))


@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs"])
def test_inputs_that_matter_are_rounded_with_less_error(kind):
    random = np.random.default_rng(4)
    weight = torch.from_numpy(random.standard_normal((16, 512)).astype(np.float32))
    x = torch.from_numpy(random.standard_normal((300, 512)).astype(np.float32))
    x *= torch.from_numpy(random.gamma(0.5, 1, 512).astype(np.float32))
    method = GGUFBlocks(type=kind)
    stats = Statistics().plus(x, method.optional_statistics)
    found = [
        method.compress(weight, stats),
        GGUFBlocks(kind, imatrix=False).compress(weight, stats),
    ]
    assert all(isinstance(each, BlockQuantized) and each.type == kind.upper() for each in found)
    own, plain = (
        float(((torch.from_numpy(each.dense()) - weight) @ x.T).square().mean()) for each in found
    )
    assert own < 0.9 * plain


@pytest.mark.parametrize("kind", GRIDS)
def test_feedback_lowers_the_error_of_the_outputs(kind):
    random = np.random.default_rng(7)
    weight = torch.from_numpy(random.standard_normal((24, 512)).astype(np.float32))
    mix = random.standard_normal((512, 512)) * random.gamma(0.5, 1, 512)
    x = torch.from_numpy((random.standard_normal((900, 512)) @ mix / 30).astype(np.float32))
    stats = Statistics().plus(x, GGUFBlocks(feedback=True).optional_statistics)
    errors = []
    for feedback in (True, False):
        stored = GGUFBlocks(kind, feedback=feedback).compress(weight, stats)
        assert stored.type == kind.upper()
        errors.append(float(((torch.from_numpy(stored.dense()) - weight) @ x.T).square().mean()))
    assert errors[0] < 0.85 * errors[1]


@pytest.mark.parametrize("kind", GRIDS)
def test_other_codes_have_the_values_of_the_grid(kind):
    random, name = np.random.default_rng(2), kind.upper()
    width, size = TYPES[name].weights, TYPES[name].nbytes
    blocks = quantize(name, random.standard_normal((3, 512)).astype(np.float32)).reshape(-1, size)
    grid = BlockGrid.of(name, blocks)
    codes = random.integers(1, 4, (len(blocks), width)).astype(np.uint8)
    values = dequantize(name, with_codes(name, blocks, codes))
    for column in range(width):
        found, rounded = grid.round(column, values[:, column])
        moving = np.abs(grid.steps[:, column]) > 0
        np.testing.assert_array_equal(found[moving], codes[moving, column])
        np.testing.assert_allclose(rounded, values[:, column], rtol=1e-4, atol=1e-5)


def test_settings_that_exclude_each_other_are_refused():
    with pytest.raises(MethodError, match="leave one of them out"):
        GGUFBlocks(feedback=True, imatrix=False)
    with pytest.raises(MethodError, match="did you mean q4_k"):
        GGUFBlocks("q4_kk")
    plain = GGUFBlocks(feedback=True).compress(torch.ones(1, 256), Statistics())
    assert plain.type == "Q4_K"  # as of embedding and head, whose inputs are not measured


def test_rows_that_are_no_whole_blocks_take_another_type_and_the_card_tells():
    weight = torch.zeros(4, 576)
    wide, short = GGUFBlocks("q4_k"), torch.zeros(4, 172)
    assert wide.compress(weight, Statistics()).type == "Q5_0"
    assert wide.note((4, 576)) == "Q5_0 instead of Q4_K: rows of 576 are no whole blocks of it"
    assert wide.note((4, 512)) is None
    kept = wide.compress(short, Statistics())
    assert isinstance(kept, Dense)
    assert kept.dtype == "F16"
    assert wide.note((4, 172)).startswith("F16 instead of Q4_K")


def test_values_too_large_for_a_type_are_refused():
    with pytest.raises(MethodError, match="more than Q4_K can hold"):
        GGUFBlocks("q4_k").compress(torch.full((1, 256), 1e8), Statistics())


# As `llama_model_quantize` chose them for a Llama of 30 layers and 3 heads that share keys.
@pytest.mark.parametrize(
    ("mix", "part", "layers"),
    [
        ("Q4_K_M", "v", {"Q6_K": [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]}),
        ("Q4_K_M", "q", {}),
        ("Q4_K_S", "v", {"Q5_K": [0, 1, 2, 3]}),
        ("Q4_K_S", "down", {"Q5_K": [0, 1, 2]}),
        ("Q3_K_M", "v", {"Q5_K": [0, 1], "Q4_K": [*range(2, 30)]}),
        ("Q3_K_M", "down", {"Q5_K": [0], "Q4_K": [*range(1, 30)]}),
        ("Q3_K_M", "o", {"Q4_K": [*range(30)]}),
        ("Q2_K_M", "v", {"Q3_K": [*range(30)]}),
    ],
)
def test_mixes_give_more_bits_where_llama_cpp_does(mix, part, layers):
    chosen = MIXES[mix]
    found = {}
    for index in range(30):
        kind = chosen.choose(Position(part, index, 30, 3))
        if kind != chosen.type:
            found.setdefault(kind, []).append(index)
    assert found == layers
    assert chosen.choose(None) == chosen.type


def test_a_mix_reaches_the_matrices(tmp_path):
    made = GGUFExport(load(shared("models", MODEL)), format_of("q4_k_m"))
    assert made.fallbacks == {("Q4_K", "Q5_0"): 12, ("Q6_K", "Q8_0"): 3}
    made.write(tmp_path / "a.gguf")
    file = load(tmp_path / "a.gguf")
    assert file.gguf.metadata["general.file_type"] == 15
    sizes = job(tmp_path / "b.gguf", "gguf:type=q4_k_m,imatrix=false").run(texts())
    other = load(tmp_path / "b.gguf")
    for name in other.weights:
        if name.startswith("layers.") and len(other.weights.shape(name)) == 2:
            assert file.weights[name].type == other.weights[name].type
            np.testing.assert_array_equal(file.weights[name].data, other.weights[name].data)
    assert 5.5 < sizes.bits_per_weight < 8.5


def format_of(text):
    from paceline.models.export.gguf_types import parse_gguf_format

    return parse_gguf_format(text)


# Recipe -> the type of q in the file. Integers of other methods are kept as they are.
RUN = {
    "gguf:type=q4_0,feedback=true": "Q4_0",
    "awq:steps=2+gguf:type=q4_1": "Q4_1",
    "gptq:bits=4,group=32": "Q4_0",
    "gptq:bits=4,group=32,symmetric=false": "Q5_0",
    "rtn:bits=8,group=64": "Q8_0",
}


@pytest.mark.parametrize("spec", RUN)
def test_llama_cpp_says_what_we_say(tmp_path, spec):
    out = tmp_path / "a.gguf"
    job(out, spec, "rtn:bits=8,group=32").run(texts())
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    model = load(out)
    assert model.weights["layers.0.q"].type == RUN[spec]
    lm = LM(out, drafter="plain", budget=1)
    prompt = lm.tokenizer.encode("Once upon a time there was a little")
    said = lm.generate(prompt, max_new_tokens=24, temperature=0.0).tokens
    library = Library()
    theirs = LlamaCpp(library, out, 128, 1)
    try:
        ids = np.array([*prompt, *said], np.int32)
        logits = np.array(theirs.extend(ids, True))
    finally:
        theirs.close()
    steps = logits[len(prompt) - 1 : -1]
    ours = steps[np.arange(len(said)), list(said)]
    assert (steps.max(1) - ours < 0.05 * steps.std(1)).all()  # activations are rounded otherwise
    assert (steps.argmax(1) == said).mean() > 0.8


@pytest.mark.parametrize("scales", ["", ",scale_bits=6"])
def test_integers_are_kept_value_for_value(tmp_path, scales):
    from paceline.compress.job import CompressionJob

    spec = parse_recipe(f"gptq:bits=4,group=32,symmetric=false{scales}")
    source = load(shared("models", MODEL))
    CompressionJob(source, tmp_path / "folder", spec).run(texts())
    GGUFJob(source, tmp_path / "a.gguf", spec).run(texts())
    folder, file = load(tmp_path / "folder"), load(tmp_path / "a.gguf")
    for name in folder.weights:
        np.testing.assert_array_equal(folder.weights.dense(name), file.weights.dense(name))


@pytest.mark.parametrize(
    ("spec", "head", "said"),
    [
        ("magnitude:pattern=2:4", "keep", r"no type for layers.0.q \(a bitmap and its values\)"),
        ("svd:keep=0.5", "keep", "layers.0.q .*low"),
        ("rtn:bits=8,group=32,symmetric=false", "keep", "integers of 8 bits in groups of 32 with"),
        ("rtn:bits=4,group=48", "keep", "groups of 48"),
        ("rtn:group=32,levels=learned,scale_bits=6", "keep", "codes of a table of 16 levels"),
        ("quik", "keep", r"no type for layers.0.q \(a matrix whose inputs are rounded"),
        ("comet:group=32", "keep", r"no type for layers.0.q \(a matrix whose inputs are rounded"),
        ("gguf", "rtn:bits=8,group=24", r"no type for embed \(integers of 8 bits in groups of 24"),
    ],
)
def test_what_gguf_has_no_type_for_is_refused_by_name(tmp_path, spec, head, said):
    with pytest.raises(MethodError, match=said):
        job(tmp_path / "a.gguf", spec, head).run(texts())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_work_and_no_file(tmp_path, monkeypatch):
    out, spec = tmp_path / "a.gguf", "gguf:type=q4_0"
    job(tmp_path / "whole.gguf", spec).run(texts())
    with monkeypatch.context() as patch:
        patch.setattr(gguf_writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(ModelError, match="the disk has 0 MB left"):
            job(out, spec).run(texts())
    assert not out.exists()
    job(out, spec).run(texts())
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_fused_matrices_need_one_type(tmp_path):
    tiny.MODELS["phi3"]().save_pretrained(tmp_path / "hf")
    model = load(tmp_path / "hf")
    for spec in ("gguf:type=q4_k_m", "gguf:type=q3_k_l"):
        with pytest.raises(MethodError, match=r"stores layers.\d.q and .* in one tensor"):
            GGUFJob(model, tmp_path / "a.gguf", parse_recipe(spec))
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 24))
    uneven = parse_recipe("rtn:mean_bits=5,group=32")  # widths are known after the work only
    with pytest.raises(MethodError, match="GGUF has no type for layers"):
        GGUFJob(model, tmp_path / "a.gguf", uneven).run(Calibration(tokens, "noise"))
    assert [each.name for each in tmp_path.iterdir()] == ["hf"]
    GGUFJob(model, tmp_path / "a.gguf", parse_recipe("gguf:type=q4_k")).run(
        Calibration(tokens, "noise")
    )
    assert load(tmp_path / "a.gguf").config.layers == model.config.layers
