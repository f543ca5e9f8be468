"""Parts of the middleware by themselves."""

import asyncio
import json
import logging
import re
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")

from paceline.serving.api.middleware import RequestGuard, Rules, _bearer, _is_unicode, _tokens
from paceline.serving.api_keys import ApiKeys
from paceline.serving.messages import FAILED
from paceline.serving.rate_limits import RateLimits


def bearer(*values):
    return _bearer({"headers": [(b"authorization", value) for value in values]})


def test_a_key_is_read_from_a_bearer_header_only():
    assert bearer(b"Bearer secret") == b"secret"
    assert bearer(b"bearer  secret ") == b"secret"
    for other in (b"Basic secret", b"Token secret", b"Digest secret", b"Bearersecret", b""):
        assert bearer(other) == b""
    assert bearer() == b""


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000, b"", b'{"a": "\xc3\xa9"}', b"3"])
def test_what_is_not_json_is_left_to_the_route(body):
    assert _is_unicode(body)


@pytest.mark.parametrize("body", [rb'"\ud800"', rb'{"\udfff": 1}', rb'["a", ["\ud83d"]]'])
def test_half_a_character_is_found_anywhere(body):
    assert not _is_unicode(body)
    assert _is_unicode(rb'"\ud83e\udd8a"')


class Counts:
    """What the guard counts: (route, status) of every request."""

    def __init__(self):
        self.requests, self.counted = self, []

    def labels(self, route, status):
        self.counted.append((route, status))
        return self

    def inc(self):
        pass


class Call:
    """One request to the guard: what the application got, and what was sent."""

    def __init__(self, rules=None, app=None, draining=False, seconds=0.0, **scope):
        self.bodies, self.sent, self.counts = [], [], Counts()
        self.rules, self.app, self.draining, self.seconds = rules, app, draining, seconds
        headers = [(b"content-length", b"3")] if "headers" not in scope else scope.pop("headers")
        self.scope = {"type": "http", "method": "POST", "path": "/v1/completions",
                      "client": ("1.2.3.4", 5), "headers": headers, **scope}  # fmt: skip

    def run(self, *messages):
        messages = list(messages or [{"type": "http.request", "body": b"abc"}])

        async def receive():
            await asyncio.sleep(self.seconds)
            return messages.pop(0)

        async def send(message):
            self.sent.append(message)

        async def app(scope, receive, send):
            self.bodies.append(await receive())
            await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
            await send({"type": "http.response.body", "body": b"done"})

        guard = RequestGuard(
            self.app or app, self.rules or Rules(), self.counts, lambda: self.draining
        )
        asyncio.run(guard(self.scope, receive, send))
        return self

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def headers(self):
        return dict(self.sent[0]["headers"])

    @property
    def error(self):
        return json.loads(self.sent[1]["body"])["error"]["message"]


def test_the_defaults_of_the_rules():
    rules = Rules()
    assert (rules.max_body, rules.body_seconds, rules.write_seconds) == (1000000, 30.0, 60.0)
    assert rules.log_prompts is False
    assert not rules.keys
    with pytest.raises(FrozenInstanceError):
        rules.max_body = 1


def test_a_request_passes_with_its_body_and_an_id():
    call = Call().run(
        {"type": "http.request", "body": b"ab", "more_body": True},
        {"type": "http.request", "more_body": True},
        {"type": "http.request", "body": b"c"},
    )
    assert call.bodies == [{"type": "http.request", "body": b"abc", "more_body": False}]
    assert call.status == 200
    assert call.sent[1] == {"type": "http.response.body", "body": b"done"}
    assert call.headers[b"a"] == b"b"
    assert re.fullmatch(rb"[0-9a-f]{24}", call.headers[b"x-request-id"])
    assert call.headers[b"x-request-id"].decode() == call.scope["state"]["request"]
    assert b"connection" not in call.headers
    assert call.counts.counted == [("other", 200)]


def test_after_the_body_the_application_hears_the_client():
    async def app(scope, receive, send):
        assert (await receive())["body"] == b"abc"
        assert await receive() == {"type": "http.disconnect"}
        await send({"type": "http.response.start", "status": 204, "headers": []})

    call = Call(app=app).run({"type": "http.request", "body": b"abc"}, {"type": "http.disconnect"})
    assert call.status == 204


