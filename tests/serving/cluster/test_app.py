"""Two replicas in this process behind one address; as for Ray, without it."""

import asyncio
import contextlib
import json
import signal
import socket
import threading
from contextlib import aclosing
from pathlib import Path

import httpx2 as httpx
import pytest

import paceline
from paceline import LM
from paceline.serving import playground
from paceline.serving.api import create_app
from paceline.serving.api.middleware import Rules
from paceline.serving.api.server import DrainingServer
from paceline.serving.api_keys import ApiKeys
from paceline.serving.cluster import app as module
from paceline.serving.cluster.app import create_front
from paceline.serving.cluster.proxy import ReplicaProxy
from paceline.serving.cluster.replica import Replica
from paceline.serving.rate_limits import RateLimits
from paceline.serving.service import Service
from paceline.serving.settings import ServerSettings
from paceline.serving.worker import Worker
from tests.serving.api.conftest import TEMPLATE
from tests.serving.api.test_leaving import until

KEYS = ApiKeys(["ann:key-of-ann-1", "bob:key-of-bob-1"])
ANN, BOB = ({"Authorization": f"Bearer key-of-{name}-1"} for name in ("ann", "bob"))
BODY = {"prompt": "Once upon a time", "max_tokens": 4, "ignore_eos": True, "seed": 1}
LONG = BODY | {"max_tokens": 60, "temperature": 0.9, "stream": True, "trace": True}
TALK = {"messages": [{"role": "user", "content": "Hello"}], "max_completion_tokens": 60}
REPLY = {"input": "Hello", "max_output_tokens": 60, "stream": True, "seed": 5, "temperature": 0.9}
COUNTED = 'paceline_requests_total{path="/v1/completions",status="200"}'
ENDED = 'paceline_answers_total{finish="length"}'
STREAMS = {
    "/v1/completions": LONG | {"logprobs": 2, "n": 2},
    "/v1/chat/completions": {name: LONG[name] for name in LONG if name not in BODY}
    | TALK
    | {"seed": 5, "logprobs": True, "top_logprobs": 1},
    "/v1/responses": REPLY,
}


class DeadError(Exception):
    pass


