"""Replicas that die at any moment, and clients that notice nothing."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.serving.cluster.front import Front, seeded
from paceline.serving.cluster.replica import Replica

SSE = (200, [(b"content-type", b"text/event-stream; charset=utf-8")])
PLAIN = (200, [(b"content-type", b"application/json")])


class DeadError(Exception):
    pass


def event(index, text, finish=None, chat=False, **more):
    choice = {"index": index, "finish_reason": finish, "logprobs": None}
    choice |= {"delta": {"content": text} if text else {}} if chat else {"text": text}
    return {"id": "x", "created": 1, "choices": [choice | more]}


def sse(pieces):
    return [f"data: {json.dumps(piece)}\n\n".encode() for piece in pieces] + [b"data: [DONE]\n\n"]


def run(attempts, path="/v1/completions", body=None, **options):
    """What a client hears when the attempts give these parts; a number is a death there."""
    heard, asked = [], []

    async def ask(scope, body, key):
        asked.append((scope, body, key))
        for part in attempts[min(len(asked), len(attempts)) - 1]:
            if part is DeadError:
                raise DeadError
            yield part

    messages = [{"type": "http.request", "body": json.dumps(body or {"prompt": "a"}).encode()}]

    async def receive():
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    async def send(message):
        heard.append(message)

    async def go():
        front = Front(ask, (DeadError,), **options)
        await front({"type": "http", "method": "POST", "path": path, "headers": []}, receive, send)
        return front.moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paceline.serving.cluster.front._PAUSE", 0)
        moved = asyncio.run(go())
    body = b"".join(message.get("body", b"") for message in heard[1:])
    assert [message["type"] for message in heard].count("http.response.start") == 1
    assert not heard[-1].get("more_body")
    return heard[0]["status"], body, moved, asked


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


@pytest.mark.parametrize(
    ("said", "path"),
    [
        (event(0, "a", logprobs={"tokens": ["a"]}), "/v1/completions"),
        (event(0, "a") | {"paceline": {}}, "/v1/completions"),
        ({"type": "response.created"}, "/v1/responses"),
        ({"type": "response.created"}, "/v1/completions"),
    ],
)
def test_a_stream_that_cannot_be_gone_on_with_says_so(said, path):
    parts = [SSE, *sse([said])]
    status, body, _, asked = run([[*parts[:2], DeadError], parts], path)
    assert (status, len(asked)) == (200, 1)
    assert json.loads(body.decode().split("\n\n")[-2][6:])["error"]["type"] == "server_error"


def test_a_refusal_of_the_second_replica_ends_the_stream():
    parts = [SSE, *sse([event(0, "a")])]
    _, body, _, asked = run([[*parts[:2], DeadError], [(429, []), b"{}"]])
    assert len(asked) == 2
    assert b"a replica died" in body


def test_nobody_left():
    status, body, moved, asked = run([[DeadError]])
    assert (status, moved, len(asked)) == (503, 8, 8)
    assert b"no replica" in body


def test_large_bodies_are_refused():
    status, _, _, asked = run([[PLAIN]], body={"prompt": "a" * 100}, largest=50)
    assert (status, asked) == (413, [])


def test_a_request_without_a_seed_gets_one():
    body, key = seeded("/v1/completions", b'{"prompt": "Once"}')
    assert key == "Once"
    assert json.loads(body)["seed"] >= 0
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
        parts, stream = [], Replica(lambda: app).ask({"path": "/"}, body, key="")
        async for part in stream:
            parts.append(part)
            if len(parts) == most:
                break
        await stream.aclose()
        return app, parts

    app, parts = asyncio.run(go(b"abc"))
    assert parts == [(200, []), b"a", b"b", b"c"]
    assert app.started
    app, parts = asyncio.run(go(b"wait", most=5))
    assert app.cancelled
    _, parts = asyncio.run(go(b"fail"))
    assert parts[1:] == [b"f", b"a", b"i", b"l"]
