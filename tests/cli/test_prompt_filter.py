"""`paceline generate --prompt-keep`: what is kept, and that it says so."""

from tests.conftest import shared

TEXT = "Once upon a time there was a little dog named Max. He liked to run in the park. " * 6


def test_it_generates_from_what_is_kept(paceline):
    model = shared("models", "stories260K")
    words = ("generate", TEXT, "--model", model, "--max-new-tokens", 8, "--json")
    done = paceline(*words, "--prompt-keep", 40, "--prompt-layer", 1)
    assert done.code == 0, done.err
    kept = done.json["prompt_filter"]
    assert len(kept["positions"]) == done.json["prompt_tokens"] == 40
    assert kept["text"]
    assert f"kept 40 of the prompt's {kept['length']} tokens" in done.err
    assert done.json["lossy"]
    assert "a filtered prompt is lossy" in done.err
    plain = paceline(*words)
    assert plain.json["prompt_filter"] is None
    assert not plain.json["lossy"]
    assert plain.json["prompt_tokens"] == kept["length"]


def test_a_layer_alone_is_refused(paceline):
    words = ("generate", "Once", "--model", shared("models", "stories260K"), "--prompt-layer", 1)
    done = paceline(*words)
    assert done.code == 2
    assert "--prompt-layer is that of --prompt-keep; give both" in done.err
