import errno
import json

import numpy as np
import pytest

from paceline.models import load
from paceline.models.formats import writer
from tests.conftest import shared


@pytest.fixture
def model():
    return shared("models", "stories260K")


def test_a_gguf_file_and_back(paceline, model, tmp_path):
    out = tmp_path / "a.gguf"
    done = paceline("convert", model, out, "--format", "q8_0:head=f16", "--json")
    assert done.code == 0
    found = done.json
    assert set(found) == {"path", "bytes", "types", "fallbacks", "notes", "seconds"}
    assert found["bytes"] == out.stat().st_size
    assert found["types"] == {"F16": 6, "F32": 11, "Q8_0": 30}
    assert found["fallbacks"] == [{"wanted": "Q8_0", "type": "F16", "tensors": 5}]
    assert done.err.startswith(f"wrote {out}, 0.")
    assert "6 F16, 11 F32, 30 Q8_0 tensors" in done.err
    assert "5 matrices are F16 instead of Q8_0: rows are no whole blocks of Q8_0" in done.err
    folder = tmp_path / "folder"
    back = paceline("convert", out, folder, "--format", "bf16", "--json").json
    assert back["types"] == {"BF16": 47}
    assert {each.name for each in folder.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        "generation_config.json",
    }
    words = ("generate", "Once upon a time", "--max-new-tokens", 12, "--temperature", 0)
    texts = [paceline(*words, "--model", each).out for each in (model, out, folder)]
    assert texts[1].startswith(", there was a little girl named Lily")
    assert texts[1] == texts[0] == texts[2]


def test_without_a_format_floating_point_numbers_stay(paceline, model, tmp_path):
    done = paceline("convert", model, tmp_path / "a.gguf", "--json")
    assert done.json["types"].keys() == {"F32"}
    assert paceline("convert", model, tmp_path / "out", "--json").json["types"] == {"F32": 47}


def refusal(done):
    assert done.code == 2
    assert done.err.count("\n") == 1
    return done.err.removeprefix("paceline: ")


def test_nothing_is_written_over(paceline, model, tmp_path):
    file, folder = tmp_path / "a.gguf", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    (folder / "mine").write_text("mine")
    assert "add --overwrite" in refusal(paceline("convert", model, file))
    assert "is not empty" in refusal(paceline("convert", model, folder, "--overwrite"))
    assert file.read_text() == "mine"
    assert [each.name for each in folder.iterdir()] == ["mine"]
    assert paceline("convert", model, file, "--overwrite").code == 0
    assert load(file).config.hidden_size == 64


def test_a_place_of_the_wrong_kind_is_refused(paceline, model, tmp_path):
    folder, file = tmp_path / "a.gguf", tmp_path / "file"
    folder.mkdir()
    file.write_text("")
    assert "is a folder, expected the name of a new file" in refusal(
        paceline("convert", model, folder)
    )
    assert "is a file; name a file that ends in .gguf" in refusal(paceline("convert", model, file))
    assert "is where the model itself lies" in refusal(paceline("convert", model, model))
    source = tmp_path / "source.gguf"
    paceline("convert", model, source)
    assert "is where the model itself lies" in refusal(
        paceline("convert", source, source, "--overwrite")
    )


def test_an_unknown_format_is_one_sentence(paceline, model, tmp_path):
    assert "unknown format 'q9_k'" in refusal(
        paceline("convert", model, tmp_path / "a.gguf", "--format", "q9_k")
    )
    assert "unknown format of safetensors 'q8_0'" in refusal(
        paceline("convert", model, tmp_path / "out", "--format", "q8_0")
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["a.gguf", "out"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    paceline, model, tmp_path, target, monkeypatch
):
    replace_file = writer.replace_file

    def full(path, write):
        def writes(file):
            write(file)
            raise OSError(errno.ENOSPC, "No space left on device")

        replace_file(path, writes)

    for module in ("writer", "gguf_writer"):
        monkeypatch.setattr(f"paceline.models.formats.{module}.replace_file", full)
    assert "No space left on device" in refusal(paceline("convert", model, tmp_path / target))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["a.gguf", "out"])
