import pytest

from paceline.models import pull
from paceline.models.known_models import KNOWN_MODELS
from tests.models.model_wheels import known

CONTENT = b"weights"


@pytest.fixture
def named(monkeypatch, tmp_path):
    """A model of the catalogue that is in the cache already."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = known((), CONTENT)
    monkeypatch.setitem(KNOWN_MODELS, "toy-model", model)
    model.path.parent.mkdir(parents=True)
    model.path.write_bytes(CONTENT)
    return model


def test_the_path_goes_to_stdout(paceline, named):
    done = paceline("pull", "toy-model")
    assert (done.code, done.out) == (0, f"{named.path}\n")
    assert "toy-model was here already, checked; talk with it: paceline chat toy-model" in done.err


def test_json_has_all_about_it(paceline, named):
    assert paceline("pull", "toy-model", "--json").json == {
        "name": "toy-model",
        "path": str(named.path),
        "source": "cache",
        "size": 7,
        "sha256": named.sha256,
        "licence": "MIT",
        "terms": "there",
        "chat": True,
    }


def test_a_folder_needs_no_pull(paceline, tmp_path):
    assert paceline("pull", str(tmp_path)).out == f"{tmp_path}\n"


def test_errors_are_one_sentence(paceline, named, monkeypatch):
    monkeypatch.setattr(pull, "hub_reachable", lambda: False)
    named.path.unlink()
    done = paceline("pull", "toy-model")
    assert (done.code, done.out) == (2, "")
    assert "toy-model cannot be fetched: " in done.err
    done = paceline("pull", "toy-mode")
    assert done.code == 2
    assert "did you mean toy-model?" in done.err


def test_models_lists_what_has_a_name_and_what_is_here(paceline, named):
    done = paceline("models", "--json").json
    assert done["folder"] == str(named.path.parent.parent)
    rows = {row["name"]: row for row in done["models"]}
    assert rows["toy-model"] == {
        "name": "toy-model",
        "title": "A toy",
        "size": 7,
        "licence": "MIT",
        "terms": "there",
        "chat": True,
        "sources": [],
        "here": True,
        "path": str(named.path),
    }
    assert not rows["gemma3-270m"]["here"]
    assert rows["gemma3-270m"]["licence"] == "Gemma Terms of Use"
    assert rows["embedded"]["size"] > 1_000_000
    shown = paceline("models").out
    for row in rows.values():
        assert row["name"] in shown
        assert row["licence"] in shown


def test_models_lists_the_hubs_cache(paceline, named, tmp_path, monkeypatch):
    client = pytest.importorskip("huggingface_hub")
    folder = tmp_path / "hub" / "models--owner--name"
    snapshot = folder / "snapshots" / ("0" * 40)
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "blobs" / "one").write_bytes(bytes(1000))
    (snapshot / "model.safetensors").symlink_to("../../blobs/one")
    monkeypatch.setattr(client.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    [row] = [r for r in paceline("models", "--json").json["models"] if r["name"] == "owner/name"]
    assert (row["size"], row["here"], row["path"]) == (1000, True, str(snapshot))
