"""Log-probabilities are of the tokens: their bytes, their places, and those of prompts."""

import math

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core import TokenTree
from paceline.decoding.strategies.base import Task
from paceline.errors import ModelError
from paceline.serving.api.logprobs import TokenTexts, completion_logprobs
from paceline.serving.messages import Logprob
from paceline.serving.prompt_scores import PromptScores

OPENING = "Once upon a time"
TALK = [{"role": "user", "content": "Once"}]

TEXT = "Once upon a time there was a dog — é 🐕."


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_joined_bytes_are_the_text(lm, text):
    ids = lm.tokenizer.encode(text)
    texts = TokenTexts(lm, begins=True)
    joined = b""
    for token in ids:
        joined += texts.piece(token)
        texts.push(token)
    assert joined.decode(errors="replace") == lm.tokenizer.decode(ids)


def test_tokens_that_look_alike_stay_apart(lm):
    top = [(token, -1.0 - token) for token in range(len(lm.tokenizer))]
    found = completion_logprobs([Logprob(5, -1.0, top)], TokenTexts(lm, begins=False))
    assert len(found["top_logprobs"][0]) == len(top)


def test_a_prompt_is_scored_as_by_the_model(client, lm):
    score = lm.score(TEXT)
    for new in (0, 3):
        [choice] = client.completions.create(
            model="tiny", prompt=TEXT, echo=True, logprobs=2, max_tokens=new, temperature=0
        ).choices
        found = choice.logprobs
        size = len(score.tokens)
        assert len(found.tokens) == size + new
        assert found.token_logprobs[0] is None
        assert found.token_logprobs[1:size] == pytest.approx(score.logprobs[1:], abs=1e-5)
        assert choice.text.startswith(TEXT)
        for place, offset in enumerate(found.text_offset):
            if place and not found.tokens[place].startswith("bytes:"):
                assert choice.text[offset:].startswith(found.tokens[place])
        for logprob, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
            assert len(top) == 2
            assert max(top.values()) >= logprob - 1e-6


def test_prompts_are_scored_together(client, lm):
    texts = [TEXT, "The dog", OPENING]
    tokens = [lm.tokenizer.encode(text) for text in texts]
    as_text, as_tokens = (
        client.completions.create(
            model="tiny", prompt=prompt, echo=True, logprobs=1, max_tokens=0
        ).choices
        for prompt in (texts, tokens)
    )
    for index, text in enumerate(texts):
        assert as_text[index].logprobs == as_tokens[index].logprobs
        total = math.fsum(as_text[index].logprobs.token_logprobs[1:])
        assert total == pytest.approx(lm.score(text).total, abs=1e-3)


def test_streamed_offsets_go_on(client):
    options = {"model": "tiny", "prompt": OPENING, "max_tokens": 12, "logprobs": 1, "seed": 3}
    whole = client.completions.create(**options).choices[0].logprobs
    pieces = [
        piece.choices[0].logprobs
        for piece in client.completions.create(**options, stream=True)
        if piece.choices[0].logprobs
    ]
    assert [each for piece in pieces for each in piece.tokens] == whole.tokens
    assert [each for piece in pieces for each in piece.text_offset] == whole.text_offset


def test_bytes_of_a_chat_are_its_text(client):
    options = {"model": "tiny", "messages": TALK, "max_tokens": 20, "temperature": 1.0, "seed": 5}
    [choice] = client.chat.completions.create(**options, logprobs=True, top_logprobs=3).choices
    joined = b"".join(bytes(each.bytes) for each in choice.logprobs.content)
    assert joined.decode(errors="replace").startswith(choice.message.content)


def test_logits_that_are_no_numbers_are_no_scores(lm, monkeypatch):
    size = lm.engine.config.vocab_size

    def broken(sequence, tokens, observe, chunk=256):
        observe(0, TokenTree.chain(tokens), np.full((len(tokens), size), np.nan, np.float32))

    monkeypatch.setattr(lm.engine, "extend", broken)
    request = lm.request(TEXT)
    with pytest.raises(ModelError, match="not finite"):
        PromptScores(1).run(Task(lm.engine, request))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_tokens": 0, "n": 2}, "max_tokens is 0"),
        ({"max_tokens": 0, "stream": True}, "leave stream out"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused(client, change, said):
    body = {"model": "tiny", "prompt": OPENING, "echo": True, "logprobs": 1} | change
    with pytest.raises(openai.BadRequestError, match=said):
        client.post("/completions", body=body, cast_to=object)
