import pytest

from tests.conftest import shared


@pytest.fixture
def model():
    return shared("models", "stories260K")


def test_an_hmm_leads_to_keywords(paceline, model, tmp_path):
    out = tmp_path / "hmm.safetensors"
    words = ("--states", 3, "--samples", 8, "--length", 16, "--rounds", 2, "--json")
    done = paceline("distil-hmm", model, out, *words)
    assert done.code == 0
    found = done.json
    assert found["path"] == str(out)
    assert (found["states"], found["tokens"], found["rounds"]) == (3, 128, 2)
    assert 0 < found["nats_per_token"] < 10
    assert done.err.startswith(f"wrote {out}, ")
    words = ("--model", model, "--keywords", "dog,park", "--temperature", 1, "--check", "--json")
    given = paceline("generate", *words, "--hmm", out, "--max-new-tokens", 24).json
    assert given["check"]["identical"] is True
    assert "dog" in given["text"].lower()
    assert "park" in given["text"].lower()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--hmm", "x"), "add --keywords"),
        (("--keywords", "dog,"), "is empty"),
        (("--keywords", "dog", "--hmm", "none"), "cannot read the HMM in none"),
        (("--keywords", "dog", "--stop", "."), "stop strings"),
        (("--keywords", "dog", "--sampler", "keywords=cat"), "given twice"),
        (("--keywords", "dog", "--sampler", "letters=g"), "breaks the rules of letters"),
        (("--keywords", "dog", "--max-new-tokens", 1), "allow more"),
        (("--sampler", "letters.most=-1"), "at least 0"),
        (("--sampler", "sounds="), "has no setting"),
        (("--sampler", "letters.longest=3"), "did you mean least"),
    ],
)
def test_what_cannot_be_asked_is_refused(paceline, words, said):
    done = paceline("generate", *words)
    assert done.code == 2
    assert said in done.err


def test_a_place_that_cannot_be_written_is_refused_at_once(paceline, model, tmp_path):
    done = paceline("distil-hmm", model, tmp_path / "none" / "hmm")
    assert done.code == 2
    assert "no folder" in done.err
