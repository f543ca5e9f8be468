import errno
import json

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
    assert "unknown format 'q4_k_m'" in refusal(
        paceline("convert", model, tmp_path / "a.gguf", "--format", "q4_k_m")
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
