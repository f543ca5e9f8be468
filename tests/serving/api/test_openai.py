"""What the real `openai` client gets."""

import json

import httpx2 as httpx
import openai
import pytest

from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.decoding.text_stream import TextStream
from paceline.models.detokenize import Detokenizer

OPENING = "Once upon a time"
TALK = [{"role": "user", "content": "Tell me of the sea."}]


def alone(lm, prompt, **options):
    """What plain decoding writes."""
    request = lm.request(prompt, **options)
    text = TextStream(Detokenizer(lm.tokenizer), request.stop_strings)
    drafter = lm.drafter_method.build(lm.draft_target)
    return Generation(lm.engine, drafter, request, Fixed(0), text).run().text


def test_a_completion_is_what_plain_decoding_writes(client, lm):
    for temperature in (0.0, 0.9):
        found = client.completions.create(
            model="tiny", prompt=OPENING, max_tokens=30, temperature=temperature, seed=5
        )
        [choice] = found.choices
        assert choice.text == alone(lm, OPENING, max_new_tokens=30, temperature=temperature, seed=5)
        assert choice.finish_reason == "length"
        assert found.usage.completion_tokens == 30
        assert found.usage.prompt_tokens == len(lm.tokenizer.encode(OPENING))


def test_a_stream_says_the_same_with_usage_at_the_end(client, lm):
    pieces = list(
        client.completions.create(
            model="tiny",
            prompt=OPENING,
            max_tokens=30,
            temperature=0.7,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(choice.text for piece in pieces for choice in piece.choices)
    assert text == alone(lm, OPENING, max_new_tokens=30, temperature=0.7, seed=1)
    assert pieces[-1].usage.completion_tokens == 30
    assert pieces[-2].choices[0].finish_reason == "length"


def test_several_prompts_and_answers(client, lm):
    found = client.completions.create(
        model="tiny", prompt=[OPENING, "The sea"], max_tokens=8, temperature=1.0, seed=3, n=2
    )
    expected = [
        alone(lm, prompt, max_new_tokens=8, temperature=1.0, seed=seed)
        for prompt in (OPENING, "The sea")
        for seed in (3, 4)
    ]
    assert [choice.text for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]


def test_the_likeliest_of_several(client):
    options = {"model": "tiny", "prompt": OPENING, "max_tokens": 6, "temperature": 1.5, "seed": 1}
    every = client.completions.create(**options, n=5, logprobs=0).choices
    mean = {
        choice.text: sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)
        for choice in every
    }
    [best] = client.completions.create(**options, best_of=5).choices
    assert best.text == max(mean, key=mean.get)


def test_stops_bias_and_echo(client, lm):
    found = client.completions.create(
        model="tiny", prompt=OPENING, max_tokens=60, temperature=0.0, stop=["able"], echo=True
    )
    assert found.choices[0].text.startswith(OPENING)
    assert "able" not in found.choices[0].text
    assert found.choices[0].finish_reason == "stop"
    token = lm.tokenizer.encode(" zebra", special=False)[0]
    biased = client.completions.create(
        model="tiny", prompt=OPENING, max_tokens=3, temperature=0.0, logit_bias={token: 100}
    )
    assert biased.choices[0].text == lm.tokenizer.decode([token] * 3)


def test_a_conversation_is_what_plain_decoding_writes(client, lm):
    options = {"temperature": 0.8, "seed": 2}
    found = client.chat.completions.create(
        model="tiny", messages=TALK, max_tokens=20, logprobs=True, top_logprobs=2, **options
    )
    message = found.choices[0].message
    assert message.role == "assistant"
    assert message.content == alone(lm, TALK, max_new_tokens=20, **options)
    assert len(found.choices[0].logprobs.content) == 20
    assert len(found.choices[0].logprobs.content[0].top_logprobs) == 2
    pieces = client.chat.completions.create(
        model="tiny", messages=TALK, max_completion_tokens=20, stream=True, **options
    )
    deltas = [choice for piece in pieces for choice in piece.choices]
    assert deltas[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in deltas) == message.content
    assert deltas[-1].finish_reason == "length"


def test_the_answer_follows_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": schema, "strict": True}}
    found = client.chat.completions.create(
        model="tiny", messages=TALK, response_format=form, max_tokens=60, temperature=1.0, seed=4
    )
    assert found.choices[0].finish_reason == "stop"
    assert 1 <= json.loads(found.choices[0].message.content)["age"] <= 9
    other = client.completions.create(
        model="tiny", prompt=OPENING, extra_body={"guided_choice": ["yes", "no"]}
    )
    assert other.choices[0].text in ("yes", "no")


def test_a_tool_is_called(client):
    tool = {
        "type": "function",
        "function": {
            "name": "dig",
            "description": "Dig a hole.",
            "parameters": {
                "type": "object",
                "properties": {"deep": {"type": "boolean"}},
                "required": ["deep"],
                "additionalProperties": False,
            },
        },
    }
    for stream in (False, True):
        found = client.chat.completions.create(
            model="tiny",
            messages=TALK,
            tools=[tool],
            tool_choice={"type": "function", "function": {"name": "dig"}},
            max_tokens=100,
            seed=1,
            stream=stream,
        )
        if stream:
            last = [choice for piece in found for choice in piece.choices][-1]
            [call], reason = last.delta.tool_calls, last.finish_reason
        else:
            [call] = found.choices[0].message.tool_calls
            reason = found.choices[0].finish_reason
        assert call.function.name == "dig"
        assert set(json.loads(call.function.arguments)) == {"deep"}
        assert reason == "tool_calls"


DIG = {"type": "function", "function": {"name": "dig", "parameters": {"type": "object"}}}


def test_offered_tools_leave_the_stream_as_it_is(client):
    options = {"model": "tiny", "messages": TALK, "max_tokens": 30, "seed": 2}
    pieces = {}
    for tools in ({}, {"tools": [DIG]}):
        stream = client.chat.completions.create(**options, **tools, stream=True)
        pieces[bool(tools)] = [piece.choices[0].delta.content or "" for piece in stream]
    assert sum(map(bool, pieces[True])) > 3
    found = client.chat.completions.create(**options, tools=[DIG])
    assert "".join(pieces[True]) == found.choices[0].message.content


@pytest.mark.parametrize(
    "text", ['{"name": [1]}', '{"name": "dig", "arguments": {"a": NaN}}', '{"name": {}}']
)
def test_what_is_no_call_is_text(client, text):
    grammar = "".join(f"\\{c}" if c in '{}[]"' else c for c in text)
    options = {"model": "tiny", "messages": TALK, "tools": [DIG], "max_tokens": 60}
    extra = {"extra_body": {"sampler": {"grammar": grammar}}}
    [choice] = client.chat.completions.create(**options, **extra).choices
    assert (choice.message.content, choice.message.tool_calls) == (text, None)
    stream = client.chat.completions.create(**options, **extra, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == text


def test_a_prediction_is_followed_and_counted(client, lm):
    options = {"model": "tiny", "prompt": OPENING, "max_tokens": 40, "temperature": 0.0}
    plain = client.completions.create(**options, extra_body={"speculation": {"budget": 0}})
    body = {
        "prediction": {"type": "content", "content": plain.choices[0].text},
        "speculation": {"drafter": "predicted_output", "budget": 8},
    }
    found = client.completions.create(**options, extra_body=body)
    assert found.choices[0].text == plain.choices[0].text
    details = found.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 20
    assert found.paceline["tokens_per_pass"] > 2 * plain.paceline["tokens_per_pass"] == 2.0


def test_a_trace_tells_who_guessed_what(client):
    options = {"model": "tiny", "prompt": OPENING, "max_tokens": 30, "temperature": 0.0}
    body = {"trace": True, "speculation": {"drafter": "recycle", "budget": 4}}
    found = client.completions.create(**options, extra_body=body)
    passes = found.paceline["trace"]
    assert sum(len(each["tokens"]) for each in passes) == 30
    assert {o for each in passes for o in each["origins"]} == {"recycle", None}
    assert all(len(each["tree"]["tokens"]) <= 5 for each in passes)
    pieces = list(client.completions.create(**options, stream=True, extra_body=body))
    assert sum(len(piece.paceline["tokens"]) for piece in pieces if piece.model_extra) == 30


def test_models_tokens_and_health(client, address, lm):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "paceline"
    with pytest.raises(openai.NotFoundError, match="no model 'big' here"):
        client.models.retrieve("big")
    tokens = httpx.post(f"{address}/tokenize", json={"prompt": OPENING}).json()
    assert tokens["tokens"] == lm.tokenizer.encode(OPENING)
    text = httpx.post(f"{address}/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert text["prompt"].strip() == OPENING
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    assert httpx.get(f"{address}/ready").status_code == 200


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"magic": 1}, "magic: is not a parameter of this server"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"prompt": []}, "empty list"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": [10**9]}, "outside the vocabulary"),
        ({"prompt": "word " * 5000}, "the model sees"),
        ({"n": 2, "best_of": 1}, "best_of is 1"),
        ({"top_p": 7}, "top_p"),
        ({"guided_regex": "("}, "regex"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "several grammars"),
        ({"speculation": {"drafter": "model:path=/etc"}}, "this server has plain"),
        ({"speculation": {"drafter": "recycle"}, "prediction": {"content": "a"}}, "prediction"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"sampler": "monitor=."}, "monitor.project names a path on the server"),
        ({"sampler": "keywords=dog,keywords.hmm=x"}, "keywords.hmm names a path"),
        ({"sampler": "keywords=umbrella", "max_tokens": 1}, "allow more"),
    ],
)
def test_bad_requests_are_told_in_a_sentence(client, change, said):
    body = {"model": "tiny", "prompt": OPENING, "max_tokens": 4} | change
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.post("/completions", body=body, cast_to=object)
    assert caught.value.type == "invalid_request_error"


def test_what_is_no_request_is_told_so(address):
    url = f"{address}/v1/completions"
    for content in (b"{", b"[]", b"\xff\xfe", b"null", b""):
        found = httpx.post(url, content=content, headers={"content-type": "application/json"})
        assert found.status_code == 400
        assert found.json()["error"]["message"]
    assert httpx.get(url).status_code == 405
    assert "/nowhere" in httpx.get(f"{address}/nowhere").json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text", "json_object"])
def test_a_schema_beside_another_format_is_refused(client, kind):
    form = {"type": kind, "json_schema": {"name": "a", "schema": {"type": "object"}}}
    with pytest.raises(openai.BadRequestError, match="takes no json_schema"):
        client.chat.completions.create(model="tiny", messages=TALK, response_format=form)