@pytest.mark.parametrize("given", [b"a", b"A.b_c:d-9", b"x" * 128])
def test_the_id_of_a_client_is_kept(given):
    assert Call(headers=[(b"x-request-id", given)]).run().headers[b"x-request-id"] == given


@pytest.mark.parametrize("given", [b"", b"a b", b"x" * 129, b"\xe9"])
def test_other_ids_are_replaced(given):
    found = Call(headers=[(b"x-request-id", given)]).run().headers[b"x-request-id"]
    assert re.fullmatch(rb"[0-9a-f]{24}", found)


def test_while_the_server_shuts_down_connections_are_closed():
    assert Call(draining=True).run().headers[b"connection"] == b"close"


@pytest.mark.parametrize("length", [True, False])
def test_a_body_has_a_maximum(length):
    rules = Rules(max_body=3)
    assert Call(rules).run().status == 200
    headers = [(b"content-length", b"4")] if length else []
    body = [{"type": "http.request", "body": b"ab", "more_body": True}] * 2
    call = Call(rules, headers=headers).run(*body)
    assert (call.status, call.bodies) == (413, [])
    assert call.error == "the body has more than 3 bytes; send less"
    assert call.headers[b"connection"] == b"close"
    assert call.counts.counted == [("other", 413)]


def test_a_body_arrives_in_time():
    call = Call(Rules(body_seconds=0.01), seconds=5.0).run()
    assert (call.status, call.bodies) == (408, [])
    assert call.error == "the body did not arrive within 0.01 s"
    assert call.headers[b"connection"] == b"close"


def test_a_lone_surrogate_is_refused_and_a_pair_is_not():
    body = {"type": "http.request", "body": rb'"\ud800"'}
    call = Call().run(body)
    assert (call.status, call.bodies) == (400, [])
    assert call.error == "the body has a lone surrogate; send valid UTF-8"
    assert Call().run({"type": "http.request", "body": rb'"\ud83e\udd8a"'}).status == 200


def test_a_client_that_leaves_gets_no_answer():
    call = Call().run({"type": "http.disconnect"})
    assert (call.sent, call.bodies) == ([], [])
    assert call.counts.counted == [("other", 499)]


