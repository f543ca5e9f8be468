"""What clients other than OpenAI's send."""

import json
import urllib.error
import urllib.request

import openai
import pytest

TALK = [{"role": "user", "content": "Once"}]
DIG = {"type": "function", "function": {"name": "dig", "parameters": {"type": "object"}}}
FLY = {"type": "function", "function": {"name": "fly", "parameters": {"type": "object"}}}


def refused(client, path="/chat/completions", **body):
    with pytest.raises(openai.APIStatusError) as caught:
        client.post(path, body=body, cast_to=object)
    return caught.value


def test_a_body_without_a_type_is_json(address):
    data = json.dumps({"messages": TALK, "max_tokens": 2}).encode()
    request = urllib.request.Request(f"{address}/v1/chat/completions", data)
    request.add_unredirected_header("Content-Type", "")
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["choices"]


def test_health_has_a_head(address):
    with urllib.request.urlopen(
        urllib.request.Request(f"{address}/health", method="HEAD")
    ) as found:
        assert found.status == 200
        assert not found.read()


def test_what_is_not_offered_is_told(client):
    error = refused(client, "/embeddings", input="a", model="tiny")
    assert error.status_code == 404
    assert "chat/completions" in error.message


def test_a_prompt_that_is_too_long_has_its_code(client):
    assert refused(client, messages=[{"role": "user", "content": "word " * 5000}]).code == (
        "context_length_exceeded"
    )
    error = refused(client, "/completions", prompt=[5] * 600)
    assert error.code == "context_length_exceeded"
    assert "This model's maximum context length is 512 tokens" in error.message


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image_url", "image_url": {"url": "data:,"}}, "no images"),
        ({"type": "input_audio", "input_audio": {}}, "no audio"),
        ({"type": "file", "file": {}}, "no files"),
    ],
)
def test_parts_that_are_no_text_are_refused_as_what_they_are(client, part, said):
    content = [{"type": "text", "text": "What is this?"}, part]
    assert said in refused(client, messages=[{"role": "user", "content": content}]).message


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"structured_outputs": {"regex": "yes|no"}},
        {"regex": "yes|no"},
        {"guided_choice": ["yes", "no"]},
    ],
)
def test_one_of_two_words_by_every_name(client, fields):
    found = client.chat.completions.create(
        model="tiny", messages=TALK, max_tokens=9, extra_body=fields
    )
    assert found.choices[0].message.content in ("yes", "no")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object", "schema": {"enum": [7]}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [7]}}}},
        {"json_schema": {"enum": [7]}},
        {"structured_outputs": {"json": {"enum": [7]}}},
    ],
)
def test_a_schema_by_every_name(client, fields):
    found = client.chat.completions.create(
        model="tiny", messages=TALK, max_tokens=9, extra_body=fields
    )
    assert json.loads(found.choices[0].message.content) == 7


def test_some_of_the_tools_may_be_called(client):
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "required",
            "tools": [{"type": "function", "function": {"name": "fly"}}],
        },
    }
    options = {"model": "tiny", "messages": TALK, "tools": [DIG, FLY], "max_tokens": 60}
    found = client.chat.completions.create(**options, tool_choice=choice)
    for call in found.choices[0].message.tool_calls or ():
        assert call.function.name == "fly"
    choice["allowed_tools"]["tools"][0]["function"]["name"] = "swim"
    assert "swim" in refused(client, **options, tool_choice=choice).message


def test_fields_of_samplers_that_change_nothing(client):
    options = {"model": "tiny", "prompt": "Once", "max_tokens": 8, "seed": 1, "temperature": 1.0}
    plain = client.completions.create(**options).choices[0].text
    stop = {"stop": ["zzz"], "extra_body": {"min_tokens": 0, "top_k": -1, "min_p": 0.0}}
    assert client.completions.create(**options, **stop).choices[0].text == plain
    sharp = client.completions.create(**options, top_p=0).choices[0].text
    greedy = client.completions.create(**options | {"temperature": 0.0}).choices[0].text
    assert sharp == greedy


def test_usage_comes_at_the_end_or_all_along(client):
    options = {"model": "tiny", "messages": TALK, "max_tokens": 5, "stream": True}
    for more in (False, True):
        extra = {"include_usage": True, "continuous_usage_stats": more}
        pieces = list(client.chat.completions.create(**options, stream_options=extra))
        assert pieces[-1].usage.completion_tokens == 5
        counted = [piece for piece in pieces[:-1] if piece.usage]
        assert bool(counted) == more
