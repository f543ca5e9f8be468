"""Where an answer ends, what it continues, and what else is said of it."""

import json

import httpx2 as httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import RequestError
from paceline.models.chat import ChatTemplate
from paceline.serving.api.reasoning import reasoning_form, separate
from tests.serving.api.test_messages import accumulated, events
from tests.serving.api.test_openai import TALK, alone

CHAT = "/v1/chat/completions"
THOUGHT = "<think>\nab\n</think>\n\ncd"


@pytest.fixture
def post(address):
    def post(path, **body):
        common = {"model": "tiny", "temperature": 0, "max_tokens": 30}
        return httpx.post(address + path, json=common | body, timeout=60)

    return post


def pieces(response):
    events = response.text.strip().split("\n\n")
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def written(regex):
    """Fields that let the tiny model write a text."""
    return {"regex": regex, "max_tokens": 60, "ignore_eos": False}


def test_a_token_id_ends_the_answer_also_with_ignore_eos(post, lm):
    tokens = lm.generate("Once", max_new_tokens=30, temperature=0).tokens
    last = next(token for at, token in enumerate(tokens) if at > 3 and token not in tokens[:at])
    place = tokens.index(last)
    found = post(
        "/v1/completions",
        prompt="Once",
        stop_token_ids=[last],
        ignore_eos=True,
        return_token_ids=True,
    ).json()["choices"][0]
    assert found["token_ids"] == tokens[: place + 1]
    assert found["finish_reason"] == "stop"
    assert found["text"] == alone(lm, "Once", max_new_tokens=place)
    assert post("/v1/completions", prompt="a", stop_token_ids=[10**6]).status_code == 400


def test_the_stop_string_may_be_part_of_the_answer(post, lm):
    text = alone(lm, "Once", max_new_tokens=30)
    stop = text[10:13]
    at = text.index(stop)
    for include in (False, True):
        body = {"prompt": "Once", "stop": [stop], "include_stop_str_in_output": include}
        found = post("/v1/completions", **body).json()["choices"][0]
        assert found["text"] == text[: at + len(stop) * include]
        assert found["finish_reason"] == "stop"


def test_stop_strings_count_only_behind_the_minimum(post, lm):
    stop = "e"
    text, tokens = alone(lm, "Once", max_new_tokens=30), 12
    start = len(alone(lm, "Once", max_new_tokens=tokens))
    expected = text[: text.index(stop, start)]
    found = post("/v1/completions", prompt="Once", stop=stop, min_tokens=tokens).json()
    assert found["choices"][0]["text"] == expected
    assert stop in expected


def test_the_last_message_is_continued(post, lm):
    talk = [*TALK, {"role": "assistant", "content": "Once upon"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    found = post(CHAT, messages=talk, return_token_ids=True, **fields).json()
    prompt = lm.tokenizer.decode(found["prompt_token_ids"])
    assert prompt.endswith("assistant: Once upon")
    whole = found["choices"][0]["message"]["content"]
    assert whole == lm.generate(found["prompt_token_ids"], max_new_tokens=30).text
    both = post(CHAT, messages=talk, continue_final_message=True, add_generation_prompt=True)
    assert both.status_code == 400
    twice = {"chat_template_kwargs": {"continue_final_message": False}}
    assert post(CHAT, messages=talk, **fields, **twice).status_code == 400


@pytest.mark.parametrize(
    ("template", "content", "end"),
    [
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", "i ", "<i "),
        ("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}", " i ", "<i"),
    ],
)
def test_the_text_ends_with_the_message_whatever_follows_it(template, content, end):
    talk = [{"role": "user", "content": "i"}, {"role": "assistant", "content": content}]
    settings = {"continue_final_message": True}
    assert ChatTemplate(template).render(talk, {}, (), settings) == "<i>" + end
    with pytest.raises(RequestError, match="leaves out"):
        ChatTemplate("hello").render(talk, {}, (), settings)
    with pytest.raises(RequestError, match="with text"):
        ChatTemplate(template).render([{"role": "assistant", "content": ""}], {}, (), settings)


def test_token_ids_of_a_stream_are_those_of_the_answer(post, lm):
    body = {"messages": TALK, "return_token_ids": True, "max_tokens": 12}
    whole = post(CHAT, **body).json()
    parts = pieces(post(CHAT, **body, stream=True))
    assert parts[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert whole["prompt_token_ids"] == list(lm.request(TALK).prompt)
    ids = [token for part in parts for token in part["choices"][0].get("token_ids", [])]
    assert ids == whole["choices"][0]["token_ids"]
    body = {"prompt": "Once", "return_token_ids": True, "max_tokens": 12}
    [whole] = post("/v1/completions", **body).json()["choices"]
    parts = [part["choices"][0] for part in pieces(post("/v1/completions", **body, stream=True))]
    assert [t for part in parts for t in part.get("token_ids", [])] == whole["token_ids"]
    prompts = [part["prompt_token_ids"] for part in parts if "prompt_token_ids" in part]
    assert prompts == [whole["prompt_token_ids"]]


def test_reasoning_is_separated_whole_and_streamed(post):
    body = {"messages": TALK, **written(THOUGHT)}
    message = post(CHAT, **body).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("ab", "cd")
    deltas = [part["choices"][0]["delta"] for part in pieces(post(CHAT, **body, stream=True))]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "ab"
    assert "".join(delta.get("content", "") for delta in deltas) == "cd"
    kept = post(CHAT, **body, include_reasoning=False).json()["choices"][0]["message"]
    assert kept["content"] == THOUGHT
    assert "reasoning_content" not in kept
    again = post(CHAT, messages=[*TALK, message, *TALK], max_tokens=2)
    assert again.status_code == 200


def test_reasoning_has_its_place_in_the_other_apis(post, address):
    fields = written(THOUGHT)
    found = post("/v1/messages", messages=TALK, **fields).json()["content"]
    assert [block["type"] for block in found] == ["thinking", "text"]
    assert (found[0]["thinking"], found[1]["text"]) == ("ab", "cd")
    streamed = post("/v1/messages", messages=TALK, stream=True, **fields)
    assert accumulated(events(streamed.text))["content"] == found
    body = {"input": "a", "regex": THOUGHT, "max_output_tokens": 60}
    kept = httpx.post(f"{address}/v1/responses", json=body, timeout=60)
    assert kept.json()["output"][0]["content"][0]["text"] == THOUGHT


def test_text_without_tags_at_its_beginning_is_no_reasoning(post):
    for text in ("a<think>b</think>", "<thin", "<b>"):
        message = post(CHAT, messages=TALK, **written(text)).json()["choices"][0]["message"]
        assert message["content"] == text
        assert "reasoning_content" not in message


PARTS = st.lists(st.sampled_from(["<think>", "</think>", "<", "</th", "a", " ", "\n", ">"]))


@given(PARTS, st.sampled_from([None, "tags", "open"]))
def test_what_is_certain_never_changes(parts, form):
    text = "".join(parts)
    whole = separate(text, form, True)
    for size in range(len(text)):
        now = separate(text[:size], form, False)
        assert whole.reasoning.startswith(now.reasoning)
        assert whole.rest.startswith(now.rest)


def test_a_prompt_may_have_opened_the_tag(lm):
    tokenizer = lm.tokenizer
    assert reasoning_form(tokenizer, tokenizer.encode("assistant: <think>\n")) == "open"
    assert reasoning_form(tokenizer, tokenizer.encode("<think>\n\n</think>\n\n")) == "tags"
    assert separate("ab</think>\n\nc", "open", True) == ("ab", "c")
    assert separate("<think>ab", "open", True) == ("ab", "")