def test_a_bug_is_a_500_before_the_response_and_an_abort_within_it():
    async def early(scope, receive, send):
        raise ValueError("secret")

    async def late(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("secret")

    call = Call(app=early).run()
    assert (call.status, call.error) == (500, FAILED)
    assert call.counts.counted == [("other", 500)]
    call = Call(app=late)
    with pytest.raises(ConnectionAbortedError):
        call.run()
    assert len(call.sent) == 1
    assert call.counts.counted == [("other", 200)]


@pytest.mark.parametrize(
    ("path", "status"),
    [("/", 200), ("/health", 200), ("/ready", 200), ("/playground/a", 200), ("/playground", 401),
     ("/v1/models", 401), ("/health/", 401), ("/metrics", 401)],
)  # fmt: skip
def test_a_key_is_needed_but_for_open_paths(path, status):
    rules = Rules(keys=ApiKeys(["ann:key-of-ann-1"]))
    call = Call(rules, path=path, method="GET").run()
    assert call.status == status
    if status == 401:
        assert call.headers[b"www-authenticate"] == b"Bearer"
        assert call.error.startswith("the API key is unknown")
        assert call.bodies == []
    right = [(b"authorization", b"Bearer key-of-ann-1")]
    call = Call(rules, path=path, method="GET", headers=right).run()
    assert call.status == 200
    assert call.scope["state"].get("key") == (None if status == 200 else "ann")


def test_rates_are_of_an_address_and_for_posts(monkeypatch):
    monkeypatch.setattr("paceline.serving.api.middleware.monotonic", lambda: 100.0)
    rules = Rules(rates=RateLimits(requests=2))
    assert [Call(rules).run().status for _ in range(2)] == [200, 200]
    call = Call(rules).run()
    assert (call.status, call.bodies) == (429, [])
    assert call.error == "the rate limit is exceeded; try again in 30 s"
    assert call.headers[b"retry-after"] == b"30"
    assert Call(rules, method="GET").run().status == 200
    assert Call(rules, client=("1.2.3.5", 5)).run().status == 200
    assert Call(rules, client=None).run().status == 200


def test_what_is_no_http_goes_through():
    async def app(scope, receive, send):
        await send({"type": "lifespan.startup.complete"})

    call = Call(app=app, type="lifespan").run()
    assert call.sent == [{"type": "lifespan.startup.complete"}]
    assert call.counts.counted == []


def choice(prompt=5, tokens=3, cached=None, finish=None):
    last = None if cached is None else SimpleNamespace(cached=cached)
    job = SimpleNamespace(id="cmpl-1", request=SimpleNamespace(prompt=(7,) * prompt))
    return SimpleNamespace(job=job, tokens=[8] * tokens, finish=finish, last=last, text="said")


def test_cached_tokens_are_free():
    assert _tokens(choice()) == 8
    assert _tokens(choice(cached=4)) == 4
    assert _tokens(choice(cached=0, tokens=0)) == 5


def answered(*choices, **rules):
    """A request with these choices: its log entry, and what was charged."""

    async def app(scope, receive, send):
        scope["state"]["choices"] = choices
        scope["route"] = SimpleNamespace(path="/v1/{name}")
        await send({"type": "http.response.start", "status": 200, "headers": []})

    charged = []
    rates = SimpleNamespace(
        admit=lambda client, now: 0.0,
        charge=lambda client, tokens, now: charged.append((client, tokens)),
    )
    call = Call(Rules(rates=rates, **rules), app=app).run()
    assert call.counts.counted == [("/v1/{name}", 200)]
    return charged


def test_a_request_is_logged_and_charged(caplog, monkeypatch):
    times = iter([10.0, 10.0, 12.34567, 12.34567])
    monkeypatch.setattr("paceline.serving.api.middleware.monotonic", lambda: next(times))
    caplog.set_level(logging.INFO, "paceline.serving")
    assert answered(choice(cached=4, finish="stop"), choice()) == [("1.2.3.4", 12)]
    [record] = [record for record in caplog.records if record.message == "request"]
    fields = dict(record.fields)
    assert len(fields.pop("request")) == 24
    assert fields == {
        "client": None, "address": "1.2.3.4", "method": "POST", "path": "/v1/completions",
        "status": 200, "seconds": 2.3457,
        "answers": [
            {"id": "cmpl-1", "prompt_tokens": 5, "tokens": 3, "finish": "stop", "cached": 4},
            {"id": "cmpl-1", "prompt_tokens": 5, "tokens": 3, "finish": "cancelled"},
        ],
    }  # fmt: skip
    times = iter([10.0] * 4)
    assert answered() == [("1.2.3.4", 0)]
    assert "answers" not in caplog.records[-1].fields
    assert "cut" not in caplog.records[-1].fields


@pytest.mark.parametrize("log_prompts", [True, False])
def test_texts_are_logged_only_if_asked_for(log_prompts):
    lm = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda tokens: f"{tokens}"))
    guard = RequestGuard(None, Rules(log_prompts=log_prompts), Counts(), bool, lm)
    fields = dict(guard._choice_fields(choice(prompt=2)))
    texts = {"prompt": "[7, 7]", "text": "said"} if log_prompts else {}
    assert {name: fields.get(name) for name in texts} == texts
    assert ("text" in fields) == ("prompt" in fields) == log_prompts
    guard = RequestGuard(None, Rules(log_prompts=True), Counts(), bool)
    assert "text" not in dict(guard._choice_fields(choice()))


def test_a_client_that_reads_nothing_is_cut_off(caplog):
    caplog.set_level(logging.INFO, "paceline.serving")
    call, aborted = Call(Rules(write_seconds=0.01)), []
    call.scope["state"] = {"transport": SimpleNamespace(abort=lambda: aborted.append(True))}

    class Stuck(list):
        def append(self, message):
            raise TimeoutError

    call.sent = Stuck()
    call.run()
    assert aborted == [True]
    assert caplog.records[-1].fields["cut"] == "the client read nothing for 0.01 s"
    assert [record.message for record in caplog.records] == ["request"], "no bug is logged"
