"""Keys, limits, slow and half-open connections, ids, logs, metrics and the end."""

import contextlib
import json
import logging
import re
import signal
import socket
import threading

import httpx2 as httpx
import openai
import pytest

from paceline.core import Request
from paceline.serving import playground
from paceline.serving.api import create_app
from paceline.serving.api.middleware import Rules
from paceline.serving.api.parse import RequestLimits
from paceline.serving.api.server import DrainingServer
from paceline.serving.api_keys import ApiKeys
from paceline.serving.logs import JsonFormatter
from paceline.serving.messages import Job, JobEvent
from paceline.serving.rate_limits import Departures, RateLimits
from paceline.serving.service import Service
from paceline.serving.settings import ServerSettings
from paceline.serving.worker import Worker
from tests.serving.api.test_leaving import raw, until
from tests.serving.halting import halt

OPENING = "Once upon a time"
BODY = {"prompt": OPENING, "max_tokens": 4, "temperature": 0.0}


@contextlib.contextmanager
def running(service, rules=None, cors=(), limits=None, **settings):
    """Our server in a thread; yields its address and itself."""
    before = list(service.observers)
    app = create_app(service, "tiny", limits, rules, cors, [playground.router])
    server = DrainingServer(app, service, ServerSettings(**settings))
    server.config.lifespan = "off"
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what is not read shows
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            until(lambda: server.started)
            yield listener.getsockname()[1], server
        finally:
            server.should_exit = True
            thread.join()
            service.observers[:] = before


def post(port, body=BODY, path="/v1/completions", **options):
    return httpx.post(f"http://127.0.0.1:{port}{path}", json=body, **options)