def test_an_interrupt_leaves_nothing(paceline, model, tmp_path, target, monkeypatch):
    def interrupted(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr("paceline.models.export.gguf.quantize", interrupted)
    monkeypatch.setattr("paceline.models.export.safetensors.quantize", interrupted)
    assert paceline("convert", model, tmp_path / target).code == 130
    assert not list(tmp_path.iterdir())


def test_what_gguf_cannot_describe_is_refused(paceline, tmp_path):
    story = shared("models", "tinystories-instruct-3m-chat")
    assert "gpt_neo models have no GGUF architecture" in refusal(
        paceline("convert", story, tmp_path / "a.gguf")
    )
    done = paceline("convert", story, tmp_path / "out", "--json")
    assert done.code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "gpt_neo"


def same_weights(one, other):
    """Whether two checkpoints hold the same bits."""
    one, other = load(one).weights, load(other).weights
    assert list(one) == list(other)
    for name in one:
        a, b = one.stored(name), other.stored(name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.values.tobytes() == b.values.tobytes()


@pytest.fixture
def halved(paceline, model, tmp_path):
    out = tmp_path / "bf16"
    assert paceline("convert", model, out, "--format", "bf16").code == 0
    return out


def test_packed_without_loss_and_back(paceline, halved, tmp_path):
    packed, back = tmp_path / "packed", tmp_path / "back"
    done = paceline("convert", halved, packed, "--lossless", "--json")
    assert done.code == 0
    found = done.json
    assert found["types"] == {"BF16": 11, "BF16 packed": 36}
    sizes = found["lossless"]
    assert sizes["packed"] < 0.72 * sizes["packed_source"]  # small matrices with their headers
    assert found["bytes"] < 0.75 * (halved / "model.safetensors").stat().st_size
    assert (packed / "model.safetensors").stat().st_size < 0.85 * sizes["source"]
    assert "unpacking takes" in done.err
    same_weights(halved, packed)
    assert load(packed).weights.formats() == ("bf16",)
    assert paceline("convert", packed, back, "--json").json["types"] == {"BF16": 47}
    same_weights(halved, back)
    data = [(each / "model.safetensors").read_bytes() for each in (halved, back)]
    assert data[0] == data[1]
    words = ("generate", "Once upon a time", "--max-new-tokens", 12, "--temperature", 0)
    texts = [paceline(*words, "--model", each).out for each in (halved, packed)]
    assert texts[0] == texts[1]


def test_packing_what_is_packed_changes_nothing(paceline, halved, tmp_path):
    for source, out in ((halved, "a"), (tmp_path / "a", "b")):
        assert paceline("convert", source, tmp_path / out, "--lossless").code == 0
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in "ab"]
    assert files[0] == files[1]


def test_blocks_of_a_gguf_file_stay_and_its_numbers_are_packed(paceline, model, tmp_path):
    source, packed, back = tmp_path / "a.gguf", tmp_path / "packed", tmp_path / "b.gguf"
    paceline("convert", model, source, "--format", "q8_0:head=f16")
    types = paceline("convert", source, packed, "--lossless", "--json").json["types"]
    assert types == {"F16 packed": 6, "F32": 11, "Q8_0": 30}
    assert paceline("convert", packed, back).code == 0
    one, other = load(source).weights, load(back).weights
    for name in one:
        a, b = one.stored(name), other.stored(name)
        data = [getattr(each, "data", None) for each in (a, b)]
        data = [a.values, b.values] if data[0] is None else data
        assert bytes(data[0]) == bytes(data[1])


def test_matrices_with_many_zeros_are_stored_without_them(paceline, halved, tmp_path):
    file = halved / "model.safetensors"
    raw = bytearray(file.read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    start = 8 + int.from_bytes(raw[:8], "little")
    random = np.random.default_rng(0)
    for name, entry in header.items():
        if name.endswith("_proj.weight"):
            begin, end = (start + offset for offset in entry["data_offsets"])
            values = np.frombuffer(raw[begin:end], np.uint16).copy()
            drawn = random.random(len(values))
            values[drawn < 0.7] = 0
            values[drawn < 0.05] = 0x8000  # -0 is no +0
            raw[begin:end] = values.tobytes()
    file.write_bytes(raw)
    done = paceline("convert", halved, tmp_path / "packed", "--lossless", "--json").json
    assert done["types"] == {"BF16": 11, "BF16 packed": 1, "BF16 packed without zeros": 35}
    same_weights(halved, tmp_path / "packed")


def test_packing_with_another_format_is_refused(paceline, model, tmp_path):
    words = ("convert", model, tmp_path / "out", "--lossless")
    assert "keeps every type as it is" in refusal(paceline(*words, "--format", "bf16"))
    assert "GGUF has no packed numbers" in refusal(
        paceline("convert", model, tmp_path / "a.gguf", "--lossless")
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left")])
def test_packing_that_stops_leaves_nothing(paceline, model, tmp_path, stop, monkeypatch):
    from paceline.models.export import lossless

    pack, calls = lossless.pack_smallest, []

    def stops(*words):
        calls.append(words)
        if len(calls) > 20:
            raise stop
        return pack(*words)

    monkeypatch.setattr(lossless, "pack_smallest", stops)
    done = paceline("convert", model, tmp_path / "out", "--lossless")
    assert done.code == 130 if stop is KeyboardInterrupt else "No space left" in refusal(done)
    assert not list(tmp_path.iterdir())


def test_a_damaged_packed_checkpoint_is_one_sentence(paceline, halved, tmp_path):
    packed = tmp_path / "packed"
    paceline("convert", halved, packed, "--lossless")
    file = packed / "model.safetensors"
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    entry = json.loads(whole[8:start])["layers.0.gate:data"]["data_offsets"]
    for at in (entry[0], sum(entry) // 2):
        broken = bytearray(whole)
        broken[start + at] ^= 64
        file.write_bytes(broken)
        said = refusal(paceline("generate", "a", "--model", packed, "--max-new-tokens", 1))
        assert "layers.0.gate" in said
        assert "damaged" in said
    file.write_bytes(whole[:-9])
    assert "truncated" in refusal(paceline("generate", "a", "--model", packed))


def test_integers_become_a_folder_of_compressed_tensors(tmp_path, paceline):
    model = shared("models", "TinyStories-656K")
    small, out = tmp_path / "small", tmp_path / "out"
    recipe = ("--recipe", "rtn:bits=4,group=32", "--no-measure")
    assert paceline("compress", model, small, *recipe).code == 0
    done = paceline("convert", small, out, "--format", "compressed-tensors", "--json")
    assert done.json["types"] == {"int4": 14, "F32": 6}
    assert paceline("generate", "Once upon", "--model", out, "--max-new-tokens", 4).code == 0
    refused = paceline("convert", model, tmp_path / "no", "--format", "compressed-tensors")
    assert refused.code == 2
    assert "compress it first" in refused.err
    assert not (tmp_path / "no").exists()
