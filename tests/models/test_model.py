"""load(): where checkpoints are looked for, their defaults, and what is said of a missing one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from byte_tokenizer import byte_level
from paceline.errors import ModelError
from paceline.models import hub, load
from paceline.models.generation import read_defaults


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny.save("llama", path)
    return byte_level(path)


def test_real_checkpoints_load(real_model: Path) -> None:
    model = load(real_model)
    assert model.config.vocab_size >= len(model.tokenizer)
    assert model.defaults.stop_tokens == set(model.config.eos)
    assert model.defaults.temperature == 0
    assert load(str(real_model)).config == model.config


def test_what_a_model_holds(folder: Path) -> None:
    model = load(folder)
    assert model.path == folder
    assert model.tokenizer is model.tokenizer
    assert model.tokenizer.decode(model.tokenizer.encode("hi")) == "hi"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (0.0, None, None, None, None)),
        ({"temperature": 0.6}, (0.0, None, None, None, None)),
        ({"do_sample": True}, (1.0, None, None, None, None)),
        ({"do_sample": True, "temperature": 0}, (0.0, None, None, None, None)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
            (0.6, 20, 0.9, 0.1, None),
        ),
        (
            {"do_sample": True, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
            (1.0, None, None, None, None),
        ),
        ({"repetition_penalty": 1.05}, (0.0, None, None, None, 1.05)),
    ],
)
def test_defaults(tmp_path: Path, folder: Path, values: dict[str, Any], expected: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({**values, "eos_token_id": [5, 6]}))
    found = read_defaults(tmp_path, load(folder).config)
    settings = (found.temperature, found.top_k, found.top_p, found.min_p, found.repetition_penalty)
    assert settings == expected
    assert list(found.samplers().values()) == [value for value in expected[1:] if value is not None]
    assert found.stop_tokens == {2, 5, 6}


@pytest.mark.parametrize(
    "values", [{"temperature": "hot"}, {"top_p": 7}, {"top_k": -1}, {"min_p": False}]
)
def test_broken_defaults(tmp_path: Path, folder: Path, values: dict[str, Any]) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, **values}))
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        read_defaults(tmp_path, load(folder).config)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere does not exist; expected a folder"):
        load("nowhere")
    with pytest.raises(ModelError, match="does not exist"):
        load(tmp_path / "a" / "b")
    with pytest.raises(ModelError, match=r"cannot read .*config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="is no GGUF file, expected one or a folder"):
        load(tmp_path / "config.json")
    with pytest.raises(ModelError, match="no model_type"):
        load(tmp_path)


def test_a_local_folder_wins(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    assert load("owner/name").config.family == "llama"


def test_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("huggingface_hub")
    asked: list[Any] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        return str(folder)

    monkeypatch.setattr(client, "snapshot_download", fetch)
    assert load("owner/name@v2").config.family == "llama"
    assert load("owner/name").config.family == "llama"
    assert asked == [("owner/name", "v2"), ("owner/name", None)]


def test_hub_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(client.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(client.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        load("owner/name")


def test_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelError, match=r"pip install 'paceline\[hub\]'"):
        load("owner/name")


def test_embedded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "EMBEDDED", tmp_path / "embedded")
    with pytest.raises(ModelError, match="no embedded model"):
        load()
    (tmp_path / "embedded").symlink_to(folder)
    assert load().config.family == "llama"