def spoken(port, content, seconds=20):
    """What the server says to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
        client.sendall(content)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(65536):
                found += part
        return found


def test_who_has_a_key_is_served_under_its_name(service, caplog):
    caplog.set_level(logging.INFO, "paceline.serving")
    keys = ApiKeys(["ann:key-of-ann-1", "bob:key-of-bob-1"])
    with running(service, Rules(keys=keys)) as (port, _):
        url = f"http://127.0.0.1:{port}/v1"
        for wrong in ("key-of-ann-2", "key-of-ann-", "ann", "ann:key-of-ann-1"):
            with (
                openai.OpenAI(base_url=url, api_key=wrong, max_retries=0) as client,
                pytest.raises(openai.AuthenticationError, match="the API key is unknown"),
            ):
                client.models.list()
        found = post(port)
        assert found.status_code == 401
        error = found.json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert post(port, headers={"Authorization": "Basic key-of-ann-1"}).status_code == 401
        assert httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 401
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        asked = []
        submit = service.worker.submit
        service.worker.submit = lambda ask: (asked.append(ask), submit(ask))
        try:
            with openai.OpenAI(base_url=url, api_key="key-of-bob-1", max_retries=0) as client:
                client.completions.create(model="tiny", **BODY, user="someone")
        finally:
            service.worker.submit = submit
    assert [ask.client for ask in asked] == ["bob"]
    assert "bob" in [getattr(record, "fields", {}).get("client") for record in caplog.records]
    assert "key-of" not in "".join(JsonFormatter().format(record) for record in caplog.records)


def test_rates_are_limited_for_each_key(service):
    keys = ApiKeys(["ann:key-of-ann-1", "bob:key-of-bob-1"])
    ann, bob = ({"Authorization": f"Bearer key-of-{name}-1"} for name in ("ann", "bob"))
    with running(service, Rules(keys=keys, rates=RateLimits(requests=2))) as (port, _):
        found = [post(port, headers=ann) for _ in range(3)]
        assert [each.status_code for each in found] == [200, 200, 429]
        assert 1 <= int(found[2].headers["Retry-After"]) <= 30
        assert found[2].json()["error"]["code"] == "rate_limit_exceeded"
        assert post(port, headers=bob).status_code == 200
    with running(service, Rules(keys=keys, rates=RateLimits(tokens=3))) as (port, _):
        assert post(port, headers=ann).status_code == 200
        until(lambda: service.idle)
        assert post(port, headers=ann).status_code == 429
        assert post(port, headers=bob).status_code == 200


def test_who_is_sent_away_pays_nothing(service, monkeypatch):
    with running(service, Rules(rates=RateLimits(tokens=3))) as (port, _):
        with monkeypatch.context() as patch:
            patch.setattr(service.worker.scheduler, "queue", 0)
            assert [post(port).status_code for _ in range(3)] == [429] * 3
        assert post(port).status_code == 200


def test_tokens_are_limited(service):
    limits = RequestLimits(new_tokens=6, prompt_tokens=8, default_tokens=3, answers=2)
    with running(service, limits=limits) as (port, _):
        unnamed = {"prompt": OPENING, "temperature": 0.0}
        assert post(port, unnamed).json()["usage"]["completion_tokens"] == 3
        for change, said in (
            ({"max_tokens": 7}, "max_tokens is 7, expected 6 or less"),
            ({"prompt": OPENING * 5}, "expected 8 or fewer"),
            ({"guidance": {"negative": OPENING * 5}}, "guidance.negative has"),
            ({"n": 3}, "exceed the maximum of 2"),
        ):
            found = post(port, BODY | change)
            assert found.status_code == 400
            assert said in found.json()["error"]["message"]


def test_large_and_slow_bodies_are_refused(service):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with running(service, Rules(max_body=1000, body_seconds=0.2)) as (port, _):
        late = spoken(port, head + b"Content-Length: 50\r\n\r\n{")
        assert b" 408 " in late.splitlines()[0]
    with running(service, Rules(max_body=1000, body_seconds=600.0)) as (port, _):
        assert post(port).status_code == 200
        assert post(port, BODY | {"prompt": "x" * 1000}).status_code == 413
        chunk = b"3e8\r\n" + b" " * 1000 + b"\r\n"
        streamed = spoken(port, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3)
        assert b" 413 " in streamed.splitlines()[0]
        assert b"more than 1000 bytes" in streamed
        assert post(port).status_code == 200


@pytest.mark.parametrize("said", [b"", b"GET /health HTTP/1.1\r\nHo"])
def test_half_open_connections_are_closed(service, said):
    with running(service, head_seconds=0.1) as (port, server):
        assert spoken(port, said) == b""
        until(lambda: not server.server_state.connections)


def test_the_time_for_a_head_does_not_run_between_requests(service):
    with (
        running(service, head_seconds=600.0) as (port, server),
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        assert client.get("/health").status_code == 200
        [connection] = server.server_state.connections
        until(lambda: connection.timeout_keep_alive_task)  # it is idle
        assert connection._head_timer is None
        assert client.get("/health").status_code == 200


def test_what_is_not_read_is_cut_off_and_holds_nobody_up(service, caplog):
    caplog.set_level(logging.INFO, "paceline.serving")
    before = service.worker.stats.tokens
    long = {"prompt": OPENING, "max_tokens": 400, "ignore_eos": True, "n": 8, "stream": True}
    with running(service, Rules(write_seconds=0.5)) as (port, server), socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", port))
        slow.sendall(raw("/v1/completions", long))
        until(lambda: service.worker.stats.tokens > before)
        assert post(port).status_code == 200
        until(lambda: not server.server_state.connections and service.idle)
    reported = [getattr(record, "fields", {}) for record in caplog.records]
    assert [each["cut"] for each in reported if "cut" in each] == [
        "the client read nothing for 0.5 s"
    ]


def test_requests_have_ids(service):
    with running(service) as (port, _):
        found = post(port, headers={"X-Request-Id": "mine-1"})
        assert found.headers["X-Request-Id"] == "mine-1"
        for bad in ("a b", "x" * 200, "é", "<script>"):
            other = post(port, headers={"X-Request-Id": bad.encode()}).headers["X-Request-Id"]
            assert re.fullmatch("[0-9a-f]{24}", other)
        forged = raw("/health", {}).replace(b"Host", b"X-Request-Id: a\rSet-Cookie: b\r\nHost", 1)
        answer = spoken(port, forged)
        assert b" 400 " in answer.splitlines()[0]
        assert b"Set-Cookie" not in answer


def test_pages_of_other_origins_are_let_in_only_when_told(service):
    ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    with running(service) as (port, _):
        found = httpx.options(f"http://127.0.0.1:{port}/v1/completions", headers=ask)
        assert "access-control-allow-origin" not in found.headers
    rules = Rules(keys=ApiKeys(["ann:key-of-ann-1"]))
    with running(service, rules, cors=("https://a.example",)) as (port, _):
        found = httpx.options(f"http://127.0.0.1:{port}/v1/completions", headers=ask)
        assert found.headers["access-control-allow-origin"] == "https://a.example"
        other = ask | {"Origin": "https://b.example"}
        found = httpx.options(f"http://127.0.0.1:{port}/v1/completions", headers=other)
        assert "access-control-allow-origin" not in found.headers
        found = post(port, headers={"Origin": "https://a.example"})
        assert (found.status_code, found.headers["access-control-allow-origin"]) == (
            401,
            "https://a.example",
        )


def test_a_full_queue_sends_away_for_as_long_as_it_takes(service, monkeypatch):
    monkeypatch.setattr(service.worker.scheduler, "queue", 0)
    with running(service) as (port, server):
        found = post(port)
        assert (found.status_code, found.headers["Retry-After"]) == (429, "1")
        now = 0.0
        paced = Departures(lambda: now)
        ask = Job("a", Request((1,), 1))
        paced.on_submit(ask)
        now = 6.5
        paced.on_event(ask, JobEvent("a", finish="stop"))
        server.config.app.state.context.departures = paced
        found = post(port)
        assert (found.status_code, found.headers["Retry-After"]) == (429, "7")


def test_too_many_connections_are_sent_away(service):
    with running(service, max_connections=2, head_seconds=600.0) as (port, server):
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        until(lambda: len(server.server_state.connections) == 2)
        answer = spoken(port, b"")
        assert b" 503 " in answer.splitlines()[0]
        assert b"Retry-After: 1" in answer
        assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["type"] == "server_error"
        for each in idle:
            each.close()
        until(lambda: not server.server_state.connections)
        assert post(port).status_code == 200


def test_a_bug_is_told_with_its_id_and_is_no_end(service, monkeypatch, caplog):
    with running(service) as (port, _):
        with monkeypatch.context() as patch:
            patch.setattr(service, "stream", None)
            found = post(port, headers={"X-Request-Id": "mine-2"})
        assert (found.status_code, found.headers["X-Request-Id"]) == (500, "mine-2")
        assert "its log says more" in found.json()["error"]["message"]
        assert [r.fields["request"] for r in caplog.records if r.exc_info] == ["mine-2"]
        assert post(port).status_code == 200


@pytest.mark.parametrize("wanted", [False, True])
def test_prompts_are_logged_only_when_wanted(service, caplog, wanted):
    caplog.set_level(logging.INFO, "paceline.serving")
    with running(service, Rules(log_prompts=wanted)) as (port, _):
        text = post(port).json()["choices"][0]["text"]
        post(port, BODY | {"magic": OPENING})
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    answer = next(line["answers"][0] for line in lines if line.get("answers"))
    assert (answer["tokens"], answer["finish"]) == (4, "length")
    assert (OPENING in json.dumps(lines)) == wanted
    assert (answer.get("text") == text) == wanted


def test_metrics_tell_what_was_done(service, lm):
    with running(service) as (port, _):
        before = service.worker.stats.tokens
        guessed = {"speculation": {"drafter": "recycle", "budget": 4}}
        post(port, BODY | {"max_tokens": 30} | guessed)
        post(port, BODY | {"prompt": []})
        httpx.get(f"http://127.0.0.1:{port}/secret/path")
        until(lambda: not service.load.running)  # it is measured before the next wait
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(values["paceline_generated_tokens_total"]) == before + 30
    assert float(values["paceline_time_to_first_token_seconds_count"]) == 1
    assert float(values["paceline_time_per_output_token_seconds_count"]) == 1
    assert float(values["paceline_tokens_per_pass_sum"]) == 30
    assert float(values["paceline_prompt_tokens_total"]) == len(lm.tokenizer.encode(OPENING))
    assert values['paceline_answers_total{finish="length"}'] == "1.0"
    assert values['paceline_requests_total{path="/v1/completions",status="200"}'] == "1.0"
    assert values['paceline_requests_total{path="/v1/completions",status="400"}'] == "1.0"
    assert values['paceline_requests_total{path="other",status="404"}'] == "1.0"
    recycle = '{drafter="recycle"}'
    assert (
        0
        < float(values[f"paceline_accepted_tokens_total{recycle}"])
        <= float(values[f"paceline_guessed_tokens_total{recycle}"])
    )
    assert values["paceline_running"] == values["paceline_queue_length"] == "0.0"
    assert 0 < float(values["paceline_kv_pages_used"]) <= float(values["paceline_kv_pages_limit"])
    assert any(name.startswith('paceline_governor_reason{state="') for name in values)
    assert "paceline_governor_tree_nodes_count" in values


def test_the_end_waits_for_those_under_way_and_takes_no_more(lm, monkeypatch):
    service, go_on = Service(Worker(lm)), threading.Event()
    step = service.worker.step

    def waiting():  # after the first token until all is asked
        return step() if not service.worker.stats.tokens or go_on.wait(0.001) else []

    monkeypatch.setattr(service.worker, "step", waiting)
    service.start()
    long = {"prompt": OPENING, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with running(service, drain=60.0) as (port, server):
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=long) as found:
            lines = found.iter_lines()
            next(lines)
            server.handle_exit(signal.SIGTERM, None)
            late = post(port)
            assert (late.status_code, late.headers["Retry-After"]) == (503, "5")
            assert late.headers["connection"] == "close"
            assert httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 503
            go_on.set()
            assert list(lines)[-2] == "data: [DONE]"
        until(lambda: not service._thread.is_alive())
    with pytest.raises(httpx.ConnectError):
        post(port)


def test_unfinished_requests_are_cancelled_at_the_end(lm, monkeypatch):
    service = Service(Worker(lm))
    halt(monkeypatch, service.worker)
    service.start()
    long = {"prompt": OPENING, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with (
        running(service, drain=0.0) as (port, server),
        httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=long) as found,
    ):
        lines = found.iter_lines()
        first = next(lines)
        server.handle_exit(signal.SIGTERM, None)
        pieces = [json.loads(line[6:]) for line in [first, *lines] if line.startswith("data: {")]
    assert pieces[-1]["choices"][0]["finish_reason"] == "cancelled"
