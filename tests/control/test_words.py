"""Controls that speak text: what the tokens of real checkpoints add to it."""

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.control.bad_words import BadWords
from paceline.control.sampler_spec import SamplerSpec
from paceline.errors import MethodError, PacelineError
from paceline.models.tokenizer import open_tokenizer
from paceline.models.vocabulary import Vocabulary, words


@pytest.fixture(scope="module")
def lm():
    return LM(drafter="plain", engine="native")


TEXTS = ["Once upon a time, ", 'He said: "Nö, 12 €!"\n\tEnd', " leading", "emoji 🙂 x", "a  b   c"]


def test_the_pieces_of_a_text_are_the_text(real_model):
    tokenizer = open_tokenizer(real_model)
    vocabulary = Vocabulary(len(tokenizer) + 3, tokenizer)
    assert vocabulary.pieces[-3:] == [b"", b"", b""]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        found = b"".join(vocabulary.pieces[token] for token in ids)
        found = found[1:] if vocabulary.strips else found
        assert found.decode() == tokenizer.decode(ids)


def test_the_pieces_of_any_tokens_decode_alike(real_model):
    tokenizer = open_tokenizer(real_model)
    vocabulary = Vocabulary(len(tokenizer), tokenizer)
    generator = np.random.default_rng(0)
    for _ in range(200):
        ids = generator.integers(0, len(tokenizer), 6).tolist()
        found = b"".join(vocabulary.pieces[token] for token in ids)
        if vocabulary.strips and found.startswith(b" "):
            found = found[1:]
        with suppress(UnicodeDecodeError):  # decoders differ in how they show what is no text
            assert found.decode() == tokenizer.decode(ids)


def test_a_bad_word_never_occurs_however_it_is_divided(lm):
    prompt, banned = "Once upon a time", ["was", " the", "e", "mo"]
    free = lm.generate(prompt, max_new_tokens=60, temperature=1.0, controls={}).text
    assert all(word in free for word in ("was", "e"))
    text = lm.generate(
        prompt, max_new_tokens=60, temperature=1.0, controls={"bad_words": banned}
    ).text
    assert len(text) > 20
    assert not [word for word in banned if word in text]


@given(st.data())
@settings(max_examples=60)
def test_bad_words_forbid_exactly_what_would_complete_one(lm, data):
    word = data.draw(st.text("abé ", min_size=1, max_size=4))
    pieces = lm.vocabulary.pieces
    short = [
        t for t, piece in enumerate(pieces) if 0 < len(piece) <= 2 and set(piece) <= set(b"abcd ")
    ]
    history = data.draw(st.lists(st.sampled_from(short), max_size=5))
    text = b"".join(pieces[t] for t in history)
    if word.encode() in text:
        return
    request = lm.request("x", controls=[BadWords(f'"{word}"')], temperature=0)
    edited = request.controls[0].apply(np.zeros(lm.vocabulary.size, np.float32), history)
    expected = [word.encode() in text + piece for piece in pieces]
    assert np.isinf(edited).tolist() == expected


def test_lists_of_words():
    assert words("x", '"a; b";12 13 ; 4') == ["a; b", (12, 13), (4,)]
    assert words("x", r'"a\u002c b"') == ["a, b"]
    assert words("x", "") == []
    for text in ('"a', "a", '"a"b', "-1", "1;;2", '""', "1.5", "9" * 20):
        with pytest.raises(MethodError, match="x"):
            words("x", text)


def test_a_mapping_and_a_text_say_the_same():
    of, parse = SamplerSpec.of, SamplerSpec.parse
    assert of({"temperature": 0.7, "top_k": 4}) == parse("temperature=0.7,top_k=4")
    assert of({"dry": 0.5, "dry.base": 2}) == parse("dry=0.5,dry.base=2")
    assert of({"bad_words": ["a, b", 3, (4, 5)]}) == parse(r'bad_words="a\u002c b";3;4 5')
    assert of({"logit_bias": {13: -5, 4: 2.5}}) == parse("logit_bias=13=-5;4=2.5")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("top_k=4,top_k=5", "given twice"),
        ("dry.bass=2", "did you mean base"),
        ("drie.base=2", "did you mean dry"),
        ("temperature=-1", "expected 0 or more"),
        ("bad_words=x", "quoted text"),
    ],
)
def test_bad_settings(text, said):
    with pytest.raises(PacelineError, match=said):
        SamplerSpec.parse(text)


@given(st.text(max_size=40) | st.from_regex(r'(dry|bad_words|logit_bias)(\.base)?=["0-9;=\\ a.-]*'))
def test_any_text_is_understood_or_refused(text):
    with suppress(PacelineError):
        SamplerSpec.parse(text)


@pytest.mark.parametrize(
    "options",
    [
        {"bad_words": [[]]},
        {"bad_words": ["a", []]},
        {"bad_words": [""]},
        {"bad_words": "13;"},
        {"controls": {"dry": 0.8, "dry.breakers": [[]]}},
        {"controls": 'bad_words:words="a";'},
        {"controls": "top_p=0.9,,min_p=0.1"},
        {"keywords": "dog;"},
        {"logit_bias": "13=1;"},
        {"stop": [""]},
        {"stop": ["a", ""]},
    ],
)
def test_an_empty_member_is_refused_by_name(lm, options):
    name = next(iter(options))
    with pytest.raises(PacelineError) as caught:
        lm.request("Once", **options)
    assert "empty" in str(caught.value)
    assert name in str(caught.value) or name == "controls"
