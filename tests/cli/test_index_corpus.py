import json
import textwrap
from itertools import islice
from pathlib import Path

import pytest

from paceline.drafters.history.corpus_index import open_corpus
from paceline.drafters.history.general_text import descriptions, general_texts
from paceline.models.tokenizer import open_tokenizer
from tests.conftest import shared

TEXT = "Once upon a time there was a little girl who liked to play in the park. "


@pytest.fixture
def model():
    return shared("models", "stories260K")


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT * n}) + "\n" for n in (1, 2)))
    return path


def test_what_it_wrote_can_be_drafted_from(paceline, model, texts, tmp_path):
    plain = tmp_path / "more.txt"
    plain.write_text(TEXT)
    out = tmp_path / "corpus"
    done = paceline("index-corpus", model, texts, plain, out, "--json")
    assert done.code == 0
    found = done.json
    assert set(found) == {"path", "bytes", "tokens", "documents", "complete", "seconds"}
    assert (found["documents"], found["complete"]) == (3, True)
    assert found["bytes"] == out.stat().st_size > 8 * found["tokens"]
    assert done.err.startswith(f"wrote {out}, ")
    words = ("generate", "Once upon a time", "--model", model, "--max-new-tokens", 20, "--check")
    words += ("--budget", 16)
    drafted = paceline(*words, "--drafter", f"datastore:path={out}", "--json").json
    assert drafted["check"]["identical"] is True
    assert drafted["passes"] < 20


def test_it_says_where_it_stopped(paceline, model, texts, tmp_path):
    done = paceline("index-corpus", model, texts, tmp_path / "corpus", "--max-tokens", 30, "--json")
    assert (done.json["tokens"], done.json["complete"]) == (30, False)
    assert "stopped at 30 tokens" in done.err


def test_what_cannot_work_is_refused_before_the_work(paceline, model, texts, tmp_path):
    out = tmp_path / "corpus"
    for words, message in (
        ((tmp_path / "none.jsonl", out), "not a file"),
        ((texts, texts), "name another file"),
        ((texts, tmp_path / "none" / "corpus"), "no folder"),
    ):
        done = paceline("index-corpus", model, *words)
        assert done.code == 2
        assert message in done.err
        assert not out.exists()
    assert texts.read_text().count("\n") == 2


def test_another_models_corpus_is_refused(paceline, model, texts, tmp_path):
    out = tmp_path / "corpus"
    paceline("index-corpus", model, texts, out)
    other = shared("models", "TinyStories-656K")
    done = paceline("generate", "--model", other, "--drafter", f"datastore:path={out}")
    assert done.code == 2
    assert "another tokenizer" in done.err


def test_general_text_is_that_of_the_running_python(paceline, model, texts, tmp_path):
    out = tmp_path / "corpus"
    done = paceline("index-corpus", model, texts, out, "--general", "--max-tokens", 3000, "--json")
    assert done.code == 0
    found = done.json
    assert (found["tokens"], found["complete"]) == (3000, False)
    assert found["documents"] > 2
    tokenizer = open_tokenizer(model)
    tokens = open_corpus(out, tokenizer, 1 << 20).tokens
    read = tokenizer.decode([t for t in tokens.tolist() if t >= 0])
    assert read.index("Once upon a time") < read.index("assert")  # named texts, then topics
    done = paceline("index-corpus", model, tmp_path / "alone")
    assert done.code == 2
    assert "no text is named" in done.err


def test_general_texts_are_prose_then_code_and_always_in_one_order():
    texts = list(islice(general_texts(), 400))
    assert texts == list(islice(general_texts(), 400))
    prose = len(descriptions())
    assert prose > 5
    assert any(text == Path(textwrap.__file__).read_text("utf-8") for text in general_texts())
    assert all(len(text) <= 1 << 20 for text in texts)
