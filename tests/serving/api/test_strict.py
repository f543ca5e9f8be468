"""Bodies: null is "not given", what changes nothing is taken and named, the rest is refused."""

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from paceline.serving.api.response_schemas import ResponseBody
from paceline.serving.api.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from paceline.serving.api.strict import HEADER, NULL, reading

TALK = [{"role": "user", "content": "Once"}]
BODIES = {
    CompletionBody: {"prompt": "Once"},
    ChatBody: {"messages": TALK},
    ResponseBody: {"input": "Once"},
    TokenizeBody: {"prompt": "Once"},
    DetokenizeBody: {"tokens": [1]},
}
NULLABLE = [
    (body, info.alias or name)
    for body in BODIES
    for name, info in body.model_fields.items()
    if not info.is_required()
]


@pytest.mark.parametrize(
    ("body", "name"), NULLABLE, ids=lambda value: getattr(value, "__name__", value)
)
def test_null_is_not_given(body, name):
    given_ = dict(BODIES[body])
    assert body.model_validate({name: None, **given_}) == body.model_validate(given_)


@given(st.sampled_from([(body, name) for body in BODIES for name in body.unused]))
@settings(deadline=None)
def test_what_changes_nothing_is_taken_and_named(case):
    body, name = case
    values = body.unused[name]
    with reading() as now:
        assert body.model_validate({**BODIES[body], name: None}) == body(**BODIES[body])
        assert not now.ignored
    if values == NULL:
        with pytest.raises(ValidationError, match="Extra"):
            body.model_validate({**BODIES[body], name: 3})
        return
    with reading() as now:
        value = "x" if values[0] is ... else values[0]
        assert body.model_validate({**BODIES[body], name: value}) == body(**BODIES[body])
    assert now.header() == name


def test_unknown_nulls_are_not_given_and_named():
    call = {"type": "function_call", "call_id": "c", "name": "dig", "arguments": "{}"}
    newer = {"input": [call | {"caller": None}], "background_mode": None}
    with reading() as now:
        assert ResponseBody.model_validate(newer) == ResponseBody.model_validate({"input": [call]})
    assert now.header() == "background_mode, caller"


@given(st.lists(st.text()))
@settings(deadline=None)
def test_any_name_fits_in_a_header(names):
    with reading() as now:
        ChatBody.model_validate({"messages": TALK, **{f"new {name}": None for name in names}})
        TokenizeBody.model_validate(dict.fromkeys(names))
    value = now.header()
    assert value == value.strip()
    assert value.isascii()
    assert value.isprintable()


ITEM = {"type": "function_call", "call_id": "c", "name": "dig", "arguments": "{}"}


@pytest.mark.parametrize(
    ("path", "body", "where", "what"),
    [
        ("responses", {"input": [ITEM | {"mood": 1}]}, "input.0.mood", "is not a parameter"),
        ("responses", {"input": [ITEM | {"name": 1}]}, "input.0.name", "a valid string"),
        ("responses", {"input": [{"role": "user"}]}, "input.0.content", "required"),
        ("responses", {"input": 3}, "input", "Input should be a valid string or a valid list"),
        ("responses", {"input": "a", "tool_choice": {"type": "function"}}, "tool_choice.name", ""),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "messages.0.content.0.text", "required"),
        ("chat/completions", {"messages": TALK, "tool_choice": {"type": "function"}},
         "tool_choice.function", "required"),
        ("chat/completions", {"messages": TALK, "stop": [1]}, "stop.0", "a valid string"),
        ("completions", {"prompt": [["a"]]}, "prompt.0.0", "a valid integer"),
    ],
)  # fmt: skip
def test_a_fault_is_told_where_it_is(client, path, body, where, what):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(f"/{path}", body={"model": "tiny", **body}, cast_to=object)
    assert caught.value.param == where
    assert caught.value.body["message"].startswith(f"{where}: ")
    assert what in caught.value.body["message"]


def test_unknown_fields_are_refused_or_named():
    with reading(), pytest.raises(ValidationError, match="Extra"):
        ChatBody.model_validate({"messages": TALK, "temperatur": 0.5})
    with reading(warn=True) as now:
        ChatBody.model_validate({"messages": [TALK[0] | {"mood": 1}], "temperatur": 0.5})
    assert now.header() == "temperatur, mood"


def test_the_header_names_what_was_ignored(client):
    body = {"messages": TALK, "max_tokens": 2, "service_tier": "auto", "reasoning_effort": "low"}
    create = client.chat.completions.with_raw_response.create
    assert create(model="tiny", **body).headers[HEADER] == "service_tier, reasoning_effort"
    assert HEADER not in create(model="tiny", messages=TALK, max_tokens=2).headers


def test_every_answer_can_be_sent_back(client):
    nothing = {"type": "object", "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "dig", "parameters": nothing}}
    for options in ({}, {"tools": [tool], "tool_choice": "required"}):
        found = client.chat.completions.create(
            model="tiny", messages=TALK, max_tokens=40, seed=1, **options
        )
        message = found.choices[0].message
        more = [
            {"role": "tool", "tool_call_id": call.id, "content": "done"}
            for call in message.tool_calls or ()
        ]
        assert bool(more) == bool(options)
        for said in (message, message.model_dump(), message.model_dump(exclude_none=True)):
            client.chat.completions.create(
                model="tiny", messages=[*TALK, said, *more, *TALK], max_tokens=2, **options
            )
    nothing = {"type": "object", "additionalProperties": False}
    tool = {"type": "function", "name": "dig", "parameters": nothing}
    for options in ({}, {"tools": [tool], "tool_choice": "required"}):
        found = client.responses.create(
            model="tiny", input=TALK, max_output_tokens=40, extra_body={"seed": 1}, **options
        )
        more = [
            {"type": "function_call_output", "call_id": item.call_id, "output": "done"}
            for item in found.output
            if item.type == "function_call"
        ]
        assert bool(more) == bool(options)
        for said in (found.output, [item.model_dump() for item in found.output]):
            client.responses.create(
                model="tiny", input=[*TALK, *said, *more, *TALK], max_output_tokens=2, **options
            )