class Fleet:
    """Replicas that take turns, and die when `deaths` says so: after how many parts."""

    lost = (DeadError,)

    def __init__(self, replicas):
        self.size, self.replicas = len(replicas), replicas
        self.living, self.deaths, self.taken = list(replicas), [], []
        self.held = False  # streams wait after their first part
        self.troubles = []

    async def handle(self, scope, body, key):
        replica = self.living[len(self.taken) % len(self.living)]
        self.taken.append(replica)
        left = self.deaths.pop(0) if self.deaths else None
        async with aclosing(replica.handle(scope, body, key)) as parts:
            async for part in parts:
                if left == 0:
                    raise DeadError
                left = None if left is None else left - 1
                yield part
                while self.held:
                    await asyncio.sleep(0.001)

    async def each(self, method, *args):
        if self.troubles:
            raise self.troubles.pop()
        return await asyncio.gather(*(getattr(each, method)(*args) for each in self.living))

    async def running(self):
        return len(self.living)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded model, with a chat template."""
    found = tmp_path_factory.mktemp("tiny")
    for file in (Path(paceline.__file__).parent / "embedded").iterdir():
        (found / file.name).symlink_to(file)
    (found / "chat_template.jinja").write_text(TEMPLATE)
    return found


@pytest.fixture
def fleet(folder):
    """One that guesses much, and one that does not guess: their passes differ."""
    services = [
        Service(Worker(LM(folder, drafter=drafter, budget=budget, threads=1)))
        for drafter, budget in (("recycle", 6), ("plain", 0))
    ]

    def made(service):
        return lambda rates: create_app(
            service, "tiny", rules=Rules(KEYS, rates), routers=[playground.router]
        )

    yield Fleet([Replica(made(each), name) for each, name in zip(services, "xy", strict=True)])
    for service in services:
        if service._thread.is_alive():
            service.stop()


@contextlib.contextmanager
def running(fleet, cors=(), keys=KEYS, **rates):
    """The address of the front, and its server."""
    front = ReplicaProxy(fleet)
    app = create_front(front, fleet, Rules(keys, RateLimits(**rates)), cors)
    server = DrainingServer(app, front, ServerSettings(drain=60.0))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join()


def post(address, body=BODY, path="/v1/completions", headers=ANN):
    return httpx.post(f"{address}{path}", json=body, headers=headers, timeout=60)


def heard(text):
    """What a stream says, piece by piece put together: texts, tokens, likelihoods, passes."""
    texts, tokens, numbers, drawn = {}, {}, {}, {}
    for event in text.strip().split("\n\n"):
        data = event.partition("data: ")[2]
        piece = {} if data == "[DONE]" else json.loads(data)
        assert "error" not in piece or piece["type"]  # of a response, None
        if "delta" in piece:
            texts[0] = texts.get(0, "") + piece["delta"]
        for choice in piece.get("choices", ()):
            at, change = choice["index"], choice.get("delta", choice)
            texts[at] = texts.get(at, "") + (change.get("content", change.get("text")) or "")
            said = choice["logprobs"] or {}
            rows = said.get("content") or [
                {"token": token, "logprob": number}
                for token, number in zip(
                    said.get("tokens", ()), said.get("token_logprobs", ()), strict=True
                )
            ]
            tokens.setdefault(at, []).extend(row["token"] for row in rows)
            numbers.setdefault(at, []).extend(row["logprob"] for row in rows)
            drawn.setdefault(at, []).extend(piece.get("paceline", {}).get("tokens", ()))
    return texts, tokens, numbers, drawn


@pytest.mark.parametrize("path", STREAMS)
def test_streams_with_all_that_can_be_told_outlive_replicas(fleet, path, monkeypatch):
    monkeypatch.setattr("paceline.serving.cluster.proxy._PAUSE", 0)
    with running(fleet) as (address, _):
        whole = heard(post(address, STREAMS[path], path).text)
        assert all(len(text) > 50 for text in whole[0].values())
        for deaths in ([0], [1], [4], [9, 6], [8, 3, 9]):
            fleet.deaths, taken = list(deaths), len(fleet.taken)
            found = heard(post(address, STREAMS[path], path).text)
            assert found == whole
            assert len(fleet.taken) - taken == len(deaths) + 1
    if path != "/v1/responses":
        assert all(
            len(tokens) == len(drawn) == 60
            for tokens, drawn in zip(whole[1].values(), whole[3].values(), strict=True)
        )


def test_a_key_has_its_rate_once(fleet):
    with running(fleet, cors=["https://a.org"], requests=3) as (address, _):
        found = [post(address, headers=ANN | {"Origin": "https://a.org"}) for _ in range(4)]
        assert [each.status_code for each in found] == [200, 200, 200, 429]
        assert 1 <= int(found[3].headers["Retry-After"]) <= 20
        for each in found:
            assert len(each.headers.get_list("x-request-id")) == 1
            assert each.headers.get_list("access-control-allow-origin") == ["https://a.org"]
        assert set(fleet.taken[:2]) == set(fleet.replicas)
        assert post(address, headers=BOB).status_code == 200
        assert len(fleet.taken) == 4
        for headers in ({}, {"Authorization": "Bearer key-of-ann-2"}):
            assert post(address, headers=headers).status_code == 401
            assert httpx.get(f"{address}/metrics", headers=headers).status_code == 401
        assert len(fleet.taken) == 4


def test_tokens_are_paid_wherever_they_were_drawn(fleet, monkeypatch):
    monkeypatch.setattr(module, "_USAGE_SECONDS", 0.01)
    charged = []
    charge = RateLimits.charge

    def noted(self, client, tokens, now):
        charged.append((client, tokens))
        charge(self, client, tokens, now)

    monkeypatch.setattr(RateLimits, "charge", noted)
    fleet.troubles.append(OSError("of the network"))
    with running(fleet, tokens=50) as (address, _):
        assert post(address).status_code == 200
        until(lambda: [tokens for client, tokens in charged if client == "ann" and tokens])
        assert post(address, BODY | {"max_tokens": 100}).status_code == 200
        until(lambda: sum(tokens for client, tokens in charged if client == "ann") > 100)
        assert len(set(fleet.taken)) == 2
        assert post(address).status_code == 429
        with httpx.stream(  # who leaves pays what was drawn so far
            "POST", f"{address}/v1/completions", json=LONG | {"max_tokens": 400}, headers=BOB
        ) as stream:
            next(stream.iter_lines())
        until(lambda: [tokens for client, tokens in charged if client == "bob" and tokens])


def figures(address):
    text = httpx.get(f"{address}/metrics", headers=ANN).text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#"]
    assert len(dict(lines)) == len(lines)
    return {name: float(value) for name, value in lines}


def test_metrics_are_of_the_whole(fleet, monkeypatch):
    monkeypatch.setattr("paceline.serving.cluster.proxy._PAUSE", 0)
    with running(fleet) as (address, _):
        for _ in range(4):
            post(address)
        fleet.deaths = [0]
        post(address)
        until(lambda: figures(address)[COUNTED] == 5)
        for name in "xy":
            until(lambda name=name: figures(address)[f'paceline_running{{replica="{name}"}}'] == 0)
        found = figures(address)
        assert set(fleet.taken) == set(fleet.replicas)
        assert found["paceline_replicas"] == found["paceline_replicas_wanted"] == 2
        assert found["paceline_moved_requests_total"] == 1
        assert found["paceline_generated_tokens_total"] >= 5 * 4
        assert found["paceline_time_to_first_token_seconds_count"] >= 5
        assert found[ENDED] == 6  # one of them when nobody listened any more
        assert "paceline_running" not in found
        fleet.living.pop()
        rest = figures(address)
        assert rest["paceline_replicas"] == 1
        assert rest[ENDED] == 6
        assert 'paceline_running{replica="x"}' in rest
        assert 'paceline_running{replica="y"}' not in rest
        fleet.living.clear()
        none = figures(address)
        assert (none[ENDED], none[COUNTED]) == (6, 5)
        assert not [name for name in none if "replica=" in name]


def test_a_front_is_ready_while_somebody_is_there(fleet):
    with running(fleet) as (address, server):

        def ready():
            found = httpx.get(f"{address}/ready")
            return found.status_code, found.json()

        assert ready() == (200, {"ready": True, "replicas": 2, "wanted": 2})
        gone = fleet.living.pop()
        assert ready() == (200, {"ready": True, "replicas": 1, "wanted": 2})
        last = fleet.living.pop()
        assert ready() == (503, {"ready": False, "replicas": 0, "wanted": 2})
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        assert httpx.post(f"{address}/ready", headers=ANN).status_code == 405
        fleet.living += [gone, last]
        fleet.held = True
        with httpx.stream("POST", f"{address}/v1/completions", json=LONG, headers=ANN) as stream:
            server.handle_exit(signal.SIGTERM, None)
            assert ready() == (503, {"ready": False, "replicas": 2, "wanted": 2})
            late = post(address)
            assert (late.status_code, late.headers["Retry-After"]) == (503, "5")
            fleet.held = False
            assert list(stream.iter_lines())[-2] == "data: [DONE]"


def test_large_bodies_are_refused_in_front(fleet):
    with running(fleet) as (address, _):
        assert post(address, {"prompt": "a" * 10**6}).status_code == 413
        assert post(address, {"prompt": "a", "no": 1}).status_code == 400
    assert len(fleet.taken) == 1
