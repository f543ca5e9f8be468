"""`/v1/responses`, as the real `openai` client reads it."""

import json

import openai
import pydantic
import pytest

from tests.serving.api.test_openai import TALK, alone

HEAT = {"temperature": 0.8, "extra_body": {"seed": 2}}
TOOL = {
    "type": "function",
    "name": "dig",
    "parameters": {
        "type": "object",
        "properties": {"deep": {"type": "boolean"}},
        "required": ["deep"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Person(pydantic.BaseModel):
    age: int = pydantic.Field(ge=1, le=9)


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_a_response_is_what_plain_decoding_writes(client, lm):
    found = client.responses.create(
        model="tiny", input=TALK[0]["content"], max_output_tokens=20, **HEAT
    )
    assert found.output_text == alone(lm, TALK, max_new_tokens=20, temperature=0.8, seed=2)
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert found.usage.output_tokens == 20
    assert found.usage.total_tokens == found.usage.input_tokens + 20
    assert found.store is False


def test_instructions_and_earlier_turns_are_part_of_it(client, lm):
    first = client.responses.create(model="tiny", input="Hello", max_output_tokens=5, **HEAT)
    turns = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        *first.output,
        {"role": "user", "content": "More"},
    ]
    found = client.responses.create(
        model="tiny", instructions="Be brief.", input=turns, max_output_tokens=10, **HEAT
    )
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "More"},
    ]
    assert found.output_text == alone(lm, talk, max_new_tokens=10, temperature=0.8, seed=2)


def test_a_stream_tells_the_same_in_the_events_of_openai(client):
    options = {"model": "tiny", "input": TALK, "max_output_tokens": 20, **HEAT}
    whole = client.responses.create(**options)
    events = list(client.responses.create(**options, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 1
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == (
        whole.output_text
    )
    assert events[-1].response.output_text == whole.output_text
    with client.responses.stream(**options) as stream:  # puts the events together
        texts = [event.text for event in stream if event.type == "response.output_text.done"]
    assert texts == [whole.output_text]


def test_the_answer_follows_a_schema(client):
    options = {"model": "tiny", "input": TALK, "max_output_tokens": 60, **HEAT}
    found = client.responses.parse(text_format=Person, **options)
    assert found.status == "completed"
    assert isinstance(found.output_parsed, Person)
    with client.responses.stream(text_format=Person, **options) as stream:
        assert stream.get_final_response().output_parsed == found.output_parsed


def test_a_tool_is_called_and_its_result_taken(client):
    options = {
        "model": "tiny",
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "dig"},
        "max_output_tokens": 100,
        **HEAT,
    }
    found = client.responses.create(input=TALK, **options)
    [call] = found.output
    assert (call.type, call.name, found.status) == ("function_call", "dig", "completed")
    assert set(json.loads(call.arguments)) == {"deep"}
    with client.responses.stream(input=TALK, **options) as stream:
        events = list(stream)
        [again] = stream.get_final_response().output
    assert again.arguments == call.arguments
    assert [e.arguments for e in events if e.type.endswith("arguments.done")] == [call.arguments]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    then = client.responses.create(
        model="tiny", input=[*TALK, call, result], max_output_tokens=5, **HEAT
    )
    assert then.usage.input_tokens > found.usage.input_tokens or then.output_text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"store": True}, "store: .*stores no responses"),
        ({"previous_response_id": "resp_1"}, "previous_response_id: .*stores no responses"),
        ({"background": True}, "background: .*stores no responses"),
        ({"n": 2}, "n: is not a parameter"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "schema"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "no message"),
    ],
)
def test_what_cannot_be_is_refused_by_name(client, change, said):
    body = {"model": "tiny", "input": "Hello", "max_output_tokens": 4} | change
    with pytest.raises(openai.BadRequestError, match=said):
        client.post("/responses", body=body, cast_to=object)


def test_some_of_the_tools_may_be_called(client):
    other = {**TOOL, "name": "fly"}
    choice = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "dig"}],
    }
    options = {"model": "tiny", "input": TALK, "tools": [other, TOOL], "max_output_tokens": 40}
    found = client.responses.create(**options, tool_choice=choice, **HEAT)
    assert [item.name for item in found.output] == ["dig"]
    choice["tools"][0]["name"] = "swim"
    with pytest.raises(openai.BadRequestError, match="swim"):
        client.responses.create(**options, tool_choice=choice)


def test_log_probabilities_are_those_of_chat(client):
    chat = client.chat.completions.create(
        model="tiny",
        messages=TALK,
        max_tokens=20,
        logprobs=True,
        top_logprobs=2,
        temperature=0.8,
        seed=2,
    )
    expected = [each.model_dump() for each in chat.choices[0].logprobs.content]
    options = {"model": "tiny", "input": TALK, "max_output_tokens": 20, **HEAT}
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    found = client.responses.create(**options, **fields)
    assert [each.model_dump() for each in found.output[0].content[0].logprobs] == expected
    deltas, whole = [], None
    for event in client.responses.create(**options, **fields, stream=True):
        if event.type == "response.output_text.delta":
            deltas += event.logprobs
        elif event.type == "response.output_text.done":
            whole = event.logprobs
    assert [each.logprob for each in deltas] == [each["logprob"] for each in expected]
    assert [each.token for each in whole] == [each["token"] for each in expected]
    assert not client.responses.create(**options).output[0].content[0].logprobs


def test_what_else_may_be_included_changes_nothing_and_is_named(client):
    create = client.responses.with_raw_response.create
    found = create(
        model="tiny", input=TALK, max_output_tokens=2, include=["reasoning.encrypted_content"]
    )
    assert found.headers["X-Paceline-Ignored"] == "include"
