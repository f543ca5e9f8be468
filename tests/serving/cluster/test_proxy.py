"""Replicas that die at any moment, and clients that notice nothing."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.serving.cluster.proxy import ReplicaProxy, seeded
from paceline.serving.cluster.replica import Replica, ResponseHead

SSE = ResponseHead(200, [(b"content-type", b"text/event-stream; charset=utf-8")])
PLAIN = ResponseHead(200, [(b"content-type", b"application/json")], "/v1/completions")


class DeadError(Exception):
    pass


class Fleet:
    """Replicas that give these parts, attempt after attempt; `DeadError` is a death there."""

    lost = (DeadError,)

    def __init__(self, attempts):
        self.attempts, self.asked = attempts, []

    async def handle(self, scope, body, key):
        self.asked.append((scope, body, key))
        for part in self.attempts[min(len(self.asked), len(self.attempts)) - 1]:
            if part is DeadError:
                raise DeadError
            if part is None:
                await asyncio.Event().wait()
            yield part


def event(index, text, finish=None, chat=False, **more):
    choice = {"index": index, "finish_reason": finish, "logprobs": None}
    choice |= {"delta": {"content": text} if text else {}} if chat else {"text": text}
    return {"id": "x", "created": 1, "choices": [choice | more]}


def sse(pieces):
    return [f"data: {json.dumps(piece)}\n\n".encode() for piece in pieces] + [b"data: [DONE]\n\n"]


def run(attempts, path="/v1/completions", during=None, **more):
    """What a client hears of these attempts, and of which kind they were."""
    heard, fleet = [], Fleet(attempts)
    messages = [{"type": "http.request", "body": json.dumps({"prompt": "a"}).encode()}]
    front = ReplicaProxy(fleet)

    async def receive():
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    async def send(message):
        heard.append(message)
        if during:
            during(front, message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], **more}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paceline.serving.cluster.proxy._PAUSE", 0)
        asyncio.run(front(scope, receive, send))
    assert front.idle
    body = b"".join(message.get("body", b"") for message in heard[1:])
    assert [message["type"] for message in heard].count("http.response.start") == 1
    assert not heard[-1].get("more_body")
    return heard[0]["status"], body, front.moved, fleet.asked


def choices(body):
    """Texts, ends, and ids of a stream."""
    texts, ends, ids, usage = {}, {}, set(), 0
    *events, done = body.decode().strip().split("\n\n")
    assert done == "data: [DONE]"
    for each in events:
        piece = json.loads(each.removeprefix("data: "))
        assert "error" not in piece
        ids.add((piece["id"], piece["created"]))
        usage += not piece["choices"]
        for choice in piece["choices"]:
            at = choice["index"]
            assert at not in ends
            delta = choice.get("delta", choice)
            if delta.get("role"):
                assert at not in texts
            texts[at] = texts.get(at, "") + (delta.get("content", delta.get("text")) or "")
            if choice["finish_reason"]:
                ends[at] = choice["finish_reason"]
    return texts, ends, ids, usage


@settings(max_examples=30, deadline=None)
@given(st.data(), st.booleans())
def test_a_stream_goes_on_without_a_seam(data, chat):
    texts = data.draw(st.lists(st.text(max_size=8), min_size=1, max_size=3))

    def attempt(number):
        """The same answer in other pieces, in another order of the choices."""
        roles = [
            event(at, "", chat=True)
            | {"choices": [{"index": at, "delta": {"role": "assistant"}, "finish_reason": None}]}
            for at in range(len(texts))
        ]
        left = dict(enumerate(texts))
        pieces = roles if chat else []
        while left:
            at = data.draw(st.sampled_from(sorted(left)))
            cut = data.draw(st.integers(min(1, len(left[at])), len(left[at])))
            part, left[at] = left[at][:cut], left[at][cut:]
            over = not left[at]
            pieces.append(event(at, part, "stop" if over else None, chat))
            if over:
                del left[at]
        usage = {"id": "x", "created": 1, "choices": [], "usage": {"completion_tokens": 3}}
        parts = sse(
            [piece | {"id": f"id{number}", "created": number} for piece in [*pieces, usage]]
        )
        return [SSE, *parts]

    deaths = data.draw(st.integers(0, 2))
    attempts = []
    for number in range(deaths):
        parts = attempt(number)
        attempts.append([*parts[: data.draw(st.integers(0, len(parts)))], DeadError])
    attempts.append(attempt(deaths))
    path = "/v1/chat/completions" if chat else "/v1/completions"
    status, body, moved, asked = run(attempts, path)
    found, ends, ids, usage = choices(body)
    assert (status, moved) == (200, deaths)
    assert found == dict(enumerate(texts))
    assert ends == dict.fromkeys(range(len(texts)), "stop")
    assert len(ids) == usage == 1
    assert len({asked_body for _, asked_body, _ in asked}) == 1  # with one seed


@pytest.mark.parametrize("cut", range(4))
def test_an_answer_that_is_no_stream_is_told_whole_or_anew(cut):
    parts = [PLAIN, b'{"a"', b": 1}"]
    status, body, moved, _ = run([[*parts[:cut], DeadError], [PLAIN, b'{"a": 2}']])
    assert (status, body, moved) == (200, b'{"a": 2}', 1)


def said_last(body):
    return json.loads(body.decode().split("\n\n")[-2][6:])["error"]["message"]


@pytest.mark.parametrize(
    ("said", "path"),
    [
        ({"type": "response.created"}, "/v1/responses"),
        ({"type": "response.created"}, "/v1/completions"),
        (event(0, "a"), "/somewhere/else"),
    ],
)
def test_a_stream_that_cannot_be_gone_on_with_says_so(said, path):
    parts = [SSE, *sse([said])]
    status, body, _, asked = run([[*parts[:2], DeadError], parts], path)
    assert (status, len(asked)) == (200, 1)
    assert said_last(body) == "a replica died, and the rest of this stream cannot be reconstructed"


def test_a_refusal_of_the_second_replica_ends_the_stream():
    parts = [SSE, *sse([event(0, "a")])]
    _, body, _, asked = run([[*parts[:2], DeadError], [ResponseHead(400, []), b"{}"]])
    assert len(asked) == 2
    assert said_last(body) == "a replica died, and another one refused the request with status 400"


def test_a_replica_without_a_place_is_asked_again():
    parts = [SSE, *sse([event(0, "a"), event(0, "b", "stop")])]
    full = [ResponseHead(429, []), b"{}"]
    _, body, moved, _ = run([[*parts[:2], DeadError], full, full, parts])
    assert choices(body)[0] == {0: "ab"}
    assert moved == 3
    _, body, moved, _ = run([[*parts[:2], DeadError], full])
    assert said_last(body) == "a replica died, and the others are full; try again"
    assert moved == 7


def test_nobody_left():
    status, body, moved, asked = run([[DeadError]])
    assert (status, moved, len(asked)) == (503, 7, 8)
    assert b"no replica" in body


def test_a_front_that_stops_tells_those_under_way():
    parts = [SSE, *sse([event(0, "a")])[:1], None]
    _, body, _, _ = run([parts], during=lambda front, _: front.stop())
    assert said_last(body) == "the server stopped before the answer was complete"


def test_an_answer_that_was_not_told_yet_is_refused_at_the_end():
    taken = []

    class Slow(Fleet):
        async def handle(self, scope, body, key):
            taken.append(asyncio.get_running_loop().call_soon(front.stop))
            async for part in super().handle(scope, body, key):
                yield part

    front, heard = ReplicaProxy(Slow([[PLAIN, b"half", None]])), []

    async def receive():
        if heard or taken:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": b"{}"}

    async def send(message):
        heard.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(front(scope, receive, send))
    assert [message.get("status") for message in heard] == [503, None]
    assert b"the server stopped" in heard[1]["body"]


def test_a_front_that_drains_takes_no_more():
    heard, fleet = [], Fleet([[PLAIN]])
    front = ReplicaProxy(fleet)
    front.drain()

    async def send(message):
        heard.append(message)

    asyncio.run(front({"type": "http", "method": "POST", "path": "/", "headers": []}, None, send))
    assert (heard[0]["status"], fleet.asked) == (503, [])
    assert b"shutting down" in heard[1]["body"]


def test_a_request_keeps_its_id_and_its_route_is_known():
    state, headers = {"request": "r1"}, [(b"x-request-id", b"forged"), (b"a", b"b")]
    scope, heard = {"state": state, "headers": headers}, []
    head = ResponseHead(200, [(b"x-request-id", b"r1"), (b"c", b"d")], "/v1/models")
    _, _, _, asked = run([[head]], during=lambda _, message: heard.append(message), **scope)
    assert asked[0][0]["headers"] == [(b"a", b"b"), (b"x-request-id", b"r1")]
    assert heard[0]["headers"] == [(b"c", b"d")]  # who guards the front adds it


def test_a_request_without_a_seed_gets_one():
    body, key = seeded("/v1/completions", b'{"prompt": "Once"}')
    assert key == "Once"
    assert json.loads(body)["seed"] >= 0
    assert json.loads(seeded("/v1/responses", b'{"input": "Once"}')[0])["seed"] >= 0
    umlaut = '{"prompt":"\u00fc"}'.encode()
    assert len(seeded("/v1/completions", umlaut)[0]) <= len(umlaut) + len(',"seed":4294967295')
    for same in (b'{"prompt": "Once", "seed": 3}', b"[]", b"\xff", b"null"):
        assert seeded("/v1/completions", same)[0] == same
    assert seeded("/tokenize", b'{"prompt": "Once"}')[0] == b'{"prompt": "Once"}'


class App:
    """An application that answers slowly, and notes who left."""

    def __init__(self):
        self.left = self.cancelled = False

    async def __call__(self, scope, receive, send):
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            for byte in body:
                await send({"type": "http.response.body", "body": b"%c" % byte, "more_body": True})
            if body == b"wait":
                await receive()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if body == b"fail":
            raise ZeroDivisionError
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @property
    def router(self):
        return self

    def lifespan_context(self, app):
        return self

    async def __aenter__(self):
        self.started = True


def test_a_replica_calls_its_application():
    async def go(body, most=99):
        app = App()
        parts, stream = [], Replica(lambda rates: app).handle({"path": "/"}, body, key="")
        async for part in stream:
            parts.append(part)
            if len(parts) == most:
                break
        await stream.aclose()
        return app, parts

    app, parts = asyncio.run(go(b"abc"))
    assert parts == [(200, [], "other"), b"a", b"b", b"c"]
    assert app.started
    app, parts = asyncio.run(go(b"wait", most=5))
    assert app.cancelled
    _, parts = asyncio.run(go(b"abcdef", most=2))  # with more on its way
    assert parts == [(200, [], "other"), b"a"]
    _, parts = asyncio.run(go(b"fail"))
    assert parts[1:] == [b"f", b"a", b"i", b"l"]
