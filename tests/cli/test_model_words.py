"""How a model is named on the command line, in every verb alike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.cli.app import EITHER_MODEL, MODEL_FIRST, MODEL_OR_PROMPT, PANELS, make_app
from paceline.cli.option_groups import split_prompt
from paceline.errors import PacelineError
from tests.conftest import shared

MODEL = str(shared("models", "stories260K"))
TWO = ("--model", "one", "--model=two")


def refused(done, said):
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert said in done.err


@pytest.mark.parametrize("verb", [*EITHER_MODEL, *MODEL_FIRST, *MODEL_OR_PROMPT])
def test_two_models_by_name_are_refused(paceline, verb):
    refused(paceline(verb, *TWO), "--model is 'one' and 'two'; give one")


def test_every_verb_with_a_model_takes_it_either_way():
    verbs = {name for names in PANELS.values() for name in names}
    app = make_app()
    import typer

    commands = typer.main.get_command(app).commands
    with_model = {
        name for name in verbs if any(p.name == "model" for p in commands[name].params)
    } - {"load-test"}  # a name on a server
    assert with_model == {*EITHER_MODEL, *MODEL_FIRST, *MODEL_OR_PROMPT}


@pytest.mark.parametrize("words", [(MODEL, "Once"), ("Once", "--model", MODEL)])
def test_generate_takes_the_model_before_the_prompt_or_by_name(paceline, words):
    done = paceline("generate", *words, "--max-new-tokens", 3, "--json")
    assert done.json["new_tokens"] == 3


@pytest.mark.parametrize("words", [("{}", "OUT", "--format", "fp16"), ("OUT", "--model", "{}")])
def test_convert_takes_the_model_either_way(paceline, tmp_path, words):
    out = str(tmp_path / "x.gguf")
    words = [word.replace("{}", MODEL).replace("OUT", out) for word in words]
    assert paceline("convert", *words).code == 0


@pytest.mark.parametrize("verb", MODEL_OR_PROMPT)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("smollm2-135m",), "is a model, and no prompt is given"),
        ((MODEL,), "is a model, and no prompt is given"),
        (("missing.gguf", "Once"), "missing.gguf does not exist"),
        (("Once", "upon", "a", "time"), "'Once upon a time' is 4 arguments"),
        ((MODEL, "Once", "--model", MODEL), "expected one prompt"),
        (("Hello", "world"), "put it in quotes"),
    ],
)
def test_what_is_not_plain_is_refused(paceline, verb, words, said):
    refused(paceline(verb, *words), said)


@given(st.lists(st.text(), max_size=4), st.none() | st.text())
def test_any_words_are_a_model_and_a_prompt_or_one_sentence(words, model):
    try:
        found = split_prompt(words, model)
    except PacelineError:
        return
    assert set(filter(None, found)) <= {*words, model}
    assert len(words) < 2 or found == tuple(words)


def test_an_ensemble_does_not_go_with_superposed(paceline):
    words = ("complete", "Once upon", "--method", "superposed", "--model", f"{MODEL}|{MODEL}")
    refused(paceline(*words), "the engine ensemble do not go together")


@pytest.mark.parametrize("verb", ["generate", "prove", "serve", "load-test"])
@pytest.mark.parametrize("width", ["40", "60", "80"])
def test_no_help_is_cut(paceline, verb, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    assert "…" not in paceline(verb, "--help").out


def test_silence_is_explained(paceline, toy):
    """A toy whose first token ends the text."""
    from tests.toy import ToyEngine

    toy.engine = ToyEngine(context=60)
    words = ("generate", "Once", "--max-new-tokens", 4, "--stop")
    plain = paceline("generate", "Once", "--max-new-tokens", 4).out
    done = paceline(*words, plain[0])
    assert done.code == 0
    assert not done.out.strip()
    assert "the model ended the text at once" in done.err
    assert "nothing is printed" not in paceline("generate", "Once", "--max-new-tokens", 4).err


def test_a_prompt_that_looks_like_a_path_is_told(paceline):
    for word in ("./no/such", "owner/name", "~/model"):
        done = paceline("generate", word, "--max-new-tokens", 1)
        assert done.code == 0
        assert "is taken for the prompt; a model stands before it" in done.err
    assert "is taken for" not in paceline("generate", "Once", "--max-new-tokens", 1).err
