"""`paceline profile-heads`, and a prompt that is read by what it wrote."""

import json

from tests.conftest import shared


def test_the_program_profiles_heads(paceline, tmp_path):
    model, text, out = shared("models", "stories260K"), tmp_path / "text", tmp_path / "heads.json"
    text.write_text("Once upon a time there was a little dog named Max. He liked to run. " * 60)
    words = ("profile-heads", model, text, out, "--budget", 64, "--threads", 1, "--json")
    short = paceline(*words, "--tokens", 300)
    assert (short.code, short.json["error"]) == (2, short.json["error"])
    assert "a profile needs 384 to 512" in short.err
    assert not out.exists()
    done = paceline(*words)
    assert done.code == 0, done.err
    assert sum(done.json["heads"].values()) == sum(
        len(layer) for layer in json.loads(out.read_text())["layers"]
    )
    assert done.err.startswith(f"wrote {out}: ")
    words = ("generate", "Once upon a time", "--model", model, "--max-new-tokens", 8)
    assert paceline(*words, "--attention", f"minference:profile={out}", "--json").code == 0
