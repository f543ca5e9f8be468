"""What no client should send, and what the OpenAPI document allows: never a failure of ours."""

import json

import httpx2 as httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from paceline.serving import playground
from paceline.serving.api import create_app
from paceline.serving.api.middleware import Rules
from paceline.serving.api.parse import RequestLimits
from tests.serving.api.conftest import served

PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/api/chat",
    "/api/generate",
    "/api/show",
    "/tokenize",
    "/detokenize",
)
DEEP = 30_000
HALF = '"\\ud800"'  # half of a character
BODIES = {
    "nothing": b"",
    "half": b'{"prompt": "a',
    "twice": b'{"prompt": "a"} {}',
    "utf-16": '{"prompt": "a"}'.encode("utf-16"),
    "latin": b'{"prompt": "\xe9\xff"}',
    "deep lists": b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep objects": b'{"prompt": "a", "guided_json": '
    + b'{"a":' * DEEP
    + b"1"
    + b"}" * DEEP
    + b"}",
    "deep schema": json.dumps(
        {"prompt": "a", "guided_json": json.loads('{"items":' * 400 + "{}" + "}" * 400)}
    ).encode(),
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "infinity": b'{"prompt": "a", "temperature": 1e999, "top_p": Infinity}',
    "huge": b'{"prompt": "a", "seed": ' + b"9" * 4000 + b"}",
    "huger": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "half a character": f'{{"prompt": {HALF}, "input": {HALF}, "model": null}}'.encode(),
    "half a name": f'{{{HALF}: 1, "prompt": "a"}}'.encode(),
    "half a stop": f'{{"prompt": "a", "stop": [{HALF}], "max_tokens": 2}}'.encode(),
    "half a word": f'{{"prompt": "a", "bad_words": [{HALF}], "max_tokens": 2}}'.encode(),
    "half a choice": f'{{"prompt": "a", "guided_choice": [{HALF}], "max_tokens": 2}}'.encode(),
    "half a schema": f'{{"prompt": "a", "guided_json": {{"const": {HALF}}}}}'.encode(),
    "half a bias": f'{{"prompt": "a", "logit_bias": {{{HALF}: 1}}}}'.encode(),
    "half a user": f'{{"prompt": "a", "user": {HALF}, "max_tokens": 2}}'.encode(),
    "half a model": f'{{"prompt": "a", "input": "a", "model": {HALF}}}'.encode(),
    "half a message": f'{{"messages": [{{"role": "user", "content": {HALF}}}]}}'.encode(),
    "half an instruction": f'{{"input": "a", "instructions": {HALF}}}'.encode(),
    "nul": b'{"prompt": "\\u0000", "stop": "\\u0000", "guided_regex": "\\u0000", "max_tokens": 2}',
    "many stops": json.dumps({"prompt": "a", "stop": ["x" * 9] * 9000, "max_tokens": 2}).encode(),
    "many prompts": json.dumps({"prompt": ["a"] * 20_000}).encode(),
    "tokens beyond": b'{"prompt": [-1], "tokens": [99999999999999999999]}',
    "empty": b'{"prompt": "", "messages": [], "input": "", "tokens": []}',
}


@pytest.fixture(scope="module")
def small(service):
    """A server that answers with few tokens only."""
    before = list(service.observers)
    limits = RequestLimits(new_tokens=4, answers=8)
    rules = Rules(max_body=200_000)
    app = create_app(service, "tiny", limits, rules, routers=[playground.router])
    with served(app) as address:
        yield app, address
    service.observers[:] = before


@pytest.mark.parametrize("name", BODIES)
def test_no_body_makes_the_server_fail(small, service, name):
    _, address = small
    headers = {"content-type": "application/json"}
    for path in PATHS:
        found = httpx.post(address + path, content=BODIES[name], headers=headers, timeout=60)
        assert found.status_code in (200, 400, 404, 413), (path, found.text[:300])
        assert found.json()
        if found.status_code != 200:
            error = found.json()["error"]
            assert error if path.startswith("/api/") else error["message"]
    assert service.ready
    assert service.failures == 0


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "", "a" * 5000])
def test_other_kinds_of_content_are_refused(small, kind):
    _, address = small
    content = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
    found = httpx.post(f"{address}/v1/completions", content=content, headers={"content-type": kind})
    assert found.status_code in (200, 400)
    assert found.json()


def test_what_the_openapi_document_allows_is_answered_as_it_says(small, service):
    app, address = small
    schema = schemathesis.openapi.from_dict(app.openapi())
    checks = (
        not_a_server_error,
        status_code_conformance,
        content_type_conformance,
        response_schema_conformance,
    )
    tried = set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=15,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @schema_given(operation)
        def attempt(case):
            case.call_and_validate(base_url=address, checks=list(checks), timeout=60)

        attempt()
        tried.add(operation.label)
    assert {f"POST {path}" for path in PATHS} <= tried
    assert {"GET /metrics", "GET /health", "GET /ready", "GET /v1/models"} <= tried
    assert service.failures == 0


def schema_given(operation):
    from hypothesis import given

    return given(case=operation.as_strategy())
