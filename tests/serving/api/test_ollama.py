"""Ollama's routes, by the shapes that it documents."""

import json

import httpx2 as httpx
import pytest

from paceline.serving.api import ollama
from tests.serving.api.test_openai import TALK, alone

OPTIONS = {"temperature": 0.8, "seed": 2, "num_predict": 12}
DIG = {
    "type": "function",
    "function": {
        "name": "dig",
        "parameters": {
            "type": "object",
            "properties": {"deep": {"type": "boolean"}},
            "required": ["deep"],
        },
    },
}
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


@pytest.fixture
def post(address):
    def post(path, **body):
        return httpx.post(address + path, json={"model": "tiny"} | body, timeout=60)

    return post


def lines(response):
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def test_an_answer_is_what_plain_decoding_writes(post, lm):
    text = alone(lm, TALK, max_new_tokens=12, temperature=0.8, seed=2)
    whole = post("/api/chat", messages=TALK, options=OPTIONS, stream=False, keep_alive="5m").json()
    assert whole["message"] == {"role": "assistant", "content": text}
    assert (whole["done"], whole["done_reason"], whole["eval_count"]) == (True, "length", 12)
    assert whole["prompt_eval_count"] == len(lm.request(TALK).prompt)
    parts = lines(post("/api/chat", messages=TALK, options=OPTIONS))
    assert "".join(part["message"]["content"] for part in parts) == text
    assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
    assert len(parts) > 3
    for end in (whole, parts[-1]):
        assert all(isinstance(end[name], int) for name in DURATIONS)
        spent = end["prompt_eval_duration"] + end["eval_duration"]
        assert 0 < end["prompt_eval_duration"] < end["total_duration"]
        assert abs(spent - end["total_duration"]) <= 2


def test_generate_uses_the_template_unless_raw(post, lm):
    prompt = TALK[-1]["content"]
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
    found = post(
        "/api/generate", prompt=prompt, system="Be brief.", options=OPTIONS, stream=False
    ).json()
    assert found["response"] == alone(lm, talk, max_new_tokens=12, temperature=0.8, seed=2)
    raw = lines(post("/api/generate", prompt=prompt, raw=True, options=OPTIONS))
    plain = alone(lm, prompt, max_new_tokens=12, temperature=0.8, seed=2)
    assert "".join(part["response"] for part in raw) == plain


@pytest.mark.parametrize("form", ["json", {"enum": [7, 8]}])
def test_the_format_is_followed(post, form):
    options = {"num_predict": 200, "temperature": 0}
    found = post("/api/chat", messages=TALK, format=form, options=options, stream=False).json()
    content = found["message"]["content"]
    if found["done_reason"] == "stop":
        assert isinstance(json.loads(content), dict) or json.loads(content) in (7, 8)
    assert content.lstrip()[0] in "{78"


def test_a_call_in_the_history_reaches_the_template(post, lm):
    call = {"function": {"name": "dig", "arguments": {"deep": True}}}
    talk = [
        *TALK,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "gold", "tool_name": "dig"},
    ]
    found = post("/api/chat", messages=talk, tools=[DIG], options=OPTIONS, stream=False).json()
    assert found["prompt_eval_count"] > len(lm.request([*TALK, talk[-1]]).prompt)


def test_a_call_has_its_arguments_as_an_object():
    call = {"id": "a", "function": {"name": "dig", "arguments": '{"deep": true}'}}
    function = {"index": 0, "name": "dig", "arguments": {"deep": True}}
    message = ollama._message("", [call])
    assert message["tool_calls"] == [{"id": "a", "function": function}]


def test_the_model_is_listed_and_described(post, address):
    [card] = httpx.get(f"{address}/api/tags").json()["models"]
    assert card["name"] == card["model"] == "tiny"
    assert card["size"] > 0
    assert httpx.get(f"{address}/api/ps").json()["models"][0]["name"] == "tiny"
    assert httpx.get(f"{address}/api/version").json()["version"]
    shown = post("/api/show", model="tiny:latest").json()
    family = shown["model_info"]["general.architecture"]
    assert shown["model_info"][f"{family}.context_length"] > 0
    assert "completion" in shown["capabilities"]
    assert post("/api/generate").json()["done_reason"] == "load"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/api/chat", {"model": "other", "messages": TALK}, 404, "only 'tiny'"),
        (
            "/api/chat",
            {"messages": [{"role": "user", "content": "a", "images": ["aa"]}]},
            400,
            "no images",
        ),
        ("/api/generate", {"prompt": "a", "options": {"tfs": 2}}, 400, "options.tfs"),
        ("/api/generate", {"prompt": "a", "raw": True, "system": "b"}, 400, "chat template"),
        ("/api/pull", {}, 404, "this server has"),
    ],
)
def test_errors_have_the_form_of_the_api(post, path, body, status, message):
    found = post(path, **body)
    assert found.status_code == status
    assert message in found.json()["error"]
