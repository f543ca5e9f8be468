"""`paceline train-head` and `paceline warm`: files, refusals and what is said."""

import shutil

from tests.conftest import shared


def test_a_head_is_trained_and_named_in_one_line(paceline, tmp_path):
    model, out = shared("models", "stories260K"), tmp_path / "head"
    words = ("--tokens", "1000", "--epochs", "2", "--method", "medusa:depth=2", "--json")
    done = paceline("train-head", model, out, *words)
    assert done.code == 0
    assert "tokens per pass as a chain" in done.err
    card = done.json
    assert card["head"] == "medusa:depth=2,layers=1,output=shared"
    assert 0 <= card["right_at_2"] <= 1
    assert sorted(file.name for file in out.iterdir()) == ["head.json", "head.safetensors"]
    again = paceline("train-head", model, out, *words)
    assert again.code == 2
    assert "exists already" in again.err
    drafted = paceline("generate", "--model", model, "Once", "--drafter", f"head:path={out}")
    assert drafted.code == 0


def test_prompts_of_a_file_are_answered(paceline, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nThe dog\n")
    plain, model = shared("models", "stories260K"), tmp_path / "chat"
    shutil.copytree(plain, model)
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}:"
    (model / "chat_template.jinja").write_text(template)
    for words, kind in (
        ((), "answers"),
        (("--prompts", prompts), "answers"),
        (("--free",), "texts"),
    ):
        done = paceline("warm", "--model", model, "--tokens", "300", *words)
        assert done.code == 0
        assert f" {kind}, " in done.err
    assert " texts, " in paceline("warm", "--model", plain, "--tokens", "300").err
    words = ("--prompts", prompts, "--free")
    refused = paceline("warm", "--model", model, *words)
    assert refused.code == 2
    assert "leave --free or --prompts out" in refused.err
    missing = paceline("warm", "--model", model, "--prompts", tmp_path / "none.txt")
    assert missing.code == 2
    assert "cannot read the prompts" in missing.err
